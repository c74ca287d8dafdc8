"""Fresh arrays for results, large ones from memory that earlier results have given up.

A large array from the system comes as pages that fault one by one on first touch, which costs more than most kernels here:
17 against 46 GB/s for ReLU. A training loop drops each result a step later; its memory is kept here, up to a limit, and
serves the next result of about that size. It is free for that once nothing refers to it any more: an array made on it, and
every view of that, holds a reference to it.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

LARGE_BYTES = 1 << 20
"""Smaller arrays come from the allocator's own reserves without a fault."""

KEPT_BYTES = 128 << 20
"""The most that is kept for later, in use or not."""

ALIGNMENT = 64

_kept: list[np.ndarray] = []
"""Memory that results have been made on, oldest first."""

_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A C-contiguous array of any content, which shares memory with no other that is alive."""
    fresh = np.empty(shape, dtype)
    return fresh if fresh.nbytes < LARGE_BYTES else _on_kept_memory(fresh)


def _on_kept_memory(fresh: np.ndarray) -> np.ndarray:
    """An array like `fresh`, whose pages nobody has touched yet, on memory that is kept for the next one."""
    # Whoever meets the lock taken (a thread, or a child forked at the wrong moment) does without.
    if not _UNUSED or fresh.nbytes > KEPT_BYTES or not _lock.acquire(blocking=False):
        return fresh
    try:
        memory = _recycled(fresh.nbytes)
        if memory is None:
            memory = np.empty(fresh.nbytes + ALIGNMENT, np.uint8)
            _kept.append(memory)
            _forget_surplus()
        return np.ndarray(fresh.shape, fresh.dtype, memory, offset=-memory.ctypes.data % ALIGNMENT)
    finally:
        _lock.release()


def _recycled(size: int) -> np.ndarray | None:
    for i in range(len(_kept)):
        if size + ALIGNMENT <= _kept[i].nbytes <= 2 * size and _references(i) == _UNUSED:
            return _kept[i]
    return None


def _forget_surplus() -> None:
    """Drop the oldest memory beyond the limit; what is in use lives on until its array dies."""
    surplus = sum(memory.nbytes for memory in _kept) - KEPT_BYTES
    while surplus > 0 and len(_kept) > 1:
        surplus -= _kept.pop(0).nbytes


def _references(i: int) -> int:
    return sys.getrefcount(_kept[i])


def _unused() -> int:
    """What `_references` says of memory that only the list refers to; 0 where it cannot be told.

    Interpreters differ in what they count; one without a global lock may count a reference late.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)() or sys.implementation.name != "cpython":
        return 0
    _kept.append(np.empty(8, np.uint8))
    alone = _references(0)
    view = np.ndarray(1, np.uint8, _kept[0])[:]
    shared = _references(0)
    del view
    given_up = _references(0)
    _kept.clear()
    return alone if shared > alone == given_up else 0


_UNUSED = _unused()
