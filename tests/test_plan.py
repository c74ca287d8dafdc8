"""The plan apart from its execution: what it says of six machines, and what holds of any."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectilinear.kernels.loops.arithmetic import WHOLE_TILES, block_count, longest_block, round_up, rows_start
from rectilinear.kernels.loops.host import LONGEST_CHAIN, Cache, Caches, Host, host_of
from rectilinear.kernels.loops.inner import DOTS_DEPTH
from rectilinear.kernels.loops.plan import (
    COPIED,
    FEW_TASKS,
    IN_PLACE,
    LARGE_W_ROWS,
    LARGE_W_USES,
    MOST_DOTS_ROWS,
    MOST_SLABS,
    NARROW,
    PACKED,
    SHORT_SLAB_ROWS,
    SLAB_ROWS,
    Backward,
    Matmul,
    even_out,
    is_narrow,
    l1_bytes,
    lines_kept,
    plan,
    plan_backward,
    plan_forward,
    schedule_backward,
    schedule_forward,
)
from rectilinear.kernels.micro.dots import DOTS_COLUMNS
from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON, SSE2
from rectilinear.kernels.micro.strip import STRIP_DEPTH, STRIP_ROWS
from rectilinear.kernels.runtime.operands import Stack

from . import plans, subprocesses

quick = settings(max_examples=150, deadline=None)


def test_the_table_of_plans_is_of_this_model() -> None:
    assert plans.text() == plans.PATH.read_text(encoding="utf-8"), "the plans have changed; `python -m tests.plans` writes them anew"


def test_planning_compiles_nothing() -> None:
    out = subprocesses.run(
        """
        from numba.core import event
        with event.install_recorder("numba:compile") as compiled:
            from tests import plans
            assert plans.text() == plans.PATH.read_text(encoding="utf-8")
        print(len(compiled.buffer), "compiled")
        """
    )
    assert out == "0 compiled\n"


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="op is 'sideways'"):
        plan("sideways", (1, 2, 3), plans.host("Zen 3", "float32"))


# ---------------------------------------------------------------- any host, any shape, any strides


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    unit, size = draw(st.sampled_from([AVX512, AVX2, SSE2, NEON])), draw(st.sampled_from([4, 8]))
    l1 = Cache(draw(st.sampled_from([32, 48, 64])) << 10, draw(st.sampled_from([4, 8, 12])))
    l2 = Cache(draw(st.sampled_from([128, 256, 512, 1024, 2048, 4096])) << 10, draw(st.sampled_from([8, 16])))
    l3 = Cache(draw(st.sampled_from([1, 4, 32, 260])) << 20, 16)
    return host_of(unit, size, Caches(l1, l2, l3), draw(st.integers(1, 128)))


extents = st.one_of(st.integers(0, 40), st.integers(0, 5000), st.sampled_from([64, 1024, 4096, 65536]))
threads = st.integers(1, 64)
narrow = st.sampled_from([2, 3, 5, 9, 10, 17, 20])


def stack(draw: st.DrawFn, rows: int, columns: int, size: int) -> Stack:
    """A matrix somewhere, in rows or columns or neither, forwards or backwards, close or far apart, or all on one place."""
    near, far = draw(st.sampled_from([0, size, size, size, -size, 2 * size, 4096])), draw(st.sampled_from([0, 1, 1, 1, -1, 2]))
    by_columns = draw(st.booleans())
    step = far * draw(st.sampled_from([1, 1, 512])) * max(1, rows if by_columns else columns) * size
    row, column = (near, step) if by_columns else (step, near)
    return Stack(data=draw(st.integers(1, 1 << 40)), group=rows * columns * size, row=row, column=column)


@st.composite
def forwards(draw: st.DrawFn, rows: st.SearchStrategy[int] = extents) -> tuple[Matmul, Host]:
    host, n, d, m = draw(hosts()), draw(rows), draw(extents), draw(extents)
    x, w, out = (stack(draw, rows, columns, host.itemsize) for rows, columns in ((n, d), (d, m), (n, m)))
    job = Matmul(a=x, b=w, c=out, n=n, k=d, m=m, groups=draw(st.sampled_from([1, 1, 3, 64])))
    plan_forward(job, host)
    return job, host


@st.composite
def backwards(draw: st.DrawFn, columns: st.SearchStrategy[int] = extents) -> tuple[Backward, Host]:
    host, n, d, m = draw(hosts()), draw(extents), draw(extents), draw(columns)
    size = host.itemsize
    dout, x, w, dx, dw = (stack(draw, rows, columns, size) for rows, columns in ((n, m), (n, d), (d, m), (n, d), (d, m)))
    for result in (dx, dw):
        result.data *= draw(st.booleans())  # or it is not wanted
    dw.row, dw.column = draw(st.sampled_from([(m * size, size), (size, d * size)]))
    job = Backward(dout=dout, x=x, w=w, dx=dx, dw=dw, n=n, d=d, m=m, groups=draw(st.sampled_from([1, 1, 3, 64])))
    plan_backward(job, host)
    return job, host


def moved(job: Any) -> Any:
    """The job with its operands elsewhere in memory."""
    other = copy.deepcopy(job)
    for field in dataclasses.fields(other):
        operand = getattr(other, field.name)
        if isinstance(operand, Stack) and operand.data:
            operand.data += 4097
    return other


def plans_of(job: Backward) -> tuple[Any, ...]:
    return job.plan, job.to_dx.plan, job.to_dw.plan


def panels(columns: int, host: Host, width: int) -> int:
    return block_count(columns, width * host.lanes)


@quick
@given(forwards(), threads, threads)
def test_threads_and_addresses_decide_nothing_of_a_forward(made: tuple[Matmul, Host], few: int, many: int) -> None:
    job, host = made
    before = copy.deepcopy(job.plan)
    for count in (few, many):
        schedule_forward(job, host, count)
        assert job.plan == before
    other = moved(job)
    plan_forward(other, host)
    assert other.plan == before


@quick
@given(st.one_of(backwards(), backwards(narrow)), threads, threads)
def test_threads_and_addresses_decide_nothing_of_a_backward(made: tuple[Backward, Host], few: int, many: int) -> None:
    job, host = made
    before = copy.deepcopy(plans_of(job))
    for count in (few, many):
        schedule_backward(job, host, count)
        assert plans_of(job) == before
    other = moved(job)
    plan_backward(other, host)
    assert plans_of(other) == before


@quick
@given(forwards(), threads)
def test_the_tasks_of_a_forward_are_all_of_out_and_none_is_empty(made: tuple[Matmul, Host], count: int) -> None:
    job, host = made
    schedule_forward(job, host, count)
    tasks = job.tasks
    assert 1 <= tasks.rows <= max(1, job.n)
    assert 1 <= tasks.columns <= panels(job.m, host, job.plan.width)
    assert tasks.count == job.groups * tasks.rows * tasks.columns
    assert 1 <= tasks.run <= tasks.count
    assert tasks.columns == 1 or tasks.prefetch == 0
    # w is packed once for all tasks or by each for itself; x copied for all only where several would copy the same.
    assert (tasks.packs > 0) + (tasks.parts > 0) == (job.plan.b == PACKED)
    assert tasks.parts <= panels(job.m, host, job.plan.width)
    assert tasks.copies <= job.n
    assert tasks.copies == 0 or (job.plan.a == COPIED and tasks.rows == 1 and tasks.columns > 1)
    if job.plan.by_strips:
        assert tasks.rows == 1
        assert tasks.copies == 0


def test_who_packs_w_and_copies_x() -> None:
    """Each task a w that no other block of rows needs, or one of gigabytes; else all of them together."""
    caches = Caches(Cache(32 << 10, 8), Cache(1 << 20, 8), Cache(32 << 20, 16))
    for unit, shape, packs, parts, copies in (
        (AVX2, (128, 784, 512), 1, 0, 0),
        (AVX2, (128, 784, 64), 0, 4, 0),  # so few columns that rows are cut, too
        (AVX2, (1024, 1024, 1024), 0, 4, 0),
        (AVX2, (1024, 1 << 16, 1 << 13), 1, 0, 0),
        (AVX512, (28, 1024, 2048), 0, 0, 4),  # higher tiles, whose rows push one another out
        (AVX512, (448, 1000, 1000), 1, 0, 0),
    ):
        job = plan("forward", shape, host_of(unit, 4, caches, cores=2), threads=2)
        assert (job.tasks.packs, job.tasks.parts, job.tasks.copies) == (packs, parts, copies), shape


def test_a_batch_is_one_block_where_l2_holds_it() -> None:
    for shape, itemsize, depth, blocks in (
        ((128, 784, 256), 4, 512, 1),
        ((256, 784, 256), 4, 512, 1),  # two blocks of 392, 401,408 bytes each
        ((256, 1024, 256), 4, 1024, 5),
        ((320, 784, 256), 4, 1024, 5),
        ((128, 784, 256), 8, 512, 1),
        ((192, 784, 256), 8, 1024, 6),
        ((128, 784, 32), 4, 1024, 2),  # all of w stays in L2
    ):
        host = plans.host("Zen 3", f"float{8 * itemsize}")
        job = plan("forward", shape, host)
        assert (job.plan.depth, job.tasks.rows) == (depth, blocks), (shape, itemsize)


@quick
@given(st.integers(1, 10_000), st.integers(1, 64), threads)
def test_few_tasks_are_evened_out(blocks: int, tasks: int, count: int) -> None:
    more = even_out(blocks, tasks, count)
    assert blocks <= more <= 1.5 * blocks
    if more > blocks:
        assert more * tasks % count == 0
        assert blocks * tasks < FEW_TASKS * count


def test_nineteen_tasks_for_two_threads_are_twenty() -> None:
    assert [even_out(19, 1, 2), even_out(19, 2, 2), even_out(19, 2, 4), even_out(3, 1, 64), even_out(1, 1, 2)] == [20, 19, 20, 3, 1]


def test_how_dw_reads_its_operands() -> None:
    """x, then dz; where it is stored by columns, with the roles of rows and columns changed, dz and then x."""
    for unit, shape, a, b in (
        (AVX2, (1024, 1024, 1024), PACKED, PACKED),
        (AVX2, (256, 784, 512), PACKED, IN_PLACE),  # a panel of dz stays in half of L1
        (AVX2, (512, 24, 4096), PACKED, IN_PLACE),  # read by four tiles
        (AVX2, (100, 784, 512), IN_PLACE, IN_PLACE),
        (AVX2, (512, 784, 32), IN_PLACE, PACKED),  # x is read by two panels
        (AVX2, (65536, 64, 64), IN_PLACE, IN_PLACE),  # by slabs, of blocks of 128 rows
        (AVX512, (1024, 1024, 1024), COPIED, IN_PLACE),  # tiles that wait for nothing
    ):
        caches = Caches(Cache(32 << 10, 8), Cache(512 << 10, 8), Cache(32 << 20, 16))
        job = plan("backward", shape, host_of(unit, 4, caches, cores=2))
        assert (job.to_dw.plan.a, job.to_dw.plan.b) == (a, b), (unit.name, shape)
    for unit, shape, a, b in (
        (AVX2, (1024, 1024, 1024), PACKED, PACKED),
        (AVX2, (256, 512, 784), PACKED, PACKED),  # rows of x meet in L1
        (AVX2, (256, 528, 784), PACKED, IN_PLACE),  # these do not, and a panel stays in half of it
        (AVX2, (256, 777, 784), PACKED, PACKED),  # panels that are not whole ones
        (AVX2, (256, 512, 10), PACKED, IN_PLACE),  # read by two tiles
        (AVX2, (65536, 64, 64), IN_PLACE, IN_PLACE),
        (AVX2, (65536, 60, 64), IN_PLACE, PACKED),  # by slabs, of panels that are not whole ones
        (AVX512, (1024, 1024, 1024), IN_PLACE, PACKED),  # rows of dz do not meet
    ):
        job = plan("backward", shape, host_of(unit, 4, caches, cores=2), w_by_columns=True)
        assert (job.to_dw.plan.a, job.to_dw.plan.b) == (a, b), (unit.name, shape)
        assert (job.tasks.x_parts > 0) == (b == PACKED and not job.plan.by_slabs)


def test_dx_goes_by_strips_where_a_w_by_columns_comes_from_memory() -> None:
    caches = Caches(Cache(32 << 10, 8), Cache(512 << 10, 8), Cache(32 << 20, 16))
    for shape, by_columns, strips in (
        ((1, 1024, 1024), True, True),
        ((8, 1024, 1024), True, True),
        ((9, 1024, 1024), True, False),
        ((4, 1024, 1024), True, False),  # a single tile
        ((4, 2048, 2048), True, True),
        ((1, 1000, 1000), True, True),
        ((8, 1000, 1000), True, False),  # rows of less than a page
        ((1, 256, 256), True, False),  # in half of L2
        ((1, 32, 10000), True, False),  # a single tile
        ((1, 1024, 1024), False, False),  # by inner products
    ):
        job = plan("backward", shape, host_of(AVX2, 4, caches, cores=2), threads=2, w_by_columns=by_columns)
        assert job.to_dx.plan.by_strips == strips, shape


def test_one_row_and_one_column_go_by_strips_where_these_are_long() -> None:
    caches = Caches(Cache(32 << 10, 8), Cache(512 << 10, 8), Cache(32 << 20, 16))
    zen3 = host_of(AVX2, 4, caches, cores=2)
    for shape, strips in (
        ((1, 784, 512), True),
        ((1, 100, 4000), True),
        ((1, 256, 256), False),  # in half of L2
        ((1, 10000, 32), False),  # a single tile
        ((2, 784, 512), False),
    ):
        assert plan("forward", shape, zen3).plan.by_strips == strips, shape
    upside_down = plan("forward", (1, 784, 512), zen3)
    upside_down.b.row *= -1
    plan_forward(upside_down, zen3)
    assert (upside_down.plan.by_strips, upside_down.plan.b) == (1, IN_PLACE)  # nobody packs what strips read where it lies
    for shape, strips in (
        ((1000, 1000, 1), True),
        ((8, 128, 1), True),
        ((7, 1000, 1), False),  # few rows of x
        ((1000, 127, 1), False),  # short ones
        ((1000, 1000, 2), False),
    ):
        assert plan("backward", shape, zen3).to_dw.plan.by_strips == strips, shape


def test_a_w_in_rows_is_packed_where_tiles_would_have_a_panel_from_l2_again_and_again() -> None:
    caches = Caches(Cache(32 << 10, 8), Cache(1 << 20, 8), Cache(32 << 20, 16))
    for unit, shape, packed in (
        (AVX2, (256, 1000, 1000), True),
        (AVX2, (32, 1024, 1024), True),  # rows that meet in L1
        (AVX2, (24, 1024, 1024), False),  # too few tiles
        (AVX2, (24, 2048, 2048), True),  # but for a w that comes from memory
        (AVX2, (22, 2048, 2048), False),
        (AVX2, (256, 500, 300), True),
        (AVX2, (256, 200, 304), False),  # a panel of 12,800 bytes
        (AVX2, (256, 200, 300), True),  # rows no multiple of a vector apart
        (AVX2, (96, 200, 300), False),  # and too few tiles for it
        (AVX2, (4096, 1000, 30), False),  # rows nearly side by side
        (AVX512, (256, 1000, 1000), True),  # 4 MB
        (AVX512, (128, 1000, 1000), True),  # and half of L3 with its gradient and those of another layer
        (AVX512, (64, 1000, 1000), False),
        (AVX512, (64, 1000, 2000), True),  # the larger the more so
        (AVX512, (28, 2100, 2100), True),
        (AVX512, (20, 2100, 2100), False),  # a single tile, or hardly two
        (AVX512, (160, 1000, 600), False),  # 2.4 MB
        (AVX512, (256, 512, 512), False),  # 1 MB
        (AVX512, (512, 512, 512), True),
    ):
        job = plan("forward", shape, host_of(unit, 4, caches, cores=2), threads=2)
        assert job.plan.b == (PACKED if packed else IN_PLACE), (unit.name, shape)
        by_columns = plan("backward", shape[:1] + shape[:0:-1], host_of(unit, 4, caches, cores=2), threads=2, w_by_columns=True)
        assert by_columns.to_dx.plan.b == job.plan.b, "dx, from the same w"


@quick
@given(st.one_of(backwards(), backwards(narrow)), threads)
def test_the_tasks_of_a_backward_are_all_of_its_results_and_none_is_empty(made: tuple[Backward, Host], count: int) -> None:
    job, host = made
    schedule_backward(job, host, count)
    chosen, tasks = job.plan, job.tasks
    if chosen.by_slabs:
        assert tasks.count == chosen.slabs * job.groups
        assert 1 <= tasks.run <= tasks.count
        assert 1 <= tasks.adders <= max(1, job.m if chosen.dw_by_columns else job.d)
        return
    stretch, dx, dw = min(job.n, chosen.stretch), job.to_dx.tasks, job.to_dw.tasks
    rows, columns = (job.m, job.d) if chosen.dw_by_columns else (job.d, job.m)
    assert 1 <= dx.columns <= panels(job.d, host, job.to_dx.plan.width)
    assert 1 <= dw.columns <= panels(columns, host, job.to_dw.plan.width)
    if tasks.z_parts == 0:  # every thread packs all of dz, which is little and in rows alone
        in_panels = job.to_dw.plan.b == PACKED and not chosen.dw_by_columns
        assert (tasks.count > 0, job.n <= chosen.stretch, in_panels) == (True, True, False)
        assert count * job.n * job.m * host.itemsize <= host.l2
    else:
        assert tasks.z_parts <= panels(job.m, host, host.vectors)
    for part, wanted, extent in ((dx.rows, job.dx.data, stretch), (dw.rows, job.dw.data, rows)):
        assert (1 <= part <= max(1, extent)) if wanted else part == 0
    assert dx.rows <= 1 or not job.to_dx.plan.by_dots or job.n > MOST_DOTS_ROWS
    assert (dx.count, dw.count, tasks.count) == (dx.rows * dx.columns, dw.rows * dw.columns, dx.count + dw.count)
    # w^T is packed by each task for itself where there is one block of rows; tasks that share panels find all of them packed.
    packed = job.to_dx.plan.b == PACKED
    assert dx.packs == (packed and dx.rows == 1)
    assert (1 <= dx.parts <= panels(job.d, host, host.vectors)) == (packed and dx.rows > 1)
    assert (dw.packs, dw.parts, dw.copies, dx.copies) == (0, 0, 0, 0)


@quick
@given(forwards())
def test_no_chain_of_a_forward_is_too_long(made: tuple[Matmul, Host]) -> None:
    job, host = made
    assert 1 <= job.plan.depth <= host.kc <= LONGEST_CHAIN


@quick
@given(backwards())
def test_no_chain_of_a_backward_is_too_long(made: tuple[Backward, Host]) -> None:
    job, host = made
    chosen = job.plan
    assert 1 <= job.to_dx.plan.depth <= host.kc <= LONGEST_CHAIN
    assert 1 <= job.to_dw.plan.depth <= LONGEST_CHAIN
    if job.to_dx.plan.by_dots:
        assert DOTS_DEPTH // host.lanes <= LONGEST_CHAIN
    # And of the rows of dz, each is in a slab or a stretch.
    shortest = SLAB_ROWS if chosen.slabs > host.cores else SHORT_SLAB_ROWS
    assert chosen.slabs == 1 or (chosen.by_slabs and chosen.slabs <= max(MOST_SLABS, host.cores) and job.n // chosen.slabs >= shortest)
    assert chosen.stretch > 0


@quick
@given(st.one_of(forwards(), forwards(st.just(1))))
def test_w_is_read_in_place_only_where_it_lies_in_rows_and_packed_only_where_that_pays(made: tuple[Matmul, Host]) -> None:
    """Vectors reach past the last column of a row, so that rows in place have to come one after the other."""
    job, host = made
    chosen, w = job.plan, job.b
    in_rows = w.column == host.itemsize and w.row >= job.m * host.itemsize
    if chosen.by_dots:
        assert job.a.column == host.itemsize
        assert (chosen.b == IN_PLACE) == (w.row == host.itemsize)
        assert chosen.b == IN_PLACE or job.m <= NARROW
        assert job.n <= MOST_DOTS_ROWS or is_narrow(host, job.k, job.m)
    elif chosen.by_strips:
        assert w.column == host.itemsize
        assert chosen.b == IN_PLACE
        assert job.n <= STRIP_ROWS
    elif chosen.b == IN_PLACE:
        assert in_rows
    if chosen.b == PACKED and in_rows and not chosen.by_dots:
        tallest = host.rows if chosen.width == host.vectors else host.rows_of_wide
        uses, bytes_of_w = job.n // tallest, job.k * job.m * host.itemsize
        assert uses >= min(host.w_uses, LARGE_W_USES, block_count(LARGE_W_ROWS, host.rows))
        assert uses >= host.w_uses or (bytes_of_w > 2 * host.l2 and (uses >= LARGE_W_USES or (uses + 1) * bytes_of_w > 2 * host.past))
        outgrows = 2 * job.k * max(1, chosen.width * host.lanes * host.itemsize // host.line) > lines_kept(host, w.row)
        assert outgrows or w.row % (host.lanes * host.itemsize) != 0


@quick
@given(forwards())
def test_x_is_copied_only_where_it_is_read_often(made: tuple[Matmul, Host]) -> None:
    job, host = made
    if job.plan.a == COPIED and job.plan.by_dots:
        assert job.m > DOTS_COLUMNS
        assert job.n * abs(job.a.row) > l1_bytes(host)
    elif job.plan.a == COPIED:
        assert panels(job.m, host, job.plan.width) >= host.choices.x_uses
        assert job.n >= host.choices.x_uses


def test_x_is_copied_for_inner_products_of_rows_that_push_one_another_out() -> None:
    host = plans.host("Zen 3", "float32")
    for shape, copied in (((16, 1024, 64), True), ((16, 1024, 3), False), ((16, 512, 64), False), ((32, 64, 1), False)):
        job = plan("forward", shape, host, w_by_columns=True)
        assert (job.plan.by_dots, job.plan.a) == (1, COPIED if copied else IN_PLACE), shape


@quick
@given(st.one_of(backwards(), backwards(st.just(1)), backwards(narrow)))
def test_a_backward_reads_past_no_end(made: tuple[Backward, Host]) -> None:
    """x is read as vectors where dw is stored by columns, and w where dx is made of inner products."""
    job, host = made
    chosen, x, dx, dw = job.plan, job.x, job.to_dx.plan, job.to_dw.plan
    if chosen.dw_by_columns and dw.b == IN_PLACE:
        assert x.column == host.itemsize
        few = (job.m <= NARROW or chosen.dw_turned) and x.row >= job.d * host.itemsize
        assert job.d % (host.vectors * host.lanes) == 0 or few or (job.n == 1 and dw.by_strips)
    if dw.a == COPIED:
        assert not chosen.dw_by_columns
        assert x.row != host.itemsize  # so that x^T is copied by columns, for which slabs have room
    if dw.by_strips and job.n == 1:
        assert (x.column, dw.a, dw.b) == (host.itemsize, IN_PLACE, IN_PLACE)
    elif dw.by_strips:
        assert chosen.dw_by_columns
        assert (job.m, x.column, dw.a, dw.b) == (1, host.itemsize, IN_PLACE, IN_PLACE)
        assert job.n >= STRIP_DEPTH
    if dx.by_dots:
        assert (job.w.column, dx.b) == (host.itemsize, IN_PLACE)
        assert job.n <= MOST_DOTS_ROWS or is_narrow(host, job.m, job.d)
    elif dx.b == IN_PLACE:
        assert job.w.row == host.itemsize
        assert job.w.column >= job.d * host.itemsize
    if dx.by_strips:
        assert dx.b == IN_PLACE
        assert job.n <= STRIP_ROWS
        assert not chosen.by_slabs
        assert not dx.by_dots
    if chosen.dw_turned:
        assert job.dw.column == host.itemsize
        assert chosen.dw_by_columns
        # By slabs partial sums are what is copied to dw, else all samples are one stretch, whose tasks copy what they computed.
        assert chosen.slabs > 1 if chosen.by_slabs else job.n <= chosen.stretch
    # Rows of packed dz, and of a partial dw, hold what is written to them.
    assert chosen.lead >= round_up(job.m, host.vectors * host.lanes) * host.itemsize
    assert chosen.part_row >= (job.d if chosen.dw_by_columns else job.m) * host.itemsize


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((256, 512, 10), 1),
        ((16, 512, 10), 0),
        ((256, 512, 16), 0),
        ((1500, 512, 15), 0),
        ((1000, 20000, 10), 0),
        ((20000, 128, 10), 1),
        ((64, 256, 512, 10), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("machine", ["Zen 3", "Zen 4"])
def test_a_narrow_dw_is_turned_where_that_pays(machine: str, shape: tuple[int, ...], turned: int) -> None:
    """Not for few samples, vectors that are full or nearly so, an x larger than the last cache, or a stack with a task for each group."""
    assert plan("backward", shape, plans.host(machine, "float32")).plan.dw_turned == turned


@pytest.mark.parametrize(
    ("shape", "by_dots"),
    [((256, 512, 10), 1), ((64, 600, 5), 1), ((32, 600, 5), 0), ((256, 100, 10), 0), ((64, 100000, 10), 0), ((64, 100000, 2), 1)],
    ids=str,
)
@pytest.mark.parametrize("machine", ["Zen 3", "Zen 4"])
def test_a_narrow_out_is_of_inner_products_where_that_pays(machine: str, shape: tuple[int, ...], by_dots: int) -> None:
    """Not of few samples or short ones, or of a w larger than L2; each thread transposes w for itself."""
    made = plan("forward", shape, plans.host(machine, "float32"), threads=2)
    assert (made.plan.by_dots, made.tasks.packs) == (by_dots, by_dots)


@pytest.mark.parametrize(
    ("shape", "by_dots"),
    [((1, 64, 64), 1), ((2, 64, 10), 1), ((8, 64, 48), 1), ((8, 64, 16), 0), ((16, 64, 64), 0), ((16, 64, 128), 1)],
    ids=str,
)
def test_dx_of_few_rows_is_of_inner_products_of_short_rows_too(shape: tuple[int, ...], by_dots: int) -> None:
    assert plan("backward", shape, plans.host("Zen 4", "float32")).to_dx.plan.by_dots == by_dots


def test_every_thread_packs_dz_for_itself_while_that_is_little() -> None:
    host = plans.host("Zen 4", "float32")
    parts = [plan("backward", (300, 200, 150), host, threads=threads).tasks.z_parts > 0 for threads in (1, 2, 4, 8, 64)]
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == (False, True)


def job_itemsize(host: Host) -> int:
    return host.itemsize


@pytest.mark.parametrize("dtype", plans.DTYPES)
@pytest.mark.parametrize("machine", plans.MACHINES)
def test_blocks_fit_the_caches_they_are_for(machine: str, dtype: str) -> None:
    host = plans.host(machine, dtype)
    nr = host.vectors * host.lanes
    assert host.kc * nr * host.itemsize <= host.l2 // 8
    assert host.mc * host.kc * host.itemsize <= host.l2 // 2


@given(st.integers(0, 3000), st.integers(1, 14), st.integers(1, 200))
def test_blocks_of_rows_are_all_rows_and_none_is_longer_than_the_longest(rows: int, height: int, count: int) -> None:
    starts = [rows_start(rows, height, count, i) for i in range(count + 1)]
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    assert (starts[0], starts[-1], min(lengths) >= 0) == (0, rows, True)
    assert max(lengths) <= longest_block(rows, height, count)
    tiles = block_count(rows, height)
    if tiles < WHOLE_TILES * count:
        assert max(lengths) - min(lengths) <= 1
        return
    assert all(length % height == 0 for length in lengths[:-1])
    half = -(-count // 2)
    assert abs(sum(lengths[:half]) * count - rows * half) <= count * height, "the first half of the blocks has half of the rows"
