"""C (n, m) = init + A (n, k) B (k, m) by strips, for few rows of A and a B that lies in rows: micro/strip.py, for so many k at a time as
a chain may have. Or for any number of rows and a single k, as dw of one sample has.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import packed_row, round_up
from rectilinear.kernels.loops.host import LONGEST_CHAIN
from rectilinear.kernels.loops.pack import Packing, copy, pack_panel
from rectilinear.kernels.loops.product import Product
from rectilinear.kernels.micro.library import step_of_strips, strip
from rectilinear.kernels.micro.simd import LINE_BYTES
from rectilinear.kernels.micro.strip import STRIP_ROWS, StripOperands
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.linking import called_by_name
from rectilinear.kernels.runtime.memory import get, put, room, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows

SUM_WORDS = 1024
"""Room on the stack for the sums of a short row: a small call needs no other memory then."""


@jit_inner
def strips_bytes(zero: Any, rows: int, k: int, columns: int, a: Matrix) -> int:
    """The scratch that `by_strips` takes: for the sums, and for elements of A. 0 for a single k, or a single short row, where elements of A
    lie side by side."""
    short = rows == 1 and a.column == size_of(zero) and columns * size_of(zero) <= 8 * SUM_WORDS
    return 0 if short or _is_outer(zero, k, a) else rows * packed_row(columns * size_of(zero)) + _bytes_of_a(zero, rows, k)


@jit_inner
def _is_outer(zero: Any, k: int, a: Matrix) -> bool:
    """Whether C is the outer product of a column of A and a row of B."""
    return k == 1 and a.row == size_of(zero)


@jit_inner
def _bytes_of_a(zero: Any, rows: int, k: int) -> int:
    return round_up(min(k, LONGEST_CHAIN) * (1 if rows == 1 else step_of_strips(zero)) * size_of(zero), LINE_BYTES)


@called_by_name(Product)
def by_strips(zero: Any, p: Product) -> None:
    """The product `p`, whose B lies in rows."""
    if _is_outer(zero, p.k, p.a):
        # Every row of C is the same row of B times an element of A: a strip of one row after the other, none with a sum to keep.
        s = StripOperands(k=1, rows=p.n, columns=p.m, a=p.a.data, b=Rows(p.b.data, p.b.row), c=p.c, bias=p.bias, flags=p.flags, bits=p.bits)
        strip(zero, 1, s)
        return
    # Sums are not in C: where another task's columns begin, both would write to the same cache lines all along.
    sums = Rows(room(SUM_WORDS), 0)
    if strips_bytes(zero, p.n, p.k, p.m, p.a) != 0:
        sums = Rows(p.space + _bytes_of_a(zero, p.n, p.k), packed_row(p.m * size_of(zero)))
    for k in range(0, p.k, LONGEST_CHAIN):
        depth = min(LONGEST_CHAIN, p.k - k)
        a = _elements_of_a(zero, Matrix(p.a.data + k * p.a.column, p.a.row, p.a.column), p.n, depth, p.space)
        s = StripOperands(k=depth, rows=p.n, columns=p.m, a=a, b=Rows(p.b.data + k * p.b.row, p.b.row), sums=sums, c=p.c, bits=p.bits)
        s.bias = p.bias if k == 0 else 0
        s.flags = (ADD if k > 0 else p.flags & ADD) | (p.flags if k + depth == p.k else 0)
        strip(zero, p.n, s)


@jit_inner
def _elements_of_a(zero: Any, a: Matrix, rows: int, depth: int, space: int) -> int:
    """Where the elements of A lie as strips take them: of a single row side by side, of more those of all rows together for each k."""
    size, step = size_of(zero), step_of_strips(zero)
    if rows == 1:
        if a.column == size:
            return a.data
        copy(zero, Packing(rows=1, columns=depth, src=a, dst=Rows(space, 0)))
        return space
    pack_panel(zero, Packing(rows=depth, columns=rows, src=Matrix(a.data, a.column, a.row), dst=Rows(space, step * size)))
    for k in range(depth if rows < STRIP_ROWS else 0):
        last = get(zero, space + (k * step + rows - 1) * size)
        for i in range(rows, STRIP_ROWS):
            put(space + (k * step + i) * size, last)
    return space
