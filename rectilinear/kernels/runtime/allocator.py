"""The allocator of large arrays: memory that is given up is kept, up to a limit, and serves the next array of about that size.

NumPy calls it through its hook for allocators (NEP 49), so arrays made by it own their memory and behave as any other. All of
it is compiled: NumPy may call it in any thread, with the GIL or without, from a child forked at any moment, and while the
interpreter exits. It serves any size, zeroed or not, so that it would do as the allocator of a whole program.

Nothing here waits. Idle blocks lie in slots; whoever takes one exchanges the slot's word for 0, and then is its only owner.
The other words of a slot (its block's size and age) only guide the search: they may be stale, and a block is asked about its
size again once it is owned. A fork can therefore lose a block that another thread had in hand, and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextvars import Context
from typing import Any

import numpy as np
from numba import types
from numba.core.registry import cpu_target
from numpy import _core  # the hook has no name in Python

from rectilinear.buffers import LARGE_BYTES
from rectilinear.kernels.runtime.cache import Job, jit, jit_inner, warms
from rectilinear.kernels.runtime.native import c_address, compare_exchange, exchange, external, fetch_add, load, store
from rectilinear.kernels.runtime.records import WORD_BYTES, Atomic, address_of, at, bytes_of, offsets_of, padded_record, record
from rectilinear.kernels.runtime.symbols import missing

ALIGNMENT = 64


@padded_record(ALIGNMENT)
class Header:
    """What lies before the bytes that are handed out, which are at a multiple of ALIGNMENT."""

    base: int = 0
    total: int = 0
    usable: int = 0
    mapped: int = 0


HEADER = bytes_of(Header)


@record
class Slot:
    """A place for an idle block: its address or 0, the bytes it can serve, and when it was put there."""

    block: Atomic = Atomic()
    bytes: Atomic = Atomic()
    stamp: Atomic = Atomic()


SLOTS = 128
"""A step of a net of 40 layers gives up about as many results. With more the oldest go."""

_SLOT_BYTES = bytes_of(Slot)


@padded_record(SLOTS * _SLOT_BYTES)
class Slots:
    first: Slot = Slot()


@record
class State:
    """The allocator's memory: the most that is kept, what is kept now, both in bytes, and the time, counted in blocks put away."""

    limit: Atomic = Atomic()
    held: Atomic = Atomic()
    clock: Atomic = Atomic()
    slots: Slots = Slots()


_HUGE = 2 << 20
"""Mappings from this size on begin at a multiple of it and ask for huge pages: 4 MiB are filled in 0.5 ms instead of 1.9 (Zen 4)."""

_LARGEST = 1 << 62

_malloc = external("malloc", 1, types.intp)
_free = external("free", 1, types.void)
_memcpy = external("memcpy", 3, types.intp)
_memset = external("memset", 3, types.intp)
_mmap = external("mmap", 6, types.intp)
_munmap = external("munmap", 2)
_madvise = external("madvise", 3)

_ALLOCATES = ctypes.sizeof(ctypes.c_void_p) == 8 and not missing(["malloc", "free", "memcpy", "memset"])

_MAPS = not missing(["mmap", "munmap", "madvise"]) and hasattr(mmap, "MAP_ANONYMOUS")
"""Whether large blocks are mappings of their own: unlike what goes back to `free`, an unmapped block is the system's at once."""

_PAGE = mmap.PAGESIZE
_FAILED = -1
_PROTECTION = getattr(mmap, "PROT_READ", 0) | getattr(mmap, "PROT_WRITE", 0)
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", -1)  # Linux


@jit_inner
def _map(length: int) -> int:
    """The address of a new mapping, or 0."""
    if _MADV_HUGEPAGE < 0 or length < _HUGE:
        base = _mmap(0, length, _PROTECTION, _FLAGS, -1, 0)
        return 0 if base == _FAILED else base
    surplus = _HUGE - _PAGE
    start = _mmap(0, length + surplus, _PROTECTION, _FLAGS, -1, 0)
    if start == _FAILED:
        return 0
    base = (start + _HUGE - 1) & -_HUGE
    if base > start:
        _munmap(start, base - start)
    if base < start + surplus:
        _munmap(base + length, start + surplus - base)
    _madvise(base, length, _MADV_HUGEPAGE)
    return base


@jit_inner
def _allocate_new(size: int) -> int:
    """A block from the system, or 0."""
    if _MAPS and size >= LARGE_BYTES:
        total, mapped = (HEADER + size + _PAGE - 1) & -_PAGE, 1
        base = _map(total)
    else:
        total, mapped = HEADER + size + ALIGNMENT, 0
        base = _malloc(total)
    if base == 0:
        return 0
    block = (base + HEADER + ALIGNMENT - 1) & -ALIGNMENT
    header = at(Header, block - HEADER)
    header.base, header.total, header.usable, header.mapped = base, total, base + total - block, mapped
    return block


