"""ReLU alone, forward and backward, over any strides; memory bounds it, so the work is cut into runs that the threads share."""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.host import host
from rectilinear.kernels.micro.library import relu, rows
from rectilinear.kernels.micro.relu import PAST_CACHES, ReluOperands
from rectilinear.kernels.micro.rows import KEEP_BITS, WRITE, RowsOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, count_of, data_of, extent_of, get, put, read_stack, size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Rows, Stack
from rectilinear.kernels.runtime.records import address_of, record
from rectilinear.kernels.runtime.threads import parallel_for_without_gil, task_of

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
def _run_task(zero: Any, index: int, job: Elementwise, slot: int) -> None:
    """One run of elements that lie side by side."""
    start = index * job.run * size_of(zero)
    count = min(job.run, job.count - index * job.run)
    src, keep, dst = job.src.data + start, job.keep.data + start, job.dst.data + start
    relu(zero, ReluOperands(count=count, src=src, keep=keep, dst=dst, flags=job.flags))


@jit_inner
def _bits_task(zero: Any, index: int, job: Elementwise, slot: int) -> None:
    """Some rows, the keep-set in bits."""
    first, last = index * job.run, min((index + 1) * job.run, job.count)
    src = Rows(job.src.data + first * job.src.row, job.src.row)
    keep = Rows(job.keep.data + first * job.keep.row, job.keep.row)
    dst = Rows(job.dst.data + first * job.dst.row, job.dst.row)
    rows(zero, RowsOperands(rows=last - first, columns=job.columns, src=src, keep=keep, dst=dst, flags=KEEP_BITS | WRITE))


@jit_inner
def _strided_task(zero: Any, index: int, job: Elementwise, slot: int) -> None:
    """Some rows, an element at a time."""
    for i in range(index * job.run, min((index + 1) * job.run, job.count)):
        src, keep, dst = job.src.data + i * job.src.row, job.keep.data + i * job.keep.row, job.dst.data + i * job.dst.row
        for j in range(job.columns):
            value = get(zero, src + j * job.src.column)
            dropped = get(zero, keep + j * job.keep.column) < zero
            put(dst + j * job.dst.column, zero if dropped else value)


@jit_inner
def _over_rows(zero: Any, job: Elementwise, arrays: tuple[int, int, int], keep_size: int, task: int, threads: int) -> int:
    """ReLU over matrices; 0, or CHANGED."""
    size = size_of(zero)
    src, keep, dst = arrays
    n, m = extent_of(src, -2), extent_of(src, -1)
    keep_columns = max(extent_of(keep, -1), (m + 7) >> 3) if keep_size == 1 else m
    if not (
        read_stack(job.src, src, size, 1, n, m)
        and read_stack(job.keep, keep, keep_size, 1, n, keep_columns)
        and read_stack(job.dst, dst, size, 1, n, m)
    ):
        return CHANGED
    job.count, job.columns = n, m
    bytes_of_row = max(1, m * size)
    job.run = max(1, RUN_BYTES // bytes_of_row) if n * bytes_of_row > SHARED_BYTES else max(n, 1)
    slow = keep_size != 1
    parallel_for_without_gil(slow or n * m * size > QUICK_BYTES, task, address_of(job), -(-n // job.run), threads)
    return 0


def entry(zero: Any) -> Any:
    """ReLU of zero's dtype: three jitted functions of the ids of arrays src, keep and dst, and threads, that return 0 or CHANGED.

    The first takes arrays whose elements lie side by side in one order, the second matrices with unit stride along
    their rows and rows of keep-mask bits, the third matrices of any strides. dst may be src.
    """
    run_task, bits_task, strided_task = (task_of(Elementwise, zero, task) for task in (_run_task, _bits_task, _strided_task))

    @jit(nogil=False)
    def over_run(src: int, keep: int, dst: int, threads: int) -> int:
        size, count = size_of(zero), count_of(src)
        if count_of(keep) != count or count_of(dst) != count:
            return CHANGED
        job = Elementwise(count=count, src=Stack(data_of(src)), keep=Stack(data_of(keep)), dst=Stack(data_of(dst)))
        # Past the caches only into memory that is not read as well, and only what could not stay in them.
        fresh = job.dst.data != job.src.data and job.dst.data != job.keep.data
        job.flags = PAST_CACHES if fresh and count * size > host(zero).past else 0
        job.run = RUN_BYTES // size if count * size > SHARED_BYTES else max(count, 1)
        parallel_for_without_gil(count * size > QUICK_BYTES, c_address(run_task), address_of(job), -(-count // job.run), threads)
        return 0

    @jit(nogil=False)
    def over_bits(src: int, keep: int, dst: int, threads: int) -> int:
        return _over_rows(zero, Elementwise(), (src, keep, dst), 1, c_address(bits_task), threads)

    @jit(nogil=False)
    def over_rows(src: int, keep: int, dst: int, threads: int) -> int:
        return _over_rows(zero, Elementwise(), (src, keep, dst), size_of(zero), c_address(strided_task), threads)

    return over_run, over_bits, over_rows
