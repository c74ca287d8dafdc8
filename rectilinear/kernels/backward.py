"""The affine backward pass: dx = dz w^T, dw = x^T dz, db = sum of dz over rows, with dz = dout where kept, else 0.

dz exists a block of rows at a time, in a pack buffer: masking, packing and the column sums of db are one pass over dout, and
both products read that buffer, dx as rows of A, dw as rows of B. The transposed operands cost nothing (x, whose
elements are broadcast from wherever they lie) or one transposition while packing (w). Few rows do without that: their dx is inner products.

Two ways through, chosen by shape:

- Slabs, for long and narrow operands: each task takes a fixed slab of rows through the whole backward, into a dw and db of
  its own; these are added in the order of the slabs.
- Blocks, for the rest: dz is packed a stretch of rows at a time, then tasks compute blocks of dx and of dw.

The two add up in different orders, so shape and host choose, and never the number of threads.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.dots import DOTS_COLUMNS
from rectilinear.kernels.library import CORES, FAR, L2, PAST, blocks, dots, lanes, rows, rows_of_dots, vectors
from rectilinear.kernels.memory import (
    CHANGED,
    data_of,
    extent_of,
    get,
    has_extents,
    put,
    room,
    rounded,
    set_word,
    size_of,
    stride_of,
    word,
    words,
)
from rectilinear.kernels.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.product import (
    AHEAD_WORDS,
    TINY_WORK,
    announce,
    block_count,
    block_start,
    copy_strided,
    depth_for,
    pack_panel,
    packed_row,
    product,
    round_up,
    rows_at_once,
    run_length,
    threads_for,
)
from rectilinear.kernels.rows import KEEP_BITS, KEEP_Z, PAD, SUM, WRITE
from rectilinear.kernels.threads import parallel_for
from rectilinear.kernels.tile import ADD

# The words of a job.
DY, DY_GROUP, DY_ROW, DY_COL = 0, 8, 16, 24
KEEP, KEEP_GROUP, KEEP_ROW, KEEP_COL, KEEP_KIND = 32, 40, 48, 56, 64
X, X_GROUP, X_ROW, X_COL = 72, 80, 88, 96
W, W_GROUP, W_ROW, W_COL = 104, 112, 120, 128
DX, DX_GROUP, DX_ROW = 136, 144, 152
DW, DW_GROUP, DW_ROW = 160, 168, 176
DB, DB_GROUP, DB_COL = 184, 192, 200
N, D, M, GROUPS = 208, 216, 224, 232
SLABS, BLOCK, LEAD = 240, 248, 256
PARTS, SUMS, PACKED_W, SLOTS, SLOT_BYTES = 264, 272, 280, 288, 296
FIRST, LAST, DX_ROWS, DX_COLUMNS, DW_ROWS, DW_COLUMNS, ZP = 304, 312, 320, 328, 336, 344, 352
PART_ROW, COPY_X, GROUP, PANELS_TO_PACK, RUN, TASKS, BY_DOTS, DX_DEPTH = 360, 368, 376, 384, 392, 400, 408, 416
JOB_WORDS = 53

BLOCK_ROWS = 128
"""Rows of dz that are packed and summed at a time."""

REUSE = 4
"""How many panels must use a copied block of x for the copy to pay."""

FEW_ROWS = 16
"""Rows up to which dx is computed by inner products, and dw is mostly a matter of writing it."""

DOTS_VECTORS = 8
"""The fewest vectors along a row of w for which adding up the lanes at its end does not cost more than the transposition it saves."""

DOTS_DEPTH = 2048
"""Elements of a row whose products are summed, in a chain for each lane, before they are added to those before."""

DOTS_BLOCK = 24
"""Columns of dx, rows of w, taken through all rows of dz before the next."""

# Their results, rounded up to whole tiles whichever operand is taken as which.
DOTS_WORDS = (FEW_ROWS + DOTS_COLUMNS - 1) * DOTS_BLOCK

SLAB_ROWS = 1024
"""The shortest slab: shorter ones would spend their time adding up partial dw."""

MOST_SLABS = 32
"""Enough for the cores of a desktop to share; more slabs mean more partial dw to add up."""


@jit_inner
def _masked_block(zero: Any, job: int, group: int, first: int, count: int, dst: int, sums: int, flags: int) -> None:
    """Rows of dz into dst, and their column sums added to `sums`, as flags (WRITE, SUM) say."""
    size, m = size_of(zero), word(job + M)
    lead = word(job + LEAD)
    src_row, src_col = word(job + DY_ROW), word(job + DY_COL)
    src = word(job + DY) + group * word(job + DY_GROUP) + first * src_row
    kind = word(job + KEEP_KIND)
    keep_row, keep_col = word(job + KEEP_ROW), word(job + KEEP_COL)
    keep = word(job + KEEP) + group * word(job + KEEP_GROUP) + first * keep_row
    odd_keep = kind == KEEP_Z and keep_col != size
    if src_col != size or odd_keep:
        copy_strided(zero, (count, m, src, src_row, src_col, dst, lead))
        src, src_row = dst, lead
    if odd_keep:
        for i in range(count):
            for j in range(m):
                if get(zero, keep + i * keep_row + j * keep_col) < zero:
                    put(dst + i * lead + j * size, zero)
        kind = 0
    rows(zero, (count, m, src, src_row, keep, keep_row, dst, lead, sums, kind | flags | PAD))


@jit_inner
def _clear(zero: Any, address: int, count: int) -> None:
    for j in range(count):
        put(address + j * size_of(zero), zero)


@jit_inner
def _pack_w(zero: Any, job: int, group: int, panel: int, dst: int) -> None:
    """Panel `panel` of w^T, all of m, by blocks of k: block after block of nr columns."""
    nr = vectors(zero) * lanes(zero)
    d, m = word(job + D), word(job + M)
    j = panel * nr
    w = word(job + W) + group * word(job + W_GROUP) + j * word(job + W_ROW)
    pack_panel(zero, (m, min(nr, d - j), w, word(job + W_COL), word(job + W_ROW), dst, nr))


@jit_inner
def _dx_by_dots(zero: Any, job: int, group: int, count: int, panel: int, panels: int, z: int) -> None:
    """dx of `count` rows and `panels` panels by inner products, from w as it lies."""
    size = size_of(zero)
    nr = vectors(zero) * lanes(zero)
    d, m, z_row, w_row, dx_row = word(job + D), word(job + M), word(job + LEAD), word(job + W_ROW), word(job + DX_ROW)
    together = rows_of_dots(zero)
    first, end = panel * nr, min(d, (panel + panels) * nr)
    space = room(DOTS_WORDS)
    while first < end:
        columns = min(DOTS_BLOCK, end - first)
        w = word(job + W) + group * word(job + W_GROUP) + first * w_row
        dx = word(job + DX) + group * word(job + DX_GROUP) + first * size
        # Either operand can be the one of which more rows are taken together: the way that computes less beyond the ends.
        if round_up(count, DOTS_COLUMNS) < round_up(count, together):
            row = DOTS_BLOCK * size
            for k in range(0, m, DOTS_DEPTH):
                dots(zero, (min(DOTS_DEPTH, m - k), columns, count, w + k * size, w_row, z + k * size, z_row, space, row, k))
            rows(zero, (count, columns, space, row, 0, 0, dx, dx_row, 0, WRITE))
        else:
            row = round_up(count, together) * size
            for k in range(0, m, DOTS_DEPTH):
                dots(zero, (min(DOTS_DEPTH, m - k), count, columns, z + k * size, z_row, w + k * size, w_row, space, row, k))
            copy_strided(zero, (count, columns, space, size, row, dx, dx_row))
        first += columns


@jit_inner
def _dx_block(zero: Any, job: int, group: int, first: int, count: int, panel: int, panels: int, z: int, packed: int, ahead: int) -> None:
    """dx of `count` rows and `panels` panels: z holds the rows' dz, packed the panels of w^T."""
    size = size_of(zero)
    nv = vectors(zero)
    nr = nv * lanes(zero)
    d, m = word(job + D), word(job + M)
    dx_row = word(job + DX_ROW)
    dx = word(job + DX) + group * word(job + DX_GROUP) + first * dx_row + panel * nr * size
    columns = min(d - panel * nr, panels * nr)
    steps = block_count(m, word(job + DX_DEPTH))
    for step in range(steps):
        k0 = block_start(m, steps, step)
        k = block_start(m, steps, step + 1) - k0
        product(zero, (count, k, columns, z + k0 * size, word(job + LEAD), size,
            packed + k0 * nr * size, m * nr * size, nr * size, 1,
            dx, dx_row, 0, ADD if step > 0 else 0, 0, 0, nv, ahead))  # fmt: skip


