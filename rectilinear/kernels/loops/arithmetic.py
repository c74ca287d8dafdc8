"""Whole-number arithmetic that plans and loops share, in jitted code and in plain Python alike."""

from __future__ import annotations

from rectilinear.kernels.runtime.cache import jit_too

LINE_BYTES = 64


@jit_too
def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@jit_too
def packed_row(length: int) -> int:
    """Bytes between the rows of a packed block: an odd number of cache lines, so that rows do not meet in one set."""
    return (round_up(length, LINE_BYTES) // LINE_BYTES | 1) * LINE_BYTES


@jit_too
def block_count(extent: int, block: int) -> int:
    """Blocks of nearly equal length, none longer than `block`; one empty block where there is nothing."""
    return max(1, -(-extent // block))


@jit_too
def block_start(extent: int, count: int, index: int) -> int:
    """Where block `index` begins when `extent` is cut into `count` nearly equal blocks."""
    return extent // count * index + min(index, extent % count)
