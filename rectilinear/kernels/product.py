"""Blocked products over the micro-kernel: the loops around a tile, and packing.

Everything here is jitted, inlined into the passes that use it, and works on addresses and byte strides.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.library import (
    MAX_ROWS,
    MC,
    blocks,
    lanes,
    least_vectors,
    most_rows,
    row_lanes,
    rows,
    tile,
    transpose,
)
from rectilinear.kernels.memory import emitted, get, put, room, set_word, size_of, word
from rectilinear.kernels.native import c_address
from rectilinear.kernels.rows import PAD, WRITE
from rectilinear.kernels.threads import helpers_at_hand
from rectilinear.kernels.tile import ADD

product = emitted("rectilinear_product", 18)
pack_panel = emitted("rectilinear_pack_panel", 7)
copy_strided = emitted("rectilinear_copy_strided", 7)
"""The functions below, compiled once for a dtype and called by name: each pass would otherwise compile its own."""

SMALL_WORK = 1 << 20
"""Multiply-adds that one thread finishes before a helper would have woken up."""

TINY_WORK = 1 << 17
"""Multiply-adds that one thread finishes before a helper that is awake would have done its part."""

LINE_BYTES = 64

AHEAD_WORDS = 6
"""Three stretches of memory that tiles ask for: see `_product`."""

TAIL_WORDS = 4096
"""Room for the last rows of a narrow B that is read in place: at most nr + 1 rows of nr elements (see `_columns`)."""


@jit_inner
def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@jit_inner
def packed_row(length: int) -> int:
    """Bytes between the rows of a packed block: an odd number of cache lines, so that rows do not meet in one set."""
    return (round_up(length, 64) // 64 | 1) * 64


@jit_inner
def block_count(extent: int, block: int) -> int:
    """Blocks of nearly equal length, none longer than `block`; one empty block where there is nothing."""
    return max(1, -(-extent // block))


@jit_inner
def threads_for(work: int, threads: int) -> int:
    """How many of `threads` to use for so many multiply-adds."""
    if work <= TINY_WORK or (work <= SMALL_WORK and threads > 1 and helpers_at_hand() == 0):
        return 1
    return threads


@jit_inner
def run_length(tasks: int, threads: int) -> int:
    """How many tasks to hand out at once: enough turns for the threads to even out, and no more claims than that."""
    return max(1, tasks // (16 * threads))


@jit_inner
def depth_for(zero: Any, n: int) -> int:
    """The block of K for an A of n rows: half of kc where twice mc rows are all there are, so that B is read once."""
    kc, mc = word(blocks(zero)), word(blocks(zero) + MC)
    return max(1, kc // 2) if n <= 2 * mc else kc


@jit_inner
def rows_at_once(zero: Any, depth: int) -> int:
    """Rows of A that L2 holds along so much of K: mc where that is kc, up to twice as many where it is less."""
    kc, mc = word(blocks(zero)), word(blocks(zero) + MC)
    return max(1, mc * kc // max(min(depth, kc), kc // 2))


@jit_inner
def block_start(extent: int, count: int, index: int) -> int:
    """Where block `index` begins when `extent` is cut into `count` nearly equal blocks."""
    return extent // count * index + min(index, extent % count)


@jit_inner
def announce(zero: Any, stretch: int, matrix: int, group: int, first: int, count: int, columns: int) -> None:
    """Write the stretch of rows that tiles are to ask for; `matrix` points to its address, and the bytes between groups and between rows.

    Nothing, where rows lie so far apart that most of what is between them would be something else.
    """
    row = word(matrix + 16)
    start = word(matrix) + group * word(matrix + 8) + first * row
    set_word(stretch, start)
    set_word(stretch + 8, start + (count * row if 0 < row <= 2 * columns * size_of(zero) else 0))


@jit_inner
def _vectors_for(zero: Any, left: int, nv: int) -> int:
    """The narrowest panel, up to nv vectors, that holds `left` columns."""
    while nv > least_vectors(zero) and left * 2 <= nv * lanes(zero):
        nv //= 2
    return nv


@jit_inner
def _tile_index(nv: int) -> int:
    index = 0
    while nv > 1:
        nv //= 2
        index += MAX_ROWS
    return index


@jit_inner
def _rows_of_tiles(
    zero: Any,
    n: int,
    k: int,
    a: int,
    a_row: int,
    a_col: int,
    b: int,
    b_row: int,
    c: int,
    c_row: int,
    bias: int,
    flags: int,
    bits: int,
    bits_row: int,
    columns: int,
    nv: int,
    following: int,
    ahead: int,
) -> None:
    """One panel of B against all rows of A, in tiles of nearly equal height.

    The tiles ask for what `ahead` says, else for the panel that follows (at `following`, not 0), a line of each row of k at a time.
    """
    count = block_count(n, most_rows(zero, nv))
    index = _tile_index(nv)
    lines = max(1, nv * lanes(zero) * size_of(zero) // LINE_BYTES)
    first = 0
    for t in range(count if n > 0 else 0):
        height = block_start(n, count, t + 1) - first
        fetch, fetch_step = b, 0
        if ahead != 0 and word(ahead) >= word(ahead + 8):
            for i in range(0, 32, 8):
                set_word(ahead + i, word(ahead + i + 16))
            set_word(ahead + 32, word(ahead + 40))
        if ahead != 0 and word(ahead) < word(ahead + 8):
            fetch, fetch_step = word(ahead), LINE_BYTES
            set_word(ahead, fetch + k * LINE_BYTES)
        elif following != 0 and t < lines:
            fetch, fetch_step = following + t * LINE_BYTES, b_row
        tile(
            zero,
            index + height,
            (
                k,
                a + first * a_row,
                a_row,
                a_col,
                b,
                b_row,
                c + first * c_row,
                c_row,
                bias,
                flags,
                bits + first * bits_row,
                bits_row,
                columns,
                fetch,
                fetch_step,
            ),
        )
        first += height


@jit_inner
def _read_past(
    zero: Any,
    n: int,
    k: int,
    a: int,
    a_row: int,
    a_col: int,
    b: int,
    b_row: int,
    c: int,
    c_row: int,
    bias: int,
    flags: int,
    bits: int,
    bits_row: int,
    columns: int,
    nv: int,
    ahead: int,
) -> None:
    """The last panel of a B that lies in memory as it is: its vectors reach past the columns of B.

    Within B that is harmless (what is read lands in columns that are not stored), but the last rows would reach past
    its end. Those, one or a few, are copied and summed in a second call.
    """
    size = size_of(zero)
    nr = nv * lanes(zero)
    last = min(k, -(-(nr - columns) * size // b_row))
    none = flags & 0  # a plain 0 would compile a second version
    tail = room(TAIL_WORDS)
    rows(zero, (last, columns, b + (k - last) * b_row, b_row, 0, 0, tail, nr * size, 0, WRITE | PAD))
    if last < k:
        early = flags & ADD
        _rows_of_tiles(zero, n, k - last, a, a_row, a_col, b, b_row, c, c_row, bias, early, none, none, columns, nv, none, ahead)
        a += (k - last) * a_col
        flags |= ADD
        bias = none
    _rows_of_tiles(zero, n, last, a, a_row, a_col, tail, nr * size, c, c_row, bias, flags, bits, bits_row, columns, nv, none, ahead)


@jit_inner
def _product(
    zero: Any,
    n: int,
    k: int,
    m: int,
    a: int,
    a_row: int,
    a_col: int,
    b: int,
    b_panel: int,
    b_row: int,
    padded: int,
    c: int,
    c_row: int,
    bias: int,
    flags: int,
    bits: int,
    bits_row: int,
    nv: int,
    ahead: int,
) -> None:
    """C (n, m) = init + A (n, k) B (k, m), panel after panel of nv vectors.

    B's panels lie b_panel bytes apart, the rows of one b_row. `padded` says that every panel can be read to its full
    width (a packed B); else B is read in place. `ahead`, if not 0, holds four words: what the next product will take from memory or
    write to, two stretches by address and end, of which as much is asked for as there are steps of k.
    """
    size = size_of(zero)
    nr = nv * lanes(zero)
    j = 0
    while j < m:
        columns = min(nr, m - j)
        width = _vectors_for(zero, columns, nv)
        bias_j = bias + j * size if bias != 0 else bias
        bits_j = bits + (j >> 3)
        c_j = c + j * size
        if padded != 0 or columns == width * lanes(zero):
            following = b + b_panel if j + nr < m else 0
            _rows_of_tiles(
                zero, n, k, a, a_row, a_col, b, b_row, c_j, c_row, bias_j, flags, bits_j, bits_row, columns, width, following, ahead
            )
        else:
            _read_past(zero, n, k, a, a_row, a_col, b, b_row, c_j, c_row, bias_j, flags, bits_j, bits_row, columns, width, ahead)
        b += b_panel
        j += nr


@jit_inner
def _pack_panel(zero: Any, k: int, columns: int, src: int, src_k: int, src_j: int, dst: int, nr: int) -> None:
    """One panel of B, k rows by nr, from a matrix with any strides; padded to whole vectors."""
    size = size_of(zero)
    if src_j == size:
        rows(zero, (k, columns, src, src_k, 0, 0, dst, nr * size, 0, WRITE | PAD))
    elif src_k == size:
        transpose(zero, (k, columns, src, src_j, dst, nr * size))
    else:
        _copy_strided(zero, k, columns, src, src_k, src_j, dst, nr * size)
        for i in range(k):
            for j in range(columns, round_up(columns, row_lanes(zero))):
                put(dst + (i * nr + j) * size, zero)


@jit_inner
def _copy_strided(zero: Any, n: int, m: int, src: int, src_row: int, src_col: int, dst: int, dst_row: int) -> None:
    """dst (n, m), unit stride along its rows, from any strides. The slow way, for layouts that nobody is fast on."""
    size = size_of(zero)
    for i in range(n):
        for j in range(m):
            put(dst + i * dst_row + j * size, get(zero, src + i * src_row + j * src_col))


def addresses(zero: Any) -> Any:
    """A jitted function that returns the addresses of product, pack_panel and copy_strided for zero's dtype."""

    @jit_inner
    def product_of_type(
        n: int,
        k: int,
        m: int,
        a: int,
        a_row: int,
        a_col: int,
        b: int,
        b_panel: int,
        b_row: int,
        padded: int,
        c: int,
        c_row: int,
        bias: int,
        flags: int,
        bits: int,
        bits_row: int,
        nv: int,
        ahead: int,
    ) -> None:
        _product(zero, n, k, m, a, a_row, a_col, b, b_panel, b_row, padded, c, c_row, bias, flags, bits, bits_row, nv, ahead)

    @jit_inner
    def pack_panel_of_type(k: int, columns: int, src: int, src_k: int, src_j: int, dst: int, nr: int) -> None:
        _pack_panel(zero, k, columns, src, src_k, src_j, dst, nr)

    @jit_inner
    def copy_strided_of_type(n: int, m: int, src: int, src_row: int, src_col: int, dst: int, dst_row: int) -> None:
        _copy_strided(zero, n, m, src, src_row, src_col, dst, dst_row)

    @jit()
    def addresses_of_type() -> tuple[int, ...]:
        return c_address(product_of_type), c_address(pack_panel_of_type), c_address(copy_strided_of_type)

    return addresses_of_type