@jit_inner
def _dw_block(
    zero: Any,
    job: int,
    group: int,
    first: int,
    count: int,
    row: int,
    row_count: int,
    panel: int,
    panels: int,
    z: int,
    dw: int,
    dw_row: int,
    flags: int,
    space: int,
    ahead: int,
) -> None:
    """Add to dw[row:row + row_count, panels] what `count` samples from `first` on give; z holds their dz.

    Where the rows of x lie so far apart that they meet in few sets of the caches, x is copied to `space` first.
    """
    size = size_of(zero)
    nv = vectors(zero)
    nr = nv * lanes(zero)
    x_row, x_col = word(job + X_ROW), word(job + X_COL)
    x = word(job + X) + group * word(job + X_GROUP) + first * x_row + row * x_col
    if word(job + COPY_X) != 0:
        lead = packed_row(row_count * size)
        if x_col == size:
            rows(zero, (count, row_count, x, x_row, 0, 0, space, lead, 0, WRITE))
        else:
            copy_strided(zero, (count, row_count, x, x_row, x_col, space, lead))
        x, x_row, x_col = space, lead, size
    j = panel * nr
    product(zero, (row_count, count, min(word(job + M) - j, panels * nr), x, x_col, x_row,
        z + j * size, nr * size, word(job + LEAD), 1, dw + row * dw_row + j * size, dw_row, 0, flags, 0, 0, nv, ahead))  # fmt: skip


