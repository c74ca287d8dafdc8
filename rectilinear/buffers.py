"""Memory kept for reuse: for large results, and for the kernels to pack into. One limit holds for all of it.

A large array from the system comes as pages that fault one by one on first touch, which costs more than most kernels here:
17 against 46 GB/s for ReLU. A training loop drops each result a step later, so what it gives up serves the next one of about
that size. Large results are arrays as any other, which own their memory; `kernels.runtime.allocator`, which NumPy calls for them, keeps
what they give up. It needs numba, so it is imported when the first of them is made.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rectilinear.threads import call_threads

if TYPE_CHECKING:
    from rectilinear.kernels.runtime.allocator import Allocator

VARIABLE = "RECTILINEAR_CACHE_BYTES"
DEFAULT_BYTES = 192 << 20

LARGE_BYTES = 1 << 20
"""Smaller arrays come from the C library's own reserves without a fault."""

SCRATCH_BYTES = 2 << 20
"""What one buffer for packing has room for. It is enough for all but large products, whose larger ones are made as results are."""

_SCRATCH_SHARE = 8
"""One part in so many of the limit is for such buffers, and room for at least one."""

_ALIGNMENT = 64
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}

_log = logging.getLogger(__name__)
_BYTE = np.dtype(np.uint8)

_limit: int | None = None
_allocator: Allocator | Literal[False] | None = None
"""None until it is first asked for, False where there is none."""
_making = threading.Lock()

_Scratch = tuple[np.ndarray, int]
"""An array, and the aligned address from which on `SCRATCH_BYTES` are usable."""
_idle: deque[_Scratch] = deque(maxlen=0)
"""Buffers that no call is using. Its ends are atomic, and so is the loss of the oldest one that is too many."""


def held_memory() -> int:
    """The bytes of main memory that are kept for reuse now, and in use by nothing.

    Never more than ``RECTILINEAR_CACHE_BYTES``, or 192 MiB where that is not set: large results, most of them the numba backend's, that
    have been dropped, and buffers that its kernels pack operands into. Memory of arrays that are alive does not count. What CuPy
    keeps on a GPU is CuPy's (``cupy.get_default_memory_pool()``).

    Returns
    -------
    int
        Bytes, 0 or more.

    Examples
    --------
    >>> import rectilinear
    >>> _ = rectilinear.release_memory()
    >>> rectilinear.held_memory()
    0
    """
    return SCRATCH_BYTES * len(_idle) + (_allocator.held() if _allocator else 0)


def release_memory() -> int:
    """Give all memory that is kept for reuse back to the system.

    Arrays that are alive keep their memory, and calls that run meanwhile in other threads what they use. Later calls start to
    keep memory anew. What CuPy keeps on a GPU is CuPy's, and stays
    (``cupy.get_default_memory_pool().free_all_blocks()``).

    Returns
    -------
    int
        How many bytes that were: what `held_memory` gave before, unless other threads are at work.

    Examples
    --------
    >>> import rectilinear
    >>> released = rectilinear.release_memory()
    >>> rectilinear.release_memory()
    0
    """
    released = _allocator.release() if _allocator else 0
    while True:
        try:
            _idle.pop()
        except IndexError:
            return released
        released += SCRATCH_BYTES


def memory_limit() -> int:
    """The most that is kept, in bytes. Read from the variable when first asked for; ValueError if it is no number of bytes."""
    global _limit
    if _limit is None:
        text = os.environ.get(VARIABLE, "").strip()
        _limit = _bytes(text) if text else DEFAULT_BYTES
    return _limit


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([a-z]*)", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"{VARIABLE} is {text!r}, but it must be a whole number of bytes, such as 67108864, or with a unit, 64 MiB (KiB, MiB or GiB); "
            f"0 keeps nothing; unset it to keep up to {DEFAULT_BYTES >> 20} MiB"
        )
    return min(int(match[1]) * _UNITS[match[2]], 1 << 62)


# Results.


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A C-contiguous array of any content, which owns its memory."""
    try:
        fresh = np.empty(shape, dtype)
    except MemoryError:
        if release_memory() == 0:
            raise
        fresh = np.empty(shape, dtype)
    if fresh.nbytes < LARGE_BYTES:
        return fresh
    allocator = _allocator or _made_allocator()
    if not allocator or not allocator.may_replace(fresh):
        return fresh
    del fresh  # its pages have not been touched
    return allocator.empty(shape, dtype)


def _made_allocator() -> Allocator | Literal[False]:
    """The allocator for large arrays, made by the first who asks; False where there is none, or another thread is making it."""
    global _allocator
    room = memory_limit() - SCRATCH_BYTES * _most_idle()
    if _allocator is None and _making.acquire(blocking=False):
        try:
            if _allocator is None:  # still
                _allocator = room >= LARGE_BYTES and _allocator_with(room)
        finally:
            _making.release()
    return _allocator or False


def _allocator_with(limit: int) -> Allocator | Literal[False]:
    try:
        from rectilinear.kernels.runtime.allocator import Allocator

        return Allocator(limit)
    except Exception:  # a NumPy without the hook, a numba that cannot compile: results are slower, and no less right
        _log.debug("no memory is kept for large results", exc_info=True)
        return False


# Scratch.


def with_scratch(kernel: Callable[..., int], *arguments: int) -> int:
    """Call ``kernel(*arguments, scratch, scratch_bytes, threads)``; its answer, unless that is how many bytes it needs and has not got."""
    threads = call_threads()
    try:
        kept = _idle.pop()
    except IndexError:
        kept = _new_scratch()
    needed = kernel(*arguments, kept[1], SCRATCH_BYTES, threads)
    while needed > 0:
        large, size = empty((needed + _ALIGNMENT,), _BYTE), needed
        needed = kernel(*arguments, _aligned(large), size, threads)
    _idle.append(kept)
    return needed


def _new_scratch() -> _Scratch:
    global _idle
    if _idle.maxlen != (most := _most_idle()):
        _idle = deque(maxlen=most)  # the first call: the limit was not known before
    array = np.empty(SCRATCH_BYTES + _ALIGNMENT, _BYTE)
    return array, _aligned(array)


def _most_idle() -> int:
    limit = memory_limit()
    return max(1, limit // _SCRATCH_SHARE // SCRATCH_BYTES) if limit >= SCRATCH_BYTES else 0


def _aligned(array: np.ndarray) -> int:
    return -(-int(array.ctypes.data) // _ALIGNMENT) * _ALIGNMENT


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()  # a thread that is not here may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
