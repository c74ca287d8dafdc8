"""The softmax loss and its gradient, a block of rows at a time."""

from __future__ import annotations

import math
from typing import Any

from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.library import softmax
from rectilinear.kernels.memory import (
    CHANGED,
    count_of,
    data_of,
    extent_of,
    get,
    has_extents,
    put,
    rounded,
    set_word,
    size_of,
    stride_of,
    word,
    words,
)
from rectilinear.kernels.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.product import block_count, block_start, copy_strided, round_up
from rectilinear.kernels.threads import parallel_for

SRC, SRC_ROW, SRC_COL, DST, DST_ROW, LABELS, N, C, BLOCKS, LOSSES, SLOTS, SLOT_BYTES = range(0, 96, 8)
JOB_WORDS = 12

SMALL_ELEMENTS = 1 << 14
"""Scores that one thread is done with before a second one would have started."""

BLOCK_ROWS = 128
"""Rows of a task; the loss is summed within each, then over them in their order."""


@jit_inner
def _task(zero: Any, index: int, job: int, slot: int) -> None:
    size = size_of(zero)
    n, c = word(job + N), word(job + C)
    first, last = block_start(n, word(job + BLOCKS), index), block_start(n, word(job + BLOCKS), index + 1)
    stats = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    picked = stats + 2 * BLOCK_ROWS * size
    src, src_row = word(job + SRC) + first * word(job + SRC_ROW), word(job + SRC_ROW)
    dst, dst_row = word(job + DST) + first * word(job + DST_ROW), word(job + DST_ROW)
    for i in range(last - first):
        label = word(word(job + LABELS) + (first + i) * 8)
        inside = label >= 0 and label < c
        put(picked + i * size, get(zero, src + i * src_row + label * word(job + SRC_COL)) if inside else zero)
    if word(job + SRC_COL) != size:
        copy_strided(zero, (last - first, c, src, src_row, word(job + SRC_COL), dst, dst_row))
        src, src_row = dst, dst_row
    softmax(zero, (last - first, c, src, src_row, dst, dst_row, stats, n))
    total = 0.0
    for i in range(last - first):
        label = word(word(job + LABELS) + (first + i) * 8)
        top, weight = get(zero, stats + 2 * i * size), get(zero, stats + (2 * i + 1) * size)
        # In T, like the differences that the exponentials saw.
        loss = math.log(float(weight)) - (get(zero, picked + i * size) - top)
        if label >= 0 and label < c:
            # p - 1 from the loss itself: where p is close to 1 the difference would cancel.
            put(dst + i * dst_row + label * size, rounded(zero, math.expm1(-loss) / n))
        else:
            loss = math.nan
            for j in range(c):
                put(dst + i * dst_row + j * size, rounded(zero, math.nan))
        total += loss / n  # before they are summed: the mean may be in range where the sum is not
    put(word(job + LOSSES) + index * 8, total)


def entry(zero: Any) -> Any:
    """The loss for zero's dtype, as a jitted function of the ids of x, int64 labels, dx and a float64 loss; scratch; threads.

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """

    @jit_inner
    def task(index: int, job: int, slot: int) -> None:
        _task(zero, index, job, slot)

    @jit(nogil=False)
    def loss_and_gradient(x: int, labels: int, dx: int, loss: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        job = words(JOB_WORDS)
        size, n, c = size_of(zero), extent_of(x, -2), extent_of(x, -1)
        if not has_extents(dx, 1, n, c) or count_of(labels) != n:
            return CHANGED
        blocks = block_count(n, BLOCK_ROWS)
        slot = round_up(3 * BLOCK_ROWS * size, 64)
        if n * c < SMALL_ELEMENTS:
            threads = 1
        needed = threads * slot + blocks * 8
        if needed > scratch_bytes:
            return needed
        set_word(job + SRC, data_of(x))
        set_word(job + SRC_ROW, stride_of(x, -2, size))
        set_word(job + SRC_COL, stride_of(x, -1, size))
        set_word(job + DST, data_of(dx))
        set_word(job + DST_ROW, stride_of(dx, -2, size))
        set_word(job + LABELS, data_of(labels))
        set_word(job + N, n)
        set_word(job + C, c)
        set_word(job + BLOCKS, blocks)
        set_word(job + SLOTS, scratch)
        set_word(job + SLOT_BYTES, slot)
        set_word(job + LOSSES, scratch + threads * slot)
        into = data_of(loss)
        others = let_go_of_gil(True)
        parallel_for(c_address(task), job, blocks, threads)
        total = 0.0
        for block in range(blocks):
            total += get(0.0, word(job + LOSSES) + block * 8)
        put(into, total)
        take_gil_back(others)
        return 0

    return loss_and_gradient
