"""The backward pass by slabs, for long and narrow operands: each task takes a fixed slab of rows through the whole backward, into a dw and
db of its own; these are added in the order of the slabs. A stack of many small matrices goes the same way, one slab a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, packed_row, round_up
from rectilinear.kernels.loops.gradients import (
    Block,
    add_sums,
    clear,
    dw_block,
    dx_block,
    dx_by_dots,
    masked_block,
    pack_b,
    pack_w,
    write_db,
)
from rectilinear.kernels.loops.plan import BLOCK_ROWS, PACKED, Backward
from rectilinear.kernels.loops.product import Prefetch, prefetch_rows
from rectilinear.kernels.micro.library import lanes, rows, vectors
from rectilinear.kernels.micro.rows import SUM, WRITE, RowsOperands
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for


@record
class Space:
    """A slab's scratch memory, laid out from `z` on: a block of dz, its sums, the totals, a block of x, copied or packed, or what strips
    keep, packed w^T; and its end."""

    z: int = 0
    sums: int = 0
    total: int = 0
    x: int = 0
    packed_w: int = 0
    end: int = 0


@jit_inner
def _lay_out(zero: Any, job: Backward, start: int, space: Space) -> None:
    size, d, m = size_of(zero), job.d, job.m
    nr = vectors(zero) * lanes(zero)
    space.z = start
    space.sums = space.z + BLOCK_ROWS * job.plan.lead
    space.total = space.sums + round_up(m * size, 64)
    space.x = space.total + round_up(m * 8, 64)
    space.packed_w = space.x + BLOCK_ROWS * packed_row(round_up(d, nr) * size)
    space.end = space.packed_w + round_up(block_count(d, nr) * m * nr * size, 64)


@jit_inner
def _task(zero: Any, index: int, job: Backward, slot: int) -> None:
    """The whole backward of one slab of one group."""
    plan, nr = job.plan, vectors(zero) * lanes(zero)
    n, d, m, slabs = job.n, job.d, job.m, plan.slabs
    group, slab = index // slabs, index % slabs
    first, last = block_start(n, slabs, slab), block_start(n, slabs, slab + 1)
    want_dx, want_dw = job.dx.data != 0, job.dw.data != 0
    by_columns = plan.dw_by_columns != 0

    space = Space()
    _lay_out(zero, job, job.slots.data + slot * job.slots.row, space)
    ahead = Prefetch()
    b = Block(group=group, z=space.z, packed_w=space.packed_w, packed_b=space.x, space=space.x, rows=m if by_columns else d)
    b.dw = Rows(job.dw.data + group * job.dw.group, job.dw.column if by_columns else job.dw.row)
    if slabs > 1:
        b.dw = Rows(job.parts + index * b.rows * plan.part_row, plan.part_row)
        space.total = job.sums + index * round_up(m * 8, 64)
    clear(0.0, space.total, m)
    dx_panels, dw_panels = block_count(d, nr), block_count(d if by_columns else m, plan.dw_width * lanes(zero))
    if want_dx and plan.by_dots == 0 and plan.w == PACKED:
        pack_w(zero, job, group, 0, dx_panels, space.packed_w)
    for r0 in range(first, max(last, first + 1), BLOCK_ROWS):
        # The same blocks as in `blocks`: they decide the order in which db is summed.
        b.first, b.count = r0, min(BLOCK_ROWS, last - r0)
        # What comes next: the rest of the slab, or where that is done and a group is one slab, the next group.
        next_group, next_row, left, next_d = group, r0 + b.count, last - r0 - b.count, 0
        if left == 0 and slabs == 1 and group + 1 < job.groups:
            next_group, next_row, left, next_d = group + 1, 0, n, d
        left = min(left, BLOCK_ROWS)
        clear(zero, space.sums, m)
        masked_block(zero, job, b, m, space.sums)
        add_sums(zero, space.sums, space.total, m)
        b.panels, b.prefetch = dx_panels, 0
        if want_dx and plan.by_dots != 0:
            dx_by_dots(zero, job, b)
        elif want_dx:
            prefetch_rows(zero, ahead.now, job.dout, next_group, next_row, left, m)
            prefetch_rows(zero, ahead.then, job.w, next_group, 0, next_d, m)
            b.prefetch = address_of(ahead)
            dx_block(zero, job, b)
        if want_dw:
            prefetch_rows(zero, ahead.now, job.x, next_group, next_row, left, d)
            if want_dx:
                prefetch_rows(zero, ahead.then, job.dx, next_group, next_row, left, d)
            prefetch_rows(zero, ahead.last, job.dw, next_group, 0, next_d, m)
            b.panels, b.prefetch, b.adds = dw_panels, address_of(ahead), 1 if r0 > first else 0
            if plan.dw_b == PACKED:
                pack_b(zero, job, b, 0, dw_panels)
            dw_block(zero, job, b)
    if job.db.data != 0 and slabs == 1:
        write_db(zero, job, group, space.total)


@jit_inner
def _combine_task(zero: Any, index: int, job: Backward) -> None:
    """Add up the slabs of some rows of one group's dw, the first task those of its db as well, in the order of the slabs."""
    plan, m, slabs, adders = job.plan, job.m, job.plan.slabs, job.tasks.adders
    group, own = index // adders, index % adders
    by_columns = plan.dw_by_columns != 0
    extent, columns, row = (m, job.d, job.dw.column) if by_columns else (job.d, m, job.dw.row)
    if job.dw.data != 0:
        part, stride = job.parts + group * slabs * extent * plan.part_row, extent * plan.part_row
        for i in range(block_start(extent, adders, own), block_start(extent, adders, own + 1)):
            dw, first = job.dw.data + group * job.dw.group + i * row, part + i * plan.part_row
            rows(zero, RowsOperands(rows=1, columns=columns, src=Rows(first, 0), dst=Rows(dw, 0), flags=WRITE))
            rows(zero, RowsOperands(rows=slabs - 1, columns=columns, src=Rows(first + stride, stride), sums=dw, flags=SUM))
    if job.db.data != 0 and own == 0:
        bytes_of_sums = round_up(m * 8, 64)
        total = job.sums + group * slabs * bytes_of_sums
        for slab in range(1, slabs):
            add_sums(0.0, total + slab * bytes_of_sums, total, m)
        write_db(zero, job, group, total)


def runner(zero: Any) -> Callable[[Backward, int, int, int], int]:
    """A jitted function of the job, scratch, its bytes, and threads: 0, or how many bytes of scratch it needs and has not got."""

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Backward, address)
        for i in range(index * job.tasks.run, min((index + 1) * job.tasks.run, job.tasks.count)):
            _task(zero, i, job, slot)

    @jit_inner
    def combine(index: int, address: int, slot: int) -> None:
        _combine_task(zero, index, at(Backward, address))

    @jit_inner
    def run(job: Backward, scratch: int, scratch_bytes: int, threads: int) -> int:
        space = Space()
        _lay_out(zero, job, 0, space)
        count = job.tasks.count
        threads = min(threads, count)
        shared = count if job.plan.slabs > 1 else 0
        job.slots = Rows(scratch, space.end)
        job.parts = scratch + threads * space.end
        job.sums = job.parts + shared * (job.m if job.plan.dw_by_columns != 0 else job.d) * job.plan.part_row
        needed = job.sums + shared * round_up(job.m * 8, 64) - scratch
        if needed > scratch_bytes:
            return needed
        parallel_for(c_address(task), address_of(job), -(-count // job.tasks.run), threads)
        if job.plan.slabs > 1:
            parallel_for(c_address(combine), address_of(job), job.groups * job.tasks.adders, threads)
        return 0

    return run
