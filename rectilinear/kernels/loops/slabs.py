"""The backward pass by slabs, for long and narrow operands: each task takes a fixed slab of rows through the whole backward, into a dw and
db of its own; these are added in the order of the slabs. A stack of many small matrices goes the same way, one slab a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, packed_row, round_up
from rectilinear.kernels.loops.gradients import Samples, add_sums, clear, masked_block, move_to, write_db, write_products
from rectilinear.kernels.loops.matmul import Part, multiply, pack_b
from rectilinear.kernels.loops.pack import Packing, copy
from rectilinear.kernels.loops.plan import BLOCK_ROWS, PACKED, Backward, Matmul
from rectilinear.kernels.loops.product import Prefetch, prefetch_rows
from rectilinear.kernels.micro.library import lanes, rows, vectors
from rectilinear.kernels.micro.rows import SUM, WRITE, RowsOperands
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import address_of, at, record
from rectilinear.kernels.runtime.threads import parallel_for, task_of


@record
class Slab:
    """What a thread has of its own for a slab: the two products, each a single part, and scratch memory, laid out from `z` on: a block of
    dz, its sums, the totals, a block of x, copied or packed, or what strips keep, packed w^T; and its end."""

    dx: Matmul = Matmul()
    dw: Matmul = Matmul()
    all_of_dx: Part = Part()
    all_of_dw: Part = Part()
    ahead: Prefetch = Prefetch()
    z: int = 0
    sums: int = 0
    total: int = 0
    x: int = 0
    w: int = 0
    end: int = 0


@jit_inner
def _lay_out(zero: Any, job: Backward, start: int, own: Slab) -> None:
    size, d, m = size_of(zero), job.d, job.m
    nr = vectors(zero) * lanes(zero)
    own.z = start
    own.sums = own.z + BLOCK_ROWS * job.plan.lead
    own.total = own.sums + round_up(m * size, 64)
    own.x = own.total + round_up(m * 8, 64)
    own.w = own.x + BLOCK_ROWS * packed_row(round_up(d, nr) * size)
    own.end = own.w + round_up(block_count(d, nr) * m * nr * size, 64)


@jit_inner
def _prepare(zero: Any, job: Backward, slot: int, own: Slab) -> None:
    dx, dw, ahead = own.dx, own.dw, address_of(own.ahead)
    _lay_out(zero, job, job.slots.data + slot * job.slots.row, own)
    dx.packed.data, dw.packed.data, dx.prefetch, dw.prefetch = own.w, own.x, ahead, ahead
    own.all_of_dx = Part(job=address_of(dx), panels=block_count(job.d, dx.plan.width * lanes(zero)))
    own.all_of_dw = Part(job=address_of(dw), rows=dw.n, panels=block_count(dw.m, dw.plan.width * lanes(zero)), space=own.x)
    if job.plan.slabs > 1:
        dw.c.row = job.plan.part_row


@jit_inner
def _task(zero: Any, index: int, job: Backward, own: Slab) -> None:
    """The whole backward of one slab of one group."""
    plan, n, d, m, slabs = job.plan, job.n, job.d, job.m, job.plan.slabs
    group, slab = index // slabs, index % slabs
    first, last = block_start(n, slabs, slab), block_start(n, slabs, slab + 1)
    want_dx, want_dw = job.dx.data != 0, job.dw.data != 0
    dx, dw, ahead = own.dx, own.dw, own.ahead
    total = own.total if slabs == 1 else job.sums + index * round_up(m * 8, 64)
    clear(0.0, total, m)
    for r0 in range(first, max(last, first + 1), BLOCK_ROWS):
        # The same blocks as in `blocks`: they decide the order in which db is summed.
        s = Samples(group=group, first=r0, count=min(BLOCK_ROWS, last - r0), z=own.z, columns=m)
        move_to(job, s, dx, dw)
        dw.flags = ADD if r0 > first else 0
        if slabs > 1:
            dw.c.data = job.parts + index * dw.n * plan.part_row
        if r0 == first and want_dx and dx.plan.b == PACKED:
            pack_b(zero, dx, Part(rows=m, panels=own.all_of_dx.panels))
        # What comes next: the rest of the slab, or where that is done and a group is one slab, the next group.
        next_group, next_row, left, next_d = group, r0 + s.count, last - r0 - s.count, 0
        if left == 0 and slabs == 1 and group + 1 < job.groups:
            next_group, next_row, left, next_d = group + 1, 0, n, d
        left = min(left, BLOCK_ROWS)
        clear(zero, own.sums, m)
        masked_block(zero, job, s, own.sums)
        add_sums(zero, own.sums, total, m)
        if want_dx:
            prefetch_rows(zero, ahead.now, job.dout, next_group, next_row, left, m)
            prefetch_rows(zero, ahead.then, job.w, next_group, 0, next_d, m)
            own.all_of_dx.rows = s.count
            multiply(zero, own.all_of_dx)
        if want_dw:
            prefetch_rows(zero, ahead.now, job.x, next_group, next_row, left, d)
            if want_dx:
                prefetch_rows(zero, ahead.then, job.dx, next_group, next_row, left, d)
            prefetch_rows(zero, ahead.last, job.dw, next_group, 0, next_d, m)
            if dw.plan.b == PACKED:
                pack_b(zero, dw, Part(rows=s.count, panels=own.all_of_dw.panels))
            multiply(zero, own.all_of_dw)
    if job.db.data != 0 and slabs == 1:
        write_db(zero, job, group, total)


@jit_inner
def _combine_task(zero: Any, index: int, job: Backward, slot: int) -> None:
    """Add up the slabs of some rows of one group's dw, the first task those of its db as well, in the order of the slabs."""
    size, plan, m, slabs, adders = size_of(zero), job.plan, job.m, job.plan.slabs, job.tasks.adders
    group, own = index // adders, index % adders
    by_columns = plan.dw_by_columns != 0
    extent, columns, row = (m, job.d, job.dw.column) if by_columns else (job.d, m, job.dw.row)
    if job.dw.data != 0:
        part, stride = job.parts + group * slabs * extent * plan.part_row, extent * plan.part_row
        i0, i1 = block_start(extent, adders, own), block_start(extent, adders, own + 1)
        for i in range(i0, i1):
            total = first = part + i * plan.part_row
            if plan.dw_turned == 0:
                total = job.dw.data + group * job.dw.group + i * row
                rows(zero, RowsOperands(rows=1, columns=columns, src=Rows(first, 0), dst=Rows(total, 0), flags=WRITE))
            rows(zero, RowsOperands(rows=slabs - 1, columns=columns, src=Rows(first + stride, stride), sums=total, flags=SUM))
        if plan.dw_turned != 0:
            src = Matrix(part + i0 * plan.part_row, size, plan.part_row)
            dst = Rows(job.dw.data + group * job.dw.group + i0 * size, job.dw.row)
            copy(zero, Packing(rows=job.d, columns=i1 - i0, src=src, dst=dst))
    if job.db.data != 0 and own == 0:
        bytes_of_sums = round_up(m * 8, 64)
        total = job.sums + group * slabs * bytes_of_sums
        for slab in range(1, slabs):
            add_sums(0.0, total + slab * bytes_of_sums, total, m)
        write_db(zero, job, group, total)


