"""Memory for the kernels to pack into, kept from call to call: fresh pages would cost more than the packing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rectilinear.threads import call_threads

ALIGNMENT = 64
KEPT_BYTES = 64 << 20
"""Larger buffers are given back after the call."""

_idle: list[tuple[np.ndarray, int, int]] = []
"""Buffers that no call is using: array, aligned address, usable bytes. As many as calls ever ran at once."""


def with_scratch(kernel: Callable[..., int], *arguments: int) -> None:
    """Call ``kernel(*arguments, scratch, scratch_bytes, threads)``, which returns 0, or how many bytes it needs and has not got."""
    threads = call_threads()
    # pop and append are atomic: no two calls get the same buffer.
    try:
        buffer = _idle.pop()
    except IndexError:
        buffer = _buffer(1 << 16)
    while (needed := kernel(*arguments, buffer[1], buffer[2], threads)) > 0:
        buffer = _buffer(needed)
    if buffer[2] <= KEPT_BYTES:
        _idle.append(buffer)


def _buffer(size: int) -> tuple[np.ndarray, int, int]:
    array = np.empty(size + ALIGNMENT, np.uint8)
    return array, -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT, size
