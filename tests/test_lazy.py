"""Lazy and traced arrays: unknown extents match anything, and nothing is read, computed or synchronised on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref

pytestmark = pytest.mark.libraries


@pytest.fixture
def case(rng: np.random.Generator) -> tuple[Any, ...]:
    return tuple(rng.standard_normal(shape) for shape in ((6, 5), (5, 4), (4,), (6, 4)))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


def test_dask_of_unknown_extent_computes_nothing(case: tuple[Any, ...]) -> None:
    import dask
    import dask.array as da

    x, w, b, dout = case
    rows = x[:, 0] > -10  # all of them, but dask does not know
    lazy = [da.from_array(a, chunks=-1) for a in case]
    unknown = da.from_array(rows, chunks=-1)
    X, D = lazy[0][unknown], lazy[3][unknown]
    assert np.isnan(X.shape[0])
    with dask.config.set(scheduler=refuse):
        out, cache = r.affine_relu_forward(X, lazy[1], lazy[2])
        grads = r.affine_relu_backward(D, cache)
        relu = r.relu_forward(X)[0]
        loss, dx = r.softmax_loss(X, da.from_array(np.array([0, 1, 2, 3, 4, 0]), chunks=-1)[unknown])
        with pytest.raises(r.ShapeError, match=r"x has 5 features per sample \(shape \(\?, 5\)\) but w takes 6"):
            r.affine_forward(X, lazy[3], None)
    with dask.config.set(scheduler="synchronous"):
        z = ref.affine_forward(x, w, b)
        np.testing.assert_allclose(out.compute(), ref.relu(z))
        for got, want in zip(grads, ref.affine_backward(np.where(z < 0, 0, dout), x, w), strict=True):
            np.testing.assert_allclose(got.compute(), want)
        np.testing.assert_array_equal(relu.compute(), ref.relu(x))
        want_loss, want_dx = r.softmax_loss(x, [0, 1, 2, 3, 4, 0])
        np.testing.assert_allclose(loss.compute(), want_loss)
        np.testing.assert_allclose(dx.compute(), want_dx)


def test_dask_cannot_flatten_what_it_does_not_know_the_extent_of(rng: np.random.Generator) -> None:
    import dask
    import dask.array as da

    x, w = rng.standard_normal((6, 2, 3)), rng.standard_normal((6, 4))
    X = da.from_array(x, chunks=-1)[da.from_array(np.ones(6, bool), chunks=-1)]
    with dask.config.set(scheduler=refuse), pytest.raises(r.ShapeError, match=r"x of shape \(\?, 2, 3\) .* x\.compute_chunk_sizes\(\)"):
        r.affine_forward(X, da.from_array(w, chunks=-1), None)
    with dask.config.set(scheduler="synchronous"):
        out, _ = r.affine_forward(X.compute_chunk_sizes(), da.from_array(w, chunks=-1), None)
        np.testing.assert_allclose(out.compute(), x.reshape(6, 6) @ w)


def test_a_long_bias_reduction_of_unknown_extent() -> None:
    """No blocks to be had there; a plain float32 sum of a million is wrong in the second digit."""
    import dask
    import dask.array as da

    n = 10**6
    dout = da.from_array(np.full((n, 2), 0.1, np.float32), chunks=-1)[da.from_array(np.ones(n, bool), chunks=-1)]
    cache = (dout, da.ones((2, 2), dtype=np.float32, chunks=-1), da.zeros(2, dtype=np.float32, chunks=-1))
    db = r.affine_backward(dout, cache, needs=(False, False, True))[2]
    assert db.dtype == np.float32
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_allclose(db.compute(), n * float(np.float32(0.1)), rtol=1e-5)


def test_what_dask_cannot_combine_is_told(case: tuple[Any, ...]) -> None:
    import dask.array as da

    x, w, b, dout = (da.from_array(a, chunks=-1) for a in case)
    unknown = x[da.from_array(np.ones(6, bool), chunks=-1)]
    for call in (
        lambda: r.relu_backward(x, unknown),
        lambda: r.affine_backward(dout, (unknown, w, b)),
        lambda: r.softmax_loss(unknown, [0] * 6),
        lambda: r.softmax_loss(unknown.T, [0] * 5),
    ):
        with pytest.raises(r.ShapeError, match=r"^(relu_backward|affine_backward|softmax_loss): .*\?.*compute_chunk_sizes"):
            call()


def test_samples_of_one_axis_and_unknown_extent_need_no_reshape() -> None:
    import dask.array as da

    x = da.ones(6, chunks=-1)[da.from_array(np.ones(6, bool), chunks=-1)]
    out, _ = r.affine_forward(x, da.ones((1, 2), chunks=-1), None)
    assert out.compute(scheduler="synchronous").shape == (6, 2)


def test_arrays_sharded_over_devices() -> None:
    """JAX names a sharding where others name a device."""
    code = """
