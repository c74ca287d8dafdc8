"""One product of a pass as its plan has it: C (n, m) = bias + A (n, k) B (k, m), a task for each block of rows and columns of C.

    for k in range(0, K, kc):                a block of A: as it lies, copied or packed
        for j in range(0, columns, ...):     panels of B: as they lie, packed before by all tasks, or by this one
            product.py

Few rows or columns go other ways: strips.py, inner.py. The forward pass is one such product, the backward two. Every element of C is a sum
of chains of at most LONGEST_CHAIN multiply-adds in ascending order of k, the first begun with the bias, or of inner products, with a chain
for each lane; where chains begin depends on shapes, strides and the host, never on threads.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, longest_block, packed_row, round_up, rows_start
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.inner import inner_products
from rectilinear.kernels.loops.pack import Packing, copy, pack_panel, pack_panels
from rectilinear.kernels.loops.plan import COPIED, PACKED, Matmul, panels_at_once
from rectilinear.kernels.loops.product import Panels, Prefetch, Product, pack_a, packed_step, prefetch_rows, product, tiles_of
from rectilinear.kernels.loops.strips import by_strips, strips_bytes
from rectilinear.kernels.micro.dots import DOTS_TALL
from rectilinear.kernels.micro.library import lanes
from rectilinear.kernels.micro.simd import LINE_BYTES
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.linking import called_by_name
from rectilinear.kernels.runtime.memory import size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows, Word
from rectilinear.kernels.runtime.records import address_of, at, record


@record
class Part:
    """A block of a group's C, of the `Matmul` at `job`: `rows` rows from `row` on, `panels` panels from `panel` on; `space` is scratch.

    For `pack_b`, rows and panels of B."""

    job: int = 0
    group: int = 0
    row: int = 0
    rows: int = 0
    panel: int = 0
    panels: int = 0
    space: int = 0


@jit_inner
def compute(zero: Any, index: int, job: Matmul, slot: int) -> None:
    """Task `index`, a block of C."""
    plan, tasks = job.plan, job.tasks
    group, index = index // (tasks.rows * tasks.columns), index % (tasks.rows * tasks.columns)
    r, c = index % tasks.rows, index // tasks.rows
    if plan.a == PACKED:  # tasks that pack the same rows of A come one after the other, else those of the same columns of B
        r, c = index // tasks.columns, index % tasks.columns
    mr, panels = DOTS_TALL if plan.by_dots != 0 else host(zero).rows, _panels(zero, job)
    part = Part(job=address_of(job), group=group, space=job.slots.data + slot * job.slots.row)
    part.row, part.panel = rows_start(job.n, mr, tasks.rows, r), block_start(panels, tasks.columns, c)
    part.rows, part.panels = rows_start(job.n, mr, tasks.rows, r + 1) - part.row, block_start(panels, tasks.columns, c + 1) - part.panel
    multiply(zero, part)
    if job.turned.data != 0:
        size, first = size_of(zero), part.panel * plan.width * lanes(zero)
        columns = min(job.m - first, part.panels * plan.width * lanes(zero))
        src = Matrix(job.c.data + part.row * job.c.row + first * size, size, job.c.row)
        dst = Rows(job.turned.data + first * job.turned.row + part.row * size, job.turned.row)
        copy(zero, Packing(rows=columns, columns=part.rows, src=src, dst=dst))


@called_by_name(Part)
def multiply(zero: Any, part: Part) -> None:
    job = at(Matmul, part.job)
    plan, size, nr, group = job.plan, size_of(zero), job.plan.width * lanes(zero), part.group
    first = part.panel * nr
    p = Product(n=part.rows, k=job.k, m=min(job.m - first, part.panels * nr), width=plan.width, low_tiles=plan.low_tiles, flags=job.flags)
    p.along_rows, p.space, p.prefetch = job.tasks.along_rows, part.space, job.prefetch
    p.a.data, p.a.row, p.a.column = job.a.data + group * job.a.group + part.row * job.a.row, job.a.row, job.a.column
    if job.tasks.copies != 0:
        p.a = Matrix(job.copied.data + (group * job.n + part.row) * job.copied.row, job.copied.row, size)
    p.c.data, p.c.row = job.c.data + group * job.c.group + part.row * job.c.row + first * size, job.c.row
    p.bits.data, p.bits.row = job.bits.data + group * job.bits.group + part.row * job.bits.row + (first >> 3), job.bits.row
    p.bias = job.bias.data + group * job.bias.row + first * size if job.bias.data != 0 else 0
    b = job.b.data + group * job.b.group + first * job.b.column
    if plan.by_strips != 0:
        p.b = Panels(data=b, panel=nr * size, row=job.b.row)
        by_strips(zero, p)
    elif plan.by_dots != 0:
        columns_of_b, packed_column = Rows(b, job.b.column), _packed_column(zero, job)
        if plan.b == PACKED:
            columns_of_b = Rows(_own_columns(zero, job, group, p.space + job.bytes_of_a) + first * packed_column, packed_column)
        _by_dots(zero, job, p, columns_of_b)
    else:
        ahead = Prefetch()
        if job.tasks.prefetch != 0:
            _prefetch_next(zero, job, group, part.row + part.rows, part.rows, ahead)
            p.prefetch = address_of(ahead)
        _by_tiles(zero, job, p, b, job.packed.data + group * job.packed.row + part.panel * job.panel)


@jit_inner
def _prefetch_next(zero: Any, job: Matmul, group: int, row: int, rows: int, ahead: Prefetch) -> None:
    """Have the tiles prefetch what the task from `row` on takes, which is most likely this thread's own: else memory idles meanwhile."""
    next_group, next_row = (group, row) if row < job.n else (group + 1, 0)
    count = min(rows, job.n - next_row) if next_group < job.groups else 0
    prefetch_rows(zero, ahead.now, job.a, next_group, next_row, count, job.k)
    prefetch_rows(zero, ahead.then, job.c, next_group, next_row, count, job.m)
    prefetch_rows(zero, ahead.last, job.b, next_group, 0, job.k if count > 0 and next_group > group else 0, job.m)


