"""The affine forward pass: out = x w + b, with ReLU and the keep-mask bits at the store.

One call is one job (`plan.Forward`), cut into tasks that each compute a block of rows by a block of columns of one group. Every element of
out is a sum of chains of at most LONGEST_CHAIN multiply-adds in ascending order of d, the first begun with the bias, or of inner products,
with a chain for each lane; where chains begin depends on shapes, strides and the host, never on threads.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, longest_block, packed_row, round_up, rows_start
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.inner import Inner, inner_products
from rectilinear.kernels.loops.pack import Packing, copy, pack_panel, pack_panels
from rectilinear.kernels.loops.plan import COPIED, PACKED, Forward, panels_at_once, plan_forward, schedule_forward
from rectilinear.kernels.loops.product import Panels, Prefetch, Product, prefetch_rows, product
from rectilinear.kernels.loops.strips import by_strips, strips_bytes
from rectilinear.kernels.micro.dots import DOTS_TALL
from rectilinear.kernels.micro.library import lanes
from rectilinear.kernels.micro.tile import ADD, BITS
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import (
    CHANGED,
    data_of,
    extent_of,
    has_extents,
    read_stack,
    size_of,
    stride_of,
)
from rectilinear.kernels.runtime.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import address_of, at
from rectilinear.kernels.runtime.threads import TINY_WORK, layer_work, parallel_for, threads_for

SCATTERED = -1
"""What the pass answers to a bias whose elements do not lie side by side."""


@jit_inner
def _task(zero: Any, index: int, job: Forward, slot: int) -> None:
    """One block of out."""
    plan, tasks, size = job.plan, job.tasks, size_of(zero)
    group, index = index // (tasks.rows * tasks.columns), index % (tasks.rows * tasks.columns)
    nr = plan.width * lanes(zero)
    panels = block_count(job.m, nr)
    mr, r = DOTS_TALL if plan.by_dots != 0 else host(zero).rows, index % tasks.rows
    first_row, last_row = rows_start(job.n, mr, tasks.rows, r), rows_start(job.n, mr, tasks.rows, r + 1)
    first = block_start(panels, tasks.columns, index // tasks.rows)
    columns = min(job.m, block_start(panels, tasks.columns, index // tasks.rows + 1) * nr) - first * nr
    rows = last_row - first_row
    space = job.slots.data + slot * job.slots.row

    x = Matrix(job.x.data + group * job.x.group + first_row * job.x.row, job.x.row, job.x.column)
    if tasks.copies != 0:
        x = Matrix(job.copied.data + (group * job.n + first_row) * job.copied.row, job.copied.row, size)
    w = Matrix(job.w.data + group * job.w.group + first * nr * job.w.column, job.w.row, job.w.column)
    bias = job.bias.data + group * job.bias.row + first * nr * size if job.bias.data != 0 else 0
    out = job.out.data + group * job.out.group + first_row * job.out.row + first * nr * size
    bits = job.bits.data + group * job.bits.group + first_row * job.bits.row + (first * nr >> 3)
    block = Product(c=Rows(out, job.out.row), bits=Rows(bits, job.bits.row), bias=bias, width=plan.width, low_tiles=plan.low_tiles)
    if plan.by_strips != 0:
        block.n, block.k, block.m, block.a, block.b = rows, job.d, columns, x, Panels(data=w.data, panel=nr * size, row=w.row)
        block.flags, block.space = job.flags, space
        by_strips(zero, block)
        return
    if plan.by_dots != 0:
        columns_of_w = Rows(w.data, w.column)
        if plan.w == PACKED:
            columns_of_w = Rows(job.packed.data + group * job.packed.row, _row_of_w(zero, job))
        _by_dots(zero, job, rows, columns, x, columns_of_w, block, space)
        return
    ahead = Prefetch()
    if tasks.prefetch != 0:
        # The tiles prefetch what the next task takes, most likely this thread's own: else memory idles meanwhile.
        next_group, next_row = (group, last_row) if last_row < job.n else (group + 1, 0)
        count = min(rows, job.n - next_row) if next_group < job.groups else 0
        prefetch_rows(zero, ahead.now, job.x, next_group, next_row, count, job.d)
        prefetch_rows(zero, ahead.then, job.out, next_group, next_row, count, job.m)
        prefetch_rows(zero, ahead.last, job.w, next_group, 0, job.d if count > 0 and next_group > group else 0, job.m)
    block.prefetch = address_of(ahead)
    steps = block_count(job.d, plan.depth)
    for step in range(steps):
        k0, k1 = block_start(job.d, steps, step), block_start(job.d, steps, step + 1)
        block.n, block.k = rows, k1 - k0
        block.flags = (ADD if step > 0 else 0) | (job.flags if step == steps - 1 else 0)
        block.a = Matrix(x.data + k0 * x.column, x.row, x.column)
        if _copies_itself(job):
            copied = Rows(space, packed_row(block.k * size))
            copy(zero, Packing(rows=rows, columns=block.k, src=block.a, dst=copied))
            block.a = Matrix(copied.data, copied.row, size)
        block.c.data, block.bits.data = out, bits
        block.bias = bias if step == 0 else 0
        panel = job.packed.data + group * job.packed.row + (k0 * panels + first * block.k) * nr * size
        _columns(zero, job, block, columns, Matrix(w.data + k0 * w.row, w.row, w.column), panel, space + job.copy_bytes)


@jit_inner
def _copies_itself(job: Forward) -> bool:
    return job.plan.x == COPIED and job.tasks.copies == 0


@jit_inner
def _columns(zero: Any, job: Forward, block: Product, columns: int, w: Matrix, packed: int, space: int) -> None:
    """`columns` columns of a block, whose part of w is `w`, or lies packed at `packed`, or is to be packed into `space`."""
    size, nr = size_of(zero), job.plan.width * lanes(zero)
    if job.plan.w == PACKED:
        block.b = Panels(data=packed, panel=block.k * nr * size, row=nr * size, padded=1)
    else:
        block.b = Panels(data=w.data, panel=nr * size, row=w.row, padded=0)
    if job.tasks.packs == 0:
        block.m = columns
        product(zero, block)
        return
    block.b.data = space
    step = panels_at_once(host(zero), block_count(columns, nr), min(job.d, job.plan.depth) * nr) * nr
    for j in range(0, columns, step):
        block.m = min(step, columns - j)
        src = Matrix(w.data + j * w.column, w.row, w.column)
        pack_panels(zero, Packing(rows=block.k, columns=block.m, src=src, dst=Rows(space, nr * size)), nr, block.b.panel)
        product(zero, block)
        block.c.data += step * size
        block.bits.data += step >> 3
        block.bias = block.bias + step * size if block.bias != 0 else 0


@jit_inner
def _row_of_w(zero: Any, job: Forward) -> int:
    """Bytes from a column of w to the next, where inner products have them packed as rows."""
    return packed_row(round_up(job.d, lanes(zero)) * size_of(zero))


@jit_inner
def _by_dots(zero: Any, job: Forward, rows: int, columns: int, x: Matrix, w: Rows, block: Product, space: int) -> None:
    """A block of out by inner products."""
    a = Rows(x.data, x.row)
    if _copies_itself(job):
        a = Rows(space, packed_row(job.d * size_of(zero)))
        copy(zero, Packing(rows=rows, columns=job.d, src=x, dst=a))
    inner_products(zero, Inner(n=rows, k=job.d, m=columns, a=a, b=w, c=block.c, bias=block.bias))
    if job.flags != 0:
        # A product of no k: ReLU and bits.
        block.n, block.m, block.b.padded, block.flags, block.bias = rows, columns, 1, ADD | job.flags, 0
        product(zero, block)


@jit_inner
def _prepare_task(zero: Any, index: int, job: Forward) -> None:
    """Some panels of w, all of d, into the packed B, block after block of K, in each panel after panel; or a copy of some rows of x."""
    tasks, size, nr = job.tasks, size_of(zero), job.plan.width * lanes(zero)
    group, part = index // (tasks.parts + tasks.copies), index % (tasks.parts + tasks.copies)
    if part >= tasks.parts:
        part -= tasks.parts
        first, last = block_start(job.n, tasks.copies, part), block_start(job.n, tasks.copies, part + 1)
        x = Matrix(job.x.data + group * job.x.group + first * job.x.row, job.x.row, job.x.column)
        copied = Rows(job.copied.data + (group * job.n + first) * job.copied.row, job.copied.row)
        copy(zero, Packing(rows=last - first, columns=job.d, src=x, dst=copied))
        return
    if job.plan.by_dots != 0:
        src = Matrix(job.w.data + group * job.w.group, job.w.column, job.w.row)
        dst = Rows(job.packed.data + group * job.packed.row, _row_of_w(zero, job))
        pack_panel(zero, Packing(rows=job.m, columns=job.d, src=src, dst=dst))
        return
    panels = block_count(job.m, nr)
    first, last = block_start(panels, tasks.parts, part), block_start(panels, tasks.parts, part + 1)
    steps = block_count(job.d, job.plan.depth)
    w = job.w.data + group * job.w.group + first * nr * job.w.column
    packed = job.packed.data + group * job.packed.row
    for step in range(steps):
        k0, k1 = block_start(job.d, steps, step), block_start(job.d, steps, step + 1)
        src = Matrix(w + k0 * job.w.row, job.w.row, job.w.column)
        dst = Rows(packed + (k0 * panels + first * (k1 - k0)) * nr * size, nr * size)
        columns = min(job.m, last * nr) - first * nr
        pack_panels(zero, Packing(rows=k1 - k0, columns=columns, src=src, dst=dst), nr, (k1 - k0) * nr * size)


@jit_inner
def _read(zero: Any, job: Forward, x: int, w: int, b: int, out: int, bits: int) -> int:
    """Write the operands into the job; 0, or what there is to say against them."""
    size = size_of(zero)
    groups, n, d, m = extent_of(w, -3), extent_of(x, -2), extent_of(x, -1), extent_of(w, -1)
    if not (has_extents(x, groups, n, d) and has_extents(w, groups, d, m) and has_extents(out, groups, n, m)):
        return CHANGED
    job.groups, job.n, job.d, job.m = groups, n, d, m
    read_stack(job.x, x, size)
    read_stack(job.w, w, size)
    read_stack(job.out, out, size)
    if bits != 0:
        if not has_extents(bits, groups, n, (m + 7) >> 3):
            return CHANGED
        read_stack(job.bits, bits, 1)
        job.flags |= BITS
    if b != 0:
        if not has_extents(b, 1, groups, m):
            return CHANGED
        if stride_of(b, -1, size) != size and groups > 0:
            return SCATTERED
        job.bias = Rows(data_of(b), stride_of(b, -2, size))
    return 0


@jit_inner
def _lay_out(zero: Any, job: Forward, scratch: int, threads: int) -> int:
    """Say where in the scratch memory everything lies; returns how many bytes that takes."""
    plan, tasks, size, nr = job.plan, job.tasks, size_of(zero), job.plan.width * lanes(zero)
    depth, slot = min(job.d, plan.depth), 0
    if _copies_itself(job) and plan.by_dots != 0:
        slot = job.n * packed_row(job.d * size)
    elif _copies_itself(job):
        slot = longest_block(job.n, host(zero).rows, tasks.rows) * packed_row(depth * size)
    if plan.by_strips != 0:
        slot = strips_bytes(zero, job.n, job.d, job.m, job.x.column == size)
    job.copy_bytes = slot
    if tasks.packs != 0:
        slot += panels_at_once(host(zero), block_count(job.m, nr), depth * nr) * depth * nr * size
    of_w = job.m * _row_of_w(zero, job) if plan.by_dots != 0 else round_up(block_count(job.m, nr) * nr * size * job.d, 64)
    job.packed = Rows(scratch, of_w if tasks.parts != 0 else 0)
    job.copied = Rows(scratch + job.groups * job.packed.row, packed_row(job.d * size) if tasks.copies != 0 else 0)
    job.slots = Rows(job.copied.data + job.groups * job.n * job.copied.row, slot)
    return job.slots.data + threads * slot - scratch


def entry(zero: Any) -> Any:
    """The forward pass for zero's dtype: (ids of x, w, b or 0, out, bits or 0; RELU or 0; scratch, its bytes; threads).

    It returns 0, or how many bytes of scratch it needs and has not got, or below 0 SCATTERED or CHANGED.
    """

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        job = at(Forward, address)
        for i in range(index * job.tasks.run, min((index + 1) * job.tasks.run, job.tasks.count)):
            _task(zero, i, job, slot)

    @jit_inner
    def prepare(index: int, address: int, slot: int) -> None:
        _prepare_task(zero, index, at(Forward, address))

    @jit(nogil=False)
    def forward(x: int, w: int, b: int, out: int, bits: int, flags: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        job = Forward(flags=flags)
        objection = _read(zero, job, x, w, b, out, bits)
        if objection != 0:
            return objection
        work = layer_work(job.groups, job.n, job.d, job.m)
        threads = threads_for(zero, work, threads)
        plan_forward(job, host(zero))
        schedule_forward(job, host(zero), threads)
        needed = _lay_out(zero, job, scratch, threads)
        if needed > scratch_bytes:
            return needed
        others = let_go_of_gil(work > TINY_WORK)
        parallel_for(c_address(prepare), address_of(job), job.groups * (job.tasks.parts + job.tasks.copies), threads)
        parallel_for(c_address(task), address_of(job), -(-job.tasks.count // job.tasks.run), threads)
        take_gil_back(others)
        return 0

    return forward