@jit_inner
def _add_sums(zero: Any, sums: int, total: int, count: int) -> None:
    """total (float64) += sums (T), column by column."""
    for j in range(count):
        put(total + 8 * j, get(0.0, total + 8 * j) + get(zero, sums + j * size_of(zero)))


@jit_inner
def _write_db(zero: Any, job: int, group: int, total: int) -> None:
    """Round the sums into db."""
    db = word(job + DB) + group * word(job + DB_GROUP)
    for j in range(word(job + M)):
        put(db + j * word(job + DB_COL), rounded(zero, get(0.0, total + 8 * j)))


# Slabs.


@jit_inner
def _slab_task(zero: Any, index: int, job: int, slot: int) -> None:
    """The whole backward of one slab of one group."""
    size = size_of(zero)
    nr = vectors(zero) * lanes(zero)
    n, d, m, slabs = word(job + N), word(job + D), word(job + M), word(job + SLABS)
    group, slab = index // slabs, index % slabs
    first, last = block_start(n, slabs, slab), block_start(n, slabs, slab + 1)
    want_dx, want_dw, want_db = word(job + DX) != 0, word(job + DW) != 0, word(job + DB) != 0

    z = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    sums = z + word(job + BLOCK) * word(job + LEAD)
    total = sums + round_up(m * size, 64)
    space = total + round_up(m * 8, 64)
    packed_w = space + round_up(word(job + BLOCK) * packed_row(d * size), 64)
    dw, dw_row = word(job + DW) + group * word(job + DW_GROUP), word(job + DW_ROW)
    if slabs > 1:
        dw, dw_row = word(job + PARTS) + index * d * word(job + PART_ROW), word(job + PART_ROW)
        total = word(job + SUMS) + index * round_up(m * 8, 64)

    ahead = words(AHEAD_WORDS)
    _clear(0.0, total, m)
    panels = block_count(d, nr)
    if want_dx and word(job + BY_DOTS) == 0:
        for panel in range(panels):
            _pack_w(zero, job, group, panel, packed_w + panel * m * nr * size)
    flags = (WRITE if want_dx or want_dw else 0) | (SUM if want_db else 0)
    steps = block_count(last - first, word(job + BLOCK))
    for step in range(steps):
        # The same blocks as in `_pack_task`: they decide the order in which db is summed.
        r0 = first + step * word(job + BLOCK)
        count = min(word(job + BLOCK), last - r0)
        # What comes next: the rest of the slab, or where that is done and a group is one slab, the next group.
        next_group, next_row, left = group, r0 + count, last - r0 - count
        next_d = 0
        if left == 0 and slabs == 1 and group + 1 < word(job + GROUPS):
            next_group, next_row, left, next_d = group + 1, 0, n, d
        left = min(left, BLOCK_ROWS)
        _clear(zero, sums, m)
        _masked_block(zero, job, group, r0, count, z, sums, flags)
        _add_sums(zero, sums, total, m)
        if want_dx and word(job + BY_DOTS) != 0:
            _dx_by_dots(zero, job, group, count, 0, panels, z)
        elif want_dx:
            announce(zero, ahead, job + DY, next_group, next_row, left, m)
            announce(zero, ahead + 16, job + W, next_group, 0, next_d, m)
            _dx_block(zero, job, group, r0, count, 0, panels, z, packed_w, ahead)
        if want_dw:
            add = ADD if step > 0 else 0
            announce(zero, ahead, job + X, next_group, next_row, left, d)
            if want_dx:
                announce(zero, ahead + 16, job + DX, next_group, next_row, left, d)
            announce(zero, ahead + 32, job + DW, next_group, 0, next_d, m)
            _dw_block(zero, job, group, r0, count, 0, d, 0, block_count(m, nr), z, dw, dw_row, add, space, ahead)
    if want_db and slabs == 1:
        _write_db(zero, job, group, total)


