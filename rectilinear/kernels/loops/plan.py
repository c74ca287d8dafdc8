"""What an affine pass or a bias reduction decides before it computes: packing, tiles, blocks, slabs, tasks. All that a bit depends on is
decided here, and nothing is computed.

A job is a record: operands, extents, and the plan. ``plan_*`` writes what shapes, strides and the host decide: how operands are packed
and where sums are cut, and with it every bit of the result. ``schedule_*`` cuts the work into tasks for so many threads, which no bit
depends on. The functions run in jitted code on every call, and in plain Python, where `plan` shows what they would do anywhere::

    plan("forward", (128, 784, 256), host_of(AVX2, 4, caches, cores=2))

The words are those of the BLIS papers: C (n, m) = A (n, k) B (k, m) by tiles of mr rows and nr columns; B in panels of nr columns and kc
rows, A in blocks of mc rows and kc columns. See Low et al., "Analytical modeling is enough for high-performance BLIS", 2016.
"""

from __future__ import annotations

from math import gcd

from rectilinear.kernels.loops.arithmetic import block_count, packed_row, round_up
from rectilinear.kernels.loops.host import Host
from rectilinear.kernels.micro.dots import DOTS_COLUMNS
from rectilinear.kernels.micro.strip import STRIP_DEPTH, STRIP_ROWS
from rectilinear.kernels.runtime.cache import jit_too
from rectilinear.kernels.runtime.operands import Rows, Stack
from rectilinear.kernels.runtime.records import record

IN_PLACE, PACKED = 0, 1
"""How an operand is read: where it lies, or packed into what tiles read."""

COPIED = 2
"""Or, of A, copied as it is, a block at a time or all of it before."""

PACK_AT_ONCE = 1 << 30
"""Bytes of packed w, padded to whole vectors, beyond which each task packs for itself."""

LARGE_W_USES, LARGE_W_ROWS = 16, 24
"""As `Host.w_uses`, of a w beyond twice L2, which is on more pages than a core knows at a time: so many uses at most, and as many as there
are tiles of so many rows at least, where it comes from memory (`pays`). With AVX-512, one thread and two, packed ran (256, 1000, 1000), 18
uses, 1.34 and 1.13 times as fast, (256, 2048, 1000) 1.49 and 1.24, but (256, 512, 512) 0.99 and 0.94 (Zen 4, 1 MiB of L2)."""

L2_RATE = 16
"""Bytes a cycle that tiles get from L2 without waiting."""

STRIP_BYTES = 512
"""The least of a row of w, of x for dw of one column, or of dw of one sample, for one thread to move along: of two threads each had half
of (1, 784, 512), 1.2 times as fast as one; dw of (1000, 500, 1) ran 1.2 times as fast as by tiles, (1000, 100, 1) 1.07, but (1000, 30, 1)
0.68 (Zen 3)."""

OUTER_BYTES = 256
"""The least of a row of dw, of a single sample, to be written by strips, which take one row after the other. One thread: (1, 1024, 1024)
ran 1.7 times as fast as by tiles, (1, 784, 256) 1.4, (1, 64, 64) 1.2, but (1, 500, 20) 0.57 (Zen 3)."""

LONG_ROWS, SHORT_K = 8, 64
"""Panels of a row of C from which on tiles follow one another along it, where k is no longer than that. Against panel by panel, one thread,
float32 and float64: dw (1, 1024, 1024) 2.8, (8, 1024, 1024) 1.57 and 1.57, (16, 1024, 1024) 1.19 and 1.24, (32, 1024, 1024) 1.08, dx of
(256, 512, 10) 1.2 and 1.4, forward (2048, 16, 1024) 1.12, (2048, 64, 512) 1.03. With four panels (8192, 64, 64) ran 0.97 times as fast;
with a k of 256 dw (256, 784, 512) 0.89, of 128 dw (128, 784, 256) on two threads 0.98 (Zen 3)."""

DOTS_VECTORS, DOTS_BYTES = 8, 20
"""The shortest rows for which adding up the lanes at their ends does not cost more than the transposition it saves: so many vectors, or,
since few rows have little to add up and as much to transpose, so many bytes for each row of A. Against tiles, dx on one thread, AVX-512 /
AVX2 on Zen 4: 64 bytes, (1, 256, 16) ran 1.29 / 1.49 times as fast; 16 bytes, (4, 256, 16) 0.91 / 1.08, (8, 256, 32) 0.98 / 1.06, float64
(8, 256, 16) 1.08 / 1.24; 8 bytes, (8, 256, 16) 0.74 / 0.89. A single column takes a vector: the forward of (10000, 8, 1) ran 1.7 times as
fast as by tiles, but (10000, 8, 3) 0.5 and (100000, 30, 3) 0.8 (Zen 3)."""

NARROW, LONG_DOTS_VECTORS = 3, 32
"""Columns of a result up to which it is better made of inner products, and vectors along a row from which on that goes for two thirds of
what tiles would compute: to add up lanes costs as much as 8 to 16 vectors. Against tiles, w by columns: m = 1 2 to 5 times as fast,
(256, 512, 10) 1.24, (1024, 256, 10) 1.02 to 1.06, but (256, 128, 10) 0.89, (256, 512, 14) 0.85 (Zen 3)."""

