"""(c) The whole backend on the stand-in array module: every primitive against float64, layouts, buffers, launches, devices."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import gpu_cases
import numpy as np
import pytest
from host_backend import Host
from host_cost import aligned
from standin import Device

import rectilinear
from rectilinear.backends import cupy_backend, cupy_scratch, cupy_small, registry
from rectilinear.keepmask import KeepMask

EXTENTS = [(3, 5, 4), (1, 1, 1), (64, 17, 33), (130, 4, 16), (0, 3, 2), (2, 0, 3), (4, 3, 0), (1, 300, 10), (300, 2, 1)]
GROUPS = [None, 1, 3, 0]


def problem(n: int, d: int, m: int, groups: int | None, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    lead = () if groups is None else (groups,)
    shapes = {"x": (*lead, n, d), "w": (*lead, d, m), "b": (*lead, m), "dout": (*lead, n, m)}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(gpu_cases.numpy_dtype(dtype)) for name, shape in shapes.items()}


def within(got: np.ndarray, want: np.ndarray, size: np.ndarray, terms: int, dtype: str) -> None:
    """The bound: `size` is |A| |B| + |b|, `terms` the summed length."""
    half_ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 0) * np.abs(want) + gpu_cases._least(dtype)
    eps = np.finfo(gpu_cases.sum_dtype(gpu_cases.numpy_dtype(dtype))).eps
    bound = 2 * (terms + 2) * eps * size + terms * np.finfo(np.float32).tiny + half_ulp
    assert got.shape == want.shape
    assert (np.abs(got.astype(np.float64) - want) <= bound).all()


def exact(p: dict[str, np.ndarray], keep: np.ndarray | None, bias: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Output -> (value, |A| |B| + |b|, summed length), in float64, with the keep-set that the forward chose."""
    x, w, b, dout = (p[name].astype(np.float64) for name in ("x", "w", "b", "dout"))
    b = b[..., None, :] * bias
    dz = dout if keep is None else np.where(keep, dout, 0)
    xt, wt, size = x.swapaxes(-1, -2), w.swapaxes(-1, -2), np.abs(x) @ np.abs(w) + np.abs(b)
    return {
        "z": (x @ w + b, size, x.shape[-1]),
        "dx": (dz @ wt, np.abs(dz) @ np.abs(wt), dz.shape[-1]),
        "dw": (xt @ dz, np.abs(xt) @ np.abs(dz), dz.shape[-2]),
        "db": (dz.sum(-2), np.abs(dz).sum(-2), dz.shape[-2]),
    }


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_affine_and_fused(host: Host, dtype: str, groups: int | None, bias: bool, way: None) -> None:
    be = host.backend
    for n, d, m in EXTENTS:
        p = problem(n, d, m, groups, dtype)
        x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
        truth = exact(p, None, bias)
        y = be.affine_forward(x, w, b if bias else None, None)
        within(y.get(), *truth["z"], dtype)

        y, mask = be.affine_relu_forward(x, w, b if bias else None, None)
        assert mask.shape == y.shape
        assert mask.nbytes <= max(1, y.size)
        keep = be.to_numpy(mask).to_bool()
        z, size, terms = truth["z"]
        within(y.get(), np.where(keep, z, 0), size, terms, dtype)
        unsure = np.abs(z) <= 2 * (terms + 2) * np.finfo(np.float32).eps * size + gpu_cases._least(dtype)
        assert ((keep == (z >= 0)) | unsure).all()

        truth = exact(p, keep)
        for kind in (mask, be.asarray(np.where(keep, 1, -1).astype(p["x"].dtype))):
            got = be.affine_backward(dout, x, w, kind, (True, True, True), (None, None, None))
            for name, gradient in zip(("dx", "dw", "db"), got, strict=True):
                assert gradient.dtype == p["x"].dtype
                within(gradient.get(), *truth[name], dtype)
        truth = exact(p, None)
        got = be.affine_backward(dout, x, w, None, (True, True, True), (None, None, None))
        for name, gradient in zip(("dx", "dw", "db"), got, strict=True):
            within(gradient.get(), *truth[name], dtype)
        within(be.bias_backward(dout, None).get(), *truth["db"], dtype)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("kept", ["mask", "preact", None])