import jax, numpy as np, rectilinear as r
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("d",))
put = lambda a, *spec: jax.device_put(np.asarray(a, "f4"), NamedSharding(mesh, P(*spec)))
x, w, b, dout = put(np.ones((4, 3)), "d", None), put(np.ones((3, 2))), put(np.zeros(2)), put(np.ones((4, 2)), "d", None)
out, cache = r.affine_relu_forward(x, w, b)
dx, dw, db = r.affine_relu_backward(dout, cache)
r.relu_backward(x, x)
loss, _ = r.softmax_loss(x, [0, 1, 2, 0])
print(len(jax.devices()), float(out.sum()), float(dw.sum()), float(db.sum()), round(float(loss), 4))
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["2", "24.0", "24.0", "8.0", "1.0986"], done.stderr


def test_labels_that_cannot_be_read_under_vmap() -> None:
    import torch

    losses, _ = torch.vmap(r.softmax_loss)(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 2]]))
    np.testing.assert_allclose(losses.numpy(), np.log(4), rtol=1e-6)


def test_a_bad_label_in_a_lazy_array_gives_nan() -> None:
    import dask
    import dask.array as da

    with dask.config.set(scheduler=refuse):
        loss, dx = r.softmax_loss(da.ones((3, 4), chunks=-1), da.from_array(np.array([0, 7, 1]), chunks=-1))
    with dask.config.set(scheduler="synchronous"):
        assert np.isnan(loss.compute())
        np.testing.assert_array_equal(np.isnan(dx.compute()).all(axis=1), [False, True, False])


def test_jit_with_the_cache_crossing_its_boundary(case: tuple[Any, ...]) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    x, w, b, dout = map(jax.numpy.asarray, case)
    out, cache = jax.jit(r.affine_relu_forward)(x, w, b)
    grads = jax.jit(r.affine_relu_backward)(dout, cache)
    z = ref.affine_forward(*case[:3])
    np.testing.assert_allclose(out, ref.relu(z))
    for got, want in zip(grads, ref.affine_backward(np.where(z < 0, 0, case[3]), *case[:2]), strict=True):
        np.testing.assert_allclose(got, want)

    @jax.jit
    def step(x: Any, w: Any, b: Any, y: Any) -> Any:
        scores, cache = r.affine_forward(x, w, b)
        loss, dscores = r.softmax_loss(scores, y)
        return loss, r.affine_backward(dscores, cache)

    loss, _ = step(x, w, b, jax.numpy.asarray([0, 1, 2, 3, 0, 1]))
    want_loss, _ = r.softmax_loss(np.asarray(r.affine_forward(*case[:3])[0]), [0, 1, 2, 3, 0, 1])
    np.testing.assert_allclose(loss, want_loss)
    bad, _ = step(x, w, b, jax.numpy.asarray([0, 1, 2, 3, 0, 9]))
    assert np.isnan(bad)


def test_jit_without_bias(case: tuple[Any, ...]) -> None:
    import jax

    x, w = case[:2]
    out, cache = jax.jit(lambda x, w: r.affine_forward(x, w, None))(x, w)
    assert cache[2] is None
    np.testing.assert_allclose(out, x @ w)


def test_wrong_shapes_are_told_while_tracing(case: tuple[Any, ...]) -> None:
    import jax

    with pytest.raises(r.ShapeError, match="affine_forward: x has 5 features per sample"):
        jax.jit(lambda x, w: r.affine_forward(x, w, None)[0])(case[0], case[3])
