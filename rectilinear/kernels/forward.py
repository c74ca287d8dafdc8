"""The affine forward pass: out = x w + b, with ReLU and the keep-mask bits at the store.

One call is one job: the operands' addresses, extents and strides written into a row of words, and tasks that each
compute a block of rows by a block of columns of one group. Every element of out is a sum of chains of at most LONGEST_CHAIN multiply-adds
in ascending order of d, the first begun with the bias; where they begin depends on shapes, strides and the host, never on threads.
"""

from __future__ import annotations

from typing import Any

from rectilinear.kernels.blocking import LONGEST_CHAIN, MEETING
from rectilinear.kernels.cache import jit, jit_inner
from rectilinear.kernels.library import FAR, L2, PAST, blocks, lanes, most_rows, rows, rows_of_strips, strip, vectors
from rectilinear.kernels.memory import (
    CHANGED,
    data_of,
    extent_of,
    get,
    has_extents,
    put,
    room,
    set_word,
    size_of,
    stride_of,
    word,
    words,
)
from rectilinear.kernels.native import c_address, let_go_of_gil, take_gil_back
from rectilinear.kernels.product import (
    AHEAD_WORDS,
    LINE_BYTES,
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
from rectilinear.kernels.rows import WRITE
from rectilinear.kernels.strip import CONTINUE, STRIP_DEPTH, STRIP_ROWS
from rectilinear.kernels.threads import parallel_for
from rectilinear.kernels.tile import ADD, BITS

# The words of a job.
X, X_GROUP, X_ROW, X_COL = 0, 8, 16, 24
W, W_GROUP, W_ROW, W_COL = 32, 40, 48, 56
BIAS, BIAS_GROUP = 64, 72
OUT, OUT_GROUP, OUT_ROW = 80, 88, 96
BIT, BIT_GROUP, BIT_ROW = 104, 112, 120
N, D, M, FLAGS = 128, 136, 144, 152
ROW_TASKS, COLUMN_TASKS, WIDTH = 160, 168, 176
PACKED, PACKED_GROUP, PACK_A, SLOTS, SLOT_BYTES = 184, 192, 200, 208, 216
RUN, TASKS, LATE, A_BYTES, STREAM, BY_STRIPS, GROUPS, DEPTH = 224, 232, 240, 248, 256, 264, 272, 280
JOB_WORDS = 36

SMALL_ROWS = 8
"""Reading w takes as long for fewer rows: two threads, (1, 724, 512) and (1, 1024, 512) ran 1.8 to 2.1 times as fast (Zen 4)."""

STRIP_BYTES = 2048
"""The least of a row of w for one thread to move along."""

TURNS = 8
"""Tasks per thread, so that they finish together: with 4, 512^3 ran at 84 % of the peak and not 97 %."""

PACK_AT_ONCE = 1 << 30
"""Bytes of packed w beyond which each task packs a panel at a time for itself: a narrow w is padded to whole vectors."""

SCATTERED = -1
"""What the pass answers to a bias whose elements do not lie side by side."""

STRIP_WORDS = STRIP_DEPTH * STRIP_ROWS
"""Room for the elements of x that a strip takes."""

X_REUSE, W_REUSE = 4, 40
"""How often a copied element must be used for the copy to pay: x by so many panels, w by so many tiles one below the other.

Tiles ask for the next panel of w while they work on one, which makes up for rows that lie on pages of their own: unpacked,
(128, 1024, 1024) ran 1.17 times as fast, (512, 1024, 1024) alike, 2048^3 0.88 times (Zen 4)."""


W_REUSE_NARROW = 10
"""The same for w where a row of a panel is one cache line or less (all but AVX-512): so narrow a tile reads w more often for each
multiply-add, and where its rows meet in L1 they come from L2 or beyond each time. AVX2 on Zen 4, two threads, forward: packed,
(128, 1024, 1024) ran 1.6 times as fast, (64, 1024, 1024) 1.3, (128, 784, 256) 1.1 to 1.3, 512^3 1.0 to 1.2. At 8 uses (48, 512, 512) ran
0.9 to 1.1 times as fast. Where rows do not meet, packing gives nothing: (256, 512, 10) 0.9."""

L1_SETS, L1_WAYS = 64, 8
"""Of Zen 2 to 5 and of Intel's to Skylake; later ones have 12 ways, where a few more layers would do without."""


@jit_inner
def _task(zero: Any, index: int, job: int, slot: int) -> None:
    """One block of out."""
    column_tasks, row_tasks = word(job + COLUMN_TASKS), word(job + ROW_TASKS)
    group, index = index // (row_tasks * column_tasks), index % (row_tasks * column_tasks)
    n, d, m, nv = word(job + N), word(job + D), word(job + M), word(job + WIDTH)
    size = size_of(zero)
    nr = nv * lanes(zero)
    panels = block_count(m, nr)
    first_row = block_start(n, row_tasks, index % row_tasks)
    last_row = block_start(n, row_tasks, index % row_tasks + 1)
    first = block_start(panels, column_tasks, index // row_tasks)
    last = min(m, block_start(panels, column_tasks, index // row_tasks + 1) * nr)
    column = first * nr

    x = word(job + X) + group * word(job + X_GROUP) + first_row * word(job + X_ROW)
    w_row = word(job + W_ROW)
    w = word(job + W) + group * word(job + W_GROUP) + column * word(job + W_COL)
    late = word(job + LATE) != 0
    packed = word(job + PACKED)
    if packed != 0:
        packed += group * word(job + PACKED_GROUP)
    out = word(job + OUT) + group * word(job + OUT_GROUP) + first_row * word(job + OUT_ROW) + column * size
    bits = word(job + BIT) + group * word(job + BIT_GROUP) + first_row * word(job + BIT_ROW) + (column >> 3)
    bias = word(job + BIAS)
    if bias != 0:
        bias += group * word(job + BIAS_GROUP) + column * size

    slots = word(job + SLOTS) + slot * word(job + SLOT_BYTES)
    if word(job + BY_STRIPS) != 0:
        _by_strips(zero, job, last - column, x, w, out, bias, bits, slots)
        return
    steps = block_count(d, word(job + DEPTH))
    rows_count = last_row - first_row
    ahead = words(AHEAD_WORDS)
    if word(job + STREAM) != 0:
        # The tiles ask for what the next task takes, most likely this thread's own: else memory idles meanwhile.
        next_group, next_row = (group, last_row) if last_row < n else (group + 1, 0)
        count = min(rows_count, n - next_row) if next_group < word(job + GROUPS) else 0
        announce(zero, ahead, job + X, next_group, next_row, count, d)
        announce(zero, ahead + 16, job + OUT, next_group, next_row, count, m)
        announce(zero, ahead + 32, job + W, next_group, 0, d if count > 0 and next_group > group else 0, m)
    row_steps = block_count(rows_count, rows_at_once(zero, min(d, word(job + DEPTH)))) if word(job + PACK_A) != 0 else 1
    for r in range(row_steps):
        r0 = block_start(rows_count, row_steps, r)
        r1 = block_start(rows_count, row_steps, r + 1)
        for step in range(steps):
            k0 = block_start(d, steps, step)
            k = block_start(d, steps, step + 1) - k0
            flags = ADD if step > 0 else 0
            if step == steps - 1:
                flags |= word(job + FLAGS)
            a, a_row, a_col = x + r0 * word(job + X_ROW) + k0 * word(job + X_COL), word(job + X_ROW), word(job + X_COL)
            if word(job + PACK_A) != 0:
                lead = packed_row(k * size)
                if a_col == size:
                    rows(zero, (r1 - r0, k, a, a_row, 0, 0, slots, lead, 0, WRITE))
                else:
                    copy_strided(zero, (r1 - r0, k, a, a_row, a_col, slots, lead))
                a, a_row, a_col = slots, lead, size
            c, bit = out + r0 * word(job + OUT_ROW), bits + r0 * word(job + BIT_ROW)
            b, b_panel, b_row, padded, together = w + k0 * w_row, nr * size, w_row, 0, last - column
            if packed != 0:
                b, b_panel, b_row, padded = packed + k0 * panels * nr * size + first * k * nr * size, k * nr * size, nr * size, 1
            elif late:
                b, b_row, padded, together = slots + word(job + A_BYTES), nr * size, 1, nr
            for done in range(0, last - column, max(together, 1)):
                columns = min(together, last - column - done)
                if late:
                    pack_panel(zero, (k, columns, w + k0 * w_row + done * word(job + W_COL), w_row, word(job + W_COL), b, nr))
                panel_bias = bias + done * size if bias != 0 and step == 0 else bias & 0
                _multiply(
                    zero, job, r1 - r0, k, columns, a, a_row, a_col, b, b_panel, b_row, padded,
                    c + done * size, panel_bias, flags, bit + (done >> 3), ahead,
                )  # fmt: skip


@jit_inner
def _by_strips(zero: Any, job: int, m: int, x: int, w: int, out: int, bias: int, bits: int, space: int) -> None:
    """m columns of all rows of out, by strips: for a w that comes from memory, past which a tile would go down a page with every k."""
    size = size_of(zero)
    n, d, x_row, x_col, w_row, out_row = (
        word(job + N), word(job + D), word(job + X_ROW), word(job + X_COL), word(job + W_ROW), word(job + OUT_ROW),
    )  # fmt: skip
    # Sums stay in memory of this task's own: where another one's columns begin, both would write to the same cache lines all along.
    lead = packed_row(m * size)
    a = room(STRIP_WORDS)
    whole = d // STRIP_DEPTH * STRIP_DEPTH
    for k in range(0, whole, STRIP_DEPTH):
        for j in range(STRIP_DEPTH):
            for i in range(STRIP_ROWS):
                put(a + (j * STRIP_ROWS + i) * size, get(zero, x + min(i, n - 1) * x_row + (k + j) * x_col))
        flags = CONTINUE if k % LONGEST_CHAIN != 0 else 0
        c, c_row = space, lead
        if (k + STRIP_DEPTH) % LONGEST_CHAIN == 0 or k + STRIP_DEPTH == whole:
            flags |= ADD if k >= LONGEST_CHAIN else 0
            flags |= word(job + FLAGS) if k + STRIP_DEPTH == d else 0
            c, c_row = out, out_row
        first = bias if k == 0 else bias & 0  # a plain 0 would compile a second version
        strip(zero, n, (n, a, w + k * w_row, w_row, space, lead, c, c_row, first, flags, bits, word(job + BIT_ROW), m))
    if whole < d:
        nr = word(job + WIDTH) * lanes(zero)
        nothing = n & 0
        _multiply(
            zero, job, n, d - whole, m, x + whole * x_col, x_row, x_col, w + whole * w_row, nr * size, w_row, nothing,
            out, nothing, ADD | word(job + FLAGS), bits, nothing,
        )  # fmt: skip


@jit_inner
def _multiply(
    zero: Any, job: int, n: int, k: int, m: int, a: int, a_row: int, a_col: int, b: int, b_panel: int, b_row: int, padded: int,
    c: int, bias: int, flags: int, bits: int, ahead: int,
) -> None:  # fmt: skip
    product(
        zero,
        (n, k, m, a, a_row, a_col, b, b_panel, b_row, padded, c, word(job + OUT_ROW), bias, flags, bits, word(job + BIT_ROW),
         word(job + WIDTH), ahead),
    )  # fmt: skip


@jit_inner
def _pack_task(zero: Any, index: int, job: int, slot: int) -> None:
    """One panel of w, all of d, into the packed B."""
    size = size_of(zero)
    nr = word(job + WIDTH) * lanes(zero)
    d, m = word(job + D), word(job + M)
    panels = block_count(m, nr)
    group, panel = index // panels, index % panels
    steps = block_count(d, word(job + DEPTH))
    w = word(job + W) + group * word(job + W_GROUP) + panel * nr * word(job + W_COL)
    dst = word(job + PACKED) + group * word(job + PACKED_GROUP)
    for step in range(steps):
        k0 = block_start(d, steps, step)
        k = block_start(d, steps, step + 1) - k0
        place = dst + k0 * panels * nr * size + panel * k * nr * size
        pack_panel(zero, (k, min(nr, m - panel * nr), w + k0 * word(job + W_ROW), word(job + W_ROW), word(job + W_COL), place, nr))


@jit_inner
def _describe(zero: Any, job: int, x: int, w: int, b: int, out: int, bits: int, flags: int) -> int:
    """Write the operands into the job; 0, or what there is to say against them."""
    size = size_of(zero)
    groups, n, d, m = extent_of(w, -3), extent_of(x, -2), extent_of(x, -1), extent_of(w, -1)
    if not (has_extents(x, groups, n, d) and has_extents(w, groups, d, m) and has_extents(out, groups, n, m)):
        return CHANGED
    set_word(job + X, data_of(x))
    set_word(job + X_GROUP, stride_of(x, -3, size))
    set_word(job + X_ROW, stride_of(x, -2, size))
    set_word(job + X_COL, stride_of(x, -1, size))
    set_word(job + W, data_of(w))
    set_word(job + W_GROUP, stride_of(w, -3, size))
    set_word(job + W_ROW, stride_of(w, -2, size))
    set_word(job + W_COL, stride_of(w, -1, size))
    set_word(job + OUT, data_of(out))
    set_word(job + OUT_GROUP, stride_of(out, -3, size))
    set_word(job + OUT_ROW, stride_of(out, -2, size))
    set_word(job + N, n)
    set_word(job + D, d)
    set_word(job + M, m)
    set_word(job + GROUPS, groups)
    if bits != 0:
        if not has_extents(bits, groups, n, (m + 7) >> 3):
            return CHANGED
        set_word(job + BIT, data_of(bits))
        set_word(job + BIT_GROUP, stride_of(bits, -3, 1))
        set_word(job + BIT_ROW, stride_of(bits, -2, 1))
        flags |= BITS
    set_word(job + FLAGS, flags)
    if b != 0:
        if not has_extents(b, 1, groups, m):
            return CHANGED
        if stride_of(b, -1, size) != size and groups > 0:
            return SCATTERED
        set_word(job + BIAS, data_of(b))
        set_word(job + BIAS_GROUP, stride_of(b, -2, size))
    return 0


@jit_inner
def _meet_in_l1(row: int, count: int) -> bool:
    """Whether `count` lines that lie `row` bytes apart meet in so few sets of L1 that they push one another out."""
    return row % (8 * LINE_BYTES) == 0 and count > max(1, L1_SETS * LINE_BYTES // max(row, 1)) * L1_WAYS


@jit_inner
def _plan(zero: Any, job: int, groups: int, threads: int) -> int:
    """Choose panels, packing and tasks."""
    size = size_of(zero)
    n, d, m = word(job + N), word(job + D), word(job + M)
    nv = vectors(zero)
    if n <= most_rows(zero, 2 * nv):
        nv *= 2
    set_word(job + WIDTH, nv)
    nr = nv * lanes(zero)
    panels = block_count(m, nr)
    far = word(blocks(zero) + FAR)
    x_row, w_row = word(job + X_ROW), word(job + W_ROW)
    # Copying pays where what is copied is used often enough: x by several panels, w by several blocks of rows.
    set_word(job + PACK_A, 1 if x_row != 0 and x_row % MEETING == 0 and panels >= X_REUSE and n >= X_REUSE else 0)
    reuse = n // most_rows(zero, nv)
    packs = (w_row >= far and reuse >= W_REUSE) or (
        nr * size <= LINE_BYTES and reuse >= W_REUSE_NARROW and _meet_in_l1(w_row, min(d, word(blocks(zero))))
    )
    in_place = word(job + W_COL) == size and w_row >= m * size and not packs
    # Panels that are read in place, down rows far apart, meet in few sets of L2: half as deep, there is room for the next one.
    depth = max(1, word(blocks(zero)) // 2) if in_place and w_row >= far else depth_for(zero, n)
    set_word(job + DEPTH, depth)
    row_tasks = block_count(n, rows_at_once(zero, min(d, depth)))
    column_tasks = 1
    wanted = TURNS * threads
    if threads == 1:
        row_tasks, column_tasks = 1, 1
    elif groups * row_tasks < wanted:
        copied = word(job + PACK_A) != 0
        column_tasks = min(max(1, panels // X_REUSE) if copied else panels, block_count(wanted, groups * row_tasks))
        tiles = 2 if copied else 4
        row_tasks = max(row_tasks, min(block_count(n, tiles * most_rows(zero, nv)), block_count(wanted, groups * column_tasks)))
    if row_tasks > 1:
        # Every block of rows reads all of its columns of w: no more of them at a time than the last cache holds with ease.
        column_tasks = max(column_tasks, min(panels, block_count(d * m * size, word(blocks(zero) + PAST) // 2)))
    few = word(job + W_COL) == size and 1 <= n <= rows_of_strips(zero) and d >= STRIP_DEPTH
    if few and m * size >= far and w_row >= far and d * m * size >= word(blocks(zero) + PAST) // 2:
        set_word(job + BY_STRIPS, 1)
        row_tasks, column_tasks = 1, min(column_tasks, max(1, threads // max(groups, 1)), max(1, m * size // STRIP_BYTES))
    # A narrow w stays in the caches while x streams by.
    narrow = column_tasks == 1 and d * m * size <= word(blocks(zero) + L2) // 4
    set_word(job + STREAM, 1 if narrow else 0)
    set_word(job + ROW_TASKS, row_tasks)
    set_word(job + COLUMN_TASKS, column_tasks)
    return 0 if in_place else panels * nr * d * size


def entry(zero: Any) -> Any:
    """The forward pass for zero's dtype: (ids of x, w, b or 0, out, bits or 0; RELU or 0; scratch, its bytes; threads).

    It returns 0, or how many bytes of scratch it needs and has not got, or below 0 SCATTERED or CHANGED.
    """

    @jit_inner
    def task(index: int, job: int, slot: int) -> None:
        run = word(job + RUN)
        for i in range(index * run, min((index + 1) * run, word(job + TASKS))):
            _task(zero, i, job, slot)

    @jit_inner
    def pack(index: int, job: int, slot: int) -> None:
        _pack_task(zero, index, job, slot)

    @jit(nogil=False)
    def forward(x: int, w: int, b: int, out: int, bits: int, flags: int, scratch: int, scratch_bytes: int, threads: int) -> int:
        job = words(JOB_WORDS)
        objection = _describe(zero, job, x, w, b, out, bits, flags)
        if objection != 0:
            return objection
        groups = word(job + GROUPS)
        work = groups * max(word(job + N), SMALL_ROWS) * word(job + D) * word(job + M)
        threads = threads_for(work, threads)
        packed = round_up(_plan(zero, job, groups, threads), 64)
        slot = 0
        if word(job + PACK_A) != 0:
            k = min(word(job + D), word(job + DEPTH))
            slot = rows_at_once(zero, k) * packed_row(k * size_of(zero))
        if word(job + BY_STRIPS) != 0:
            slot = STRIP_ROWS * packed_row(word(job + M) * size_of(zero))
        set_word(job + A_BYTES, slot)
        if groups * packed > PACK_AT_ONCE:
            packed = 0
            set_word(job + LATE, 1)
            slot += word(job + DEPTH) * word(job + WIDTH) * lanes(zero) * size_of(zero)
        needed = groups * packed + threads * slot
        if needed > scratch_bytes:
            return needed
        others = let_go_of_gil(work > TINY_WORK)
        if packed > 0:
            set_word(job + PACKED, scratch)
            set_word(job + PACKED_GROUP, packed)
            parallel_for(c_address(pack), job, groups * block_count(word(job + M), word(job + WIDTH) * lanes(zero)), threads)
        set_word(job + SLOTS, scratch + groups * packed)
        set_word(job + SLOT_BYTES, slot)
        tasks = groups * word(job + ROW_TASKS) * word(job + COLUMN_TASKS)
        run = run_length(tasks, threads)
        set_word(job + RUN, run)
        set_word(job + TASKS, tasks)
        parallel_for(c_address(task), job, -(-tasks // run), threads)
        take_gil_back(others)
        return 0

    return forward