def test_only_what_is_wanted(host: Host, wanted: tuple[bool, bool, bool], kept: str | None, no_small_layers: None) -> None:
    be, p = host.backend, problem(20, 6, 24, None, "float32")
    x, w, dout, z = (be.asarray(a) for a in (p["x"], p["w"], p["dout"], p["x"] @ p["w"]))
    keep = {"mask": be.asarray(gpu_cases.mask_of(p["x"] @ p["w"])), "preact": z, None: None}[kept]
    whole = be.affine_backward(dout, x, w, keep, (True, True, True), (None, None, None))
    host.cp.counts.clear()
    part = be.affine_backward(dout, x, w, keep, wanted, (None, None, None))
    assert host.cp.counts["products"] == sum(wanted[:2])
    for want, a, b in zip(wanted, part, whole, strict=True):
        assert (a is not None) == want
        assert not want or np.array_equal(a.get(), b.get())


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("kept", ["mask", "preact", None])
def test_only_what_is_wanted_of_a_small_layer(host: Host, wanted: tuple[bool, bool, bool], kept: str | None) -> None:
    """Whose kernel makes dw, with or without the others; without dw there are products."""
    be, p = host.backend, problem(20, 6, 24, None, "float32")
    x, w, dout, z = (be.asarray(a) for a in (p["x"], p["w"], p["dout"], p["x"] @ p["w"]))
    keep = {"mask": be.asarray(gpu_cases.mask_of(p["x"] @ p["w"])), "preact": z, None: None}[kept]
    got = be.affine_backward(dout, x, w, keep, wanted, (None, None, None))
    name = "small_backward" if kept is None else f"{kept}_small_backward"
    assert (host.launched == [name]) == wanted[1]
    truth = exact(p, None if kept is None else p["x"] @ p["w"] >= 0)
    for name, want, gradient in zip(("dx", "dw", "db"), wanted, got, strict=True):
        assert (gradient is not None) == want
        if want:
            within(gradient.get(), *truth[name], "float32")


def layouts(a: np.ndarray) -> list[np.ndarray]:
    """The same values in other strides: Fortran order, negative, every other, unaligned, broadcast where that changes nothing."""
    spaced = np.zeros([2 * extent for extent in a.shape], a.dtype)
    spaced[tuple(slice(None, None, 2) for _ in a.shape)] = a
    unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    unaligned[...] = a
    flipped = np.ascontiguousarray(a[..., ::-1])[..., ::-1]
    return [np.asfortranarray(a), flipped, spaced[tuple(slice(None, None, 2) for _ in a.shape)], unaligned]


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_strides_and_alignment(host: Host, groups: int | None, dtype: str, way: None) -> None:
    be, p = host.backend, problem(9, 8, 16, groups, dtype)
    wrap = host.cp.ndarray._of
    plain = {name: be.asarray(a) for name, a in p.items()}
    y0, mask0 = be.affine_relu_forward(plain["x"], plain["w"], plain["b"], None)
    want = be.affine_backward(plain["dout"], plain["x"], plain["w"], mask0, (True,) * 3, (None,) * 3)
    for x, w, b, dout in zip(*(layouts(p[name]) for name in ("x", "w", "b", "dout")), strict=True):
        frozen = [wrap(a) for a in (x, w, b, dout)]
        for a in frozen:
            a._host.flags.writeable = False  # operands are never written to
        y, mask = be.affine_relu_forward(*frozen[:3], None)
        assert np.allclose(y.get().astype(float), y0.get().astype(float), atol=1e-5)
        assert np.array_equal(mask.bits.get(), mask0.bits.get())
        got = be.affine_backward(frozen[3], *frozen[:2], mask, (True,) * 3, (None,) * 3)
        for a, b in zip(got, want, strict=True):
            assert np.allclose(a.get().astype(float), b.get().astype(float), atol=1e-5)
        assert np.array_equal(be.relu_forward(frozen[0], None).get(), be.relu_forward(plain["x"], None).get())
        # The mask of another backend may have longer rows, in any strides.
        longer = np.zeros((*mask.bits.shape[:-1], 4 * mask.bits.shape[-1]), np.uint8)
        longer[..., : 2 * mask.bits.shape[-1] : 2] = mask.bits.get()
        strange = KeepMask(wrap(longer[..., : 2 * mask.bits.shape[-1] : 2]), mask.shape)
        padded = KeepMask(wrap(np.concatenate([mask.bits.get(), np.zeros_like(mask.bits.get())], axis=-1)), mask.shape)
        for other in (strange, padded):
            assert np.array_equal(be.relu_backward(frozen[3], other, None).get(), be.relu_backward(plain["dout"], mask0, None).get())


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", ["fresh", "strided", "offset"])
def test_out_is_filled_and_returned(host: Host, dtype: str, make: str, way: None) -> None:
    be, p = host.backend, problem(12, 5, 8, None, dtype)
    x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
    labels = be.asarray(np.arange(12) % 8)

    def out(like: Any) -> Any:
        if make == "strided":
            return be._empty((*like.shape[:-1], 2 * like.shape[-1]), like.dtype)[..., ::2]
        return be._empty((like.size + 1,), like.dtype)[1:].reshape(like.shape) if make == "offset" else be._empty(like.shape, like.dtype)

    y, mask = be.affine_relu_forward(x, w, b, None)
    calls = {
        "affine_forward": lambda o: be.affine_forward(x, w, b, o),
        "no bias": lambda o: be.affine_forward(x, w, None, o),
        "fused": lambda o: be.affine_relu_forward(x, w, b, o)[0],
        "db": lambda o: be.bias_backward(dout, o),
        "relu": lambda o: be.relu_forward(x, o),
        "mask": lambda o: be.relu_backward(dout, mask, o),
        "preact": lambda o: be.relu_backward(dout, y, o),
        "softmax": lambda o: be.softmax_loss(dout, labels, o)[1],
    }
    for name, call in calls.items():
        fresh = call(None)
        given = out(fresh)
        assert call(given) is given, name
        assert np.array_equal(gpu_cases.bits(given.get()), gpu_cases.bits(fresh.get())), name
    fresh = be.affine_backward(dout, x, w, mask, (True,) * 3, (None,) * 3)
    given = tuple(out(a) for a in fresh)
    got = be.affine_backward(dout, x, w, mask, (True,) * 3, given)
    assert all(a is b for a, b in zip(got, given, strict=True))
    assert all(np.array_equal(a.get(), b.get()) for a, b in zip(got, fresh, strict=True))
    for keep in (mask, y):
        want = be.relu_backward(dout, keep, None).get()
        in_place = out(dout)
        in_place[...] = dout
        assert be.relu_backward(in_place, keep, in_place) is in_place
        assert np.array_equal(in_place.get(), want)


