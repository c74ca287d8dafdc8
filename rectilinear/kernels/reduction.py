"""The bias reduction alone: db = sum of dout over rows, and what the fused backward adds up.

Rows are summed in T within a block, blocks in float64, slabs of blocks in their order: the bits depend on shape and strides
alone, and long sums of one sign stay within a few units in the last place.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.library import PAST, blocks, row_lanes, rows
from rectilinear.kernels.memory import (
    CHANGED,
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
from rectilinear.kernels.rows import AHEAD, SUM
from rectilinear.kernels.threads import parallel_for

SRC, SRC_GROUP, SRC_ROW, SRC_COL = 0, 8, 16, 24
OUT, OUT_GROUP, OUT_COL = 32, 40, 48
N, M, FOLD, GROUPS = 56, 64, 72, 80
SLABS, STRIPES, TOTALS, SLOTS, SLOT_BYTES, LEFT = 88, 96, 104, 112, 120, 128
JOB_WORDS = 17

BLOCK_ROWS = 256
"""Rows summed in T: 64 additions of four rows each, so that even float32 ones of one sign lose less than 64 half-ulps."""

STRIPE_COLUMNS = 2048
"""Columns of a task: their sums stay in L1 beside the rows that stream by."""

SLAB_ELEMENTS = 1 << 16
"""The least work of a slab; below it the sums to be added up would cost as much as the rows."""

MOST_SLABS = 64

QUICK_ELEMENTS = 1 << 14
"""So many are summed in a microsecond or two: letting go of the GIL would cost as much as others would gain."""

FOLD_COLUMNS = 512
"""Rows that end within a vector are taken several at a time, as one row of at least about so many columns."""


@jit_inner
def _task(zero: Any, index: int, job: int, slot: int) -> None:
    """The sums of one slab of rows and one stripe of columns of one group, in float64."""
    size = size_of(zero)
    slabs, stripes = word(job + SLABS), word(job + STRIPES)
    group, slab, stripe = index // (slabs * stripes), index // stripes % slabs, index % stripes
    n, m = word(job + N), word(job + M)
    first, last = block_start(n, slabs, slab), block_start(n, slabs, slab + 1)
    c0, c1 = block_start(m, stripes, stripe), block_start(m, stripes, stripe + 1)
    width = c1 - c0
    sums = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    copy = sums + round_up(width * size, 64)
    total = word(job + TOTALS) + ((group * slabs + slab) * m + c0) * 8
    for j in range(width):
        put(total + 8 * j, 0.0)
    src_row, src_col = word(job + SRC_ROW), word(job + SRC_COL)
    flags = SUM | (AHEAD if word(job + GROUPS) * n * abs(src_row) > word(blocks(zero) + PAST) else 0)
    steps = block_count(last - first, BLOCK_ROWS)
    for step in range(steps):
        r0, r1 = first + block_start(last - first, steps, step), first + block_start(last - first, steps, step + 1)
        src = word(job + SRC) + group * word(job + SRC_GROUP) + r0 * src_row + c0 * src_col
        for j in range(width):
            put(sums + j * size, zero)
        if src_col == size:
            rows(zero, (r1 - r0, width, src, src_row, 0, 0, 0, 0, sums, flags))
        else:
            copy_strided(zero, (r1 - r0, width, src, src_row, src_col, copy, width * size))
            rows(zero, (r1 - r0, width, copy, width * size, 0, 0, 0, 0, sums, SUM))
        for j in range(width):
            put(total + 8 * j, get(0.0, total + 8 * j) + get(zero, sums + j * size))


@jit_inner
def _finish(zero: Any, job: int) -> None:
    """Add up slabs and folded rows, and what rows were left over by folding; round into out."""
    size = size_of(zero)
    m, slabs, fold = word(job + M), word(job + SLABS), word(job + FOLD)
    real = m // fold
    for group in range(word(job + GROUPS)):
        totals = word(job + TOTALS) + group * slabs * m * 8
        for slab in range(1, slabs):
            for j in range(m):
                put(totals + 8 * j, get(0.0, totals + 8 * j) + get(0.0, totals + (slab * m + j) * 8))
        for j in range(real):
            total = 0.0
            for f in range(fold):
                total += get(0.0, totals + (f * real + j) * 8)
            left = word(job + SRC) + group * word(job + SRC_GROUP) + word(job + N) * word(job + SRC_ROW)
            for i in range(word(job + LEFT)):
                total += get(zero, left + (i * real + j) * size)
            put(word(job + OUT) + group * word(job + OUT_GROUP) + j * word(job + OUT_COL), rounded(zero, total))


@jit_inner
def _plan(zero: Any, job: int) -> None:
    """Fold short rows; choose slabs and stripes, by shape and strides alone."""
    size = size_of(zero)
    n, m = word(job + N), word(job + M)
    fold = 1
    side_by_side = word(job + SRC_COL) == size and word(job + SRC_ROW) == m * size
    if side_by_side and m % row_lanes(zero) != 0 and m * row_lanes(zero) <= STRIPE_COLUMNS:
        # A whole number of vectors, and enough of them that the sums are not added to at once again.
        fold = max(1, FOLD_COLUMNS // (m * row_lanes(zero))) * row_lanes(zero)
        fold = fold if n >= 4 * fold else 1
    set_word(job + FOLD, fold)
    set_word(job + LEFT, n % fold)
    set_word(job + N, n // fold)
    set_word(job + M, m * fold)
    set_word(job + SRC_ROW, word(job + SRC_ROW) * fold)
    stripes = block_count(m * fold, STRIPE_COLUMNS)
    set_word(job + STRIPES, stripes)
    width = -(-m * fold // stripes)
    slab_rows = max(BLOCK_ROWS, SLAB_ELEMENTS // width)
    set_word(job + SLABS, max(1, min(-(-MOST_SLABS // stripes), n // fold // slab_rows)))
    copied = 0 if word(job + SRC_COL) == size else BLOCK_ROWS * width * size
    set_word(job + SLOT_BYTES, round_up(width * size, 64) + round_up(copied, 64))


def entry(zero: Any) -> Any:
    """The bias reduction for zero's dtype, as a jitted function of the ids of dout and out, scratch, and threads.

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """

    @jit_inner
    def task(index: int, job: int, slot: int) -> None:
        _task(zero, index, job, slot)

    @jit(nogil=False)
    def reduce(src: int, out: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        job, size = words(JOB_WORDS), size_of(zero)
        groups, n, m = extent_of(src, -3), extent_of(src, -2), extent_of(src, -1)
        if not has_extents(out, 1, groups, m):
            return CHANGED
        set_word(job + SRC, data_of(src))
        set_word(job + SRC_GROUP, stride_of(src, -3, size))
        set_word(job + SRC_ROW, stride_of(src, -2, size))
        set_word(job + SRC_COL, stride_of(src, -1, size))
        set_word(job + OUT, data_of(out))
        set_word(job + OUT_GROUP, stride_of(out, -2, size))
        set_word(job + OUT_COL, stride_of(out, -1, size))
        set_word(job + N, n)
        set_word(job + M, m)
        set_word(job + GROUPS, groups)
        if word(job + M) == 0:
            return 0
        _plan(zero, job)
        tasks = word(job + GROUPS) * word(job + SLABS) * word(job + STRIPES)
        threads = min(threads, tasks)
        totals = round_up(word(job + GROUPS) * word(job + SLABS) * word(job + M) * 8, 64)
        if totals + threads * word(job + SLOT_BYTES) > scratch_bytes:
            return totals + threads * word(job + SLOT_BYTES)
        set_word(job + TOTALS, scratch)
        set_word(job + SLOTS, scratch + totals)
        others = let_go_of_gil(groups * n * m > QUICK_ELEMENTS)
        parallel_for(c_address(task), job, tasks, threads)
        _finish(zero, job)
        take_gil_back(others)
        return 0

    return reduce
