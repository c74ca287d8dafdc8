"""The backward pass by blocks, for all but long and narrow operands: dz is packed a stretch of rows at a time, then tasks compute blocks
of dx and of dw, group after group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, longest_block, packed_row, round_up, rows_start
from rectilinear.kernels.loops.gradients import (
    Block,
    add_sums,
    clear,
    dw_block,
    dx_block,
    dx_by_dots,
    dx_by_strips,
    masked_block,
    pack_b,
    pack_w,
    write_db,
)
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.plan import BLOCK_ROWS, COPIED, IN_PLACE, PACKED, Backward, panels_at_once
from rectilinear.kernels.loops.product import packed_step, tiles_of
from rectilinear.kernels.loops.strips import strips_bytes
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
    tasks, plan, size, d, m = job.tasks, job.plan, size_of(zero), job.d, job.m
    nr, parts = vectors(zero) * lanes(zero), tasks.w_parts
    if index < parts:
        panels = block_count(d, nr)
        first, last = block_start(panels, parts, index), block_start(panels, parts, index + 1)
        pack_w(zero, job, job.group, first, last, job.packed_w + first * m * nr * size)
        return
    # What is there of dz and of x for one block of rows comes together.
    index, parts = index - parts, tasks.z_parts + tasks.x_parts
    index, part = index // parts, index % parts
    first = job.first + index * BLOCK_ROWS
    b = Block(group=job.group, first=first, count=min(BLOCK_ROWS, job.last - first), z=job.z + index * BLOCK_ROWS * plan.lead)
    b.packed_b = job.packed_b + index * BLOCK_ROWS * nr * size
    is_x = part >= tasks.z_parts
    extent, part, parts = (d, part - tasks.z_parts, tasks.x_parts) if is_x else (m, part, tasks.z_parts)
    panels = block_count(extent, nr)
    p0, p1 = block_start(panels, parts, part), block_start(panels, parts, part + 1)
    if not is_x:
        columns = min(m, p1 * nr) - p0 * nr
        sums = job.sums + index * round_up(m * size, 64)
        clear(zero, sums + p0 * nr * size, columns)
        b.panel = p0
        masked_block(zero, job, b, columns, sums)
    if is_x or (plan.dw_b == PACKED and plan.dw_by_columns == 0):
        pack_b(zero, job, b, p0, p1)


@jit_inner
def _dx_task(zero: Any, index: int, job: Backward, slot: int) -> None:
    tasks, m = job.tasks, job.m
    nr = vectors(zero) * lanes(zero)
    r, c = index % tasks.dx_rows, index // tasks.dx_rows
    count, mr = job.last - job.first, host(zero).rows
    r0, r1 = rows_start(count, mr, tasks.dx_rows, r), rows_start(count, mr, tasks.dx_rows, r + 1)
    panels = block_count(job.d, nr)
    p0, p1 = block_start(panels, tasks.dx_columns, c), block_start(panels, tasks.dx_columns, c + 1)
    b = Block(group=job.group, first=job.first + r0, count=r1 - r0, z=job.z + r0 * job.plan.lead, panel=p0, panels=p1 - p0)
    if job.plan.by_dots != 0:
        dx_by_dots(zero, job, b)
    elif job.plan.by_strips != 0:
        b.space = job.slots.data + slot * job.slots.row
        dx_by_strips(zero, job, b)
    elif job.plan.w == IN_PLACE:
        dx_block(zero, job, b)
    elif tasks.dx_rows > 1:
        b.packed_w = job.packed_w + p0 * m * nr * size_of(zero)
        dx_block(zero, job, b)
    else:
        b.packed_w = job.slots.data + slot * job.slots.row
        step = panels_at_once(host(zero), p1 - p0, m * nr)
        for panel in range(p0, p1, step):
            b.panel, b.panels = panel, min(step, p1 - panel)
            pack_w(zero, job, job.group, panel, panel + b.panels, b.packed_w)
            dx_block(zero, job, b)


@jit_inner
def _dw_task(zero: Any, index: int, job: Backward, slot: int) -> None:
    tasks, nr = job.tasks, job.plan.dw_width * lanes(zero)
    by_columns = job.plan.dw_by_columns != 0
    rows, columns = (job.m, job.d) if by_columns else (job.d, job.m)
    r, c = index // tasks.dw_columns, index % tasks.dw_columns
    mr = host(zero).rows
    r0, r1 = rows_start(rows, mr, tasks.dw_rows, r), rows_start(rows, mr, tasks.dw_rows, r + 1)
    panels = block_count(columns, nr)
    p0, p1 = block_start(panels, tasks.dw_columns, c), block_start(panels, tasks.dw_columns, c + 1)
    b = Block(group=job.group, row=r0, rows=r1 - r0, panel=p0, panels=p1 - p0, space=job.slots.data + slot * job.slots.row)
    b.dw = Rows(job.dw.data + job.group * job.dw.group, job.dw.column if by_columns else job.dw.row)
    count = job.last - job.first
    steps = block_count(count, host(zero).kc)
    for step in range(steps):
        k0, k1 = block_start(count, steps, step), block_start(count, steps, step + 1)
        b.first, b.count, b.z, b.packed_b = job.first + k0, k1 - k0, job.z + k0 * job.plan.lead, job.packed_b + k0 * nr * size_of(zero)
        b.adds = 1 if b.first > 0 else 0
        dw_block(zero, job, b)


@jit_inner
def _slot_bytes(zero: Any, job: Backward) -> int:
    """Scratch of one thread: panels of w^T, or a block of dw's A, or what strips keep."""
    size, nr = size_of(zero), vectors(zero) * lanes(zero)
    rows, row = longest_block(job.m if job.plan.dw_by_columns != 0 else job.d, host(zero).rows, max(1, job.tasks.dw_rows)), 0
    if job.plan.dw_a == COPIED:
        row = packed_row(rows * size)
    elif job.plan.dw_a == PACKED:
        row = tiles_of(zero, rows, vectors(zero)) * packed_step(zero, vectors(zero))
    of_dx = 0
    if job.plan.by_strips != 0:
        of_dx = strips_bytes(zero, job.n, job.m, job.d, True)
    elif job.plan.w == PACKED and job.plan.by_dots == 0 and job.tasks.dx_rows == 1:
        of_dx = panels_at_once(host(zero), block_count(job.d, nr), job.m * nr) * job.m * nr * size
    of_dw = strips_bytes(zero, 1, job.n, job.d, False) if job.plan.dw_by_strips != 0 else host(zero).kc * row
    return round_up(max(of_dx, of_dw), 64)