@jit_inner
def _by_tiles(zero: Any, job: Matmul, p: Product, b: int, packed: int) -> None:
    """The block, whose part of B begins at `b`, and lies packed at `packed` if that is done before."""
    plan, size, nr = job.plan, size_of(zero), job.plan.width * lanes(zero)
    a, a_row, a_column = p.a.data, p.a.row, p.a.column
    c, bits, bias, columns = p.c.data, p.bits.data, p.bias, p.m
    steps, k = block_count(job.k, plan.depth), 0
    for step in range(steps):
        p.k, p.m = block_start(job.k, steps, step + 1) - k, columns
        p.flags = (ADD if step > 0 else job.flags & ADD) | (job.flags if step == steps - 1 else 0)
        p.a.data, p.a.row, p.a.column = a + k * a_column, a_row, a_column
        p.c.data, p.bits.data, p.bias = c, bits, bias if step == 0 else 0
        if plan.a == PACKED:
            pack_a(zero, p, p.space)
        elif _copies_itself(job):
            _copy_a(zero, p)
        if job.tasks.packs != 0:
            _packing_b(zero, job, p, Matrix(b + k * job.b.row, job.b.row, job.b.column), p.space + job.bytes_of_a)
        elif plan.b == PACKED:
            p.b.data, p.b.panel, p.b.row, p.b.padded = packed + k * nr * size, job.panel, nr * size, 1
            product(zero, p)
        else:
            p.b.data, p.b.panel, p.b.row, p.b.padded = b + k * job.b.row, nr * size, job.b.row, job.padded
            product(zero, p)
        k += p.k