def test_relu_takes_any_shape(host: Host) -> None:
    be = host.backend
    for shape in ((), (0,), (3, 0, 2), (2, 3, 4, 5)):
        x = np.asarray(gpu_cases.uniform(shape, 3), "f4")
        got = be.relu_forward(be.asarray(x), None)
        assert got.shape == shape
        assert np.array_equal(got.get(), np.where(x < 0, 0, x))
        assert np.array_equal(be.relu_backward(be.asarray(x), be.asarray(-x), None).get(), np.where(-x < 0, 0, x))


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_softmax(host: Host, dtype: str) -> None:
    be, T = host.backend, gpu_cases.numpy_dtype(dtype)
    x = np.array([[1, 2, 3], [0, 0, 0], [5, -5, 5]], T)
    for labels in (np.int8, np.uint8, np.int32, np.uint64, np.int64):
        loss, dx = be.softmax_loss(be.asarray(x), be.asarray(np.array([0, 1, 2], labels)), None)
        assert (loss.shape, loss.dtype, dx.dtype) == ((), T, T)
        assert np.isfinite(loss.get().astype(float))
    for bad in (-1, 3):
        loss, dx = be.softmax_loss(be.asarray(x), be.asarray(np.array([0, bad, 2])), None)
        assert np.isnan(loss.get().astype(float))
        assert np.isnan(dx.get().astype(float)).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    loss, dx = be.softmax_loss(be.asarray(x[:0]), be.asarray(np.zeros(0, int)), None)
    assert np.isnan(loss.get().astype(float))
    assert dx.shape == (0, 3)


def test_softmax_is_stable_for_any_finite_scores(host: Host) -> None:
    be, big = host.backend, np.finfo(np.float32).max
    x = np.array([[big, -big], [-big, -big], [big, big], [big, 0]], "f4")
    loss, dx = be.softmax_loss(be.asarray(x), be.asarray(np.array([0, 1, 0, 0])), None)
    assert np.allclose(loss.get(), np.log(2) / 2)
    assert np.allclose(dx.get(), np.array([[0, 0], [0.5, -0.5], [-0.5, 0.5], [0, 0]]) / 4)
    # Each loss is three quarters of the largest number: their sum is not one, their mean is.
    x = np.array([[0.0, 0.75 * big]] * 4, "f4")
    loss, _ = be.softmax_loss(be.asarray(x), be.asarray(np.zeros(4, int)), None)
    assert loss.get() == np.float32(0.75 * big)


