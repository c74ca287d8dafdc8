"""C (n, m) = init + A (n, k) B (k, m) by strips, for few rows of A and a B that comes from memory, where a tile would touch a page with
every k.

    for k in range(0, k, STRIP_DEPTH):      as many rows of B, each a stream
        for i in range(0, n, mr):           from the second on, they are in the cache
            micro/strip.py                  along all columns
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import packed_row
from rectilinear.kernels.loops.host import LONGEST_CHAIN, host
from rectilinear.kernels.loops.product import Product, product
from rectilinear.kernels.micro.library import strip
from rectilinear.kernels.micro.strip import CONTINUE, STRIP_DEPTH, STRIP_ROWS, StripOperands
from rectilinear.kernels.micro.tile import ADD
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import get, put, room, size_of
from rectilinear.kernels.runtime.operands import Rows

STRIP_WORDS = STRIP_DEPTH * STRIP_ROWS
"""Room for the elements of A that a strip takes."""


@jit_inner
def strips_bytes(zero: Any, columns: int) -> int:
    """The scratch that `by_strips` takes."""
    return STRIP_ROWS * packed_row(columns * size_of(zero))


@jit_inner
def by_strips(zero: Any, p: Product, space: int) -> None:
    """The product `p`, whose B lies in rows, with sums at `space`."""
    size = size_of(zero)
    # Sums stay in memory of this task's own: where another one's columns begin, both would write to the same cache lines all along.
    sums = Rows(space, packed_row(p.m * size))
    elements = room(STRIP_WORDS)
    whole = p.k // STRIP_DEPTH * STRIP_DEPTH
    for k in range(0, whole, STRIP_DEPTH):
        for first in range(0, p.n, host(zero).rows_of_strips):
            rows = min(host(zero).rows_of_strips, p.n - first)
            for j in range(STRIP_DEPTH):
                for i in range(STRIP_ROWS):
                    place = p.a.data + (first + min(i, rows - 1)) * p.a.row + (k + j) * p.a.column
                    put(elements + (j * STRIP_ROWS + i) * size, get(zero, place))
            so_far = Rows(sums.data + first * sums.row, sums.row)
            s = StripOperands(rows=rows, a=elements, b=Rows(p.b.data + k * p.b.row, p.b.row), init=so_far, c=so_far, columns=p.m)
            s.bits = Rows(p.bits.data + first * p.bits.row, p.bits.row)
            s.flags = CONTINUE if k % LONGEST_CHAIN != 0 else 0
            s.bias = p.bias if k == 0 else 0
            if (k + STRIP_DEPTH) % LONGEST_CHAIN == 0 or k + STRIP_DEPTH == whole:
                s.c = Rows(p.c.data + first * p.c.row, p.c.row)
                s.flags |= (ADD if k >= LONGEST_CHAIN else 0) | (p.flags if k + STRIP_DEPTH == p.k else 0)
            strip(zero, rows, s)
    if whole < p.k:
        p.a.data += whole * p.a.column
        p.b.data += whole * p.b.row
        p.k -= whole
        p.bias, p.flags = 0, ADD | p.flags
        product(zero, p)
