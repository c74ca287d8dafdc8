"""C (n, m) = bias + A (n, k) B^T by inner products of rows of A and of B, for few rows of A or of B.

    for j in range(0, m, DOTS_BLOCK):           rows of B that stay in the cache for all of A
        for i in range(0, n, DOTS_ROWS):        a single column takes all rows at once
            for k in range(0, K, DOTS_DEPTH):
                micro/dots.py

Tiles would have B transposed first, which for few rows of A takes as long as the product, and of few rows of B they would compute padding.
It serves dx = dz w^T, the forward where w is stored by columns, and a few outputs of any w.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import round_up
from rectilinear.kernels.loops.host import host
from rectilinear.kernels.loops.pack import Packing, copy
from rectilinear.kernels.loops.plan import l1_bytes
from rectilinear.kernels.loops.product import Product
from rectilinear.kernels.micro.dots import DOTS_TALL, DotsOperands
from rectilinear.kernels.micro.library import dots, rows_of_dots
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import room, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows

DOTS_ROWS = 16
"""Rows of A taken through a block of B before the next."""

DOTS_BLOCK = 24
"""Rows of B taken through all rows of A before the next."""

DOTS_DEPTH = 2048
"""Elements of a row whose products are summed, in a chain for each lane, before they are added to those before."""

DOTS_AHEAD = 4096
"""How many bytes ahead of a single column's rows of A to prefetch the next ones, if there are more of them than L2 holds. The forward of
(100000, 30, 1) ran 1.3 times as fast so, but (64, 512, 1) 0.9 and (10000, 64, 1) 0.93, in float64 1.03 (Zen 3, one thread)."""

DOTS_WORDS = DOTS_ROWS * DOTS_BLOCK
"""Results, of whole tiles whichever operand is taken as which."""


@jit_inner
def inner_products(zero: Any, p: Product) -> None:
    """The product `p`, but for its flags. Elements of a row of A lie side by side, and those of a column of B, `p.b.row` bytes apart."""
    whole = p.n // DOTS_TALL * DOTS_TALL
    if _is_a_row_of_its_transpose(zero, p) and whole > 0:
        _block(zero, p, 0, whole, 0, 1)
        if whole < p.n:
            _block(zero, p, whole, p.n - whole, 0, 1)
        return
    for j in range(0, p.m, DOTS_BLOCK):
        for i in range(0, p.n, DOTS_ROWS):
            _block(zero, p, i, min(DOTS_ROWS, p.n - i), j, min(DOTS_BLOCK, p.m - j))


@jit_inner
def _is_a_row_of_its_transpose(zero: Any, p: Product) -> bool:
    """Whether C is a single column that is as well a row of C^T."""
    return p.m == 1 and p.c.row == size_of(zero)


@jit_inner
def _block(zero: Any, p: Product, i: int, n: int, j: int, m: int) -> None:
    """n rows of C from row i on, m columns from column j on."""
    size, together = size_of(zero), rows_of_dots(zero)
    space = room(DOTS_WORDS)
    dst = Rows(p.c.data + i * p.c.row + j * size, p.c.row)
    # Either operand can be the one whose rows are taken in fours or eights: the way that computes less beyond the ends. Of two that compute
    # as much, the one that writes rows of C, if L1 keeps the rows of B, which it reads anew for every three rows of A.
    one_way, other_way = round_up(m, together) * n, round_up(n, together) * m
    b_first = one_way < other_way or (one_way == other_way and m * p.k * size <= l1_bytes(host(zero)))
    in_place = m % DOTS_TALL == 0 if b_first else _is_a_row_of_its_transpose(zero, p) and n % DOTS_TALL == 0
    sums = dst if in_place else Rows(space, (DOTS_BLOCK if b_first else DOTS_ROWS) * size)
    ahead = round_up(DOTS_AHEAD, DOTS_TALL * p.a.row) if p.m == 1 and p.n * p.a.row > host(zero).l2 else 0
    for k in range(0, p.k, DOTS_DEPTH):
        a = Rows(p.a.data + i * p.a.row + k * size, p.a.row)
        b = Rows(p.b.data + j * p.b.row + k * size, p.b.row)
        bias = p.bias + j * size if p.bias != 0 and k == 0 else 0
        d = DotsOperands(k=min(DOTS_DEPTH, p.k - k), rows=n, columns=m, a=a, b=b, c=sums, bias=Matrix(bias, 0, size), adds=k, ahead=ahead)
        if b_first:
            d.rows, d.columns, d.a, d.b, d.bias = m, n, b, a, Matrix(bias, size, 0)
        dots(zero, d)
    if not in_place:
        src = Matrix(space, sums.row, size) if b_first else Matrix(space, size, sums.row)
        copy(zero, Packing(rows=n, columns=m, src=src, dst=dst))
