"""The product over the micro-kernel: C (n, m) = init + A (n, k) B (k, m), one block of K, panel after panel of B, tile after tile of A.

    for j in range(0, m, nr):               a panel of B, nr columns
        for i in range(0, n, mr):           a tile of C, its sums in registers
            for k in range(k):              micro/tile.py

Where k is small (`plan.blocks_along_rows`) the two outer loops change places, so that C is written row by row. Everything works on
addresses and byte strides. The loops over blocks of K and of rows are the passes'.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.loops.arithmetic import block_count, block_start, round_up
from rectilinear.kernels.loops.pack import SIDE_BY_SIDE, Packing, pack_panel
from rectilinear.kernels.micro.library import (
    index_of_tile,
    lanes,
    lanes_of_rows,
    least_vectors,
    most_rows,
    panels_of_a,
    rows,
    tile,
    vectors,
)
from rectilinear.kernels.micro.panels import PanelsOperands
from rectilinear.kernels.micro.rows import PAD, WRITE, RowsOperands
from rectilinear.kernels.micro.simd import LINE_BYTES
from rectilinear.kernels.micro.tile import ADD, Steps, TileOperands
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.linking import called_by_name
from rectilinear.kernels.runtime.memory import room, size_of
from rectilinear.kernels.runtime.operands import Matrix, Rows, Stack
from rectilinear.kernels.runtime.records import at, record

TAIL_WORDS = 4096
"""Room for the last rows of a narrow B that is read in place: at most nr - 1 rows of nr elements (see `_read_past`)."""


@record
class Panels:
    """B: panels lie `panel` bytes apart, the rows of one `row`. `padded` is 1 where every panel can be read to its full width, as packed
    ones can; else B is read where it lies."""

    data: int = 0
    panel: int = 0
    row: int = 0
    padded: int = 0


@record
class Stretch:
    """Memory from `start` to `end`."""

    start: int = 0
    end: int = 0


@record
class Prefetch:
    """What comes next: memory that tiles prefetch, as much with each as it has steps of k."""

    now: Stretch = Stretch()
    then: Stretch = Stretch()
    last: Stretch = Stretch()


@record
class Product:
    """A lies in rows, or packed, tile after tile `a_panel` bytes apart. With `along_rows` 1 tiles go along rows of C. A last panel narrower
    than `width` vectors has higher tiles than the others, unless A is packed or `low_tiles` is 1. `bias` is 0 where there is none.
    `prefetch` is the address of a `Prefetch`, or 0 to prefetch the panel that follows; `space` is scratch for one that goes by strips."""

    n: int = 0
    k: int = 0
    m: int = 0
    a: Matrix = Matrix()
    a_panel: int = 0
    low_tiles: int = 0
    along_rows: int = 0
    b: Panels = Panels()
    c: Rows = Rows()
    bias: int = 0
    flags: int = 0
    bits: Rows = Rows()
    width: int = 0
    prefetch: int = 0
    space: int = 0


@jit_inner
def prefetch_rows(zero: Any, stretch: Stretch, matrix: Stack, group: int, first: int, count: int, columns: int) -> None:
    """Write the stretch of so many rows.

    Nothing, where rows lie so far apart that most of what is between them would be something else.
    """
    stretch.start = matrix.data + group * matrix.group + first * matrix.row
    stretch.end = stretch.start + (count * matrix.row if 0 < matrix.row <= 2 * columns * size_of(zero) else 0)


@jit_inner
def tiles_of(zero: Any, n: int, nv: int) -> int:
    """Into how many tiles, nv vectors wide, n rows are cut."""
    return block_count(n, most_rows(zero, nv))


@jit_inner
def pack_a(zero: Any, p: Product, dst: int) -> None:
    """Pack the rows of A for the product's tiles: of each, for every k, one element of each of its rows, and set p.a to it."""
    size = size_of(zero)
    count = tiles_of(zero, p.n, p.width) if p.n > 0 else 0
    step = packed_step(zero, p.width)
    a, p.a_panel = Matrix(p.a.data, p.a.row, p.a.column), p.k * step
    done = _pack_side_by_side(zero, p, count, Rows(dst, step)) if a.row == size and p.width == vectors(zero) else 0
    for i in range(done, count):
        first = block_start(p.n, count, i)
        src = Matrix(a.data + first * a.row, a.column, a.row)
        height = block_start(p.n, count, i + 1) - first
        pack_panel(zero, Packing(rows=p.k, columns=height, src=src, dst=Rows(dst + i * p.a_panel, step)))
    p.a = Matrix(dst, size, step)


