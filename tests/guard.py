"""Memory between pages that nobody may touch: whoever reads or writes outside of an array there dies of it at once.

For what runs in a process of its own. POSIX only.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import defaultdict
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
GUARD_BYTES = 16 * PAGE
"""On either side: a few rows, so that a stride taken wrongly ends there as well."""

POISON = 0xFF
"""What memory is full of: NaN in any float type, every bit of a mask set."""

_libc = ctypes.CDLL(None, use_errno=True)


class Region:
    """So many pages between guards; `bytes` are all of them."""

    def __init__(self, pages: int) -> None:
        size = pages * PAGE
        self._map = mmap.mmap(-1, size + 2 * GUARD_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for guard in (address, address + GUARD_BYTES + size):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(GUARD_BYTES), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = address + GUARD_BYTES
        self.bytes = np.frombuffer(self._map, np.uint8, size, GUARD_BYTES)


class Memory:
    """Regions by size, used again: a mapping and two guards cost as much as many a call."""

    def __init__(self) -> None:
        self._free: dict[int, list[Region]] = defaultdict(list)
        self._taken: list[Region] = []

    def lend(self, size: int) -> Region:
        """A poisoned region of at least so many bytes, until it is given back."""
        pages = 1 << max(0, -(-size // PAGE) - 1).bit_length()
        free = self._free[pages * PAGE]
        region = free.pop() if free else Region(pages)
        region.bytes.fill(POISON)
        return region

    def give_back(self, region: Region) -> None:
        self._free[region.bytes.size].append(region)

    def take(self, size: int) -> Region:
        """As `lend`, until all are taken back."""
        region = self.lend(size)
        self._taken.append(region)
        return region

    def take_back_all(self) -> None:
        """Whoever still holds an array in a region sees it overwritten."""
        for region in self._taken:
            self.give_back(region)
        self._taken.clear()


def guarded(array: np.ndarray, at_end: bool, memory: Memory | None = None) -> np.ndarray:
    """A C-contiguous copy of `array` that touches the guard before it, or the one behind it."""
    region = (memory or Memory()).take(array.nbytes)
    start = region.bytes.size - array.nbytes if at_end else 0
    made: np.ndarray = np.ndarray(array.shape, array.dtype, region.bytes, start)
    made[...] = array
    return made


class _Handler(ctypes.Structure):
    """NumPy's PyDataMem_Handler (NEP 49)."""

    MALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    CALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    REALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("context", ctypes.c_void_p),
        ("malloc", MALLOC),
        ("calloc", CALLOC),
        ("realloc", REALLOC),
        ("free", FREE),
    )


_SET_HANDLER = 304
"""PyDataMem_SetHandler in the table of NumPy's C API."""


def _set_handler() -> Any:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = pointer(np._core._multiarray_umath._ARRAY_API, None)
    address = ctypes.c_void_p.from_address(table + _SET_HANDLER * ctypes.sizeof(ctypes.c_void_p)).value
    assert address is not None
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address)


class Allocator:
    """While entered, what NumPy allocates for arrays lies in guarded memory too: fresh results, masks, scratch."""

    def __init__(self) -> None:
        self.at_end = True
        self._memory = Memory()
        self._used: dict[int, tuple[Region, int]] = {}
        """By address: the region, and the bytes in use."""
        self._fresh: list[int] = []
        self._handler = _Handler(
            b"guarded", 1, None, _Handler.MALLOC(self._malloc), _Handler.CALLOC(self._calloc), _Handler.REALLOC(self._realloc),
            _Handler.FREE(self._free),
        )  # fmt: skip
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self._name = b"mem_handler"  # the capsule points to it
        self._capsule = new(ctypes.addressof(self._handler), self._name, None)
        self._set = _set_handler()

    def __enter__(self) -> None:
        self._fresh.clear()
        self._before = self._set(self._capsule)

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def intact(self) -> bool:
        """Whether nothing was written beside the arrays that were made since it was entered and are still alive."""
        for address in self._fresh:
            if address in self._used:
                region, size = self._used[address]
                start = address - region.address
                if (region.bytes[:start] != POISON).any() or (region.bytes[start + size :] != POISON).any():
                    return False
        return True

    def _malloc(self, context: int | None, size: int) -> int:
        region = self._memory.lend(size)
        address: int = region.address + (region.bytes.size - size if self.at_end else 0)
        self._used[address] = region, size
        self._fresh.append(address)
        return address

    def _calloc(self, context: int | None, count: int, size: int) -> int:
        address = self._malloc(context, count * size)
        ctypes.memset(address, 0, count * size)
        return address

    def _realloc(self, context: int | None, old: int, size: int) -> int:
        address = self._malloc(context, size)
        ctypes.memmove(address, old, min(size, self._used[old][1]))
        self._free(context, old, 0)
        return address

    def _free(self, context: int | None, address: int, size: int) -> None:
        self._memory.give_back(self._used.pop(address)[0])
