"""What both ways through the backward pass, `slabs` and `blocks`, are made of: masked dz with its sums, and the two products of it.

dz exists a block of rows at a time (`slabs`), or a stretch of rows (`blocks`), in a pack buffer: masking, packing and the column sums of
db are one pass over dout, and both products read that buffer, dx as rows of A, dw as rows of B, or panels made of it. The transposed x
costs nothing, since its elements are broadcast from wherever they lie, w one transposition while it is packed. Few rows do without that:
their dx is inner products, or strips of a w^T that lies in rows; a dx of few features is inner products too.
A dw that is stored by columns, or has only one, is the rows of dw^T = dz^T x: dz is then A, the operand that is broadcast, and x is B.
Of a narrow one dw^T is made too, in scratch memory, and copied to its place in the end.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.pack import Packing, copy
from rectilinear.kernels.loops.plan import Backward, Matmul
from rectilinear.kernels.micro.library import lanes, rows
from rectilinear.kernels.micro.rows import KEEP_BITS, KEEP_Z, PAD, SUM, WRITE, RowsOperands
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import get, put, rounded, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows
from rectilinear.kernels.runtime.records import record


@record
class Samples:
    """`count` samples from `first` on of a group, whose dz is at `z`; of that, `columns` columns from `column` on."""

    group: int = 0
    first: int = 0
    count: int = 0
    z: int = 0
    column: int = 0
    columns: int = 0


@jit_inner
def masked_block(zero: Any, job: Backward, s: Samples, sums: int) -> None:
    """Columns of the samples' dz to s.z, if a product needs them, and their sums added to `sums`, if db is wanted."""
    size, first = size_of(zero), s.column
    kind, keep = job.keep_kind, job.keep
    ahead = first >> 3 if kind == KEEP_BITS else first * keep.column
    mask = Rows(keep.data + s.group * keep.group + s.first * keep.row + ahead, keep.row)
    start = job.dout.data + s.group * job.dout.group + s.first * job.dout.row + first * job.dout.column
    src = Matrix(start, job.dout.row, job.dout.column)
    dst = Rows(s.z + first * size, job.plan.lead)
    z_by_columns = kind == KEEP_Z and keep.column != size
    if src.column != size or z_by_columns:
        copy(zero, Packing(rows=s.count, columns=s.columns, src=src, dst=dst))
        src = Matrix(dst.data, dst.row, size)
    if z_by_columns:
        for i in range(s.count):
            for j in range(s.columns):
                if get(zero, mask.data + i * mask.row + j * keep.column) < zero:
                    put(dst.data + i * dst.row + j * size, zero)
        kind = 0
    flags = kind | PAD | (WRITE if job.dx.data != 0 or job.dw.data != 0 else 0) | (SUM if job.db.data != 0 else 0)
    src_rows, total = Rows(src.data, src.row), sums + first * size
    rows(zero, RowsOperands(rows=s.count, columns=s.columns, src=src_rows, keep=mask, dst=dst, sums=total, flags=flags))


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
    db = job.db.data + group * job.db.row
    for j in range(job.m):
        put(db + j * job.db.column, rounded(zero, get(0.0, total + 8 * j)))


@jit_inner
def write_products(zero: Any, job: Backward) -> None:
    """Write the operands of both products into the job, all but what differs from one stretch of samples to the next (`move_to`)."""
    size, plan, dx, dw = size_of(zero), job.plan, job.to_dx, job.to_dw
    dx.a.row, dx.a.column = plan.lead, size
    dx.b.row, dx.b.column = job.w.column, job.w.row
    dx.c.row = job.dx.row
    dx.panel = dx.k * dx.plan.width * lanes(zero) * size
    dw.panel = plan.stretch * dw.plan.width * lanes(zero) * size
    if plan.dw_by_columns != 0:
        dw.a.row, dw.a.column = size, plan.lead
        dw.b.row, dw.b.column = job.x.row, job.x.column
        dw.c.row = job.turned.row if plan.dw_turned != 0 else job.dw.column
    else:
        dw.padded = 1
        dw.a.row, dw.a.column = job.x.column, job.x.row
        dw.b.row, dw.b.column = plan.lead, size
        dw.c.row = job.dw.row


@jit_inner
def move_to(job: Backward, s: Samples, dx: Matmul, dw: Matmul) -> None:
    """Let both products be of these samples."""
    x = job.x.data + s.group * job.x.group + s.first * job.x.row
    dx.n, dw.k, dw.flags = s.count, s.count, ADD if s.first > 0 else 0
    dx.a.data, dx.b.data = s.z, job.w.data + s.group * job.w.group
    dx.c.data, dw.c.data = job.dx.data + s.group * job.dx.group + s.first * job.dx.row, job.dw.data + s.group * job.dw.group
    if job.plan.dw_turned != 0:
        dw.turned, dw.c.data = Rows(dw.c.data, job.dw.row), job.turned.data
    dw.a.data, dw.b.data = (s.z, x) if job.plan.dw_by_columns != 0 else (x, s.z)