@jit_inner
def _pack_side_by_side(zero: Any, p: Product, count: int, dst: Rows) -> int:
    """Those of the `count` tiles of an A that lies in columns whose vectors end within the block, several at a time. Returns how many."""
    size, n, done = size_of(zero), p.n, 0
    width = round_up(most_rows(zero, vectors(zero)), lanes(zero))
    while done < count:
        first = block_start(n, count, done)
        height = block_start(n, count, done + 1) - first
        same = (n % count if done < n % count else count) - done
        within = (n - first - width) // height + 1
        if within <= 0:
            break
        some = min(SIDE_BY_SIDE, same, within)
        src, to = Rows(p.a.data + first * size, p.a.column), Rows(dst.data + done * p.a_panel, dst.row)
        panels_of_a(zero, PanelsOperands(k=p.k, panels=some, panel=p.a_panel, apart=height * size, src=src, dst=to))
        done += some
    return done


@jit_inner
def packed_step(zero: Any, nv: int) -> int:
    """Bytes from one k to the next of an A that is packed for tiles nv vectors wide: whole vectors."""
    return round_up(most_rows(zero, nv), lanes_of_rows(zero)) * size_of(zero)


@jit_inner
def _vectors_for(zero: Any, left: int, nv: int) -> int:
    """The narrowest panel, up to nv vectors, that holds `left` columns."""
    while nv > least_vectors(zero) and left * 2 <= nv * lanes(zero):
        nv //= 2
    return nv