@jit_inner
def _packing_b(zero: Any, job: Matmul, p: Product, b: Matrix, space: int) -> None:
    """The product of a block of K, with panels of B packed into `space` first, as many at a time as L2 holds."""
    size, nr, columns = size_of(zero), job.plan.width * lanes(zero), p.m
    p.b = Panels(data=space, panel=p.k * nr * size, row=nr * size, padded=1)
    step = _panels_of_task(zero, job, block_count(columns, nr)) * nr
    for j in range(0, columns, step):
        p.m = min(step, columns - j)
        src = Matrix(b.data + j * b.column, b.row, b.column)
        pack_panels(zero, Packing(rows=p.k, columns=p.m, src=src, dst=Rows(space, nr * size)), nr, p.b.panel)
        product(zero, p)
        p.c.data += step * size
        p.bits.data += step >> 3
        p.bias = p.bias + step * size if p.bias != 0 else 0


@jit_inner
def _by_dots(zero: Any, job: Matmul, p: Product, columns_of_b: Rows) -> None:
    p.b.data, p.b.row = columns_of_b.data, columns_of_b.row
    if _copies_itself(job):
        _copy_a(zero, p)
    inner_products(zero, p)
    if p.flags != 0:
        # A product of no k: ReLU and bits.
        p.k, p.b.padded, p.flags, p.bias = 0, 1, ADD | p.flags, 0
        product(zero, p)


@jit_inner
def _own_columns(zero: Any, job: Matmul, group: int, space: int) -> int:
    """Where the columns of the group's B lie as rows: in this thread's `space`, behind a line that says of which group they are."""
    filled_for = at(Word, space)
    if filled_for.value != group + 1:
        src = Matrix(job.b.data + group * job.b.group, job.b.column, job.b.row)
        pack_panel(zero, Packing(rows=job.m, columns=job.k, src=src, dst=Rows(space + LINE_BYTES, _packed_column(zero, job))))
        filled_for.value = group + 1
    return space + LINE_BYTES


@jit_inner
def _copies_itself(job: Matmul) -> bool:
    return job.plan.a == COPIED and job.tasks.copies == 0


@jit_inner
def _copy_a(zero: Any, p: Product) -> None:
    """Set p.a to a copy of it in p.space, by rows if it lies so, else by columns."""
    size, a = size_of(zero), p.a
    if a.column == size:
        copied = Rows(p.space, packed_row(p.k * size))
        copy(zero, Packing(rows=p.n, columns=p.k, src=a, dst=copied))
        p.a = Matrix(copied.data, copied.row, size)
    else:
        copied = Rows(p.space, packed_row(p.n * size))
        copy(zero, Packing(rows=p.k, columns=p.n, src=Matrix(a.data, a.column, a.row), dst=copied))
        p.a = Matrix(copied.data, size, copied.row)


# Before the tasks.


@jit_inner
def forget_packed_columns(job: Matmul, threads: int) -> None:
    """Let no thread take for its columns of B what lies in its scratch memory from before."""
    if job.plan.by_dots != 0 and job.tasks.packs != 0:
        for slot in range(threads):
            at(Word, job.slots.data + slot * job.slots.row + job.bytes_of_a).value = 0


@jit_inner
def prepare(zero: Any, index: int, job: Matmul, slot: int) -> None:
    """Some panels of B, packed, or a copy of some rows of A, for all tasks: `index` is less than parts + copies, for each group."""
    tasks, panels = job.tasks, _panels(zero, job)
    group, part = index // (tasks.parts + tasks.copies), index % (tasks.parts + tasks.copies)
    if part >= tasks.parts:
        part -= tasks.parts
        first, last = block_start(job.n, tasks.copies, part), block_start(job.n, tasks.copies, part + 1)
        src = Matrix(job.a.data + group * job.a.group + first * job.a.row, job.a.row, job.a.column)
        copied = Rows(job.copied.data + (group * job.n + first) * job.copied.row, job.copied.row)
        copy(zero, Packing(rows=last - first, columns=job.k, src=src, dst=copied))
    else:
        first, last = block_start(panels, tasks.parts, part), block_start(panels, tasks.parts, part + 1)
        pack_b(zero, job, Part(group=group, row=0, rows=job.k, panel=first, panels=last - first))


