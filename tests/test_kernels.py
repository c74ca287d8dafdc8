"""The fused kernels: every tail of every tile, any layout, nothing touched outside, the same bits for every number of threads.

Operands are small whole numbers, so that float32 and float64 products are exact, NumPy's too, and any wrong element is a wrong number.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rectilinear.backends.contract import Wanted
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.keepmask import KeepMask
from rectilinear.kernels.loops import host, passes
from rectilinear.kernels.loops.plan import COPIED, PACKED, plan
from rectilinear.kernels.loops.tuned import Choices
from rectilinear.kernels.micro import library
from rectilinear.threads import num_threads

from . import subprocesses

KC = 8
DTYPES = ["float32", "float64"]
ALL: Wanted = (True, True, True)
CANARY = 77

backend = NumbaBackend()


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return np.dtype(request.param)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Block boundaries where small extents meet them."""
    for itemsize in (4, 8):
        passes.prepare[itemsize]
        host.publish_host(itemsize, kc=KC, mc=24)
    yield
    for itemsize in (4, 8):
        host.publish_host(itemsize)


def whole(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(dtype)


def framed(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """An array inside a larger one that is full of canaries."""
    frame = np.full([extent + 2 for extent in shape], CANARY, dtype)
    inner = frame[tuple(slice(1, -1) for _ in shape)]
    return inner, frame


def intact(frame: np.ndarray) -> bool:
    """Whether the canaries around the inner array are alive."""
    around = frame.copy()
    around[tuple(slice(1, -1) for _ in frame.shape)] = CANARY
    return bool((around == CANARY).all())


def expected(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, dout: np.ndarray) -> tuple[np.ndarray, ...]:
    """out, keep, dx, dw, db: exact in float64, whose products are fast."""
    z = exact(x) @ exact(w) + (0 if b is None else exact(b)[..., None, :])
    return np.maximum(z, 0), z >= 0, *gradients(x, w, np.where(z >= 0, dout, 0))


def exact(a: np.ndarray) -> np.ndarray:
    """As float64 in rows, which NumPy multiplies fast."""
    return a.astype(np.float64, order="C")


def gradients(x: np.ndarray, w: np.ndarray, dz: np.ndarray) -> tuple[np.ndarray, ...]:
    x, w, dz = exact(x), exact(w), exact(dz)
    return dz @ w.swapaxes(-1, -2), x.swapaxes(-1, -2) @ dz, dz.sum(-2)


def check_step(
    x: np.ndarray, w: np.ndarray, b: np.ndarray | None, dout: np.ndarray, *, frames: bool = False, by_columns: bool = False
) -> None:
    """Forward and backward of affine and ReLU against exact arithmetic; dw is stored by columns, if asked for."""
    out, keep, dx, dw, db = expected(x, w, b, dout)
    made = [framed(array.shape, x.dtype) if frames else (None, np.full(1, CANARY)) for array in (out, dx, dw, db)]
    if by_columns:
        columns, frame = framed(dw.swapaxes(-1, -2).shape, x.dtype)
        made[2] = columns.swapaxes(-1, -2), frame
    got, mask = backend.affine_relu_forward(x, w, b, made[0][0])
    grads = backend.affine_backward(dout, x, w, mask, ALL, (made[1][0], made[2][0], made[3][0]))
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(np.unpackbits(mask.bits, axis=-1, bitorder="little")[..., : keep.shape[-1]], keep)
    assert not np.unpackbits(mask.bits, axis=-1, bitorder="little")[..., keep.shape[-1] :].any()
    for grad, wanted in zip(grads, (dx, dw, db), strict=True):
        np.testing.assert_array_equal(grad, wanted)
    if frames:
        assert all(intact(frame) for _, frame in made)


# ---------------------------------------------------------------- tails


def tile_extents(dtype: np.dtype[Any]) -> tuple[int, int]:
    mr, nv = library.host_simd().tile(dtype.itemsize)
    return mr, nv * library.host_simd().lanes(dtype.itemsize)


@pytest.mark.usefixtures("small_blocks")
def test_every_tail_of_rows_and_columns(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    """At a depth that has a first block, one in between, and a last one of a single step."""
    mr, nr = tile_extents(dtype)
    rows, columns, d = 2 * mr + 1, 2 * nr + 1, 2 * KC + 1
    x, w = whole(rng, (rows, d), dtype), whole(rng, (d, columns), dtype)
    b, dout = whole(rng, (columns,), dtype), whole(rng, (rows, columns), dtype)
    for n, m in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        check_step(x[:n], np.ascontiguousarray(w[:, :m]), b[:m], np.ascontiguousarray(dout[:n, :m]), frames=(n + m) % 8 == 0)


@pytest.mark.smoke
@pytest.mark.usefixtures("small_blocks")
def test_every_depth_around_one_and_two_tiles(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    mr, nr = tile_extents(dtype)
    near = {1, mr - 1, mr, mr + 1, 2 * mr + 1}, {1, nr - 1, nr, nr + 1, 2 * nr + 1}
    for d, n, m in itertools.product(range(2 * KC + 2), *near):
        x, w = whole(rng, (n, d), dtype), whole(rng, (d, m), dtype)
        check_step(x, w, None if d % 3 == 0 else whole(rng, (m,), dtype), whole(rng, (n, m), dtype), frames=True)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("groups", [None, 0, 1, 3])
def test_nothing_and_one(dtype: np.dtype[Any], shape: tuple[int, int, int], groups: int | None, rng: np.random.Generator) -> None:
    n, d, m = shape
    lead = () if groups is None else (groups,)
    x, w, b = whole(rng, (*lead, n, d), dtype), whole(rng, (*lead, d, m), dtype), whole(rng, (*lead, m), dtype)
    check_step(x, w, b, whole(rng, (*lead, n, m), dtype))


SHAPES = [(1, 64, 64), (16, 128, 128), (100, 300, 100), (333, 77, 111), (40, 700, 600), (3000, 20, 33), (2500, 64, 10), (700, 300, 500)]
SHAPES += [(150, 90, 1100), (20, 1024, 90)]  # rows of dz far apart; rows of x that meet in the same sets
SHAPES += [(90, 30, 1100), (90, 700, 20)]  # of out and of dx, tile after tile along rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_through(dtype: np.dtype[Any], shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Slabs, blocks, packed and in place, with the host's own block sizes."""
    n, d, m = shape
    check_step(whole(rng, (n, d), dtype), whole(rng, (d, m), dtype), whole(rng, (m,), dtype), whole(rng, (n, m), dtype), frames=True)


@pytest.mark.parametrize("l2", [None, 1 << 18], ids=["", "in several blocks"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(90, 30, 1500), (90, 1500, 20), (30, 290, 1501), (3, 64, 1000, 40), (3000, 700, 20)], ids=str)
def test_tiles_along_rows(dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, l2: int | None, rng: np.random.Generator) -> None:
    """Of out, of dx, of dw and of dw^T, by slabs too, and with columns left over for a last panel."""
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    seen = host.this_host(dtype.itemsize)
    seen = dataclasses.replace(seen, l2=l2 or seen.l2)
    backward = plan("backward", shape, seen, threads=threads)
    jobs = plan("forward", shape, seen, threads=threads), backward.to_dx, backward.to_dw
    assert any(job.tasks.along_rows for job in jobs)
    host.publish_host(dtype.itemsize, l2=seen.l2)
    try:
        with num_threads(threads):
            x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
            for by_columns in (False, True):
                check_step(x, w, b, dout, frames=True, by_columns=by_columns)
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(400, 150, 10), (700, 131, 3), (2300, 70, 2), (2, 1300, 290, 5), (3, 400, 150, 10)], ids=str)
def test_a_narrow_dw_is_computed_as_its_transpose(
    dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, rng: np.random.Generator
) -> None:
    """By tasks and by slabs; a stack's groups that are a task each leave it. dw may have gaps between its rows."""
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
    for changed in ({}, {"cores": 64} if n > 2000 else {"cores": 64, "l2": 64}):
        chosen = plan("backward", shape, dataclasses.replace(host.this_host(dtype.itemsize), **changed), threads=threads).plan
        assert chosen.by_slabs == (n > 2000) or not changed
        assert chosen.dw_turned or (bool(lead), chosen.by_slabs, chosen.slabs) == (True, 1, 1)
        host.publish_host(dtype.itemsize, **changed)
        try:
            with num_threads(threads):
                check_step(x, w, b, dout, frames=True)
        finally:
            host.publish_host(dtype.itemsize)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 20, 200, 300), (2, 200, 600, 33), (2, 90, 600, 10)], ids=str)