@jit_inner
def _give_back(block: int) -> None:
    header = at(Header, block - HEADER)
    if _MAPS and header.mapped != 0:
        _munmap(header.base, header.total)
    else:
        _free(header.base)


@jit_inner
def _fits(usable: int, size: int) -> bool:
    """Whether a block of so many bytes may serve `size` of them: at most half of it goes unused."""
    return size <= usable and usable - size <= size


@jit_inner
def _empty(state: State, slot: Slot) -> int:
    """The block of a slot, which is the caller's now, or 0."""
    block = exchange(slot.block, 0)
    if block != 0:
        fetch_add(state.held, -at(Header, block - HEADER).total)
    return block


@jit_inner
def _take(state: State, size: int) -> int:
    """The latest block kept that may serve `size` bytes, which the caches may still hold; or 0."""
    while True:
        found, newest = 0, -1
        for index in range(SLOTS):
            slot = at(Slot, address_of(state.slots) + index * _SLOT_BYTES)
            if load(slot.block) != 0 and _fits(load(slot.bytes), size) and load(slot.stamp) > newest:
                found, newest = address_of(slot), load(slot.stamp)
        if found == 0:
            return 0
        block = _empty(state, at(Slot, found))
        if block != 0:
            if _fits(at(Header, block - HEADER).usable, size):
                return block
            _give_back(block)  # the slot has changed hands meanwhile


@jit_inner
def _drop_oldest(state: State) -> bool:
    """Give the oldest block back to the system; False if there is none."""
    found, oldest = 0, 0
    for index in range(SLOTS):
        slot = at(Slot, address_of(state.slots) + index * _SLOT_BYTES)
        if load(slot.block) != 0 and (found == 0 or load(slot.stamp) < oldest):
            found, oldest = address_of(slot), load(slot.stamp)
    if found == 0:
        return False
    block = _empty(state, at(Slot, found))
    if block != 0:
        _give_back(block)
    return True


@jit_inner
def _reserve(state: State, total: int) -> bool:
    """Make room for `total` bytes below the limit, and count them."""
    while total <= load(state.limit):
        held = load(state.held)
        if held + total > load(state.limit):
            if not _drop_oldest(state):
                return False
        elif compare_exchange(state.held, held, held + total):
            return True
    return False


@jit_inner
def _place(state: State, block: int) -> bool:
    usable = at(Header, block - HEADER).usable  # before: from the exchange on the block is whoever's who takes it, who may unmap it
    for index in range(SLOTS):
        slot = at(Slot, address_of(state.slots) + index * _SLOT_BYTES)
        if load(slot.block) == 0 and compare_exchange(slot.block, 0, block):
            store(slot.bytes, usable)
            store(slot.stamp, fetch_add(state.clock, 1))
            return True
    return False


@jit_inner
def _keep(state: State, block: int) -> None:
    """Keep a block for later, or give it back where it is small or beyond the limit."""
    total = at(Header, block - HEADER).total
    if at(Header, block - HEADER).usable >= LARGE_BYTES and _reserve(state, total):
        if _place(state, block) or (_drop_oldest(state) and _place(state, block)):
            return
        fetch_add(state.held, -total)
    _give_back(block)


# What NumPy calls, with the address of the state; sizes are its own, and never negative.


@jit_inner
def _allocate(state: int, size: int) -> int:
    if size < 0 or size > _LARGEST:
        return 0
    block = _take(at(State, state), size) if size >= LARGE_BYTES else 0
    if block == 0:
        block = _allocate_new(size)
    if block == 0 and _release(state) > 0:  # the system has no more: what is idle here may be what is missing
        block = _allocate_new(size)
    return block


