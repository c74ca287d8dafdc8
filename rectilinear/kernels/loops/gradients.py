"""The pieces of the backward pass, of which `slabs` and `blocks` are made: masked dz with its sums, and blocks of dx and of dw.

dz exists a block of rows at a time (`slabs`), or a stretch of rows (`blocks`), in a pack buffer: masking, packing and the column sums of
db are one pass over dout, and both products read that buffer, dx as rows of A, dw as rows of B, or panels made of it. The transposed x
costs nothing, since its elements are broadcast from wherever they lie, w one transposition while it is packed. Few rows do without that:
their dx is inner products, or strips of a w^T that lies in rows; a dx of few features is inner products too.
A dw that is stored by columns, or has only one, is the rows of dw^T = dz^T x: dz is then A, the operand that is broadcast, and x is B.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, packed_row
from rectilinear.kernels.loops.inner import Inner, inner_products
from rectilinear.kernels.loops.pack import Packing, copy, pack_panels
from rectilinear.kernels.loops.plan import COPIED, IN_PLACE, PACKED, Backward
from rectilinear.kernels.loops.product import Panels, Product, pack_a, product
from rectilinear.kernels.loops.strips import by_strips
from rectilinear.kernels.micro.library import lanes, rows, vectors
from rectilinear.kernels.micro.rows import KEEP_BITS, KEEP_Z, PAD, SUM, WRITE, RowsOperands
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import get, put, rounded, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import record


@record
class Block:
    """What `dx_block` and `dw_block` compute: `count` samples from `first` on of a group, whose dz lies at `z`.

    Of dx: `panels` panels from `panel` on, with w^T packed at `packed_w`. Of dw: `rows` rows from `row` on and `panels` panels, where `dw`
    is the whole of it; its B may be packed, with these samples of its first panel at `packed_b`, and `space` is for a copy of its A, or
    for what strips keep. What the tiles are to prefetch meanwhile is at `prefetch`, or that is 0.
    """

    group: int = 0
    first: int = 0
    count: int = 0
    z: int = 0
    panel: int = 0
    panels: int = 0
    packed_w: int = 0
    packed_b: int = 0
    row: int = 0
    rows: int = 0
    dw: Rows = Rows()
    adds: int = 0
    space: int = 0
    prefetch: int = 0


@jit_inner
def masked_block(zero: Any, job: Backward, b: Block, columns: int, sums: int) -> None:
    """`columns` columns of the block's rows of dz, from panel b.panel on, to b.z, if a product needs them, and their sums added to `sums`,
    if db is wanted."""
    size, lead = size_of(zero), job.plan.lead
    first = b.panel * vectors(zero) * lanes(zero)
    kind, keep = job.keep_kind, job.keep
    ahead = first >> 3 if kind == KEEP_BITS else first * keep.column
    mask = Rows(keep.data + b.group * keep.group + b.first * keep.row + ahead, keep.row)
    start = job.dout.data + b.group * job.dout.group + b.first * job.dout.row + first * job.dout.column
    src = Matrix(start, job.dout.row, job.dout.column)
    dst = Rows(b.z + first * size, lead)
    z_by_columns = kind == KEEP_Z and keep.column != size
    if src.column != size or z_by_columns:
        copy(zero, Packing(rows=b.count, columns=columns, src=src, dst=dst))
        src = Matrix(dst.data, dst.row, size)
    if z_by_columns:
        for i in range(b.count):
            for j in range(columns):
                if get(zero, mask.data + i * mask.row + j * keep.column) < zero:
                    put(dst.data + i * dst.row + j * size, zero)
        kind = 0
    flags = kind | PAD | (WRITE if job.dx.data != 0 or job.dw.data != 0 else 0) | (SUM if job.db.data != 0 else 0)
    src_rows, total = Rows(src.data, src.row), sums + first * size
    rows(zero, RowsOperands(rows=b.count, columns=columns, src=src_rows, keep=mask, dst=dst, sums=total, flags=flags))


@jit_inner
def clear(zero: Any, address: int, count: int) -> None:
    for j in range(count):
        put(address + j * size_of(zero), zero)


@jit_inner
def add_sums(zero: Any, sums: int, total: int, count: int) -> None:
    """total (float64) += sums (T), column by column."""
    for j in range(count):
        put(total + 8 * j, get(0.0, total + 8 * j) + get(zero, sums + j * size_of(zero)))


@jit_inner
def write_db(zero: Any, job: Backward, group: int, total: int) -> None:
    """Round the sums into db."""
    db = job.db.data + group * job.db.group
    for j in range(job.m):
        put(db + j * job.db.column, rounded(zero, get(0.0, total + 8 * j)))


# dx.


@jit_inner
def pack_w(zero: Any, job: Backward, group: int, first: int, last: int, dst: int) -> None:
    """Panels `first` to `last` of w^T, all of m, panel after panel."""
    nr, row = vectors(zero) * lanes(zero), vectors(zero) * lanes(zero) * size_of(zero)
    src = Matrix(job.w.data + group * job.w.group + first * nr * job.w.row, job.w.column, job.w.row)
    columns = min(job.d, last * nr) - first * nr
    pack_panels(zero, Packing(rows=job.m, columns=columns, src=src, dst=Rows(dst, row)), nr, job.m * row)


@jit_inner
def dx_by_dots(zero: Any, job: Backward, b: Block) -> None:
    """Panels of dx by inner products, from w as it lies."""
    size = size_of(zero)
    first = b.panel * vectors(zero) * lanes(zero)
    columns = min(job.d - first, b.panels * vectors(zero) * lanes(zero))
    w = Rows(job.w.data + b.group * job.w.group + first * job.w.row, job.w.row)
    dx = Rows(job.dx.data + b.group * job.dx.group + b.first * job.dx.row + first * size, job.dx.row)
    inner_products(zero, Inner(n=b.count, k=job.m, m=columns, a=Rows(b.z, job.plan.lead), b=w, c=dx))


@jit_inner
def dx_by_strips(zero: Any, job: Backward, b: Block) -> None:
    """Panels of dx by strips, from a w^T that lies in rows; what they keep is in `b.space`."""
    size, nr = size_of(zero), vectors(zero) * lanes(zero)
    j = b.panel * nr
    dx = Rows(job.dx.data + b.group * job.dx.group + b.first * job.dx.row + j * size, job.dx.row)
    block = Product(n=b.count, k=job.m, m=min(job.d - j, b.panels * nr), c=dx, width=vectors(zero))
    block.a = Matrix(b.z, job.plan.lead, size)
    block.b = Panels(data=job.w.data + b.group * job.w.group + j * size, panel=nr * size, row=job.w.column)
    block.space = b.space
    by_strips(zero, block)


@jit_inner
def dx_block(zero: Any, job: Backward, b: Block) -> None:
    """Panels of dx from the block's dz, rows of A, and w^T, packed or as it lies."""
    size, m = size_of(zero), job.m
    nr = vectors(zero) * lanes(zero)
    dx = job.dx.data + b.group * job.dx.group + b.first * job.dx.row + b.panel * nr * size
    columns = min(job.d - b.panel * nr, b.panels * nr)
    steps = block_count(m, job.plan.depth)
    for step in range(steps):
        k0, k1 = block_start(m, steps, step), block_start(m, steps, step + 1)
        if job.plan.w == IN_PLACE:
            start = job.w.data + b.group * job.w.group + k0 * job.w.column + b.panel * nr * size
            w = Panels(data=start, panel=nr * size, row=job.w.column, padded=0)
        else:
            w = Panels(data=b.packed_w + k0 * nr * size, panel=m * nr * size, row=nr * size, padded=1)
        block = Product(n=b.count, k=k1 - k0, m=columns, b=w, c=Rows(dx, job.dx.row), width=vectors(zero), prefetch=b.prefetch)
        block.a = Matrix(b.z + k0 * size, job.plan.lead, size)
        block.flags = ADD if step > 0 else 0
        product(zero, block)