@jit_inner
def pack_b(zero: Any, job: Matmul, part: Part) -> None:
    """Part of B, its rows and panels, to where it is to lie packed."""
    size, nr, row, first = size_of(zero), job.plan.width * lanes(zero), part.row, part.panel
    b, packed = job.b.data + part.group * job.b.group, job.packed.data + part.group * job.packed.row
    src = Matrix(b + row * job.b.row + first * nr * job.b.column, job.b.row, job.b.column)
    dst = Rows(packed + first * job.panel + row * nr * size, nr * size)
    columns = min(job.m - first * nr, part.panels * nr)
    pack_panels(zero, Packing(rows=part.rows, columns=columns, src=src, dst=dst), nr, job.panel)


# Scratch memory.


@jit_inner
def lay_out(zero: Any, job: Matmul, scratch: int) -> int:
    """Say where what all tasks share lies, in the scratch memory from `scratch` on; returns where it ends."""
    size, tasks = size_of(zero), job.tasks
    job.packed = Rows(scratch, round_up(_panels(zero, job) * job.panel, 64) if tasks.parts != 0 else 0)
    job.copied = Rows(scratch + job.groups * job.packed.row, packed_row(job.k * size) if tasks.copies != 0 else 0)
    return job.copied.data + job.groups * job.n * job.copied.row


@jit_inner
def slot_bytes(zero: Any, job: Matmul) -> int:
    """Scratch of one thread: for A, or what strips keep, and for panels of B or all of its columns."""
    plan, size, nr = job.plan, size_of(zero), job.plan.width * lanes(zero)
    job.bytes_of_a, of_b = _bytes_of_a(zero, job), 0
    if job.tasks.packs != 0 and plan.by_dots != 0:
        of_b = LINE_BYTES + job.m * _packed_column(zero, job)
    elif job.tasks.packs != 0:
        of_b = _panels_of_task(zero, job, _panels(zero, job)) * min(job.k, plan.depth) * nr * size
    return round_up(job.bytes_of_a + of_b, 64)


@jit_inner
def _bytes_of_a(zero: Any, job: Matmul) -> int:
    plan, size, a = job.plan, size_of(zero), job.a
    if plan.by_strips != 0:
        columns = -(-_panels(zero, job) // max(1, job.tasks.columns)) * plan.width * lanes(zero)
        return strips_bytes(zero, job.n, job.k, min(job.m, columns), Matrix(a.data, a.row, a.column))
    if plan.a != PACKED and not _copies_itself(job):
        return 0
    depth = job.k if plan.by_dots != 0 else min(job.k, plan.depth)
    rows = longest_block(job.n, DOTS_TALL if plan.by_dots != 0 else host(zero).rows, job.tasks.rows)
    if plan.a == PACKED:
        return tiles_of(zero, rows, plan.width) * packed_step(zero, plan.width) * depth
    return rows * packed_row(depth * size) if a.column == size else depth * packed_row(rows * size)


@jit_inner
def _panels(zero: Any, job: Matmul) -> int:
    return block_count(job.m, job.plan.width * lanes(zero))


@jit_inner
def _panels_of_task(zero: Any, job: Matmul, panels: int) -> int:
    return panels_at_once(host(zero), panels, min(job.k, job.plan.depth) * job.plan.width * lanes(zero))


@jit_inner
def _packed_column(zero: Any, job: Matmul) -> int:
    """Bytes from a column of B to the next, where inner products have them packed as rows."""
    return packed_row(round_up(job.k, lanes(zero)) * size_of(zero))