@jit_inner
def _slab_bytes(zero: Any, job: int) -> int:
    """Scratch of one thread."""
    size = size_of(zero)
    d, m = word(job + D), word(job + M)
    nr = vectors(zero) * lanes(zero)
    block = word(job + BLOCK)
    packed_w = block_count(d, nr) * m * nr * size
    own = block * word(job + LEAD) + round_up(m * size, 64) + round_up(m * 8, 64)
    return own + round_up(block * packed_row(d * size), 64) + round_up(packed_w, 64)


@jit_inner
def _combine_task(zero: Any, index: int, job: int, slot: int) -> None:
    """Add up the slabs of one group: dw and db, in the order of the slabs."""
    d, m, slabs = word(job + D), word(job + M), word(job + SLABS)
    part_row, sums_row = word(job + PART_ROW), round_up(m * 8, 64)
    if word(job + DW) != 0:
        part = word(job + PARTS) + index * slabs * d * part_row
        for i in range(d):
            dw = word(job + DW) + index * word(job + DW_GROUP) + i * word(job + DW_ROW)
            rows(zero, (1, m, part + i * part_row, 0, 0, 0, dw, 0, 0, WRITE))
            rows(zero, (slabs - 1, m, part + (d + i) * part_row, d * part_row, 0, 0, 0, 0, dw, SUM))
    if word(job + DB) != 0:
        total = word(job + SUMS) + index * slabs * sums_row
        for slab in range(1, slabs):
            _add_sums(0.0, total + slab * sums_row, total, m)
        _write_db(zero, job, index, total)


# Blocks.


@jit_inner
def _pack_task(zero: Any, index: int, job: int, slot: int) -> None:
    """One block of rows of dz with its sums, or one panel of w^T."""
    size = size_of(zero)
    m = word(job + M)
    nr = vectors(zero) * lanes(zero)
    if index < word(job + PANELS_TO_PACK):
        _pack_w(zero, job, word(job + GROUP), index, word(job + PACKED_W) + index * m * nr * size)
        return
    index -= word(job + PANELS_TO_PACK)
    block = word(job + BLOCK)
    first = word(job + FIRST) + index * block
    count = min(block, word(job + LAST) - first)
    sums = word(job + SUMS) + index * round_up(m * size, 64)
    _clear(zero, sums, m)
    flags = (WRITE if word(job + DX) != 0 or word(job + DW) != 0 else 0) | (SUM if word(job + DB) != 0 else 0)
    _masked_block(zero, job, word(job + GROUP), first, count, word(job + ZP) + index * block * word(job + LEAD), sums, flags)


@jit_inner
def _block_task(zero: Any, index: int, job: int, slot: int) -> None:
    """One block of dx or of dw."""
    dx_tasks = word(job + DX_ROWS) * word(job + DX_COLUMNS)
    if index < dx_tasks:
        _dx_task(zero, index, job, slot)
    else:
        _dw_task(zero, index - dx_tasks, job, slot)


