"""Lazy and traced arrays: unknown extents match anything, and nothing is read, computed or synchronised on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rectilinear as r

from . import reference as ref

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
