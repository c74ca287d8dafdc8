"""The bias reduction alone: db = sum of dout over rows.

Rows are summed in T within a block, blocks in float64, slabs of blocks in their order: the bits depend on shape and strides
alone, and long sums of one sign stay within a few units in the last place.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, round_up
from rectilinear.kernels.loops.gradients import add_sums, clear
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.pack import Packing, copy
from rectilinear.kernels.loops.plan import Reduction, plan_reduction
from rectilinear.kernels.micro.library import rows
from rectilinear.kernels.micro.rows import PREFETCH, SUM, RowsOperands
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import CHANGED, extent_of, get, put, read_stack, rounded, size_of
from rectilinear.kernels.runtime.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import address_of
from rectilinear.kernels.runtime.threads import parallel_for, task_of

ROWS_IN_T = 256
"""Rows summed in T: 64 additions of four rows each, so that even float32 ones of one sign lose less than 64 half-ulps."""

QUICK_ELEMENTS = 1 << 14
"""So many are summed in a microsecond or two: letting go of the GIL would cost as much as others would gain."""


@jit_inner
def _task(zero: Any, index: int, job: Reduction, slot: int) -> None:
    """The sums of one slab of rows and one stripe of columns of one group, in float64."""
    plan, size = job.plan, size_of(zero)
    n, m = plan.rows, plan.columns
    group, slab, stripe = index // (plan.slabs * plan.stripes), index // plan.stripes % plan.slabs, index % plan.stripes
    first, last = block_start(n, plan.slabs, slab), block_start(n, plan.slabs, slab + 1)
    c0, c1 = block_start(m, plan.stripes, stripe), block_start(m, plan.stripes, stripe + 1)
    width = c1 - c0
    sums = job.slots.data + slot * job.slots.row
    copied = Rows(sums + round_up(width * size, 64), width * size)
    total = job.totals + ((group * plan.slabs + slab) * m + c0) * 8
    clear(0.0, total, width)
    prefetch = PREFETCH if job.groups * n * abs(plan.row) > host(zero).past else 0
    steps = block_count(last - first, ROWS_IN_T)
    for step in range(steps):
        r0, r1 = first + block_start(last - first, steps, step), first + block_start(last - first, steps, step + 1)
        src = job.src.data + group * job.src.group + r0 * plan.row + c0 * job.src.column
        block = RowsOperands(rows=r1 - r0, columns=width, src=Rows(src, plan.row), sums=sums, flags=SUM | prefetch)
        clear(zero, sums, width)
        if job.src.column != size:
            copy(zero, Packing(rows=r1 - r0, columns=width, src=Matrix(src, plan.row, job.src.column), dst=copied))
            block.src, block.flags = copied, SUM
        rows(zero, block)
        add_sums(zero, sums, total, width)


@jit_inner
def _finish(zero: Any, job: Reduction) -> None:
    """Add up slabs and folded rows, and what rows were left over by folding; round into out."""
    plan, size = job.plan, size_of(zero)
    m = plan.columns
    for group in range(job.groups):
        totals = job.totals + group * plan.slabs * m * 8
        for slab in range(1, plan.slabs):
            add_sums(0.0, totals + slab * m * 8, totals, m)
        left = job.src.data + group * job.src.group + plan.rows * plan.row
        for j in range(job.m):
            total = 0.0
            for f in range(plan.fold):
                total += get(0.0, totals + (f * job.m + j) * 8)
            for i in range(plan.left):
                total += get(zero, left + (i * job.m + j) * size)
            put(job.out.data + group * job.out.row + j * job.out.column, rounded(zero, total))


def entry(zero: Any) -> Any:
    """The bias reduction for zero's dtype, as a jitted function of the ids of dout and out, scratch, and threads.

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """
    task = task_of(Reduction, zero, _task)

    @jit(nogil=False)
    def reduce(src: int, out: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        size, groups, n, m = size_of(zero), extent_of(src, -3), extent_of(src, -2), extent_of(src, -1)
        job = Reduction(groups=groups, n=n, m=m)
        if not (read_stack(job.src, src, size, groups, n, m) and read_stack(job.out, out, size, 1, groups, m)):
            return CHANGED
        if m == 0:
            return 0
        plan_reduction(job, host(zero), ROWS_IN_T)
        tasks = groups * job.plan.slabs * job.plan.stripes
        threads = min(threads, tasks)
        job.totals = scratch
        job.slots = Rows(scratch + round_up(groups * job.plan.slabs * job.plan.columns * 8, 64), job.plan.slot_bytes)
        needed = job.slots.data + threads * job.slots.row - scratch
        if needed > scratch_bytes:
            return needed
        others = let_go_of_gil(groups * n * m > QUICK_ELEMENTS)
        parallel_for(c_address(task), address_of(job), tasks, threads)
        _finish(zero, job)
        take_gil_back(others)
        return 0

    return reduce
