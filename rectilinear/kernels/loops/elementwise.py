"""ReLU alone, forward and backward, over any strides; memory bounds it, so the work is cut into runs that the threads share."""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.host import host
from rectilinear.kernels.micro.library import relu, rows
from rectilinear.kernels.micro.relu import PAST_CACHES, ReluOperands
from rectilinear.kernels.micro.rows import KEEP_BITS, WRITE, RowsOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, count_of, data_of, extent_of, get, has_extents, put, read_stack, size_of
from rectilinear.kernels.runtime.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.operands import Rows, Stack
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for

RUN_BYTES = 256 << 10
"""What a task handles of each operand: a few dozen microseconds."""

QUICK_BYTES = 64 << 10
"""So many are through in a microsecond or two: letting go of the GIL would cost as much as others would gain."""

SHARED_BYTES = 128 << 10
"""Shorter runs are not worth waking a second thread."""


@record
class Elementwise:
    """The job: dst = src where `keep` says so, else 0. `count` is of elements, or of rows of `columns` each; a task takes `run` of them."""

    src: Stack = Stack()
    keep: Stack = Stack()
    dst: Stack = Stack()
    count: int = 0
    columns: int = 0
    flags: int = 0
    run: int = 0


@jit_inner
def _run_task(zero: Any, index: int, job: Elementwise) -> None:
    """One run of elements that lie side by side."""
    start = index * job.run * size_of(zero)
    count = min(job.run, job.count - index * job.run)
    src, keep, dst = job.src.data + start, job.keep.data + start, job.dst.data + start
    relu(zero, ReluOperands(count=count, src=src, keep=keep, dst=dst, flags=job.flags))


@jit_inner
def _bits_task(zero: Any, index: int, job: Elementwise) -> None:
    """Some rows, the keep-set in bits."""
    first, last = index * job.run, min((index + 1) * job.run, job.count)
    src = Rows(job.src.data + first * job.src.row, job.src.row)
    keep = Rows(job.keep.data + first * job.keep.row, job.keep.row)
    dst = Rows(job.dst.data + first * job.dst.row, job.dst.row)
    rows(zero, RowsOperands(rows=last - first, columns=job.columns, src=src, keep=keep, dst=dst, flags=KEEP_BITS | WRITE))


@jit_inner
def _strided_task(zero: Any, index: int, job: Elementwise) -> None:
    """Some rows, an element at a time."""
    for i in range(index * job.run, min((index + 1) * job.run, job.count)):
        src, keep, dst = job.src.data + i * job.src.row, job.keep.data + i * job.keep.row, job.dst.data + i * job.dst.row
        for j in range(job.columns):
            value = get(zero, src + j * job.src.column)
            dropped = get(zero, keep + j * job.keep.column) < zero
            put(dst + j * job.dst.column, zero if dropped else value)


@jit_inner
def _read_rows(zero: Any, job: Elementwise, src: int, keep: int, dst: int, keep_size: int) -> int:
    """Write matrices into the job; returns the number of tasks, or CHANGED."""
    size = size_of(zero)
    n, m = extent_of(src, -2), extent_of(src, -1)
    keep_columns = (m + 7) >> 3 if keep_size == 1 else m
    if not has_extents(dst, 1, n, m) or extent_of(keep, -2) != n or extent_of(keep, -1) < keep_columns:
        return CHANGED
    read_stack(job.src, src, size)
    read_stack(job.keep, keep, keep_size)
    read_stack(job.dst, dst, size)
    job.count, job.columns = n, m
    bytes_of_row = max(1, m * size)
    job.run = max(1, RUN_BYTES // bytes_of_row) if n * bytes_of_row > SHARED_BYTES else max(n, 1)
    return -(-n // job.run)


def entry(zero: Any) -> Any:
    """ReLU of zero's dtype: three jitted functions of the ids of arrays src, keep and dst, and threads, that return 0 or CHANGED.

    The first takes arrays whose elements lie side by side in one order, the second matrices with unit stride along
    their rows and rows of keep-mask bits, the third matrices of any strides. dst may be src.
    """

    @jit_inner
    def run_task(index: int, address: int, slot: int) -> None:
        _run_task(zero, index, at(Elementwise, address))

    @jit_inner
    def bits_task(index: int, address: int, slot: int) -> None:
        _bits_task(zero, index, at(Elementwise, address))

    @jit_inner
    def strided_task(index: int, address: int, slot: int) -> None:
        _strided_task(zero, index, at(Elementwise, address))

    @jit(nogil=False)
    def over_run(src: int, keep: int, dst: int, threads: int) -> int:
        size, count = size_of(zero), count_of(src)
        if count_of(keep) != count or count_of(dst) != count:
            return CHANGED
        job = Elementwise(count=count, src=Stack(data_of(src)), keep=Stack(data_of(keep)), dst=Stack(data_of(dst)))
        # Past the caches only into memory that is not read as well, and only what could not stay in them.
        job.flags = PAST_CACHES if dst != src and count * size > host(zero).past else 0
        job.run = RUN_BYTES // size if count * size > SHARED_BYTES else max(count, 1)
        others = let_go_of_gil(count * size > QUICK_BYTES)
        parallel_for(c_address(run_task), address_of(job), -(-count // job.run), threads)
        take_gil_back(others)
        return 0

    @jit(nogil=False)
    def over_bits(src: int, keep: int, dst: int, threads: int) -> int:
        job = Elementwise()
        runs = _read_rows(zero, job, src, keep, dst, 1)
        if runs < 0:
            return runs
        others = let_go_of_gil(job.count * job.columns * size_of(zero) > QUICK_BYTES)
        parallel_for(c_address(bits_task), address_of(job), runs, threads)
        take_gil_back(others)
        return 0

    @jit(nogil=False)
    def over_rows(src: int, keep: int, dst: int, threads: int) -> int:
        job = Elementwise()
        runs = _read_rows(zero, job, src, keep, dst, size_of(zero))
        if runs < 0:
            return runs
        others = let_go_of_gil(True)
        parallel_for(c_address(strided_task), address_of(job), runs, threads)
        take_gil_back(others)
        return 0

    return over_run, over_bits, over_rows