@jit_inner
def _allocate_zeroed(state: int, count: int, item: int) -> int:
    if count < 0 or item < 0 or (item > 0 and count > _LARGEST // item):
        return 0
    size = count * item
    block = _allocate_new(size)  # a new mapping is all zeros, and takes memory only where it is written to
    if block != 0 and at(Header, block - HEADER).mapped == 0:
        _memset(block, 0, size)
    return block


@jit_inner
def _reallocate(state: int, block: int, size: int) -> int:
    if block == 0:
        return _allocate(state, size)
    usable = at(Header, block - HEADER).usable
    if _fits(usable, size):
        return block
    moved = _allocate(state, size)
    if moved != 0:
        _memcpy(moved, block, min(usable, size))
        _keep(at(State, state), block)
    return moved


@jit_inner
def _deallocate(state: int, block: int, size: int) -> None:
    if block != 0:
        _keep(at(State, state), block)


# What Python calls.


@jit_inner
def _release(address: int) -> int:
    """Give all that is kept back to the system; how many bytes that were."""
    state, released = at(State, address), 0
    for index in range(SLOTS):
        slot = at(Slot, address_of(state.slots) + index * _SLOT_BYTES)
        block = _empty(state, slot)
        if block != 0:
            released += at(Header, block - HEADER).total
            _give_back(block)
    return released


@jit_inner
def _recount(address: int) -> None:
    """Count anew what is kept: in a forked child, where blocks that other threads had in hand are counted and lost."""
    state, held = at(State, address), 0
    for index in range(SLOTS):
        slot = at(Slot, address_of(state.slots) + index * _SLOT_BYTES)
        block = load(slot.block)
        if block != 0:
            held += at(Header, block - HEADER).total
    store(state.held, held)


@jit()
def _entry_points() -> tuple[int, int, int, int, int, int]:
    return (
        c_address(_allocate), c_address(_allocate_zeroed), c_address(_reallocate), c_address(_deallocate),
        c_address(_release), c_address(_recount),
    )  # fmt: skip


# NumPy's C API: functions by their places in its table, which are fixed, and the record of an allocator (version 1).
_FEATURE_VERSION, _SET_HANDLER, _GET_HANDLER = 211, 304, 305
_HOOK_SINCE = 0xF  # NumPy 1.22
_CAPSULE = b"mem_handler"


class _Handler(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("state", ctypes.c_void_p),
        ("malloc", ctypes.c_void_p),
        ("calloc", ctypes.c_void_p),
        ("realloc", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    )


class Allocator:
    """The allocator as NumPy's. One is made in a process, and it stays to the end: arrays are freed by it as the interpreter exits."""

    def __init__(self, limit: int) -> None:
        """RuntimeError unless NumPy takes an allocator from here. `limit` is the most that is kept, in bytes."""
        if not _ALLOCATES:
            raise RuntimeError("this system's C library is not found by its names, or has not 64 bits")
        allocate, allocate_zeroed, reallocate, deallocate, release, recount = _entry_points()
        memory = (ctypes.c_int64 * (bytes_of(State) // WORD_BYTES))()
        self._state = ctypes.addressof(memory)
        offsets = offsets_of(State)
        ctypes.c_int64.from_address(self._state + offsets["limit.value"]).value = limit
        self._held = ctypes.c_int64.from_address(self._state + offsets["held.value"])
        self._release = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_ssize_t)(release)
        recount_held = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t)(recount)
        handler = _Handler(b"rectilinear", 1, self._state, allocate, allocate_zeroed, reallocate, deallocate)
        for needed_to_the_end in (memory, handler, _entry_points, cpu_target.target_context.codegen()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(needed_to_the_end))
        # Where NumPy allocates by this allocator: its choice is a variable of contexts, so nobody else's is ever touched.
        self._context = Context()
        self._context.run(_install, handler)
        self._handler_name = _core.multiarray.get_handler_name
        if self._handler_name(self.empty((LARGE_BYTES,), np.uint8)) != "rectilinear":
            raise RuntimeError(f"NumPy {np.__version__} does not use the allocator it was given")
        self._release(self._state)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: recount_held(self._state))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As np.empty. The context is copied since only one thread at a time may be in it."""
        return self._context.copy().run(np.empty, shape, dtype)

    def may_replace(self, array: np.ndarray) -> bool:
        """Whether NumPy's own allocator made `array`; another one is the user's choice for this context."""
        return bool(self._handler_name(array) == "default_allocator")

    def held(self) -> int:
        return int(self._held.value)

    def release(self) -> int:
        return int(self._release(self._state))


def _install(handler: _Handler) -> None:
    """Make `handler` NumPy's allocator in the running context. RuntimeError unless NumPy's hook is the one known here."""
    get_pointer: Any = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    new_capsule: Any = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    api: Any = (ctypes.c_void_p * (_GET_HANDLER + 1)).from_address(get_pointer(_core.multiarray._ARRAY_API, None))
    if ctypes.PYFUNCTYPE(ctypes.c_uint)(api[_FEATURE_VERSION])() < _HOOK_SINCE:
        raise RuntimeError(f"NumPy {np.__version__} has no hook for allocators")
    usual = _Handler.from_address(get_pointer(ctypes.PYFUNCTYPE(ctypes.py_object)(api[_GET_HANDLER])(), _CAPSULE))
    if (usual.name, usual.version) != (b"default_allocator", handler.version):
        raise RuntimeError(f"NumPy {np.__version__} describes allocators in another way: {usual.name!r}, version {usual.version}")
    capsule = new_capsule(ctypes.addressof(handler), _CAPSULE, None)
    ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(api[_SET_HANDLER])(capsule)


@warms
def _jobs(dtype: str) -> Iterator[Job]:
    """What `rectilinear.warmup` compiles; the same for every dtype."""
    if _ALLOCATES:
        yield "memory for results", _entry_points