def test_threads_that_pack_dz_for_themselves(dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, rng: np.random.Generator) -> None:
    """Group after group, blocks of rows after the first too, for gradients by rows and by columns, with db and alone."""
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    seen = dataclasses.replace(host.this_host(dtype.itemsize), cores=64)
    made = plan("backward", shape, seen, threads=threads)
    assert (made.plan.by_slabs, made.tasks.z_parts) == (0, 0)
    x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
    host.publish_host(dtype.itemsize, cores=64)
    try:
        with num_threads(threads):
            for by_columns in (False, True):
                check_step(x, w, b, dout, frames=True, by_columns=by_columns)
            expected = of_the_backend(dout, x, w)
            for wanted in ((True, False, False), (False, True, False), (False, True, True), (False, False, True)):
                for gradient, alone, is_wanted in zip(expected, of_the_backend(dout, x, w, wanted), wanted, strict=True):
                    assert alone is None if not is_wanted else np.array_equal(gradient, alone)
    finally:
        host.publish_host(dtype.itemsize)


def of_the_backend(dout: np.ndarray, x: np.ndarray, w: np.ndarray, wanted: Wanted = (True, True, True)) -> tuple[np.ndarray | None, ...]:
    return NumbaBackend().affine_backward(dout, x, w, None, wanted, (None, None, None))


def test_bits_are_those_of_threads_that_share_dz(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    n, d, m, many = 300, 200, 150, 40
    passes.prepare[dtype.itemsize]
    parts = [plan("backward", (n, d, m), host.this_host(dtype.itemsize), threads=threads).tasks.z_parts for threads in (1, many)]
    assert parts[0] == 0 < parts[1]
    dout, x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((n, m), (n, d), (d, m)))
    with num_threads(1):
        alone = of_the_backend(dout, x, w)
    with num_threads(many):
        shared = of_the_backend(dout, x, w)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(70, 600, 5), (300, 600, 5), (3, 80, 290, 3), (9, 70, 600, 2)], ids=str)
def test_narrow_products_whose_w_every_thread_transposes(
    dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, rng: np.random.Generator
) -> None:
    """Group after group, and call after call with another w in the same place."""
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    made = plan("forward", shape, host.this_host(dtype.itemsize), threads=threads)
    assert (made.plan.by_dots, made.tasks.packs) == (1, 1)
    x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
    with num_threads(threads):
        for _ in range(2):
            check_step(x, w, b, dout, frames=True)
            w[:] = whole(rng, w.shape, dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 5, 301), (1, 700, 67), (3, 1, 90, 64), (90, 1, 64, 100)], ids=str)
def test_dw_of_a_single_sample_by_strips(dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, rng: np.random.Generator) -> None:
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    assert plan("backward", shape, host.this_host(dtype.itemsize), threads=threads).to_dw.plan.by_strips
    x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
    with num_threads(threads):
        for by_columns in (False, True):
            check_step(x, w, b, dout, frames=True, by_columns=by_columns)
            check_step(whole(rng, (*lead, n, 2 * d), dtype)[..., ::2], w, b, dout, frames=True, by_columns=by_columns)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(70, 512, 300), (20, 1024, 300), (2100, 512, 60), (3, 20, 1024, 300)], ids=str)
