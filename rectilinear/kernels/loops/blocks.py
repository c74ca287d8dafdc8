"""The backward pass by blocks, for all but long and narrow operands: dz is packed a stretch of rows at a time, then tasks compute blocks
of dx and of dw, group after group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, round_up
from rectilinear.kernels.loops.gradients import Samples, add_sums, clear, masked_block, move_to, write_db, write_products
from rectilinear.kernels.loops.matmul import Part, compute, pack_b, prepare, slot_bytes
from rectilinear.kernels.loops.plan import BLOCK_ROWS, PACKED, Backward
from rectilinear.kernels.micro.library import lanes, vectors
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import address_of, at
from rectilinear.kernels.runtime.threads import parallel_for


@jit_inner
def _pack_task(zero: Any, index: int, job: Backward) -> None:
    """Some columns of one block of rows of dz with their sums, or of x, or some panels of w^T."""
    tasks, plan, size, m = job.tasks, job.plan, size_of(zero), job.m
    if index < job.to_dx.tasks.parts:
        prepare(zero, index, job.to_dx)
        return
    # What is there of dz and of x for one block of rows comes together.
    nr, parts = vectors(zero) * lanes(zero), tasks.z_parts + tasks.x_parts
    index -= job.to_dx.tasks.parts
    index, part = index // parts, index % parts
    row = index * BLOCK_ROWS
    s = Samples(group=job.group, first=job.first + row, count=min(BLOCK_ROWS, job.last - job.first - row), z=job.z + row * plan.lead)
    is_x = part >= tasks.z_parts
    extent, part, parts = (job.d, part - tasks.z_parts, tasks.x_parts) if is_x else (m, part, tasks.z_parts)
    panels = block_count(extent, nr)
    p0, p1 = block_start(panels, parts, part), block_start(panels, parts, part + 1)
    if not is_x:
        s.column, s.columns = p0 * nr, min(m, p1 * nr) - p0 * nr
        sums = job.sums + index * round_up(m * size, 64)
        clear(zero, sums + s.column * size, s.columns)
        masked_block(zero, job, s, sums)
    if is_x or (job.to_dw.plan.b == PACKED and plan.dw_by_columns == 0):
        pack_b(zero, job.to_dw, Part(row=row, rows=s.count, panel=p0, panels=p1 - p0))


def runner(zero: Any) -> Callable[[Backward, int, int, int], int]:
    """A jitted function of the job, scratch, its bytes, and threads: 0, or how many bytes of scratch it needs and has not got."""

    @jit_inner
    def pack(index: int, address: int, slot: int) -> None:
        _pack_task(zero, index, at(Backward, address))

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Backward, address)
        of_dx = job.to_dx.tasks.count
        if index < of_dx:
            compute(zero, index, job.to_dx, slot)
        else:
            compute(zero, index - of_dx, job.to_dw, slot)

    @jit_inner
    def run(job: Backward, scratch: int, scratch_bytes: int, threads: int) -> int:
        size, n, m, stretch, dx, dw = size_of(zero), job.n, job.m, job.plan.stretch, job.to_dx, job.to_dw
        nr, bytes_of_sums, w_parts = vectors(zero) * lanes(zero), round_up(m * size, 64), dx.tasks.parts
        write_products(zero, job)
        dx.n = dw.k = min(n, stretch)
        job.z = scratch
        dw.packed.data = job.z + stretch * job.plan.lead
        job.sums = dw.packed.data + (block_count(dw.m, nr) * dw.panel if dw.plan.b == PACKED else 0)
        totals = job.sums + stretch // BLOCK_ROWS * bytes_of_sums
        dx.packed.data = totals + round_up(m * 8, 64)
        slots = dx.packed.data + (block_count(job.d, nr) * dx.panel if w_parts != 0 else 0)
        dx.slots = Rows(slots, max(slot_bytes(zero, dx), slot_bytes(zero, dw)))
        dw.slots = dx.slots
        needed = slots + threads * dx.slots.row - scratch
        if needed > scratch_bytes:
            return needed
        parts = job.tasks.z_parts + job.tasks.x_parts
        for group in range(job.groups):
            job.group, dx.tasks.parts = group, w_parts
            clear(0.0, totals, m)
            for first in range(0, max(n, 1), stretch):
                job.first, job.last = first, min(n, first + stretch)
                move_to(job, Samples(group=group, first=first, count=job.last - first, z=job.z), dx, dw)
                blocks = -(-(job.last - first) // BLOCK_ROWS)
                parallel_for(c_address(pack), address_of(job), dx.tasks.parts + blocks * parts, threads)
                dx.tasks.parts = 0  # w^T stays as it is packed
                for block in range(blocks):
                    add_sums(zero, job.sums + block * bytes_of_sums, totals, m)
                parallel_for(c_address(task), address_of(job), job.tasks.count, threads)
            if job.db.data != 0:
                write_db(zero, job, group, totals)
        return 0

    return run