# dw.


@jit_inner
def x_of(job: Backward, b: Block) -> int:
    """Where x of the block's samples begins."""
    return job.x.data + b.group * job.x.group + b.first * job.x.row


@jit_inner
def pack_b(zero: Any, job: Backward, b: Block, first: int, last: int) -> None:
    """Panels `first` to `last` of dw's B, which is dz, or where dw is by columns x, for the block's samples."""
    size, nr = size_of(zero), vectors(zero) * lanes(zero)
    panel = job.plan.stretch * nr * size
    src, columns = Matrix(b.z, job.plan.lead, size), job.m
    if job.plan.dw_by_columns != 0:
        src, columns = Matrix(x_of(job, b), job.x.row, job.x.column), job.d
    part = Matrix(src.data + first * nr * src.column, src.row, src.column)
    dst = Rows(b.packed_b + first * panel, nr * size)
    pack_panels(zero, Packing(rows=b.count, columns=min(columns, last * nr) - first * nr, src=part, dst=dst), nr, panel)


@jit_inner
def dw_block(zero: Any, job: Backward, b: Block) -> None:
    """Rows and panels of dw, or of dw^T, from the block's samples: added to what is there, if so asked.

    A is copied or packed first where the plan says so; a packed B is there.
    """
    size, nr = size_of(zero), job.plan.dw_width * lanes(zero)
    j = b.panel * nr
    x, z = Matrix(x_of(job, b), job.x.row, job.x.column), Matrix(b.z, job.plan.lead, size)
    block = Product(k=b.count, n=b.rows, width=job.plan.dw_width, prefetch=b.prefetch, flags=ADD if b.adds != 0 else 0)
    block.c = Rows(b.dw.data + b.row * b.dw.row + j * size, b.dw.row)
    if job.plan.dw_by_columns != 0:
        columns = job.d
        block.a = Matrix(z.data + b.row * size, size, z.row)
        whole = columns % (vectors(zero) * lanes(zero)) == 0
        block.b = Panels(data=x.data + j * size, panel=nr * size, row=x.row, padded=1 if whole else 0)
    else:
        columns = job.m
        block.a = Matrix(x.data + b.row * x.column, x.column, x.row)
        block.b = Panels(data=z.data + j * size, panel=nr * size, row=z.row, padded=1)
    block.m = min(columns - j, b.panels * nr)
    if job.plan.dw_a == COPIED:
        copied = Rows(b.space, packed_row(b.rows * size))
        src = Matrix(block.a.data, block.a.column, block.a.row)
        copy(zero, Packing(rows=b.count, columns=b.rows, src=src, dst=copied))
        block.a = Matrix(copied.data, size, copied.row)
    elif job.plan.dw_a == PACKED:
        pack_a(zero, block, b.space)
    if job.plan.dw_b == PACKED:
        panel = job.plan.stretch * nr * size
        block.b = Panels(data=b.packed_b + b.panel * panel, panel=panel, row=nr * size, padded=1)
    if job.plan.dw_by_strips != 0:
        block.space = b.space
        by_strips(zero, block)
    else:
        product(zero, block)