@jit_inner
def _dx_task(zero: Any, index: int, job: int, slot: int) -> None:
    size = size_of(zero)
    nr = vectors(zero) * lanes(zero)
    d, m, group = word(job + D), word(job + M), word(job + GROUP)
    count = word(job + LAST) - word(job + FIRST)
    r, c = index % word(job + DX_ROWS), index // word(job + DX_ROWS)
    r0, r1 = block_start(count, word(job + DX_ROWS), r), block_start(count, word(job + DX_ROWS), r + 1)
    panels = block_count(d, nr)
    p0, p1 = block_start(panels, word(job + DX_COLUMNS), c), block_start(panels, word(job + DX_COLUMNS), c + 1)
    z = word(job + ZP) + r0 * word(job + LEAD)
    nothing = index & 0  # a plain 0 would compile a second version
    if word(job + BY_DOTS) != 0:
        _dx_by_dots(zero, job, group, count, p0, p1 - p0, z)
        return
    if word(job + DX_ROWS) > 1:
        packed = word(job + PACKED_W) + p0 * m * nr * size
        _dx_block(zero, job, group, word(job + FIRST) + r0, r1 - r0, p0, p1 - p0, z, packed, nothing)
        return
    packed = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    for panel in range(p0, p1):
        _pack_w(zero, job, group, panel, packed)
        _dx_block(zero, job, group, word(job + FIRST) + r0, r1 - r0, panel, 1, z, packed, nothing)


@jit_inner
def _dw_task(zero: Any, index: int, job: int, slot: int) -> None:
    d, m, group = word(job + D), word(job + M), word(job + GROUP)
    nr = vectors(zero) * lanes(zero)
    first, last = word(job + FIRST), word(job + LAST)
    r, c = index // word(job + DW_COLUMNS), index % word(job + DW_COLUMNS)
    r0, r1 = block_start(d, word(job + DW_ROWS), r), block_start(d, word(job + DW_ROWS), r + 1)
    panels = block_count(m, nr)
    p0, p1 = block_start(panels, word(job + DW_COLUMNS), c), block_start(panels, word(job + DW_COLUMNS), c + 1)
    dw = word(job + DW) + group * word(job + DW_GROUP)
    space = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    nothing = index & 0
    steps = block_count(last - first, word(blocks(zero)))
    for step in range(steps):
        k0 = block_start(last - first, steps, step)
        k1 = block_start(last - first, steps, step + 1)
        flags = ADD if first + k0 > 0 else 0
        z = word(job + ZP) + k0 * word(job + LEAD)
        _dw_block(zero, job, group, first + k0, k1 - k0, r0, r1 - r0, p0, p1 - p0, z, dw, word(job + DW_ROW), flags, space, nothing)


