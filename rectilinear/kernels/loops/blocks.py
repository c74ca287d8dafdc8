"""The backward pass by blocks, for all but long and narrow operands: dz is packed a stretch of rows at a time, then tasks compute blocks
of dx and of dw, group after group. A small dz is packed by every thread for itself, with its first task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, packed_row, round_up
from rectilinear.kernels.loops.gradients import Samples, add_sums, clear, masked_block, move_to, write_db, write_products
from rectilinear.kernels.loops.matmul import Part, compute, pack_b, prepare, slot_bytes
from rectilinear.kernels.loops.plan import BLOCK_ROWS, PACKED, Backward, Matmul
from rectilinear.kernels.micro.library import lanes, vectors
from rectilinear.kernels.micro.simd import LINE_BYTES
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import size_of
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.operands import Rows
from rectilinear.kernels.runtime.records import PAIR_BYTES, address_of, at, bytes_of, record
from rectilinear.kernels.runtime.threads import parallel_for, task_of


@record
class Own:
    """A dz that is ready for tasks: both products of it. Behind it lies dz, of the rows that the job is at, and behind that the sums of
    each of its blocks.

    All threads share one, which is ready when tasks begin, or each has its own, and makes it ready with its first task.
    """

    ready: int = 0
    dx: Matmul = Matmul()
    dw: Matmul = Matmul()


_BYTES_OF_OWN = round_up(bytes_of(Own), LINE_BYTES)


@jit_inner
def _mask(zero: Any, job: Backward, own: int, block: int, column: int, columns: int) -> None:
    """Columns of a block of dz, with their sums."""
    size, row = size_of(zero), block * BLOCK_ROWS
    s = Samples(group=job.group, first=job.first + row, count=min(BLOCK_ROWS, job.last - job.first - row), column=column, columns=columns)
    s.z = own + _BYTES_OF_OWN + row * job.plan.lead
    sums = _sums(zero, job, own, block)
    clear(zero, sums + column * size, columns)
    masked_block(zero, job, s, sums)


@jit_inner
def _sums(zero: Any, job: Backward, own: int, block: int) -> int:
    return own + _BYTES_OF_OWN + min(job.n, job.plan.stretch) * job.plan.lead + block * round_up(job.m * size_of(zero), LINE_BYTES)


@jit_inner
def _make_ready(job: Backward, address: int) -> None:
    """Both products of this dz, to be ready for tasks."""
    own = at(Own, address)
    own.dx, own.dw = job.to_dx, job.to_dw
    s = Samples(group=job.group, first=job.first, count=job.last - job.first, z=address + _BYTES_OF_OWN)
    move_to(job, s, own.dx, own.dw)
    own.ready = 1


@jit_inner
def _pack_task(zero: Any, index: int, job: Backward, slot: int) -> None:
    """Some columns of one block of rows of dz with their sums, or of x, or some panels of w^T."""
    tasks = job.tasks
    if index < job.to_dx.tasks.parts:
        prepare(zero, index, job.to_dx, slot)
        return
    # What is there of dz and of x for one block of rows comes together.
    nr, parts = vectors(zero) * lanes(zero), tasks.z_parts + tasks.x_parts
    index -= job.to_dx.tasks.parts
    block, part = index // parts, index % parts
    is_x = part >= tasks.z_parts
    extent, part, parts = (job.d, part - tasks.z_parts, tasks.x_parts) if is_x else (job.m, part, tasks.z_parts)
    panels, row = block_count(extent, nr), block * BLOCK_ROWS
    p0, p1 = block_start(panels, parts, part), block_start(panels, parts, part + 1)
    if not is_x:
        _mask(zero, job, job.own.data, block, p0 * nr, min(extent, p1 * nr) - p0 * nr)
    if is_x or (job.to_dw.plan.b == PACKED and job.plan.dw_by_columns == 0):
        pack_b(zero, job.to_dw, Part(row=row, rows=min(BLOCK_ROWS, job.last - job.first - row), panel=p0, panels=p1 - p0))


def runner(zero: Any) -> Callable[[Backward, int, int, int], int]:
    """A jitted function of the job, scratch, its bytes, and threads: 0, or how many bytes of scratch it needs and has not got."""

    pack = task_of(Backward, zero, _pack_task)

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Backward, address)
        own, of_dx = job.own.data + slot * job.own.row, job.to_dx.tasks.count
        if at(Own, own).ready == 0:
            for block in range(block_count(job.last - job.first, BLOCK_ROWS)):
                _mask(zero, job, own, block, 0, job.m)
            _make_ready(job, own)
        if index < of_dx:
            compute(zero, index, at(Own, own).dx, slot)
        else:
            compute(zero, index - of_dx, at(Own, own).dw, slot)

    @jit_inner
    def run(job: Backward, scratch: int, scratch_bytes: int, threads: int) -> int:
        n, m, stretch, dx, dw = job.n, job.m, job.plan.stretch, job.to_dx, job.to_dw
        workers = min(threads, max(1, job.tasks.count))
        nr, w_parts, parts = vectors(zero) * lanes(zero), dx.tasks.parts, job.tasks.z_parts + job.tasks.x_parts
        job.turned.row = packed_row(job.d * size_of(zero)) if job.plan.dw_turned != 0 else 0
        write_products(zero, job)
        dx.n = dw.k = min(n, stretch)
        bytes_of_own = round_up(_sums(zero, job, 0, block_count(min(n, stretch), BLOCK_ROWS)), PAIR_BYTES)
        owners = workers if job.tasks.z_parts == 0 else 1
        job.own = Rows(scratch, bytes_of_own if job.tasks.z_parts == 0 else 0)
        dw.packed.data = scratch + owners * bytes_of_own
        totals = dw.packed.data + (block_count(dw.m, nr) * dw.panel if dw.plan.b == PACKED else 0)
        dx.packed.data = totals + round_up(m * 8, LINE_BYTES)
        job.turned.data = dx.packed.data + (block_count(job.d, nr) * dx.panel if w_parts != 0 else 0)
        slots = job.turned.data + m * job.turned.row
        dx.slots = Rows(slots, max(slot_bytes(zero, dx), slot_bytes(zero, dw)))
        dw.slots = dx.slots
        needed = slots + workers * dx.slots.row - scratch
        if needed > scratch_bytes:
            return needed
        for group in range(job.groups):
            job.group, dx.tasks.parts = group, w_parts
            clear(0.0, totals, m)
            for first in range(0, max(n, 1), stretch):
                job.first, job.last = first, min(n, first + stretch)
                blocks = -(-(job.last - first) // BLOCK_ROWS)
                # For what is packed before the tasks, of w and x; `_make_ready` says it again where each has a dz of its own.
                move_to(job, Samples(group=group, first=first, count=job.last - first, z=scratch + _BYTES_OF_OWN), dx, dw)
                parallel_for(c_address(pack), address_of(job), dx.tasks.parts + blocks * parts, threads)
                dx.tasks.parts = 0  # w^T stays as it is packed
                for i in range(owners):
                    at(Own, scratch + i * bytes_of_own).ready = 0
                if job.tasks.z_parts != 0:
                    _make_ready(job, scratch)
                parallel_for(c_address(task), address_of(job), job.tasks.count, threads)
                own = scratch  # one of them is ready: there are tasks, or it is the one that all share
                while at(Own, own).ready == 0:
                    own += bytes_of_own
                for block in range(blocks):
                    add_sums(zero, _sums(zero, job, own, block), totals, m)
            if job.db.data != 0:
                write_db(zero, job, group, totals)
        return 0

    return run