def runner(zero: Any) -> Callable[[Backward, int, int, int], int]:
    """A jitted function of the job, scratch, its bytes, and threads: 0, or how many bytes of scratch it needs and has not got."""
    combine = task_of(Backward, zero, _combine_task)

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Backward, address)
        own = Slab(dx=job.to_dx, dw=job.to_dw)
        _prepare(zero, job, slot, own)
        for i in range(index * job.tasks.run, min((index + 1) * job.tasks.run, job.tasks.count)):
            _task(zero, i, job, own)

    @jit_inner
    def run(job: Backward, scratch: int, scratch_bytes: int, threads: int) -> int:
        own = Slab()
        _lay_out(zero, job, 0, own)
        write_products(zero, job)
        count = job.tasks.count
        threads = min(threads, count)
        shared = count if job.plan.slabs > 1 else 0
        job.slots = Rows(scratch, own.end)
        job.parts = scratch + threads * own.end
        job.sums = job.parts + shared * (job.m if job.plan.dw_by_columns != 0 else job.d) * job.plan.part_row
        needed = job.sums + shared * round_up(job.m * 8, 64) - scratch
        if needed > scratch_bytes:
            return needed
        parallel_for(c_address(task), address_of(job), -(-count // job.tasks.run), threads)
        if job.plan.slabs > 1:
            parallel_for(c_address(combine), address_of(job), job.groups * job.tasks.adders, threads)
        return 0

    return run