NARROW_ROWS, NARROW_ELEMENTS = 64, 1 << 14
"""Of x, for the transposition of a narrow w in rows to pay, which every thread does for itself: (64, 64, 3) ran 0.8 times as fast with it,
(16, 2048, 3) 0.9, (64, 256, 2) 1.1, (1024, 256, 3) 2.5 (Zen 3). On one thread and on two (256, 512, 10) ran 1.13 and 1.16 times as fast,
held to AVX2 1.09 and 1.10, (128, 784, 10) 1.2 and 1.17, AVX2 1.2 and 1.12, (64, 512, 5) 1.8 and 1.5, AVX2 1.25 and 1.1; but
(64, 100000, 10), whose w outgrows L2, 0.75 and 0.65 (Zen 4)."""

FEW_DOTS_ROWS, DOTS_ROWS_FOR_K, MOST_DOTS_ROWS = 16, 32, 48
"""Transposing w costs a share of a product that falls with n, adding up lanes one that falls with k: inner products take 16 rows, and
one for every 32 of k. Against tiles, one thread: (24, 1024, 1024) 1.15 to 1.4, (48, 784, 256) 1.02, but (32, 784, 256) 0.93 to 0.96 as
dx, of k = 256; (100, 3072, 100) 1.1 with AVX-512, 0.9 with AVX2 (Zen 4)."""

BLOCK_ROWS = 128
"""Rows of dz that are packed and summed at a time."""

PART_ELEMENTS = 1 << 13
"""The least of a block of dz for a task: a microsecond or two, as long as it takes to hand it out."""

SLAB_ROWS = 1024
"""The shortest slab: shorter ones would spend their time adding up partial dw."""

SHORT_SLAB_ROWS = 256
"""And where longer ones would be fewer than there are cores: adding up a slab takes a core about as long as 4 of its rows did."""

MOST_SLABS = 32
"""Enough for the cores of a desktop to share, or as many as there are cores; more slabs mean more partial dw to add up."""

FEW_TASKS = 32
"""Tasks of a thread from which on one more is at most 3 % of its time. 1024^3, 19 tasks for two threads, ran 1.04 times as fast in 20,
each pass of it, (100, 3072, 100) 1.04, (256, 512, 10) 1.1 (Zen 3)."""

TURNED_ROWS = 384
"""Rows of dz, times those of a tile, from which on it pays to compute a narrow dw as dw^T, if all of its lanes were for nothing: what
padding costs grows with the rows, to copy the result to its place takes as long for few. That is 27 rows with AVX-512, 64 with AVX2. dw,
one thread: (256, 512, 3) ran 3.4 and 2.0 times as fast, (256, 512, 10) 1.4 and 1.3, (128, 512, 10) 1.3 and 0.96, (32, 512, 10) 0.98 and
0.87, in float64 (256, 512, 10) 1.43 with AVX-512, (256, 512, 9) 1.2 with AVX2, but (256, 512, 3) 0.94 (Zen 4)."""

DW_ROWS = 28
"""The least rows of dw in a task: two tall tiles of AVX-512."""


@record
class ProductPlan:
    """How C (n, m) = A (n, k) B (k, m) is computed."""

    width: int = 0
    """Vectors of a panel of B."""
    depth: int = 0
    """kc."""
    a: int = 0
    """IN_PLACE, COPIED or PACKED."""
    b: int = 0
    """IN_PLACE or PACKED."""
    low_tiles: int = 0
    """1 where A is read in place and its rows meet: the tiles of a narrow last panel are then no higher than others."""
    by_strips: int = 0
    """1 where rows are so few that B is read along its rows."""
    by_dots: int = 0
    """1 where C is made of inner products, with the columns of B as they lie, or PACKED into rows of their own."""


@record
class ProductTasks:
    rows: int = 0
    """Into how many blocks of rows C is cut; 0 where it is not wanted."""
    columns: int = 0
    """And into how many of columns."""
    packs: int = 0
    """1 where each task packs its own part of B, or by inner products each thread all of it; else that is done before, in `parts` parts a
    group."""
    parts: int = 0
    copies: int = 0
    """Into how many blocks of rows A is cut to be copied for all tasks; 0 where each task copies its own."""
    along_rows: int = 0
    """1 where tiles follow one another along the rows of C; they otherwise go down one panel of B after the other."""
    prefetch: int = 0
    """1 where tiles prefetch the next task's rows."""
    count: int = 0
    run: int = 0
    """Tasks handed out together."""


@record
class Matmul:
    """The job of a product: C (n, m) = bias + A (n, k) B (k, m), in groups, with what `flags` ask for at the end of its sums."""

    n: int = 0
    k: int = 0
    m: int = 0
    groups: int = 0
    a: Stack = Stack()
    b: Stack = Stack()
    c: Stack = Stack()
    bits: Stack = Stack()
    bias: Rows = Rows()
    """Its data, or 0, and the bytes from one group's to the next."""
    flags: int = 0
    plan: ProductPlan = ProductPlan()
    tasks: ProductTasks = ProductTasks()
    padded: int = 0
    """1 where a B in place can be read to the full width of its panels."""
    packed: Rows = Rows()
    """Packed B, all of K panel after panel, and its bytes for each group."""
    panel: int = 0
    """Bytes from one packed panel to the next."""
    copied: Rows = Rows()
    """The copy of A for all tasks, group after group."""
    turned: Rows = Rows()
    """Where C is copied to in the end, transposed, or no data."""
    slots: Rows = Rows()
    """Scratch of the threads, and the bytes of each."""
    bytes_of_a: int = 0
    """Which of these are for A, or for what strips keep."""
    prefetch: int = 0
    """The address of a `Prefetch`, or 0."""


