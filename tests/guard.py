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
        self._taken: list[tuple[int, Region]] = []

    def take(self, size: int) -> Region:
        """A poisoned region of at least so many bytes."""
        pages = 1 << max(0, -(-size // PAGE) - 1).bit_length()
        region = self._free[pages].pop() if self._free[pages] else Region(pages)
        region.bytes.fill(POISON)
        self._taken.append((pages, region))
        return region

    def take_back_all(self) -> None:
        """Whoever still holds an array in a region sees it overwritten."""
        for pages, region in self._taken:
            self._free[pages].append(region)
        self._taken.clear()


def guarded(array: np.ndarray, at_end: bool, memory: Memory | None = None) -> np.ndarray:
    """A C-contiguous copy of `array` that touches the guard before it, or the one behind it."""
    region = (memory or Memory()).take(array.nbytes)
    start = region.bytes.size - array.nbytes if at_end else 0
    made: np.ndarray = np.ndarray(array.shape, array.dtype, region.bytes, start)
    made[...] = array
    return made