@pytest.mark.parametrize("values", [np.full, None])
def test_a_long_bias_reduction_keeps_five_digits(host: Host, values: Any) -> None:
    n = 10**6
    column = np.full((n, 1), 0.1, "f4") if values else gpu_cases.uniform((n, 1), 4).astype("f4") + np.float32(2)
    got = host.backend.bias_backward(host.backend.asarray(column), None).get()
    assert abs(got[0] / column.sum(dtype=np.float64) - 1) < 1e-5


def test_many_rows_of_one_thread_keep_five_digits(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an array a thousand times as long: one block of 256 threads sums all the rows."""
    monkeypatch.setattr(cupy_backend, "_blocks_of_sum", lambda *of: 1)
    n = 2**20
    got = host.backend.bias_backward(host.backend.asarray(np.full((n, 1), 0.1, "f4")), None).get()
    assert abs(got[0] / (n * float(np.float32(0.1))) - 1) < 1e-5


def test_finite_differences(host: Host) -> None:
    be, p = host.backend, problem(6, 5, 7, None, "float64", seed=5)

    def loss(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> float:
        y, _ = be.affine_relu_forward(be.asarray(x), be.asarray(w), be.asarray(b), None)
        return float((y.get() * p["dout"]).sum())

    on = {name: be.asarray(a) for name, a in p.items()}
    _, mask = be.affine_relu_forward(on["x"], on["w"], on["b"], None)
    gradients = be.affine_backward(on["dout"], on["x"], on["w"], mask, (True,) * 3, (None,) * 3)
    for name, gradient in zip(("x", "w", "b"), gradients, strict=True):
        for index in list(np.ndindex(p[name].shape))[::5]:
            moved = {key: p[key].copy() for key in ("x", "w", "b")}
            moved[name][index] += 1e-6
            up = loss(**moved)
            moved[name][index] -= 2e-6
            assert abs((up - loss(**moved)) / 2e-6 - gradient.get()[index]) < 1e-7


# ---------------------------------------------------------------- launches


def step(host: Host, p: dict[str, np.ndarray]) -> tuple[int, list[str], int]:
    """(products, kernels, copies) of one affine + ReLU forward and backward."""
    be = host.backend
    x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
    be._shared(x, 1)  # counters, filled once a stream
    host.cp.counts.clear()
    for module in host.modules.values():
        module.launched.clear()
    _, mask = be.affine_relu_forward(x, w, b, None)
    be.affine_backward(dout, x, w, mask, (True,) * 3, (None,) * 3)
    return host.cp.counts["products"], host.launched, host.cp.counts["copies"] + host.cp.counts["fills"]


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_is_three_products_and_two_kernels(host: Host, groups: int | None, dtype: str, no_small_layers: None) -> None:
    for n in (5, 100, 1500):
        assert step(host, problem(n, 8, 32, groups, dtype)) == (3, ["bias_relu_mask_wide", "mask_colsum_wide"], 0)
        assert step(host, problem(n, 8, 33, groups, dtype)) == (3, ["bias_relu_mask", "mask_colsum"], 0)


def test_a_bias_off_the_boundary_is_not_read_16_bytes_at_a_time(host: Host, no_small_layers: None) -> None:
    be, p = host.backend, problem(4, 3, 16, None, "float32")
    x, w = be.asarray(p["x"]), be.asarray(p["w"])
    memory = aligned((20,), np.float32)
    for start, kernel in ((4, "bias_relu_mask_wide"), (1, "bias_relu_mask"), (4, "bias_relu_mask_wide")):
        memory[start : start + 16] = p["b"]
        y, _ = be.affine_relu_forward(x, w, host.cp.ndarray._of(memory[start : start + 16]), None)
        assert host.launched[-1] == kernel
        assert np.allclose(y.get(), (p["x"] @ p["w"] + p["b"]).clip(0), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("host", ["gemm"], indirect=True)
def test_a_16_bit_step_by_gemm_has_two_more_to_round_dx_and_dw(host: Host, dtype: str, no_small_layers: None) -> None:
    products, kernels, copies = step(host, problem(100, 8, 32, None, dtype))
    assert (products, copies) == (3, 0)
    assert kernels == ["bias_relu_mask_wide", "mask_colsum_wide", "bias_add_wide", "bias_add_wide"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("groups", [None, 2])
def test_a_16_bit_step_by_plans_has_no_kernel_that_rounds(host: Host, dtype: str, groups: int | None, no_small_layers: None) -> None:
    products, kernels, copies = step(host, problem(100, 8, 32, groups, dtype))
    assert (products, copies) == (3, 0)
    assert kernels == ["relu_mask_wide", "mask_colsum_wide"]


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_step_of_a_small_layer_is_two_kernels(host: Host, groups: int | None, dtype: str) -> None:
    for n, d, m in ((1, 64, 64), (16, 128, 128), (20, 33, 10)):
        assert step(host, problem(n, d, m, groups, dtype)) == (0, ["small_forward", "mask_small_backward"], 0)


@pytest.mark.parametrize("name", list("xw"))
def test_a_small_layer_in_other_strides_is_left_to_cublas(host: Host, name: str) -> None:
    """Which takes them as they are; copying them would be another launch."""
    be, p = host.backend, problem(6, 5, 7, None, "float32")
    on = {key: be.asarray(a) for key, a in p.items()}
    on[name] = host.cp.ndarray._of(np.asfortranarray(p[name]))
    host.cp.counts.clear()
    be.affine_forward(on["x"], on["w"], on["b"], None)
    be.affine_backward(on["dout"], on["x"], on["w"], None, (True, True, False), (None, None, None))
    assert host.cp.counts["products"] == 3
    assert host.cp.counts["copies"] == 0


def test_what_counts_as_a_small_layer() -> None:
    """By the estimates of what both ways take on an H100."""

    def small(*shape: int, groups: int = 1, itemsize: int = 4) -> tuple[bool, bool]:
        layer = cupy_small.Layer(groups, *shape)
        return bool(cupy_small.share_forward(layer, itemsize)), bool(cupy_small.share_backward(layer, itemsize, True))

    for shape in ((1, 64, 64), (16, 128, 128), (64, 256, 256), (1, 1, 1), (64, 256, 10)):
        assert small(*shape) == small(*shape, itemsize=2) == (True, True)
    for shape in ((128, 784, 256), (100, 3072, 100)):
        assert small(*shape) == (True, True)
        assert small(*shape, itemsize=2) == (False, False)  # where cuBLAS has tensor cores
    for shape in ((512, 512, 512), (1024, 1024, 1024), (8, 4096, 4096), (65536, 64, 64), (65536, 1, 1), (1, 65536, 1), (1, 1, 65536)):
        assert small(*shape) == (False, False)
    assert small(16, 128, 128, groups=1000) == (False, False)
    assert small(1, 64, 64, itemsize=8) == (False, False)
    assert small(0, 3, 3) == small(3, 0, 3) == small(3, 3, 0) == small(3, 3, 3, groups=0) == (False, False)


def test_the_estimate_grows_with_every_extent() -> None:
    def estimate(tiles: int, depth: int, slabs: int = 1000) -> float:
        return cupy_small.estimated_us((cupy_small._Product(tiles, depth),), slabs, backward=False)

    assert estimate(1, 1) < estimate(1, 65) < estimate(1, 1000)  # a tile's own slabs
    assert estimate(132, 64) < estimate(133, 64)  # a multiprocessor's tiles
    assert estimate(32, 784, 4) < estimate(32, 784)  # blocks that share tiles have work for more multiprocessors
    assert estimate(1, 65, 1) > estimate(1, 65)  # and what they leave has to be added up


def test_blocks_that_share_a_tile_take_whole_slabs_of_all_of_it() -> None:
    for shape in ((100, 3072, 100), (128, 784, 256), (8, 1024, 64), (300, 33, 40), (64, 256, 256)):
        n, d, m = shape
        for sharing, products in (
            (cupy_small.share_forward(cupy_small.Layer(1, *shape), 4), ((n, m, d),)),
            (cupy_small.share_backward(cupy_small.Layer(1, *shape), 4, True), ((d, m, n), (n, d, m))),
        ):
            assert sharing is not None
            blocks = left = 0
            for (rows, cols, depth), span in zip(products, sharing.spans, strict=True):
                assert span % 64 == 0
                tiles, each = -(-rows // 32) * -(-cols // 32), -(-depth // span)
                blocks += tiles * each
                left += tiles * each * (32 * 32 + 32) * (each > 1)
            assert (sharing.blocks, sharing.left) == (blocks, left)
    most = cupy_small.MOST_SHARED  # each has a counter
    assert cupy_small._possible((cupy_small._Product(most, 128), cupy_small._Product(most, 64)), 1)
    assert not cupy_small._possible((cupy_small._Product(most + 1, 128),), 1)
    assert not cupy_small._possible((cupy_small._Product(most, 128), cupy_small._Product(1, 128)), 1)


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
def test_bfloat16_is_widened_where_cublas_has_none(host: Host, monkeypatch: pytest.MonkeyPatch, no_small_layers: None) -> None:
    """Before sm_80."""
    monkeypatch.setattr(Device, "compute_capability", "75")
    p = problem(10, 8, 16, None, "bfloat16")
    products, _, copies = step(host, p)
    assert (products, copies) == (3, 6)
    y = host.backend.affine_forward(*(host.backend.asarray(p[name]) for name in "xwb"), None)
    within(y.get(), *exact(p, None)["z"], "bfloat16")


def test_grids_and_sums_depend_on_the_shape_alone(host: Host, no_small_layers: None) -> None:
    """db has the same bits under any schedule, whether dz or only db is wanted, and whatever kind of keep said what to keep."""
    be, p = host.backend, problem(1300, 3, 24, None, "float32")
    keep = p["x"] @ p["w"]
    mask, z, dout, x, w = be.asarray(gpu_cases.mask_of(keep)), *(be.asarray(a) for a in (keep, p["dout"], p["x"], p["w"]))
    found = set()
    for schedule, kind, want in itertools.product((0, 1, 99), (mask, z), (True, False)):
        host.set(schedule=schedule)
        found.add(be.affine_backward(dout, x, w, kind, (want, want, True), (None,) * 3)[2].get().tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("host", ["plans", "gemm"], indirect=True)
def test_extents_that_cublas_cannot_count_are_refused(host: Host) -> None:
    host_view = np.broadcast_to(np.zeros((1, 1), "f4"), (2**31, 1))
    x, w, out = (host.cp.ndarray._of(a) for a in (host_view, np.zeros((1, 1), "f4"), host_view))
    with pytest.raises(ValueError, match="extents up to 2147483647"):
        host.backend._product("NN", x, w, out)


# ---------------------------------------------------------------- one allocation for small results


def test_small_results_of_a_call_share_an_allocation_and_are_apart(host: Host, monkeypatch: pytest.MonkeyPatch, way: None) -> None:
    be, p = host.backend, problem(20, 6, 24, None, "float32")
    x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
    asked: list[int] = []
    alloc = host.cp.cuda.alloc
    monkeypatch.setattr(host.cp.cuda, "alloc", lambda nbytes: asked.append(nbytes) or alloc(nbytes))
    y, mask = be.affine_relu_forward(x, w, b, None)
    gradients = be.affine_backward(dout, x, w, mask, (True, True, True), (None, None, None))
    assert len(asked) == 2
    results = [y, mask._bits, *gradients]
    want = [array.get() for array in results]
    for i, array in enumerate(results):  # written to and given back one by one, they leave the others alone
        array.fill(0)
        assert all((other.get() == kept).all() for other, kept in zip(results[i + 1 :], want[i + 1 :], strict=True))
        assert array.data.ptr % 16 == 0
        results[i] = None
    be.affine_backward(dout, x, w, mask, (True, False, True), (None, None, None))
    be.affine_backward(dout, x, w, mask, (True, True, True), (be.asarray(p["x"]), None, None))
    assert len(asked) == 3  # where a place is given, the others have memory of their own


def test_large_results_have_memory_of_their_own() -> None:
    """One that is still needed must not keep others."""
    for shapes in (((512, 1024), (1024, 768)), ((8, 1 << 18), (1 << 18, 8))):
        assert cupy_backend.backward(4, *shapes, (True, True, True), "", 0).together.nbytes == 0
    assert cupy_backend.forward(4, (4096, 64), (64, 512)).together.nbytes == 0
    assert cupy_backend.forward(4, (4, 64), (64, 512)).together.nbytes == 4 * 512 * 4 + 512


# ---------------------------------------------------------------- counters of the last block


def counters(host: Host) -> Any:
    """Of a launch on the current stream of the current device."""
    return host.backend._shared(host.cp.empty((1,)), 1)[1]


def test_streams_and_devices_have_counters_of_their_own(host: Host) -> None:
    first = counters(host)
    assert (first.get() == 0).all()
    assert counters(host) is first
    with host.cp.cuda.Stream() as stream:
        other = counters(host)
        assert other is not first
        assert counters(host) is other
    with Device(1):
        assert all(counters(host) is not known for known in (first, other))
        assert counters(host).device.id == 1
    assert counters(host) is first
    with stream:
        assert counters(host) is other


def test_the_default_stream_of_each_thread_is_a_stream_of_its_own(host: Host) -> None:
    """All have the same handle."""
    found = []

    def look() -> None:
        with host.cp.cuda.Stream(ptds=True):
            found.append(counters(host))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    look()
    assert found[0] is not found[1]
    assert found[0] is found[2]


def test_counters_that_were_not_set_back_would_be_noticed(host: Host) -> None:
    be, ones = host.backend, host.backend.asarray(np.ones((4000, 8), "f4"))
    assert (be.bias_backward(ones, None).get() == 4000).all()
    counters(host).fill(7)
    assert not np.isfinite(be.bias_backward(ones, None).get()).all()


def test_a_recording_has_counters_of_its_own_in_this_thread_alone(host: Host) -> None:
    own, seen = counters(host), []
    scratch = cupy_scratch.Scratch(host.cp)
    with cupy_scratch.recording(scratch):
        given = counters(host)
        thread = threading.Thread(target=lambda: seen.append(counters(host)))
        thread.start()
        thread.join()
        assert counters(host) is given is not own
    assert seen[0] is own
    assert counters(host) is own


def test_no_counters_are_made_while_another_than_our_capture_records(host: Host) -> None:
    """They would be zeros only once its graph has been launched, and the stream goes on to use them."""
    ones = host.backend.asarray(np.ones((4000, 8), "f4"))
    with host.cp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="call the function once on this stream before the capture begins"):
                host.backend._shared(ones, 1)
        finally:
            stream.end_capture()
        assert (host.backend.bias_backward(ones, None).get() == 4000).all()
        stream.begin_capture()
        try:
            host.backend._shared(ones, 1)
        finally:
            stream.end_capture()


def test_streams_without_end_leave_no_counters_without_end(host: Host) -> None:
    for _ in range(300):
        with host.cp.cuda.Stream():
            counters(host)
    assert len(host.backend.scratches._of) <= cupy_scratch._MOST_STREAMS


def test_every_launch_leaves_its_counters_zero_and_has_enough_of_them(host: Host) -> None:
    be = host.backend
    for schedule in (0, 1, 7):
        host.set(schedule=schedule)
        for shape in ((1300, 24), (4, 600, 130), (100, 33)):
            be.bias_backward(be.asarray(np.ones(shape, "f4")), None)
            assert (counters(host).get() == 0).all()
    shared = [groups for groups in range(1, 2000) if cupy_backend.column_sum(4, "colsum", (groups, 10**6, 8), True, 0).parts]
    assert max(shared) <= counters(host).size
    assert cupy_small.MOST_SHARED <= counters(host).size


def test_sums_have_the_same_bits_however_blocks_take_turns(host: Host, no_small_layers: None) -> None:
    be, p = host.backend, problem(700, 3, 72, 2, "float32")
    dout, mask = be.asarray(p["dout"]), be.asarray(gpu_cases.mask_of(p["x"] @ p["w"]))
    found = set()
    for schedule in (0, 1, 2, 3, 4, 5, 99, 1000):
        host.set(schedule=schedule)
        found.add(be._select_and_sum(dout, mask, True, None)[1].get().tobytes())
    assert len(found) == 1


# ---------------------------------------------------------------- devices, arrays, threads


def test_work_goes_to_the_device_of_the_arrays(host: Host, way: None) -> None:
    be, p = host.backend, problem(5, 3, 8, None, "float32")
    with Device(1):
        x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
    assert Device().id == 0
    y, mask = be.affine_relu_forward(x, w, b, None)
    results = [y, mask.bits, *be.affine_backward(dout, x, w, mask, (True,) * 3, (None,) * 3)]
    results += [be.affine_forward(x, w, b, None), be.bias_backward(dout, None), be.relu_forward(x, None)]
    results += [be.relu_backward(dout, mask, None), *be.softmax_loss(dout, _on(1, be, np.zeros(5, int)), None)]
    assert {a.device.id for a in results} == {1}
    assert Device().id == 0


def _on(device: int, backend: Any, a: np.ndarray) -> Any:
    with Device(device):
        return backend.asarray(a)


def test_small_layers_have_the_same_bits_however_blocks_take_turns(host: Host) -> None:
    """Of both groups, where blocks share tiles of y, of dw and of dx."""
    for shape, launches in (((40, 460, 36), 1), ((200, 10, 200), 2)):
        be, p = host.backend, problem(*shape, 2, "float32")
        x, w, b, dout = (be.asarray(p[name]) for name in ("x", "w", "b", "dout"))
        found = set()
        for schedule in (0, 1, 2, 3, 99, 1000):
            host.set(schedule=schedule)
            y, mask = be.affine_relu_forward(x, w, b, None)
            results = [y, mask._bits, *be.affine_backward(dout, x, w, mask, (True,) * 3, (None,) * 3)] if launches == 2 else [y]
            found.add(b"".join(array.get().tobytes() for array in results))
            assert (counters(host).get() == 0).all()
        assert len(found) == 1


def test_asarray_and_to_numpy(host: Host) -> None:
    be = host.backend
    a = be.asarray([[1, 2], [3, 4]], "float32")
    assert isinstance(a, host.cp.ndarray)
    assert a.dtype == np.float32
    assert be.asarray(a) is a
    assert np.array_equal(be.to_numpy(a), [[1, 2], [3, 4]])
    mask = gpu_cases.mask_of(np.array([[1.0, -1.0, 0.0]]))
    moved = be.asarray(mask)
    assert isinstance(moved.bits, host.cp.ndarray)
    back = be.to_numpy(moved)
    assert isinstance(back, KeepMask)
    assert np.array_equal(np.asarray(back), np.asarray(mask))
    be.synchronize()


def test_asarray_takes_other_cpu_libraries(host: Host) -> None:
    import array_api_strict

    a = host.backend.asarray(array_api_strict.asarray([1.0, 2.0]))
    assert np.array_equal(a.get(), [1, 2])


def test_many_threads(host: Host) -> None:
    """The launches of the CPU stand-in take turns; what the backend itself keeps is what is tried here."""
    be, p = host.backend, problem(30, 4, 12, None, "float32")
    want = (p["x"] @ p["w"] + p["b"]).clip(0)
    failures: list[object] = []

    def work() -> None:
        for _ in range(5):
            y = be.affine_relu_forward(*(be.asarray(p[name]) for name in "xwb"), None)[0].get()
            if not np.allclose(y, want, atol=1e-5):
                failures.append(y)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---------------------------------------------------------------- through the public functions


def test_numpy_arrays_go_to_the_device_and_back(host: Host) -> None:
    """The chosen backend serves NumPy arrays; results, and the keep-mask of the cache, come back to the host."""
    registry.register("cupy-standin", lambda: host.backend)
    try:
        with rectilinear.use_backend("cupy-standin"):
            p = problem(7, 6, 9, None, "float32")
            out, cache = rectilinear.affine_relu_forward(p["x"].reshape(7, 2, 3), p["w"], p["b"])
            assert "small_forward" in host.launched
            assert isinstance(cache[1], KeepMask)
            assert isinstance(cache[1].bits, np.ndarray)
            dx, dw, db = rectilinear.affine_relu_backward(p["dout"], cache)
            loss, _ = rectilinear.softmax_loss(out, [0] * 7)
            kept = rectilinear.relu_backward(p["dout"], cache[1])
        with rectilinear.use_backend("numpy"):  # whose own functions read the cache as well
            want, want_cache = rectilinear.affine_relu_forward(p["x"].reshape(7, 2, 3), p["w"], p["b"])
            for a, b in zip((dx, dw, db), rectilinear.affine_relu_backward(p["dout"], cache), strict=True):
                assert type(a) is np.ndarray
                assert np.allclose(a, b, atol=1e-5)
            assert np.array_equal(kept, rectilinear.relu_backward(p["dout"], want_cache[1]))
            assert np.allclose(loss, rectilinear.softmax_loss(want, [0] * 7)[0])
        assert np.allclose(out, want, atol=1e-5)
        assert dx.shape == (7, 2, 3)
    finally:
        registry.unregister("cupy-standin")