def test_a_copied_x(dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, rng: np.random.Generator) -> None:
    """By each task or for all of them, and by slabs for dw: as on a machine whose L1 has fewer ways than its tiles have rows."""
    *lead, n, d, m = shape
    passes.prepare[dtype.itemsize]
    fields = {"l1_ways": 2, "choices": dataclasses.replace(host.this_host(dtype.itemsize).choices, x_uses=1)}
    seen = dataclasses.replace(host.this_host(dtype.itemsize), **fields)
    assert plan("forward", shape, seen, threads=threads).plan.a == COPIED
    if n > 2000:
        assert plan("backward", shape, seen, threads=threads).to_dw.plan.a == COPIED
    host.publish_host(dtype.itemsize, **fields)
    try:
        with num_threads(threads):
            x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
            check_step(x, w, b, dout, frames=True)
            # One whose elements lie apart in both directions.
            few = min(d, 16)
            apart = whole(rng, (*lead, n, 1024), dtype)[..., :: 1024 // few]
            check_step(apart, np.ascontiguousarray(w[..., :few, :]), b, dout, frames=True)
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.smoke
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 8, 9, 13, 16, 17])
def test_few_rows_by_inner_products(dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> None:
    """dx from w as it lies, and the forward from the columns of w: every tail along them, around tiles and blocks of them."""
    lanes = library.host_simd().lanes(dtype.itemsize)
    for few, k in itertools.product([1, 2, 3, 7, 9, 23, 24, 25, 49], [8 * lanes - 1, 8 * lanes, 8 * lanes + 1, 9 * lanes - 1]):
        check_step(whole(rng, (n, few), dtype), whole(rng, (few, k), dtype), None, whole(rng, (n, k), dtype), frames=True)
        w = whole(rng, (few, k), dtype).T
        check_step(whole(rng, (n, k), dtype), w, whole(rng, (few,), dtype), whole(rng, (n, few), dtype), frames=True)


@pytest.mark.parametrize("shape", [(20, 700, 90), (48, 1540, 50), (7, 4100, 30), (3, 9, 1024, 40)], ids=str)
def test_inner_products_over_several_blocks(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Of rows, of columns, of k; a copied x; stacked; on any number of threads."""
    *lead, n, d, m = shape
    x, w, b, dout = (whole(rng, (*lead, *s), dtype) for s in ((n, d), (m, d), (m,), (n, m)))
    for threads in (1, 2, 3):
        with num_threads(threads):
            check_step(x, w.swapaxes(-1, -2), b, dout, frames=True)
            check_step(x[..., ::-1], w.swapaxes(-1, -2), b, dout)


@pytest.mark.parametrize(
    "shape", [(5, 33, 70), (40, 37, 300), (3000, 19, 24), (130, 150, 1030), (20, 150, 2100), (3, 20, 45, 60), (70, 600, 16, 24)], ids=str
)
def test_w_stored_by_columns(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """dx from w^T as it lies: by blocks and by slabs, over several blocks of m, with a last panel that is not a whole one, stacked."""
    *lead, n, d, m = shape
    x, w, b, dout = (whole(rng, (*lead, *s), dtype) for s in ((n, d), (m, d), (m,), (n, m)))
    for threads in (1, 3):
        with num_threads(threads):
            check_step(x, w.swapaxes(-1, -2), b, dout, frames=True)


@pytest.mark.parametrize("few", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 60, 131, 2050], ids=str)
def test_few_columns_or_features(dtype: np.dtype[Any], n: int, few: int, rng: np.random.Generator) -> None:
    """Many samples of long rows, and few columns, or few features of long rows; in every order of w, on any number of threads."""
    lanes, nr = host.this_host(dtype.itemsize).lanes, tile_extents(dtype)[1]
    for long, threads in itertools.product([7, 8 * lanes + 1, 32 * lanes, 3 * nr, 34 * lanes + 3], (1, 3)):
        for d, m in ((long, few), (few, long)):
            x, w, b, dout = (whole(rng, shape, dtype) for shape in ((n, d), (d, m), (m,), (n, m)))
            with num_threads(threads):
                check_step(x, w, b, dout, frames=True)
                check_step(x, np.asfortranarray(w), None, dout, frames=True)
                check_step(x, w, b, dout)  # a dw of one column is then a row as well
                check_step(np.asfortranarray(x), w, b, dout)


@pytest.mark.parametrize("n", [5, 8, 64, 65])
def test_results_in_a_column_of_something_wider(dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> None:
    d = 300
    x, w, b, dout = (whole(rng, shape, dtype) for shape in ((n, d), (d, 1), (1,), (n, d)))
    wide = np.full((n, 3), CANARY, dtype)
    backend.affine_forward(x, w, b, wide[:, 1:2])
    np.testing.assert_array_equal(wide[:, 1:2], x @ w + b)
    dx = np.full((n, 3), CANARY, dtype)
    backend.affine_backward(dout, x[:, :1], w.T, None, (True, False, False), (dx[:, 1:2], None, None))
    np.testing.assert_array_equal(dx[:, 1:2], dout @ w)
    dw = np.full((d, 3), CANARY, dtype)
    backend.affine_backward(dout[:, :1], x, w, None, (False, True, False), (None, dw[:, 1:2], None))
    np.testing.assert_array_equal(dw[:, 1:2], x.T @ dout[:, :1])
    for result in (wide, dx, dw):
        assert (result[:, ::2] == CANARY).all()


def test_inner_products_read_no_more_than_the_rows(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    """What lies beyond a row of w is not multiplied by 0 either: it may be NaN."""
    n, d, m = 5, 30, 150
    wide = np.full((d, m + 40), np.nan, dtype)
    wide[:, :m] = whole(rng, (d, m), dtype)
    check_step(whole(rng, (n, d), dtype), wide[:, :m], None, whole(rng, (n, m), dtype))


@pytest.fixture
def far_memory() -> Iterator[None]:
    """Few rows by strips, however small w is."""
    for itemsize in (4, 8):
        passes.prepare[itemsize]
        host.publish_host(itemsize, past=2, page=1, l2=2, cores=64)
    yield
    for itemsize in (4, 8):
        host.publish_host(itemsize)


@pytest.mark.smoke
@pytest.mark.usefixtures("far_memory")
@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 7, 8, 9])
def test_few_rows_by_strips(dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> None:
    _, nr = tile_extents(dtype)
    for d, m in itertools.product([7, 8, 9, 16, 31], [1, 7, nr - 1, nr, nr + 1, 2 * nr, 2 * nr + 9, 5 * nr + 3]):
        b = None if m == 2 * nr else whole(rng, (m,), dtype)
        x, w, dout = whole(rng, (n, 2 * d), dtype), whole(rng, (d, m), dtype), whole(rng, (n, m), dtype)
        check_step(x[:, d:], w, b, dout, frames=True)
        check_step(x[:, ::2], w, b, dout)
    check_step(*(whole(rng, shape, dtype) for shape in ((n, 1031), (1031, 3 * nr), (3 * nr,), (n, 3 * nr))))  # more than a chain


@pytest.mark.smoke
@pytest.mark.usefixtures("far_memory")
@pytest.mark.parametrize("n", [1, 4, 5, 8, 9])
def test_dx_of_few_rows_by_strips(dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> None:
    """From a w by columns, whose w^T lies in rows."""
    _, nr = tile_extents(dtype)
    for (d, m), groups in itertools.product([(7, 9), (nr, 8), (nr + 1, 31), (2 * nr + 9, 16), (2060, 600)], [1, 3]):
        x, w, dout = (whole(rng, (groups, *extents), dtype) for extents in ((n, d), (m, d), (n, m)))
        for threads in (1, 2):
            with num_threads(threads):
                check_step(x, w.swapaxes(-1, -2), None, dout, frames=True)
                alone = backend.affine_backward(dout, x, w.swapaxes(-1, -2), None, (True, False, False), (None,) * 3)[0]
                np.testing.assert_array_equal(alone, exact(dout) @ exact(w))


ODD = [(1, 40, 700), (1, 2060, 2200), (1, 9, 40, 700), (4, 33, 2100), (8, 803, 1031), (5, 2051, 1031), (3, 5, 40, 300), (0, 5, 40, 300)]
EVEN = [(1, 40, 768), (4, 32, 2048), (8, 256, 1024), (3, 5, 40, 384)]


@pytest.mark.smoke
@pytest.mark.parametrize("shape", ODD + EVEN, ids=str)
def test_strips_give_the_same_bits_for_any_threads(dtype: np.dtype[Any], shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    *lead, n, d, m = shape
    rng = np.random.default_rng(3)
    x, w, b = (rng.standard_normal((*lead, *s)).astype(dtype) for s in ((n, d), (d, m), (m,)))

    def results() -> list[np.ndarray]:
        out, mask = backend.affine_relu_forward(x, w, b, None)
        return [out.view(np.uint8), mask.bits]

    by_tiles = results()
    request.getfixturevalue("far_memory")
    with num_threads(1):
        by_strips = results()
    for threads in (2, 3):
        with num_threads(threads):
            for got, right in zip(results(), by_strips, strict=True):
                np.testing.assert_array_equal(got, right)
    if shape in EVEN:  # where tiles take K as one block, do not read past the end of w, and strips leave nothing over
        for got, right in zip(by_strips, by_tiles, strict=True):
            np.testing.assert_array_equal(got, right)


def test_strips_of_short_rows_need_no_scratch_memory(dtype: np.dtype[Any]) -> None:
    """Neither does a longer row of which each thread has a short part."""
    columns = 16384 // dtype.itemsize
    x, w, out = (np.ones(shape, dtype) for shape in ((1, 1024), (1024, columns), (1, columns)))
    forward = passes.affine_forward[dtype.itemsize]
    assert forward(id(x), id(w), 0, id(out), 0, 0, 0, 0, 2) == 0
    np.testing.assert_array_equal(out, np.full_like(out, 1024))


@pytest.mark.parametrize("n", [511, 512, 513, 1300])
def test_dz_packed_a_stretch_at_a_time(dtype: np.dtype[Any], n: int, rng: np.random.Generator) -> None:
    passes.prepare[dtype.itemsize]
    host.publish_host(dtype.itemsize, past=1, l2=1)  # stretches as short as they get, and no slabs
    try:
        for d, m in ((70, 90), (33, 64), (17, 1100)):  # the last with dz in panels too
            x, w, dout = whole(rng, (n, d), dtype), whole(rng, (d, m), dtype), whole(rng, (n, m), dtype)
            check_step(x, w, whole(rng, (m,), dtype), dout, frames=True)
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "shape", [(5, 7, 9, 11), (64, 128, 64, 64), (3, 2100, 16, 24), (2, 50, 300, 700), (3, 7, 30, 150), (2, 2, 300, 900)], ids=str
)
def test_stacked(dtype: np.dtype[Any], shape: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    g, n, d, m = shape
    check_step(
        whole(rng, (g, n, d), dtype), whole(rng, (g, d, m), dtype), whole(rng, (g, m), dtype), whole(rng, (g, n, m), dtype), frames=True
    )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 7), (2100, 8, 8), (70, 400, 500), (70, 40, 1100)], ids=str)
def test_only_what_is_wanted(shape: tuple[int, int, int], wanted: Wanted, rng: np.random.Generator) -> None:
    n, d, m = shape
    x, w, dout = whole(rng, (n, d), "f4"), whole(rng, (d, m), "f4"), whole(rng, (n, m), "f4")
    exact = (dout @ w.T, x.T @ dout, dout.sum(0))
    for got, want, right in zip(backend.affine_backward(dout, x, w, None, wanted, (None,) * 3), wanted, exact, strict=True):
        assert (got is not None) == want
        if want:
            np.testing.assert_array_equal(got, right)


# ---------------------------------------------------------------- layouts

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": lambda a: np.asfortranarray(a),
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2) if a.ndim > 1 else a,
    "every second": lambda a: np.repeat(np.repeat(a, 2, axis=-2), 2, axis=-1)[..., ::2, ::2] if a.ndim > 1 else np.repeat(a, 2)[::2],
    "backwards": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1] if a.ndim > 1 else a[::-1].copy()[::-1],
    "rows backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "wide rows": lambda a: np.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
    "4 KiB rows": lambda a: np.concatenate([a, np.zeros((*a.shape[:-1], -a.shape[-1] % (4096 // a.itemsize)), a.dtype)], -1)[
        ..., : a.shape[-1]
    ],
    "unaligned": lambda a: _unaligned(a),
    "same rows": lambda a: np.broadcast_to(a[:1], a.shape),
    "same columns": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "one number": lambda a: np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), a.shape),
}


def _unaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    made = np.frombuffer(raw.data, a.dtype, a.size, offset=1).reshape(a.shape)
    made[...] = a
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "w", "b", "dout", "z"])
@pytest.mark.parametrize("shape", [(30, 37, 45), (6, 30, 150), (2100, 9, 12), (130, 300, 270), (130, 20, 1100)], ids=str)
def test_any_layout(dtype: np.dtype[Any], layout: str, operand: str, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    n, d, m = shape
    given = {"x": whole(rng, (n, d), dtype), "w": whole(rng, (d, m), dtype), "b": whole(rng, (m,), dtype)}
    given |= {"dout": whole(rng, (n, m), dtype), "z": whole(rng, (n, m), dtype)}
    given[operand] = LAYOUTS[layout](given[operand])
    x, w, b, dout, z = given.values()
    check_step(x, w, b, dout)
    dz = np.where(z >= 0, dout, 0)
    for got, right in zip(backend.affine_backward(dout, x, w, z, ALL, (None,) * 3), gradients(x, w, dz), strict=True):
        np.testing.assert_array_equal(got, right)
    np.testing.assert_array_equal(backend.bias_backward(dout, None), dout.sum(0))
    np.testing.assert_array_equal(backend.relu_backward(dout, z, None), dz)
    np.testing.assert_array_equal(backend.relu_forward(x, None), np.where(x < 0, 0, x))


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["fortran", "every second", "backwards", "wide rows", "unaligned"])
def test_any_layout_of_out(dtype: np.dtype[Any], layout: str, rng: np.random.Generator) -> None:
    n, d, m = 30, 37, 45
    x, w, b, dout = whole(rng, (n, d), dtype), whole(rng, (d, m), dtype), whole(rng, (m,), dtype), whole(rng, (n, m), dtype)
    right = expected(x, w, b, dout)

    def empty(like: np.ndarray) -> np.ndarray:
        return LAYOUTS[layout](np.full(like.shape, CANARY, dtype))

    out, grads = empty(right[0]), (empty(right[2]), empty(right[3]), empty(right[4]))
    got, mask = backend.affine_relu_forward(x, w, b, out)
    assert got is out
    assert all(made is given for made, given in zip(backend.affine_backward(dout, x, w, mask, ALL, grads), grads, strict=True))
    for made, wanted in zip((out, *grads), (right[0], *right[2:]), strict=True):
        np.testing.assert_array_equal(made, wanted)
    reused = empty(dout)
    assert backend.relu_backward(dout, mask, reused) is reused
    np.testing.assert_array_equal(reused, np.where(right[1], dout, 0))


SHAPES_OF_DW = [(2100, 9, 12), (4100, 33, 20), (130, 300, 70), (130, 40, 300), (5, 30, 150), (1, 70, 40)]
SHAPES_OF_DW += [(5, 7, 9, 11), (9, 50, 33, 20), (3, 2100, 16, 24)]


@pytest.mark.parametrize("layout", ["rows", *LAYOUTS])
@pytest.mark.parametrize("shape", SHAPES_OF_DW, ids=str)
def test_dw_stored_by_columns(dtype: np.dtype[Any], shape: tuple[int, ...], layout: str, rng: np.random.Generator) -> None:
    """By slabs, by blocks, of few rows, stacked; alone and with dx and db."""
    *lead, n, d, m = shape
    x, w, dout, z = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (n, m), (n, m)))
    x = x if layout == "rows" else LAYOUTS[layout](x)
    right = gradients(x, w, np.where(z >= 0, dout, 0))
    for wanted in ((False, True, False), ALL):
        columns, frame = framed((*lead, m, d), dtype)
        dw = columns.swapaxes(-1, -2)
        grads = backend.affine_backward(dout, x, w, z, wanted, (None, dw, None))
        assert grads[1] is dw
        assert intact(frame)
        for got, exact in zip(grads, right, strict=True):
            if got is not None:
                np.testing.assert_array_equal(got, exact)


@pytest.mark.smoke
@pytest.mark.usefixtures("small_blocks")
def test_every_tail_of_dw_stored_by_columns(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    mr, nr = tile_extents(dtype)
    near = {1, mr - 1, mr, mr + 1, 2 * mr + 1} | {1, 7, nr - 1, nr, nr + 1, 2 * nr + 1}
    for n, d, m in itertools.product([1, KC - 1, KC, KC + 1, 2 * KC + 1], near, near):
        x, w, dout = whole(rng, (n, d), dtype), whole(rng, (d, m), dtype), whole(rng, (n, m), dtype)
        columns, frame = framed((m, d), dtype)
        backend.affine_backward(dout, x, w, None, (False, True, False), (None, columns.T, None))
        np.testing.assert_array_equal(columns.T, gradients(x, w, dout)[1])
        assert intact(frame)


def test_dw_by_columns_has_the_same_bits_for_any_threads(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    for shape in ((4100, 33, 20), (333, 300, 111), (5, 30, 150), (3, 2100, 16, 24)):
        *lead, n, d, m = shape
        x, w, dout = (rng.standard_normal((*lead, *extents)).astype(dtype) for extents in ((n, d), (d, m), (n, m)))

        def of(threads: int, dw: np.ndarray) -> np.ndarray:
            with num_threads(threads):
                backend.affine_backward(dout, x, w, None, (False, True, False), (None, dw, None))  # noqa: B023
            return dw

        alone = of(1, np.empty((*lead, m, d), dtype).swapaxes(-1, -2))
        for threads in (2, 3):
            got = of(threads, np.empty((*lead, m, d), dtype).swapaxes(-1, -2))
            np.testing.assert_array_equal(got.view(f"u{dtype.itemsize}"), alone.view(f"u{dtype.itemsize}"))


def test_more_than_2_31_elements() -> None:
    """Views of a few numbers, so that it takes time and not memory: offsets must not be taken in 32 bits."""
    n = 2**25 + 3
    row = np.zeros(64, "f4")
    row[[3, 7, 63]] = 1, -1, 1
    x, w = np.broadcast_to(row, (n, 64)), np.ones((64, 1), "f4")
    np.testing.assert_array_equal(backend.bias_backward(x, None), row * np.float32(n))
    out, mask = backend.affine_relu_forward(x, w, None, None)
    assert (out == 1).all()
    _, dw, db = backend.affine_backward(out, x, w, mask, (False, True, True), (None,) * 3)
    np.testing.assert_allclose(dw[:, 0], row * np.float32(n), rtol=1e-6)
    np.testing.assert_array_equal(db, np.float32(n))


# ---------------------------------------------------------------- nothing outside


GUARDED = """
import numpy as np
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.keepmask import KeepMask
from rectilinear.kernels.loops import host, passes
from tests.guard import guarded

backend, rng = NumbaBackend(), np.random.default_rng(5)
SHAPES = [(1, 1, 1), (1, 64, 64), (3, 5, 7), (15, 9, 33), (14, 8, 32), (29, 17, 65), (30, 20, 10), (2049, 3, 5), (200, 300, 260)]
SHAPES += [(1, 17, 130), (8, 25, 133), (5, 16, 33), (140, 79, 130), (333, 64, 130), (70, 300, 3), (2100, 70, 1), (70, 1, 300), (40, 300, 1)]
for T, few_by_strips in (("f4", False), ("f8", False), ("f4", True), ("f8", True)):
    size = np.dtype(T).itemsize
    passes.prepare[size]
    # Either few rows go by strips, or w is packed from one use on where a panel outgrows L1, and x and dz are as for low tiles.
    host.publish_host(size, **({"past": 2, "page": 1, "l2": 2} if few_by_strips else {"w_uses": 1, "rows": 4}))
    for n, d, m in SHAPES:
        for at_end in (False, True):
            x, w, b, dout = (rng.integers(-3, 4, s).astype(T) for s in ((n, d), (d, m), (m,), (n, m)))
            z = x @ w + b
            bits = np.packbits(z >= 0, axis=1, bitorder="little")
            dz = np.where(z >= 0, dout, 0)
            x, w, b, dout, bits, z, out, dx, dw, db, da = (
                guarded(a, at_end) for a in (x, w, b, dout, bits, z, z, x, w, b, dout)
            )
            backend.affine_relu_forward(x, w, b, out)
            assert (out == np.maximum(z, 0)).all()
            for keep in (KeepMask(bits, (n, m)), z):
                backend.affine_backward(dout, x, w, keep, (True,) * 3, (dx, dw, db))
                assert (dx == dz @ w.T).all() and (dw == x.T @ dz).all() and (db == dz.sum(0)).all()
                backend.relu_backward(dout, keep, da)
                assert (da == dz).all()
            backend.relu_forward(z, out)
            backend.bias_backward(dout, db)
            assert (out == np.maximum(z, 0)).all() and (db == dout.sum(0)).all()
            backend.softmax_loss(z, np.zeros(n, int), out)
print("untouched")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="guard pages by mprotect")
def test_nothing_is_touched_outside() -> None:
    assert subprocesses.run(GUARDED, limit_s=250) == "untouched\n"


BY_COLUMNS = """
import numpy as np
from rectilinear.backends.numba_backend import NumbaBackend
from tests.guard import guarded

def by_columns(a, at_end):
    return guarded(a.swapaxes(-1, -2), at_end).swapaxes(-1, -2)

LAYOUTS = [
    guarded,
    by_columns,
    lambda a, at_end: guarded(a[..., ::-1, :], at_end)[..., ::-1, :],
    lambda a, at_end: guarded(a[..., ::-1], at_end)[..., ::-1],
    lambda a, at_end: guarded(np.repeat(a, 2, axis=-1), at_end)[..., 1 if at_end else 0 :: 2],
    lambda a, at_end: np.broadcast_to(guarded(a[..., :1, :], at_end), a.shape),
]
backend, rng = NumbaBackend(), np.random.default_rng(5)
SHAPES = [(1, 1, 1), (3, 5, 7), (30, 9, 33), (29, 65, 17), (200, 300, 40), (1, 17, 130), (8, 25, 133), (2049, 3, 5), (2100, 33, 20)]
SHAPES += [(5, 7, 9, 11), (3, 2100, 5, 9), (40, 300, 1), (130, 37, 1), (2100, 70, 1), (2100, 1, 70), (70, 300, 3), (130, 600, 10)]
for T in ("f4", "f8"):
    for *lead, n, d, m in SHAPES:
        x, w, dout, z = (rng.integers(-3, 4, (*lead, *s)).astype(T) for s in ((n, d), (d, m), (n, m), (n, m)))
        for at_end in (False, True):
            for layout in LAYOUTS:
                own, dz = layout(x, at_end), np.where(z < 0, 0, dout)
                for own_w in (guarded(w, at_end), by_columns(w, at_end)):
                    dw = by_columns(np.full(w.shape, 77, T), at_end)
                    outs = None, dw, None
                    dx, _, _ = backend.affine_backward(guarded(dout, at_end), own, own_w, guarded(z, at_end), (True,) * 3, outs)
                    assert (dw == own.swapaxes(-1, -2) @ dz).all()
                    assert (dx == dz @ own_w.swapaxes(-1, -2)).all()
print("untouched")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="guard pages by mprotect")
def test_nothing_is_touched_outside_by_w_and_dw_stored_by_columns() -> None:
    assert subprocesses.run(BY_COLUMNS, limit_s=250) == "untouched\n"


# ---------------------------------------------------------------- values at the edges


def bits_of(a: np.ndarray) -> np.ndarray:
    return a.view(f"u{a.itemsize}")


def edges(dtype: Any) -> np.ndarray:
    info = np.finfo(dtype)
    values = [np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, info.max, -info.max, info.tiny, -info.tiny]
    values += [info.smallest_subnormal, -info.smallest_subnormal, 1.0, -1.0]
    return np.array(values, dtype)


@pytest.mark.parametrize("count", [1, 3, 14, 15, 16, 17, 63, 64, 65, 1000, 70_000])
def test_relu_keeps_every_bit_of_what_it_keeps(dtype: np.dtype[Any], count: int) -> None:
    x = np.resize(edges(dtype), count)
    dout = np.resize(edges(dtype)[::-1], count)
    zero = dtype.type(0)
    forward, backward = np.where(x < 0, zero, x), np.where(x < 0, zero, dout)
    np.testing.assert_array_equal(bits_of(backend.relu_forward(x, None)), bits_of(forward))
    np.testing.assert_array_equal(bits_of(backend.relu_backward(dout, x, None)), bits_of(backward))
    np.testing.assert_array_equal(bits_of(backend.relu_backward(dout, x, dout)), bits_of(backward))
    np.testing.assert_array_equal(bits_of(backend.relu_forward(x[::-1], None)), bits_of(forward[::-1].copy()))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_relu_of_a_run_longer_than_the_caches(dtype: np.dtype[Any], offset: int, rng: np.random.Generator) -> None:
    passes.prepare[dtype.itemsize]
    host.publish_host(dtype.itemsize, past=1000)
    try:
        x = np.resize(edges(dtype), 200_000 + offset)[offset:]
        out = np.full(x.size + 8, CANARY, dtype)
        backend.relu_forward(x, out[3:-5])
        np.testing.assert_array_equal(bits_of(out[3:-5]), bits_of(np.where(x < 0, dtype.type(0), x)))
        assert (out[:3] == CANARY).all()
        assert (out[-5:] == CANARY).all()
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.smoke
def test_fused_relu_at_the_edges(dtype: np.dtype[Any]) -> None:
    """x w + b is b where x is zero (and -0.0 cannot come of a sum that starts with +0)."""
    b = edges(dtype)
    out, mask = backend.affine_relu_forward(np.zeros((3, 2), dtype), np.zeros((2, b.size), dtype), b, None)
    kept = np.asarray(mask) > 0
    np.testing.assert_array_equal(kept, np.broadcast_to(~(b < 0), out.shape))
    np.testing.assert_array_equal(out, np.broadcast_to(np.where(b < 0, 0, b), out.shape))
    dout = np.full(out.shape, np.nan, dtype)
    dout[1] = np.inf
    _, _, db = backend.affine_backward(dout, np.zeros((3, 2), dtype), np.zeros((2, b.size), dtype), mask, ALL, (None,) * 3)
    assert db is not None
    np.testing.assert_array_equal(np.isnan(db), ~(b < 0))
    assert (db[b < 0] == 0).all()


# ---------------------------------------------------------------- bits and threads


@pytest.mark.parametrize("shape", [*SHAPES, (5, 40, 50, 60), (3, 2100, 16, 24), (2, 300, 300, 300), (9, 600, 700)], ids=str)
def test_same_bits_for_every_number_of_threads(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> None:
    *lead, n, d, m = shape
    x, w, b, dout = (rng.standard_normal((*lead, *s)).astype(dtype) for s in ((n, d), (d, m), (m,), (n, m)))

    def results() -> list[Any]:
        out, mask = backend.affine_relu_forward(x, w, b, None)
        return [out, mask.bits, *backend.affine_backward(dout, x, w, mask, ALL, (None,) * 3), backend.bias_backward(dout, None)]

    with num_threads(1):
        alone = results()
    for threads in (2, 3):
        with num_threads(threads):
            for got, right in zip(results(), alone, strict=True):
                np.testing.assert_array_equal(got.view(np.uint8), right.view(np.uint8))


@pytest.mark.parametrize("shape", [(1500, 310, 1), (900, 1000, 2), (900, 501, 3), (3000, 75, 1), (2, 600, 300, 2)], ids=str)
def test_same_bits_of_a_narrow_dw_for_every_cut_into_tasks(dtype: np.dtype[Any], shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Of x as it lies: where its last columns are read past, chains have a cut more, which must not move with a task's first panel."""
    *lead, n, d, m = shape
    x, w, dout = (rng.standard_normal((*lead, *s)).astype(dtype) for s in ((n, d), (d, m), (n, m)))
    found = []
    for threads, turns in itertools.product((1, 2, 3), (1, 3, 8)):
        chosen = dataclasses.replace(host.this_host(dtype.itemsize).choices, turns=turns)
        passes.prepare[dtype.itemsize]
        host.publish_host(dtype.itemsize, choices=chosen)
        dw = np.zeros((*lead, m, d), dtype).swapaxes(-1, -2)
        with num_threads(threads):
            backend.affine_backward(dout, x, w, None, (True, True, False), (None, dw, None))
        found.append(dw)
    host.publish_host(dtype.itemsize)
    for dw in found[1:]:
        np.testing.assert_array_equal(bits_of(dw), bits_of(found[0]))


@pytest.mark.smoke
def test_db_adds_slabs_in_their_order() -> None:
    """1e17 + 1 - 1e17 is 0 in this order and 1 in another."""
    rows = 4096
    dout = np.zeros((rows, 8))
    dout[0], dout[rows // 2], dout[-1] = 1e17, 1, -1e17
    _, dw, db = backend.affine_backward(dout, np.ones((rows, 1)), np.ones((1, 8)), None, ALL, (None,) * 3)
    assert dw is not None
    assert db is not None
    assert (db == 0).all()
    assert (dw == 0).all()
    dout[rows // 2], dout[-1] = -1e17, 1
    _, dw, db = backend.affine_backward(dout, np.ones((rows, 1)), np.ones((1, 8)), None, ALL, (None,) * 3)
    assert dw is not None
    assert db is not None
    assert (db == 1).all()
    assert (dw == 1).all()


@pytest.mark.parametrize("m", [1, 3, 8, 100, 5000])
def test_long_bias_reductions_lose_little(m: int, rng: np.random.Generator) -> None:
    for data in (np.full((2_000_000 // m, m), 0.1, "f4"), rng.random((2_000_000 // m, m), dtype="f4")):
        exact = data.astype("f8").sum(0)
        for db in (backend.bias_backward(data, None), backend.affine_backward(data, data[:, :1], data[:1], None, ALL, (None,) * 3)[2]):
            assert db is not None
            assert np.abs(db / exact - 1).max() < 2e-6


def test_results_share_no_memory_while_they_are_alive(rng: np.random.Generator) -> None:
    """Large results are made on memory of earlier ones, but only of those that nothing refers to any more, not even by a view."""
    x = rng.standard_normal((1 << 19) + 7).astype("f4")
    right = np.where(x < 0, 0, x)
    alive = []
    for step in range(30):
        out = backend.relu_forward(x * np.float32(step % 4), None)
        assert not any(np.shares_memory(out, other) for other, _ in alive)
        assert out.flags.writeable
        assert out.ctypes.data % 64 == 0
        alive.append((out[5:9] if step % 2 else out, step % 4))
        if step % 3 == 0:
            alive.pop(0)
    for other, factor in alive:
        expected_part = (right * np.float32(factor))[5:9] if other.size == 4 else right * np.float32(factor)
        np.testing.assert_array_equal(other, expected_part)


def test_a_mask_with_longer_rows_is_read_right(rng: np.random.Generator) -> None:
    keep = rng.random((20, 21)) < 0.5
    bits = np.full((20, 9), 255, np.uint8)
    bits[:, :3] = np.packbits(keep, axis=1, bitorder="little")
    dout = whole(rng, (20, 21), "f4")
    for given in (bits, np.asfortranarray(bits)):
        np.testing.assert_array_equal(backend.relu_backward(dout, KeepMask(given, (20, 21)), None), np.where(keep, dout, 0))


@pytest.mark.parametrize("threads", [1, 2])  # one thread has both panels in one task, two have a task each
def test_a_w_too_large_to_pack_at_once(threads: int) -> None:
    """Rows of stride 0 have to be packed, and these would take 1.3 GB: each task packs for itself, as much as it uses at a time."""
    d = 2_500_000
    row, column, b = np.linspace(-1, 1, 41), np.array([[1.0], [-2.0], [0.5]]), np.linspace(3, -3, 41)
    x, w = np.broadcast_to(column, (3, d)), np.broadcast_to(row, (d, 41))
    with num_threads(threads):
        out, keep = backend.affine_relu_forward(x, w, b, None)
    z = column * row * d + b
    np.testing.assert_allclose(out, np.where(z < 0, 0, z), rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(keep)[:, np.abs(row) > 0.01] > 0, z[:, np.abs(row) > 0.01] >= 0)


@pytest.fixture
def small_l2() -> Iterator[None]:
    """An L2 that extents of some dozens go beyond, and one use enough to pack a w whose rows meet."""
    for itemsize in (4, 8):
        passes.prepare[itemsize]
        host.publish_host(itemsize, kc=16, mc=24, l2=1 << 14, w_uses=1, choices=Choices(w_uses=1, x_uses=2, turns=2, w_share=4))
    yield
    for itemsize in (4, 8):
        host.publish_host(itemsize)


@pytest.mark.usefixtures("small_l2")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["rows that meet", "columns", "every second"])
@pytest.mark.parametrize("shape", [(30, 37, 290), (13, 70, 301), (2, 20, 60, 290)], ids=str)
def test_tasks_that_pack_for_themselves_and_share_a_copy_of_x(
    dtype: np.dtype[Any], layout: str, shape: tuple[int, ...], threads: int, rng: np.random.Generator
) -> None:
    """One block of rows and a w beyond twice L2: each task packs its columns of it, and x, whose rows meet, is copied once for all."""
    *lead, n, d, m = shape
    x = whole(rng, (*lead, n, 1024), dtype)[..., :d]
    w = {
        "rows that meet": whole(rng, (*lead, d, 1024), dtype)[..., :m],
        "columns": whole(rng, (*lead, m, d), dtype).swapaxes(-1, -2),
        "every second": whole(rng, (*lead, d, 2 * m), dtype)[..., ::2],
    }[layout]
    with num_threads(threads):
        check_step(x, w, whole(rng, (*lead, m), dtype), whole(rng, (*lead, n, m), dtype), frames=True)


@pytest.mark.parametrize("n", [29, 48])
@pytest.mark.parametrize("d", [1, 5, 40])
def test_inner_products_of_more_rows_than_a_block_has(dtype: np.dtype[Any], n: int, d: int, rng: np.random.Generator) -> None:
    x, w, b, dout = (whole(rng, shape, dtype) for shape in ((n, d), (d, 2048), (2048,), (n, 2048)))
    passes.prepare[dtype.itemsize]
    assert plan("backward", (n, d, 2048), host.this_host(dtype.itemsize)).to_dx.plan.by_dots
    host.publish_host(dtype.itemsize, mc=8)
    try:
        check_step(x, w, b, dout, frames=True)
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
def test_whole_panels_are_packed_side_by_side(dtype: np.dtype[Any], by_columns: bool, threads: int, rng: np.random.Generator) -> None:
    """More of them in a part than are written to at a time: of w where it lies in rows, of w^T for dx where in columns."""
    n, d, m = (60, 640, 301) if by_columns else (60, 301, 641)
    x, b, dout = (whole(rng, shape, dtype) for shape in ((n, d), (m,), (n, m)))
    w = whole(rng, (m, d), dtype).T if by_columns else whole(rng, (d, m), dtype)
    choices = Choices(w_uses=1, x_uses=4, turns=8, w_share=4)
    host.publish_host(dtype.itemsize, mc=24, l2=1 << 14, w_uses=1, choices=choices)
    try:
        with num_threads(threads):
            check_step(x, w, b, dout, frames=True)
    finally:
        host.publish_host(dtype.itemsize)


@pytest.mark.parametrize("by_columns", [False, True], ids=["dw by rows", "dw by columns"])
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("shape", [(700, 70, 290), (2, 650, 67, 301)], ids=str)
def test_operands_of_dw_are_packed_in_parts(
    dtype: np.dtype[Any], shape: tuple[int, ...], threads: int, by_columns: bool, rng: np.random.Generator
) -> None:
    """B: several blocks of rows, each in several ranges of columns, in three chains of kc; A in tiles of unequal height."""
    *lead, n, d, m = shape
    d, m = (m, d) if by_columns else (d, m)
    x, w, b, dout = (whole(rng, (*lead, *extents), dtype) for extents in ((n, d), (d, m), (m,), (n, m)))
    passes.prepare[dtype.itemsize]
    fields = {"kc": 304, "rows": 4, "w_uses": 1, "cores": 64}
    seen = dataclasses.replace(host.this_host(dtype.itemsize), **fields)
    made = plan("backward", (*lead, n, d, m), seen, w_by_columns=by_columns)
    assert made.to_dw.plan.a == made.to_dw.plan.b == PACKED
    host.publish_host(dtype.itemsize, **fields)
    try:
        with num_threads(threads):
            check_step(x, w, b, dout, frames=True, by_columns=by_columns)
    finally:
        host.publish_host(dtype.itemsize)
