"""ReLU alone, forward and backward, over any strides; memory bounds it, so the work is cut into runs that the threads share."""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.library import PAST, blocks, relu, rows
from rectilinear.kernels.memory import (
    CHANGED,
    count_of,
    data_of,
    extent_of,
    get,
    has_extents,
    put,
    set_word,
    size_of,
    stride_of,
    word,
    words,
)
from rectilinear.kernels.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.rows import KEEP_BITS, WRITE
from rectilinear.kernels.stream import PAST_CACHES
from rectilinear.kernels.threads import parallel_for

# The words of a job; ROW and COL are the strides, from where an operand's address is.
SRC, KEEP, DST = 0, 24, 48
ROW, COL = 8, 16
COUNT, COLS, FLAGS, RUN = 72, 80, 88, 96
JOB_WORDS = 13

RUN_BYTES = 256 << 10
"""What a task handles of each operand: a few dozen microseconds."""

QUICK_BYTES = 64 << 10
"""So many are through in a microsecond or two: letting go of the GIL would cost as much as others would gain."""

SHARED_BYTES = 128 << 10
"""Shorter runs are not worth waking a second thread."""


@jit_inner
def _run_task(zero: Any, index: int, job: int, slot: int) -> None:
    """One run of elements that lie side by side."""
    run, count = word(job + RUN), word(job + COUNT)
    at = index * run * size_of(zero)
    relu(zero, (min(run, count - index * run), word(job + SRC) + at, word(job + KEEP) + at, word(job + DST) + at, word(job + FLAGS)))


@jit_inner
def _bits_task(zero: Any, index: int, job: int, slot: int) -> None:
    """Some rows, the keep-set in bits."""
    first, last = index * word(job + RUN), min((index + 1) * word(job + RUN), word(job + COUNT))
    src = word(job + SRC) + first * word(job + SRC + ROW)
    keep = word(job + KEEP) + first * word(job + KEEP + ROW)
    dst = word(job + DST) + first * word(job + DST + ROW)
    rows(
        zero,
        (
            last - first,
            word(job + COLS),
            src,
            word(job + SRC + ROW),
            keep,
            word(job + KEEP + ROW),
            dst,
            word(job + DST + ROW),
            0,
            KEEP_BITS | WRITE,
        ),
    )


@jit_inner
def _strided_task(zero: Any, index: int, job: int, slot: int) -> None:
    """Some rows, an element at a time."""
    first, last = index * word(job + RUN), min((index + 1) * word(job + RUN), word(job + COUNT))
    for i in range(first, last):
        src, keep, dst = (
            word(job + SRC) + i * word(job + SRC + ROW),
            word(job + KEEP) + i * word(job + KEEP + ROW),
            word(job + DST) + i * word(job + DST + ROW),
        )
        for j in range(word(job + COLS)):
            value = get(zero, src + j * word(job + SRC + COL))
            dropped = get(zero, keep + j * word(job + KEEP + COL)) < zero
            put(dst + j * word(job + DST + COL), zero if dropped else value)


@jit_inner
def _describe_rows(zero: Any, job: int, src: int, keep: int, dst: int, keep_size: int) -> int:
    """Write matrices into the job; returns the number of tasks, or CHANGED."""
    size = size_of(zero)
    n, m = extent_of(src, -2), extent_of(src, -1)
    keep_columns = (m + 7) >> 3 if keep_size == 1 else m
    if not has_extents(dst, 1, n, m) or extent_of(keep, -2) != n or extent_of(keep, -1) < keep_columns:
        return CHANGED
    for offset, array, itemsize in ((SRC, src, size), (KEEP, keep, keep_size), (DST, dst, size)):
        set_word(job + offset, data_of(array))
        set_word(job + offset + ROW, stride_of(array, -2, itemsize))
        set_word(job + offset + COL, stride_of(array, -1, itemsize))
    set_word(job + COUNT, n)
    set_word(job + COLS, m)
    bytes_of_row = max(1, m * size)
    run = max(1, RUN_BYTES // bytes_of_row) if n * bytes_of_row > SHARED_BYTES else max(n, 1)
    set_word(job + RUN, run)
    return -(-n // run)


def entry(zero: Any) -> Any:
    """ReLU of zero's dtype: three jitted functions of the ids of arrays src, keep and dst, and threads, that return 0 or CHANGED.

    The first takes arrays whose elements lie side by side in one order, the second matrices with unit stride along
    their rows and rows of keep-mask bits, the third matrices of any strides. dst may be src.
    """

    @jit_inner
    def run_task(index: int, job: int, slot: int) -> None:
        _run_task(zero, index, job, slot)

    @jit_inner
    def bits_task(index: int, job: int, slot: int) -> None:
        _bits_task(zero, index, job, slot)

    @jit_inner
    def strided_task(index: int, job: int, slot: int) -> None:
        _strided_task(zero, index, job, slot)

    @jit(nogil=False)
    def over_run(src: int, keep: int, dst: int, threads: int) -> int:
        size, count = size_of(zero), count_of(src)
        if count_of(keep) != count or count_of(dst) != count:
            return CHANGED
        job = words(JOB_WORDS)
        set_word(job + SRC, data_of(src))
        set_word(job + KEEP, data_of(keep))
        set_word(job + DST, data_of(dst))
        set_word(job + COUNT, count)
        # Past the caches only into memory that is not read as well, and only what could not stay in them.
        set_word(job + FLAGS, PAST_CACHES if dst != src and count * size > word(blocks(zero) + PAST) else 0)
        run = RUN_BYTES // size if count * size > SHARED_BYTES else max(count, 1)
        set_word(job + RUN, run)
        others = let_go_of_gil(count * size > QUICK_BYTES)
        parallel_for(c_address(run_task), job, -(-count // run), threads)
        take_gil_back(others)
        return 0

    @jit(nogil=False)
    def over_bits(src: int, keep: int, dst: int, threads: int) -> int:
        job = words(JOB_WORDS)
        runs = _describe_rows(zero, job, src, keep, dst, 1)
        if runs < 0:
            return runs
        others = let_go_of_gil(word(job + COUNT) * word(job + COLS) * size_of(zero) > QUICK_BYTES)
        parallel_for(c_address(bits_task), job, runs, threads)
        take_gil_back(others)
        return 0

    @jit(nogil=False)
    def over_rows(src: int, keep: int, dst: int, threads: int) -> int:
        job = words(JOB_WORDS)
        runs = _describe_rows(zero, job, src, keep, dst, size_of(zero))
        if runs < 0:
            return runs
        others = let_go_of_gil(True)
        parallel_for(c_address(strided_task), job, runs, threads)
        take_gil_back(others)
        return 0

    return over_run, over_bits, over_rows