@jit_inner
def _prefetches_next(p: Product, t: TileOperands) -> bool:
    """Whether the tiles prefetch what p.prefetch says; then they do, but no more of them than that lasts for."""
    if p.prefetch == 0:
        return False
    ahead = at(Prefetch, p.prefetch)
    if ahead.now.start >= ahead.now.end:
        ahead.now = ahead.then
        ahead.then = ahead.last
        ahead.last.end = 0
    left, share = ahead.now.end - ahead.now.start, max(1, t.k) * LINE_BYTES
    if left <= 0:
        return False
    t.prefetch, t.prefetch_step, t.steps.prefetch, t.tiles = ahead.now.start, LINE_BYTES, share, min(t.tiles, -(-left // share))
    ahead.now.start += t.tiles * share
    return True


@jit_inner
def _along_rows(zero: Any, p: Product, panels: int) -> None:
    """So many whole panels of B against all rows of A: all panels for a tile's rows, then for the next ones. The first rows prefetch B."""
    n, nv, size, first = p.n, p.width, size_of(zero), 0
    count, nr = tiles_of(zero, n, nv), nv * lanes(zero)
    t = TileOperands(k=p.k, flags=p.flags, columns=nr)
    t.steps = Steps(b=p.b.panel, c=nr * size, bias=nr * size if p.bias != 0 else 0, bits=nr >> 3)
    for i in range(count if n > 0 else 0):
        height, left = block_start(n, count, i + 1) - first, panels
        t.a, t.b, t.bias = p.a, Rows(p.b.data, p.b.row), p.bias
        t.a.data += i * p.a_panel if p.a_panel != 0 else first * p.a.row
        t.c, t.bits = Rows(p.c.data + first * p.c.row, p.c.row), Rows(p.bits.data + first * p.bits.row, p.bits.row)
        while left > 0:
            t.tiles = left
            if not _prefetches_next(p, t):
                t.prefetch, t.prefetch_step, t.steps.prefetch = t.b.data + p.b.panel, p.b.row if i == 0 else 0, p.b.panel
            left -= t.tiles
            tile(zero, index_of_tile(nv, height), t)
        first += height


@jit_inner
def _down_panel(zero: Any, p: Product, nv: int, t: TileOperands, following: int) -> None:
    """One panel of B, nv vectors wide, against all rows of A, in tiles of nearly equal height.

    The tiles prefetch what p.prefetch says, else the panel that follows (at `following`, not 0): each an equal share of a packed one, or
    one line of each row of k of one in place. If the first tile prefetched all of a packed panel, it would ask more of L3 than that
    delivers meanwhile.
    """
    n, width = p.n, nv * lanes(zero) * size_of(zero)
    count, done = tiles_of(zero, n, p.width if p.a_panel != 0 or p.low_tiles != 0 else nv), 0
    packed = t.b.row == width
    share = -(-width // count) if packed else LINE_BYTES
    sharers = -(-width // share) if following != 0 else 0
    while done < count and n > 0:
        taller = done < n % count  # as `block_start` has it
        height = n // count + (1 if taller else 0)
        t.tiles = (n % count if taller else count) - done
        t.steps = Steps(a=p.a_panel if p.a_panel != 0 else height * t.a.row, c=height * t.c.row, bits=height * t.bits.row)
        if not _prefetches_next(p, t):
            t.prefetch, t.prefetch_step, t.steps.prefetch = t.b.data, 0, 0
            if done < sharers:
                t.steps.prefetch, t.prefetch_step = (t.k * share, share) if packed else (share, t.b.row)
                t.prefetch, t.tiles = following + done * t.steps.prefetch, min(t.tiles, sharers - done)
        done += t.tiles
        tile(zero, index_of_tile(nv, height), t)


@jit_inner
def _read_past(zero: Any, p: Product, nv: int, t: TileOperands) -> None:
    """The last panel of a B that lies in memory as it is: its vectors reach past the columns of B.

    Within B that is harmless (what is read lands in columns that are not stored), but the last rows would reach past
    its end. Those, one or a few, are copied and summed in a second call.
    """
    size = size_of(zero)
    nr, k = nv * lanes(zero), t.k
    last = min(k, -(-(nr - t.columns) * size // t.b.row))
    tail = Rows(room(TAIL_WORDS), nr * size)
    src = Rows(t.b.data + (k - last) * t.b.row, t.b.row)
    rows(zero, RowsOperands(rows=last, columns=t.columns, src=src, dst=tail, flags=WRITE | PAD))
    if last < k:
        early = TileOperands(k=k - last, a=t.a, b=t.b, c=t.c, bias=t.bias, flags=t.flags & ADD, columns=t.columns)
        _down_panel(zero, p, nv, early, 0)
        t.a.data += (k - last) * t.a.column
        t.flags |= ADD
        t.bias = 0
    t.k, t.b = last, tail
    _down_panel(zero, p, nv, t, 0)


@called_by_name(Product)
def product(zero: Any, p: Product) -> None:
    size = size_of(zero)
    nr = p.width * lanes(zero)
    along = p.m // nr if p.along_rows != 0 else 0
    if along > 0:
        _along_rows(zero, p, along)
    for j in range(along * nr, p.m, nr):
        columns = min(nr, p.m - j)
        nv = _vectors_for(zero, columns, p.width)
        b = Rows(p.b.data + j // nr * p.b.panel, p.b.row)
        c = Rows(p.c.data + j * size, p.c.row)
        bits = Rows(p.bits.data + (j >> 3), p.bits.row)
        bias = p.bias + j * size if p.bias != 0 else 0
        t = TileOperands(k=p.k, a=p.a, b=b, c=c, bias=bias, flags=p.flags, bits=bits, columns=columns)
        if p.b.padded != 0 or columns == nv * lanes(zero):
            _down_panel(zero, p, nv, t, b.data + p.b.panel if j + nr < p.m else 0)
        else:
            _read_past(zero, p, nv, t)
