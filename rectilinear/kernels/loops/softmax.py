"""The softmax loss and its gradient, a block of rows at a time."""

from __future__ import annotations

import math
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, round_up
from rectilinear.kernels.loops.pack import Packing, copy
from rectilinear.kernels.micro.library import softmax
from rectilinear.kernels.micro.softmax import SoftmaxOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, count_of, data_of, extent_of, get, put, read_stack, rounded, size_of, word
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Matrix, Rows, Stack
from rectilinear.kernels.runtime.records import address_of, record
from rectilinear.kernels.runtime.threads import parallel_for_without_gil, task_of

SMALL_ELEMENTS = 1 << 14
"""Scores that one thread is done with before a second one would have started."""

LOSS_ROWS = 128
"""Rows of a task; the loss is summed within each, then over them in their order."""


@record
class Loss:
    """The job: scores `src` (n, c), int64 labels, gradient `dst`, and the loss of each block of rows, in float64."""

    src: Stack = Stack()
    dst: Stack = Stack()
    labels: int = 0
    n: int = 0
    c: int = 0
    blocks: int = 0
    losses: int = 0
    slots: Rows = Rows()


@jit_inner
def _task(zero: Any, index: int, job: Loss, slot: int) -> None:
    size, c = size_of(zero), job.c
    first, last = block_start(job.n, job.blocks, index), block_start(job.n, job.blocks, index + 1)
    count, labels = last - first, job.labels + first * 8
    stats = job.slots.data + slot * job.slots.row
    picked = stats + 2 * LOSS_ROWS * size
    src = Matrix(job.src.data + first * job.src.row, job.src.row, job.src.column)
    dst = Rows(job.dst.data + first * job.dst.row, job.dst.row)
    for i in range(count):
        label = word(labels + i * 8)
        inside = label >= 0 and label < c
        put(picked + i * size, get(zero, src.data + i * src.row + label * src.column) if inside else zero)
    scores = Rows(src.data, src.row)
    if src.column != size:
        copy(zero, Packing(rows=count, columns=c, src=src, dst=dst))
        scores = dst
    softmax(zero, SoftmaxOperands(rows=count, columns=c, src=scores, dst=dst, stats=stats, samples=job.n))
    total = 0.0
    for i in range(count):
        label = word(labels + i * 8)
        top, weight = get(zero, stats + 2 * i * size), get(zero, stats + (2 * i + 1) * size)
        # In T, like the differences that the exponentials saw.
        loss = math.log(float(weight)) - (get(zero, picked + i * size) - top)
        if label >= 0 and label < c:
            # p - 1 from the loss itself: where p is close to 1 the difference would cancel.
            put(dst.data + i * dst.row + label * size, rounded(zero, math.expm1(-loss) / job.n))
        else:
            loss = math.nan
            for j in range(c):
                put(dst.data + i * dst.row + j * size, rounded(zero, math.nan))
        total += loss / job.n  # before they are summed: the mean may be in range where the sum is not
    put(job.losses + index * 8, total)


def entry(zero: Any) -> Any:
    """The loss for zero's dtype, as a jitted function of the ids of x, int64 labels, dx and a float64 loss; scratch; threads.

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """
    task = task_of(Loss, zero, _task)

    @jit(nogil=False)
    def loss_and_gradient(x: int, labels: int, dx: int, loss: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        size, n, c = size_of(zero), extent_of(x, -2), extent_of(x, -1)
        threads = threads if n * c >= SMALL_ELEMENTS else 1
        job = Loss(labels=data_of(labels), n=n, c=c, blocks=block_count(n, LOSS_ROWS))
        if not (read_stack(job.src, x, size, 1, n, c) and read_stack(job.dst, dx, size, 1, n, c) and count_of(labels) == n):
            return CHANGED
        job.slots = Rows(scratch, round_up(3 * LOSS_ROWS * size, 64))
        job.losses = scratch + threads * job.slots.row
        needed = threads * job.slots.row + job.blocks * 8
        if needed > scratch_bytes:
            return needed
        into = data_of(loss)
        parallel_for_without_gil(True, c_address(task), address_of(job), job.blocks, threads)
        total = 0.0
        for block in range(job.blocks):
            total += get(0.0, job.losses + block * 8)
        put(into, total)
        return 0

    return loss_and_gradient