def runner(zero: Any) -> Callable[[Backward, int, int, int], int]:
    """A jitted function of the job, scratch, its bytes, and threads: 0, or how many bytes of scratch it needs and has not got."""

    @jit_inner
    def pack(index: int, address: int, slot: int) -> None:
        _pack_task(zero, index, at(Backward, address))

    @jit_inner
    def compute(index: int, address: int, slot: int) -> None:
        job = at(Backward, address)
        dx_tasks = job.tasks.dx_rows * job.tasks.dx_columns
        if index < dx_tasks:
            _dx_task(zero, index, job, slot)
        else:
            _dw_task(zero, index - dx_tasks, job, slot)

    @jit_inner
    def run(job: Backward, scratch: int, scratch_bytes: int, threads: int) -> int:
        size, n, m, stretch, w_parts = size_of(zero), job.n, job.m, job.plan.stretch, job.tasks.w_parts
        nr, columns_of_b = vectors(zero) * lanes(zero), job.d if job.plan.dw_by_columns != 0 else m
        panels = block_count(job.d, nr) if w_parts != 0 else 0
        bytes_of_sums = round_up(m * size, 64)
        job.z = scratch
        job.packed_b = job.z + stretch * job.plan.lead
        job.sums = job.packed_b + (stretch * round_up(columns_of_b, nr) * size if job.plan.dw_b == PACKED else 0)
        totals = job.sums + stretch // BLOCK_ROWS * bytes_of_sums
        job.packed_w = totals + round_up(m * 8, 64)
        job.slots = Rows(job.packed_w + panels * m * nr * size, _slot_bytes(zero, job))
        needed = job.slots.data + threads * job.slots.row - scratch
        if needed > scratch_bytes:
            return needed
        parts = job.tasks.z_parts + job.tasks.x_parts
        for group in range(job.groups):
            job.group, job.tasks.w_parts = group, w_parts
            clear(0.0, totals, m)
            for first in range(0, max(n, 1), stretch):
                job.first, job.last = first, min(n, first + stretch)
                blocks = -(-(job.last - first) // BLOCK_ROWS)
                parallel_for(c_address(pack), address_of(job), job.tasks.w_parts + blocks * parts, threads)
                job.tasks.w_parts = 0
                for block in range(blocks):
                    add_sums(zero, job.sums + block * bytes_of_sums, totals, m)
                parallel_for(c_address(compute), address_of(job), job.tasks.count, threads)
            if job.db.data != 0:
                write_db(zero, job, group, totals)
        return 0

    return run