@record
class BackwardPlan:
    lead: int = 0
    """Bytes between rows of packed dz."""
    part_row: int = 0
    """Bytes between rows of a partial dw, or dw^T, of a slab."""
    dw_by_columns: int = 0
    """1 where dw^T = dz^T x is computed: dw is stored by columns, or has only one, or is turned."""
    dw_turned: int = 0
    """1 where dw lies in rows, but is narrow, and dw^T is computed all the same, to be copied there in the end."""
    by_slabs: int = 0
    slabs: int = 0
    stretch: int = 0
    """Rows of dz that are packed before dx and dw are computed from them."""


@record
class BackwardTasks:
    z_parts: int = 0
    """Into how many ranges of columns a block of dz is cut to be packed; 0 where every thread packs all of it for itself."""
    x_parts: int = 0
    """And one of x, where it is the B of dw."""
    adders: int = 0
    """Tasks that add up the slabs of a group, each of them some rows of dw."""
    count: int = 0
    run: int = 0


@record
class Backward:
    """The job of a backward pass; operands whose data is 0 are not there or not wanted."""

    dout: Stack = Stack()
    keep: Stack = Stack()
    x: Stack = Stack()
    w: Stack = Stack()
    dx: Stack = Stack()
    dw: Stack = Stack()
    db: Stack = Stack()
    keep_kind: int = 0
    """0, KEEP_Z or KEEP_BITS."""
    n: int = 0
    d: int = 0
    m: int = 0
    groups: int = 0
    plan: BackwardPlan = BackwardPlan()
    tasks: BackwardTasks = BackwardTasks()
    to_dx: Matmul = Matmul()
    """dx = dz w^T."""
    to_dw: Matmul = Matmul()
    """dw = x^T dz, or where that is stored by columns dw^T = dz^T x, of the samples of a stretch or less, added to what is there."""
    slots: Rows = Rows()
    parts: int = 0
    """Partial dw of slabs."""
    turned: Rows = Rows()
    """By blocks: dw^T, where it is copied to dw in the end."""
    sums: int = 0
    own: Rows = Rows()
    """What a thread has for itself (`blocks.Own`), and how far from the next one's it lies; 0 where all have the same."""
    group: int = 0
    first: int = 0
    last: int = 0
    """The rows of a group whose dz is packed."""


@record
class ReductionPlan:
    """The matrix as it is summed, `fold` rows taken as one of `columns` columns, `row` bytes apart, with `left` rows left over."""

    fold: int = 0
    left: int = 0
    rows: int = 0
    columns: int = 0
    row: int = 0
    slabs: int = 0
    stripes: int = 0
    slot_bytes: int = 0


@record
class Reduction:
    """The job of a bias reduction: out (m) = sum of src (n, m) over rows, in groups."""

    src: Stack = Stack()
    out: Stack = Stack()
    n: int = 0
    m: int = 0
    groups: int = 0
    plan: ReductionPlan = ReductionPlan()
    totals: int = 0
    """Sums of slabs, in float64."""
    slots: Rows = Rows()


@jit_too
def l1_bytes(host: Host) -> int:
    return host.l1_sets * host.l1_ways * host.line