@jit_inner
def _cut(extent: int, least: int, most: int, wanted: int) -> int:
    """How many blocks to cut `extent` into: none longer than `most`, then up to `wanted`, but none shorter than `least`."""
    count = block_count(extent, most)
    return max(count, min(wanted, extent // least))


@jit_inner
def _plan(zero: Any, job: int) -> bool:
    size = size_of(zero)
    nr = vectors(zero) * lanes(zero)
    n, d, m, groups = word(job + N), word(job + D), word(job + M), word(job + GROUPS)
    l2 = word(blocks(zero) + L2)
    set_word(job + LEAD, packed_row(round_up(m, nr) * size))
    x_row = word(job + X_ROW)
    often = block_count(m, nr) >= REUSE
    set_word(job + COPY_X, 1 if x_row % 1024 == 0 and often and n > REUSE else 0)
    set_word(job + BLOCK, BLOCK_ROWS)
    set_word(job + BY_DOTS, 1 if n <= FEW_ROWS and m >= DOTS_VECTORS * lanes(zero) and word(job + W_COL) == size else 0)
    set_word(job + DX_DEPTH, depth_for(zero, n))
    set_word(job + PART_ROW, packed_row(m * size))
    narrow = d * m * size <= l2 // 4
    slabs = max(1, min(MOST_SLABS, n // SLAB_ROWS)) if narrow else 1
    set_word(job + SLABS, slabs)
    return narrow and (slabs > 1 or groups >= word(blocks(zero) + CORES))


@jit_inner
def _plan_blocks(zero: Any, job: int, threads: int) -> int:
    """Choose the stretch of rows and the tasks of one group; returns the rows of a stretch."""
    nr = vectors(zero) * lanes(zero)
    n, d, m = word(job + N), word(job + D), word(job + M)
    most = max(4 * BLOCK_ROWS, word(blocks(zero) + PAST) // word(job + LEAD) // BLOCK_ROWS * BLOCK_ROWS)
    stretch = round_up(-(-max(n, 1) // block_count(n, most)), BLOCK_ROWS)
    wanted = 8 * threads if threads > 1 else 1
    dx_rows = block_count(min(n, stretch), rows_at_once(zero, min(m, word(job + DX_DEPTH)))) if word(job + DX) != 0 else 0
    set_word(job + DX_ROWS, dx_rows)
    dx_columns = -(-wanted // max(dx_rows, 1))
    if dx_rows > 1:
        # As in the forward pass: no more of w at a time than the last cache holds with ease.
        dx_columns = max(dx_columns, block_count(d * m * size_of(zero), word(blocks(zero) + PAST) // 2))
    set_word(job + DX_COLUMNS, min(block_count(d, nr), dx_columns))
    # With few rows dw is a matter of writing: a thread writes to no more rows at a time than it has to, each a page of its own.
    scattered = n <= FEW_ROWS and m * size_of(zero) >= word(blocks(zero) + FAR) and threads > 1
    dw_rows = _cut(d, 28, rows_at_once(zero, min(n, stretch)), d if scattered else wanted) if word(job + DW) != 0 else 0
    set_word(job + DW_ROWS, dw_rows)
    set_word(job + DW_COLUMNS, _cut(block_count(m, nr), 1, 1 << 30, -(-wanted // max(dw_rows, 1))))
    set_word(job + PANELS_TO_PACK, block_count(d, nr) if dx_rows > 1 else 0)
    return stretch


@jit_inner
def _describe(zero: Any, job: int, dy: int, keep: int, kind: int, x: int, w: int, dx: int, dw: int, db: int) -> int:
    """Write the operands into the job; 0, or CHANGED."""
    size = size_of(zero)
    groups, n, d, m = extent_of(w, -3), extent_of(dy, -2), extent_of(w, -2), extent_of(w, -1)
    if not (has_extents(dy, groups, n, m) and has_extents(x, groups, n, d) and has_extents(w, groups, d, m)):
        return CHANGED
    for offset, array in ((DY, dy), (X, x), (W, w)):
        set_word(job + offset, data_of(array))
        set_word(job + offset + 8, stride_of(array, -3, size))
        set_word(job + offset + 16, stride_of(array, -2, size))
        set_word(job + offset + 24, stride_of(array, -1, size))
    if kind != 0:
        columns, keep_size = (extent_of(keep, -1), 1) if kind == KEEP_BITS else (m, size)
        if not has_extents(keep, groups, n, columns) or (kind == KEEP_BITS and columns < (m + 7) >> 3):
            return CHANGED
        set_word(job + KEEP, data_of(keep))
        set_word(job + KEEP_GROUP, stride_of(keep, -3, keep_size))
        set_word(job + KEEP_ROW, stride_of(keep, -2, keep_size))
        set_word(job + KEEP_COL, stride_of(keep, -1, keep_size))
        set_word(job + KEEP_KIND, kind)
    for offset, array, rows_of_result, columns_of_result in ((DX, dx, n, d), (DW, dw, d, m)):
        if array != 0:
            if not has_extents(array, groups, rows_of_result, columns_of_result):
                return CHANGED
            set_word(job + offset, data_of(array))
            set_word(job + offset + 8, stride_of(array, -3, size))
            set_word(job + offset + 16, stride_of(array, -2, size))
    if db != 0:
        if not has_extents(db, 1, groups, m):
            return CHANGED
        set_word(job + DB, data_of(db))
        set_word(job + DB_GROUP, stride_of(db, -2, size))
        set_word(job + DB_COL, stride_of(db, -1, size))
    set_word(job + N, n)
    set_word(job + D, d)
    set_word(job + M, m)
    set_word(job + GROUPS, groups)
    return 0


def entry(zero: Any) -> Any:
    """The backward pass for zero's dtype, as a jitted function of the ids of arrays (0 for one that is not there).

    It returns 0, or how many bytes of scratch it needs and has not got, or CHANGED.
    """

    @jit_inner
    def slab_task(index: int, job: int, slot: int) -> None:
        run = word(job + RUN)
        for i in range(index * run, min((index + 1) * run, word(job + TASKS))):
            _slab_task(zero, i, job, slot)

    @jit_inner
    def combine_task(index: int, job: int, slot: int) -> None:
        _combine_task(zero, index, job, slot)

    @jit_inner
    def pack_task(index: int, job: int, slot: int) -> None:
        _pack_task(zero, index, job, slot)

    @jit_inner
    def block_task(index: int, job: int, slot: int) -> None:
        _block_task(zero, index, job, slot)

    @jit_inner
    def by_slabs(job: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        d, m, slabs, groups = word(job + D), word(job + M), word(job + SLABS), word(job + GROUPS)
        slot = _slab_bytes(zero, job)
        tasks = slabs * groups
        threads = min(threads, tasks)
        parts = tasks * d * word(job + PART_ROW) if slabs > 1 else 0
        sums = tasks * round_up(m * 8, 64) if slabs > 1 else 0
        if threads * slot + parts + sums > scratch_bytes:
            return threads * slot + parts + sums
        set_word(job + SLOTS, scratch)
        set_word(job + SLOT_BYTES, slot)
        set_word(job + PARTS, scratch + threads * slot)
        set_word(job + SUMS, scratch + threads * slot + parts)
        run = run_length(tasks, threads)
        set_word(job + RUN, run)
        set_word(job + TASKS, tasks)
        parallel_for(c_address(slab_task), job, -(-tasks // run), threads)
        if slabs > 1:
            parallel_for(c_address(combine_task), job, groups, threads)
        return 0

    @jit_inner
    def by_blocks(job: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        size = size_of(zero)
        nr = vectors(zero) * lanes(zero)
        n, d, m, groups = word(job + N), word(job + D), word(job + M), word(job + GROUPS)
        stretch = _plan_blocks(zero, job, threads)
        zp = stretch * word(job + LEAD)
        blocks_of_stretch = stretch // BLOCK_ROWS
        sums_row = round_up(m * size, 64)
        sums = blocks_of_stretch * sums_row
        total = round_up(m * 8, 64)
        packed_w = word(job + PANELS_TO_PACK) * m * nr * size
        slot = max(m * nr * size, word(blocks(zero)) * packed_row((d // max(1, word(job + DW_ROWS)) + 1) * size))
        slot = round_up(slot, 64)
        needed = zp + sums + total + packed_w + threads * slot
        if needed > scratch_bytes:
            return needed
        set_word(job + ZP, scratch)
        set_word(job + SUMS, scratch + zp)
        totals = scratch + zp + sums
        set_word(job + PACKED_W, totals + total)
        set_word(job + SLOTS, totals + total + packed_w)
        set_word(job + SLOT_BYTES, slot)
        tasks = word(job + DX_ROWS) * word(job + DX_COLUMNS) + word(job + DW_ROWS) * word(job + DW_COLUMNS)
        panels = word(job + PANELS_TO_PACK)
        for group in range(groups):
            set_word(job + GROUP, group)
            set_word(job + PANELS_TO_PACK, panels)
            _clear(0.0, totals, m)
            first = 0
            while True:
                last = min(n, first + stretch)
                set_word(job + FIRST, first)
                set_word(job + LAST, last)
                count = -(-(last - first) // BLOCK_ROWS)
                parallel_for(c_address(pack_task), job, word(job + PANELS_TO_PACK) + count, threads)
                set_word(job + PANELS_TO_PACK, 0)
                for block in range(count):
                    _add_sums(zero, word(job + SUMS) + block * sums_row, totals, m)
                parallel_for(c_address(block_task), job, tasks, threads)
                first = last
                if first >= n:
                    break
            if word(job + DB) != 0:
                _write_db(zero, job, group, totals)
        return 0

    @jit(nogil=False)
    def backward(
        dy: int, keep: int, kind: int, x: int, w: int, dx: int, dw: int, db: int, scratch: int, scratch_bytes: int, threads: int
    ) -> int:
        job = words(JOB_WORDS)
        if _describe(zero, job, dy, keep, kind, x, w, dx, dw, db) != 0:
            return CHANGED
        work = word(job + GROUPS) * word(job + N) * word(job + D) * word(job + M)
        threads = threads_for(work, threads)
        others = let_go_of_gil(work > TINY_WORK)
        needed = by_slabs(job, scratch, scratch_bytes, threads) if _plan(zero, job) else by_blocks(job, scratch, scratch_bytes, threads)
        take_gil_back(others)
        return needed

    return backward