@jit_too
def lines_kept(host: Host, stride: int) -> int:
    """How many lines `stride` bytes apart L1 keeps: all ways of the sets that they fall into."""
    apart = stride & -stride  # the power of two in it
    return min(host.l1_sets, max(1, host.l1_sets * host.line // max(apart, host.line))) * host.l1_ways


@jit_too
def l2_holds(host: Host, n: int, k: int) -> bool:
    """Whether L2 has room for all n rows of A, cut along k into blocks of no more than half of kc, beside what streams past."""
    depth = -(-k // block_count(k, max(1, host.kc // 2)))
    return n <= 8 * host.mc and n * depth * host.itemsize <= host.l2 * 7 // 8


@jit_too
def depth_for(host: Host, n: int, k: int, b_bytes: int, packed: bool) -> int:
    """kc for an A of n rows: half of it where L2 then holds all of them, so that a panel of B is used once, by the thread that packed it.

    Not where B is so small that it stays in L2 itself: then it can be used often.
    """
    one_block = n <= 2 * host.mc or (packed and l2_holds(host, n, k))
    return max(1, host.kc // 2) if one_block and b_bytes > host.l2 // 4 else host.kc


@jit_too
def rows_at_once(host: Host, depth: int) -> int:
    """mc for such a depth: rows of A that L2 holds along it, up to twice as many where it is less than kc."""
    return max(1, host.mc * host.kc // max(min(depth, host.kc), host.kc // 2))


@jit_too
def row_blocks(host: Host, n: int, rows: int, k: int, depth: int) -> int:
    """Into how many blocks so many of the n rows of A are cut: one where L2 holds all of them."""
    if l2_holds(host, n, k) and (depth < host.kc or rows * k * host.itemsize <= host.l2 // 4):
        return 1
    return block_count(rows, rows_at_once(host, min(k, depth)))


@jit_too
def panels_at_once(host: Host, panels: int, elements: int) -> int:
    """How many of its panels of w, of so many elements each, a task packs before it uses them: a quarter of L2."""
    return max(1, min(panels, host.l2 // 4 // max(elements * host.itemsize, 1)))


@jit_too
def even_out(blocks: int, tasks: int, threads: int) -> int:
    """So many blocks of `tasks` tasks each, or some more, so that every thread gets the same number of tasks, where that is a small one."""
    if threads < 2 or blocks < 2:
        return blocks
    more = round_up(blocks, threads // gcd(threads, tasks))
    return more if 2 * more <= 3 * blocks and blocks * tasks < FEW_TASKS * threads else blocks


@jit_too
def run_length(tasks: int, threads: int) -> int:
    """How many tasks to hand out at once: enough turns for the threads to even out, and no more claims than that."""
    return max(1, tasks // (16 * threads))


@jit_too
def w_at_once(host: Host) -> int:
    """Bytes of w that tasks of several blocks of rows read over and over: no more than the last cache holds with ease."""
    return host.past * host.choices.w_share // 8


@jit_too
def suits_dots(host: Host, n: int, k: int, m: int) -> int:
    """Whether n rows of m inner products of length k take less time than tiles: few rows, for which tiles would have B transposed first, or
    few columns, for which they would compute padding."""
    few = n <= max(FEW_DOTS_ROWS, min(MOST_DOTS_ROWS, k // DOTS_ROWS_FOR_K))
    long = k >= (1 if m == 1 else DOTS_VECTORS) * host.lanes or k * host.itemsize >= DOTS_BYTES * n
    return 1 if long and (few or is_narrow(host, k, m)) else 0


@jit_too
def is_narrow(host: Host, k: int, m: int) -> bool:
    """Whether a result of m columns takes less time by inner products, which compute no more than those, than by tiles of whole vectors."""
    width = host.vectors
    while width > 1 and 2 * m <= width * host.lanes:
        width //= 2
    return m <= NARROW or (3 * m <= 2 * width * host.lanes and k >= LONG_DOTS_VECTORS * host.lanes)


@jit_too
def blocks_along_rows(host: Host, plan: ProductPlan, k: int, m: int) -> int:
    """Into how many blocks of columns C is cut at least, if tiles are to follow one another along its rows; 0 if they are not.

    With few k a product is mostly a matter of writing: rows of C from end to end, not a line at a time on as many pages as there are rows.
    What such tiles read of B again and again is to stay in a quarter of L2. In slabs it may take all of it: even so dx of (2100, 4000, 32)
    ran 1.5 times as fast along rows (Zen 3).
    """
    suits = k <= SHORT_K and m >= LONG_ROWS * plan.width * host.lanes and plan.by_strips + plan.by_dots == 0
    return block_count(k * m * host.itemsize, host.l2 // 4) if suits else 0


@jit_too
def suits_strips(host: Host, n: int, k: int, m: int, depth: int, stride: int) -> int:
    """Whether A (n, k) and B (k, m), with rows of B so far apart, take less time by strips than by tiles of such a depth.

    A single row does where B is not small and wider than a tile. On one and two threads (1, 784, 512) ran 1.4 and 1.2 times as fast,
    (1, 4000, 1000) 1.5 and 1.8, (1, 512, 256) 1.2 and 0.97, but in float64 (1, 256, 128) 1.0 and 0.9 (Zen 3). Several rows do where those
    of B are a page or more, and B comes from memory, or from L3 once for each tile, since the rows of a panel meet in L2 as well: then what
    a tile prefetches of the next panel is lost, too. One tile of several rows hides that. (8, 1024, 1024), two tiles with AVX2, ran 1.1 to
    1.5 times as fast; one tile of 5 or 6 rows would have taken 1.2 to 1.5 times as long (Zen 4).
    """
    kept_by_l2 = lines_kept(host, stride) * host.l2 // l1_bytes(host)
    meets_in_l2 = kept_by_l2 < min(k, depth) and n > host.rows
    row = m * host.itemsize
    streams = meets_in_l2 or k * row >= host.past // 2
    far = stride >= host.page and row >= host.page and streams
    alone = n == 1 and m > 2 * host.vectors * host.lanes and k * row > host.l2 // 2
    return 1 if k >= STRIP_DEPTH and (alone or (far and 1 < n <= STRIP_ROWS)) else 0


@jit_too
def suits_packing(host: Host, stride: int, k: int, columns: int, uses: int) -> bool:
    """Whether so many tiles would wait for a panel of k rows of B, so far apart, that they read in place.

    Where it does not stay in half of L1, or of the sets that its rows fall into, each tile takes it from L2 anew, a line of another page
    with every k, which no hardware prefetches, while a packed panel streams. A panel whose rows lie almost side by side streams as it is.
    And where rows are no multiple of a vector apart, a share of its vectors is split between two lines. Packed, dx of (333, 777, 111) with
    w by columns, 55 uses, ran 1.10 times as fast, the forward of (128, 100, 777), 21 uses, 1.05, but (100, 100, 100), 16 uses of rows a
    multiple of half a vector apart, 0.87 (Zen 3).
    """
    row, apart = columns * host.itemsize, stride & -stride
    outgrows = 2 * min(k, host.kc) * max(1, row // host.line) > lines_kept(host, stride)
    splits = max(0, host.lanes * host.itemsize - apart)  # so many of every `line` vectors
    return stride > 2 * row and (outgrows or uses * splits >= host.w_uses * host.line)


@jit_too
def pays(host: Host, w_uses: int, uses: int, w_bytes: int) -> bool:
    """Whether to pack a w that could be read in place, for tiles that read each line so often; `w_uses` is what a small one takes.

    A large one has mostly left the last cache by the time its layer comes again. Tiles that read it in place then fetch single lines of
    many pages from memory, which is slow; packing reads whole rows. So the larger w is, the fewer uses make packing pay. One w again and
    again / many in turn, float32, packed ran (128, 1024, 1024) 0.94 / 1.25 times as fast, (64, 1024, 2048) 0.95 / 1.42, (32, 2048, 2048)
    1.20 / 1.58, and (64, 1024, 1024), for which it is not taken, 0.93 / 1.32; with AVX2 (24, 2048, 2048) 1.18 / 1.06, and, not taken,
    (16, 2048, 2048) 0.84 / 1.08. Training steps of 64 and 128 samples of 2048-2048-2048-10 ran 1.14 and 1.09 times as fast, of 128 of a net
    of five layers of 1024 1.07 (Zen 4, 32 MiB of L3, two threads).
    """
    if w_bytes > 2 * host.l2:
        w_uses = min(w_uses, LARGE_W_USES, max(block_count(LARGE_W_ROWS, host.rows), 2 * host.past // w_bytes))
    return uses >= w_uses


# The forward pass.


@jit_too
def plan_forward(job: Matmul, host: Host) -> None:
    """How to compute out (n, m) = x (n, d) w (d, m) + b."""
    plan, n, d, m = job.plan, job.n, job.k, job.m
    size = host.itemsize
    plan.width = 2 * host.vectors if n <= host.rows_of_wide else host.vectors
    mr = host.rows_of_wide if n <= host.rows_of_wide else host.rows
    panels = block_count(m, plan.width * host.lanes)
    # A tile reads a line of each of its rows of x for several k: twice as many must find room beside what streams past. 1024^3 went
    # from 83 to 92 % of the peak by the copy (Zen 5), (100, 3072, 100) took 0.74 times as long (Zen 4), and copying an x whose rows do not
    # meet costs more than it gives ((128, 784, 256) in float64: 0.87 times as fast). A tile of no more rows than a set has ways keeps them:
    # on AVX2 (128, 1024, 256) ran 1.14 times as fast without, (512, 1024, 300) 1.04, 2048^3 0.99 (Zen 3, two threads).
    meets = job.a.row != 0 and lines_kept(host, job.a.row) < 2 * host.rows
    crowds = meets and host.rows > host.l1_ways
    copies = crowds and panels >= host.choices.x_uses and n >= host.choices.x_uses
    plan.a = COPIED if copies else IN_PLACE
    plan.low_tiles = 1 if meets and not copies else 0
    uses = n // mr
    far = job.b.row >= host.page
    suits = suits_packing(host, job.b.row, d, plan.width * host.lanes, uses)
    # A choice that was measured must not change bits. So kc goes by the model, and so does whether a last panel that is not a whole one is
    # read in place, where its chain has a cut more (`product._read_past`).
    packs_by_model = suits and pays(host, host.w_uses, uses, d * m * size)
    packs = suits and pays(host, host.choices.w_uses, uses, d * m * size) if m % (plan.width * host.lanes) == 0 else packs_by_model
    in_rows = job.b.column == size and job.b.row >= m * size
    plan.b = IN_PLACE if in_rows and not packs else PACKED
    # Panels that are read in place, down rows far apart, meet in few sets of L2: half as deep, there is room for the next one.
    depth = depth_for(host, n, d, d * m * size, (packs_by_model or not in_rows) and not crowds)
    plan.depth = min(depth, max(1, host.kc // 2)) if in_rows and not packs_by_model and far else depth
    plan.by_strips = suits_strips(host, n, d, m, plan.depth, job.b.row) if job.b.column == size else 0
    if plan.by_strips != 0:
        plan.b = IN_PLACE
    plan.by_dots = suits_dots(host, n, d, m) if job.a.column == size else 0
    outgrows = m > NARROW and m * packed_row(d * size) > host.l2 // 2
    if job.b.row != size and (n < NARROW_ROWS or n * d < NARROW_ELEMENTS or outgrows):
        plan.by_dots = 0
    if plan.by_dots != 0:
        # Few rows of x stay in L1 while those of w stream by, and are read anew for every DOTS_COLUMNS of them; the copy has
        # them apart.
        meets = n * abs(job.a.row) > l1_bytes(host) and lines_kept(host, job.a.row) < 8 * n
        reused = n <= MOST_DOTS_ROWS and m > DOTS_COLUMNS
        plan.a = COPIED if reused and meets and 2 * n * packed_row(d * size) <= host.l2 else IN_PLACE
        plan.b = IN_PLACE if job.b.row == size else PACKED


@jit_too
def schedule_forward(job: Matmul, host: Host, threads: int) -> None:
    plan, tasks, n, d, m = job.plan, job.tasks, job.n, job.k, job.m
    size = host.itemsize
    panels = block_count(m, plan.width * host.lanes)
    mr = host.rows_of_wide if n <= host.rows_of_wide else host.rows
    # Inner products of few columns use a row of x once: no cache has to keep any. (10000, 64, 1) ran 1.4 times as fast as in 90 blocks.
    streams = plan.by_dots != 0 and n > MOST_DOTS_ROWS
    rows, columns = 1 if streams else row_blocks(host, n, n, d, plan.depth), 1
    wanted, least = host.choices.turns * threads, blocks_along_rows(host, plan, d, m)
    if threads > 1 and job.groups * rows < wanted:
        most, tiles = (max(1, panels // host.choices.x_uses), 2) if plan.a == COPIED else (panels, 4)
        most = min(most, least) if least > 0 else most
        if job.groups * most * block_count(n, tiles * mr) < threads:
            most, tiles = panels, 1  # a copy that is used less, or lower tiles, cost less than a thread without a task
        columns = min(most, block_count(wanted, job.groups * rows))
        rows = max(rows, min(block_count(n, tiles * mr), block_count(wanted, job.groups * columns)))
    if rows > 1:
        # Every block of rows reads all of its columns of w: no more of them at a time than the last cache holds with ease.
        columns = max(columns, min(panels, block_count(d * m * size, w_at_once(host))))
    _set_blocks(job, host, threads, 1 if plan.by_strips != 0 else rows, max(columns, least), least)
    # Every task uses a w of its own where there is one block of rows: no thread waits for what another packs, nor fetches it from there.
    # (128, 784, 256) ran 1.05 to 1.13 times as fast, (128, 512, 512) 1.06 to 1.09, (256, 784, 512) 1.0 to 1.03 (Zen 3, two threads).
    large = job.groups * panels * plan.width * host.lanes * size * d > PACK_AT_ONCE or tasks.rows == 1
    tasks.packs = 1 if plan.b == PACKED and (large or plan.by_dots != 0) else 0
    tasks.parts = min(panels, 2 * threads) if plan.b == PACKED and tasks.packs == 0 else 0
    tasks.copies = min(n, 2 * threads) if plan.a == COPIED and plan.by_strips == 0 and tasks.rows == 1 and tasks.columns > 1 else 0
    # A narrow w stays in the caches while x streams by.
    tasks.prefetch = 1 if tasks.columns == 1 and d * m * size <= host.l2 // 4 else 0
    tasks.run = run_length(tasks.count, threads)


@jit_too
def _set_blocks(job: Matmul, host: Host, threads: int, rows: int, columns: int, least: int) -> None:
    """Cut C of each group into so many blocks of rows and of columns, or a few more; of columns `least` go along rows, if that is not 0."""
    plan, tasks = job.plan, job.tasks
    if plan.by_strips != 0:
        columns = min(columns, max(1, threads // max(job.groups, 1)), max(1, job.m * host.itemsize // STRIP_BYTES))
    tasks.rows, tasks.columns = even_out(rows, job.groups * columns, threads), columns
    tasks.along_rows = 1 if least > 0 and block_count(job.m, plan.width * host.lanes) >= LONG_ROWS * columns else 0
    tasks.count = job.groups * tasks.rows * columns


# The backward pass.


@jit_too
def plan_backward(job: Backward, host: Host) -> None:
    plan, n, d, m = job.plan, job.n, job.d, job.m
    size, nr = host.itemsize, host.vectors * host.lanes
    plan.lead = packed_row(round_up(m, nr) * size)
    narrow = d * m * size <= host.l2
    plan.slabs = max(1, min(max(MOST_SLABS, host.cores), n // SLAB_ROWS)) if narrow else 1
    if plan.slabs > 1:
        plan.slabs = max(plan.slabs, min(host.cores, n // SHORT_SLAB_ROWS))
    plan.by_slabs = 1 if narrow and (plan.slabs > 1 or job.groups >= host.cores) else 0
    if job.dw.data != 0:
        # A dw of one column is a row of dw^T, whose vectors are then of x.
        by_columns = job.dw.column != size or (m == 1 and d > 1 and job.dw.row == size)
        plan.dw_turned = 1 if not by_columns and _suits_turning(job, host) else 0
        plan.dw_by_columns = 1 if by_columns or plan.dw_turned != 0 else 0
    plan.part_row = packed_row((d if plan.dw_by_columns != 0 else m) * size)
    job.to_dx.groups, job.to_dx.k, job.to_dx.m, job.to_dw.groups = 1, m, d, 1
    job.to_dw.n, job.to_dw.m = (m, d) if plan.dw_by_columns != 0 else (d, m)
    _plan_dx(job, host)
    _plan_dw(job, host)
    bytes_of_row = plan.lead + (round_up(job.to_dw.m, nr) * size if job.to_dw.plan.b == PACKED else 0)
    most = max(4 * BLOCK_ROWS, host.past // bytes_of_row // BLOCK_ROWS * BLOCK_ROWS)
    plan.stretch = BLOCK_ROWS if plan.by_slabs != 0 else round_up(-(-max(n, 1) // block_count(n, most)), BLOCK_ROWS)


@jit_too
def _suits_turning(job: Backward, host: Host) -> bool:
    """Whether dw takes less time as the rows of dw^T, which are not padded, copied to its own in the end."""
    n, d, m, size = job.n, job.d, job.m, host.itemsize
    padded = round_up(m, host.lanes)
    in_rows = job.dw.column == size and job.x.column == size and job.x.row >= d * size
    pays = padded > m and 4 * m <= 3 * padded and n * (padded - m) * host.rows >= TURNED_ROWS * padded
    # Slabs have little of x at a time; else its panels, on a page for every k, must not come from memory: float64 (1000, 5000, 10) ran half
    # as fast so, (10000, 300, 5) by slabs 1.5 times as fast. A stack's group by itself has no room for dw^T.
    fits = job.plan.slabs > 1 if job.plan.by_slabs != 0 else n * (d * size + job.plan.lead) <= host.past
    return pays and in_rows and fits and m <= 2 * host.rows and d >= 2 * host.vectors * host.lanes


@jit_too
def _plan_dx(job: Backward, host: Host) -> None:
    plan, n, d, m, size = job.to_dx.plan, job.n, job.d, job.m, host.itemsize
    uses = n // host.rows
    # As in the forward pass, of w^T, which lies in rows where w does by columns.
    packs = suits_packing(host, job.w.column, m, host.vectors * host.lanes, uses) and pays(host, host.w_uses, uses, d * m * size)
    plan.b = IN_PLACE if job.w.row == size and job.w.column >= d * size and not packs else PACKED
    plan.width, plan.depth = host.vectors, depth_for(host, n, m, d * m * size, plan.b == PACKED)
    plan.by_dots = suits_dots(host, n, m, d) if job.w.column == size else 0
    if plan.by_dots != 0:
        plan.b = IN_PLACE
    elif job.plan.by_slabs == 0 and plan.b == IN_PLACE:
        plan.by_strips = suits_strips(host, n, m, d, plan.depth, job.w.column)


@jit_too
def _plan_dw(job: Backward, host: Host) -> None:
    plan, n, d, m = job.to_dw.plan, job.n, job.d, job.m
    size, nr, by_columns = host.itemsize, host.vectors * host.lanes, job.plan.dw_by_columns != 0
    plan.width, plan.depth = host.vectors, host.kc
    if job.dw.data == 0:
        return
    rows, columns, row_of_b = job.to_dw.n, job.to_dw.m, job.x.row if by_columns else job.plan.lead
    if n == 1 and job.x.column == size and columns * size >= OUTER_BYTES:
        plan.by_strips = 1
        return
    # dw goes down the rows of x, a line of each: where L1 keeps a sixteenth of its lines or less of those, nothing is there again.
    meets = lines_kept(host, job.x.row) * 16 <= host.l1_sets * host.l1_ways
    # For every k a tile reads nr elements of B, and a line of A of which it uses a part, more than L2 delivers to a narrow tile meanwhile.
    # Slabs have little of both at a time: x packed for them took 1.03 to 1.06 times as long ((65536, 64, 64), (32768, 32, 128), Zen 3).
    bytes_of_k, cycles_of_k = nr * size + host.line, host.rows * host.vectors // 2
    waits = job.plan.by_slabs == 0 and bytes_of_k > L2_RATE * cycles_of_k
    if rows > host.rows_of_wide and block_count(columns, nr) >= host.choices.x_uses and n > host.choices.x_uses:
        outgrows = waits and bytes_of_k * min(n, host.kc) >= l1_bytes(host) // 2
        plan.a = PACKED if outgrows else COPIED if meets and not by_columns else IN_PLACE
    uses = rows // host.rows
    packs = waits and suits_packing(host, row_of_b, n, nr, uses) and uses >= host.w_uses
    # An x as B is padded to whole panels, so that the chains of the last one have no cut more (`product._read_past`). For few rows of dw^T
    # that would cost more than the product, and the cut is taken. Where its tiles find it in no cache again x is packed for more than two
    # of them: (256, 512, 10) ran 1.2 times as fast without (Zen 3).
    lost = meets and n > host.l1_ways and rows > 2 * host.rows
    few = m <= NARROW or job.plan.dw_turned != 0
    must = by_columns and (lost or job.x.column != size or (d % nr != 0 and (not few or job.x.row < d * size)))
    plan.b = PACKED if packs or must else IN_PLACE
    if by_columns and plan.b == IN_PLACE:
        plan.by_strips = 1 if m == 1 and n >= STRIP_DEPTH and d * size >= STRIP_BYTES else 0
        plan.width = 2 * host.vectors if rows <= host.rows_of_wide else host.vectors


@jit_too
def _cut(extent: int, least: int, most: int, wanted: int) -> int:
    """How many blocks to cut `extent` into: none longer than `most`, then up to `wanted`, but none shorter than `least`."""
    return max(block_count(extent, most), min(wanted, extent // least))


@jit_too
def _parts(columns: int, rows: int, nr: int, wanted: int) -> int:
    """Into how many ranges of columns to cut so many rows to be packed: as many as wanted, but none too small for a task."""
    return min(wanted, block_count(columns, nr), max(1, rows * columns // PART_ELEMENTS))


@jit_too
def schedule_backward(job: Backward, host: Host, threads: int) -> None:
    plan, tasks, d, m, nr = job.plan, job.tasks, job.d, job.m, host.vectors * host.lanes
    if plan.by_slabs != 0:
        tasks.count = plan.slabs * job.groups
        tasks.run = run_length(tasks.count, threads)
        rows = m if plan.dw_by_columns != 0 else d
        job.to_dx.tasks.along_rows = min(1, blocks_along_rows(host, job.to_dx.plan, m, d))
        tasks.adders = max(1, min(rows, -(-threads // max(job.groups, 1)))) if job.dw.data != 0 else 1
        return
    stretch = min(job.n, plan.stretch)
    # A single block would keep one thread busy and let the others fall asleep.
    parts = block_count(2 * threads, block_count(stretch, BLOCK_ROWS)) if threads > 1 else 1
    tasks.z_parts = _parts(m, min(stretch, BLOCK_ROWS), nr, parts)
    packs_x = plan.dw_by_columns != 0 and job.to_dw.plan.b == PACKED
    tasks.x_parts = _parts(d, min(stretch, BLOCK_ROWS), nr, parts) if packs_x else 0
    _schedule_dx(job, host, stretch, threads)
    _schedule_dw(job, host, stretch, threads)
    tasks.count = job.to_dx.tasks.count + job.to_dw.tasks.count
    # Packed by every thread for itself, dz is waited for by none, nor fetched from where another one packed it: on two threads the backward
    # of (64, 128, 128) ran 1.15 times as fast, (100, 256, 100) 1.09, (16, 128, 128) 1.08, (128, 784, 256) 1.01 (Zen 4). But all of them
    # do the work of one, which has to be the shorter the more they are.
    in_panels = plan.dw_by_columns == 0 and job.to_dw.plan.b == PACKED
    if job.n <= plan.stretch and tasks.count > 0 and not in_panels and threads * job.n * plan.lead <= host.l2:
        tasks.z_parts = 0


@jit_too
def _schedule_dx(job: Backward, host: Host, stretch: int, threads: int) -> None:
    plan, tasks, n, d, m = job.to_dx.plan, job.to_dx.tasks, job.n, job.d, job.m
    panels, size = block_count(d, plan.width * host.lanes), host.itemsize
    # Few rows by inner products read all of w: once.
    rows = row_blocks(host, n, stretch, m, plan.depth) if plan.by_dots == 0 or n > MOST_DOTS_ROWS else 1
    wanted = host.choices.turns * threads if threads > 1 else 1
    least, most, enough = blocks_along_rows(host, plan, m, d), panels, block_count(stretch, 4 * host.rows)
    if least > 0 and enough >= threads:
        rows, most = max(rows, min(enough, wanted)), least
    columns = -(-wanted // max(rows, 1))
    if rows > 1:
        # As in the forward pass: no more of w at a time than the last cache holds with ease.
        columns = max(columns, block_count(d * m * size, w_at_once(host)))
    _set_blocks(job.to_dx, host, threads, rows if job.dx.data != 0 else 0, max(least, min(most, columns)), least)
    tasks.packs = 1 if plan.b == PACKED and tasks.rows == 1 else 0
    tasks.parts = min(panels, 2 * threads) if plan.b == PACKED and tasks.rows > 1 else 0


@jit_too
def _schedule_dw(job: Backward, host: Host, stretch: int, threads: int) -> None:
    plan, dw = job.to_dw.plan, job.to_dw
    wanted = host.choices.turns * threads if threads > 1 else 1
    rows = _cut(dw.n, DW_ROWS, rows_at_once(host, stretch), wanted) if job.dw.data != 0 else 0
    least = blocks_along_rows(host, plan, stretch, dw.m)
    most = least if least > 0 and rows >= threads else block_count(dw.m, plan.width * host.lanes)
    _set_blocks(dw, host, threads, rows, max(least, min(most, -(-wanted // max(rows, 1)))), least)


# The bias reduction.

STRIPE_COLUMNS = 2048
"""Columns of a task of the bias reduction: their sums stay in L1 beside the rows that stream by."""

SLAB_ELEMENTS = 1 << 16
"""The least work of its slabs; below it the sums to be added up would cost as much as the rows."""

MOST_SLABS_OF_SUMS = 64

FOLD_COLUMNS = 512
"""Rows that end within a vector are taken several at a time, as one row of at least about so many columns."""


@jit_too
def plan_reduction(job: Reduction, host: Host, block_rows: int) -> None:
    """Fold short rows; choose slabs and stripes, by shape and strides alone. Rows are summed so many at a time."""
    plan, size, n, m = job.plan, host.itemsize, job.n, job.m
    whole = max(8, host.lanes)  # as in micro.rows
    fold = 1
    side_by_side = job.src.column == size and job.src.row == m * size
    if side_by_side and m % whole != 0 and m * whole <= STRIPE_COLUMNS:
        # A whole number of vectors, and enough of them that the sums are not added to at once again.
        fold = max(1, FOLD_COLUMNS // (m * whole)) * whole
        fold = fold if n >= 4 * fold else 1
    plan.fold, plan.left = fold, n % fold
    plan.rows, plan.columns, plan.row = n // fold, m * fold, job.src.row * fold
    plan.stripes = block_count(plan.columns, STRIPE_COLUMNS)
    width = -(-plan.columns // plan.stripes)
    slab_rows = max(block_rows, SLAB_ELEMENTS // width)
    plan.slabs = max(1, min(-(-MOST_SLABS_OF_SUMS // plan.stripes), plan.rows // slab_rows))
    copied = 0 if job.src.column == size else block_rows * width * size
    plan.slot_bytes = round_up(width * size, 64) + round_up(copied, 64)


# In plain Python.


def plan(op: str, shape: tuple[int, ...], host: Host, *, threads: int = 1, w_by_columns: bool = False) -> Matmul | Backward:
    """The job of a pass as it would be planned on `host`, with operands in C order (w in Fortran order, if asked for).

    `op` is ``"forward"`` or ``"backward"``; `shape` is (n, d, m) or (groups, n, d, m). The job's operands have strides and no addresses.
    """
    *lead, n, d, m = shape
    size = host.itemsize

    def stack(rows: int, columns: int, *, by_columns: bool = False) -> Stack:
        row, column = (size, rows * size) if by_columns else (columns * size, size)
        return Stack(data=1, group=rows * columns * size, row=row, column=column)

    groups = lead[0] if lead else 1
    x, w = stack(n, d), stack(d, m, by_columns=w_by_columns)
    if op == "forward":
        forward = Matmul(a=x, b=w, c=stack(n, m), n=n, k=d, m=m, groups=groups)
        plan_forward(forward, host)
        schedule_forward(forward, host, threads)
        return forward
    if op == "backward":
        backward = Backward(dout=stack(n, m), x=x, w=w, dx=stack(n, d), dw=w, n=n, d=d, m=m, groups=groups)
        plan_backward(backward, host)
        schedule_backward(backward, host, threads)
        return backward
    raise ValueError(f'op is {op!r}, and should be "forward" or "backward"')
