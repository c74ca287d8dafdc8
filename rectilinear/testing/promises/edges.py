"""Where ReLU's predicate, ``not (x < 0)``, is easily got wrong: NaN, infinities, zeros of either sign, subnormals."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.lib import Lib

EDGES = [np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, 5e-324, -5e-324, 1.0, -1.0, 2.5e-308, -2.5e-308]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_at_the_edges(lib: Lib, dtype: str) -> None:
    info = np.finfo(dtype)
    normal = float(info.smallest_normal)
    x = np.array([*(e for e in EDGES if abs(e) > 1e-300 or e == 0 or e != e), normal, -normal], dtype)
    out, cache = r.relu_forward(lib.array(x))
    got = lib.numpy(out)
    want = np.where(x < 0, np.zeros((), dtype), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[x == 0]), np.signbit(x[x == 0]))  # -0.0 stays -0.0
    for upstream in (np.nan, np.inf, 1.0):
        dx = lib.numpy(r.relu_backward(lib.array(np.full_like(x, upstream)), cache))
        np.testing.assert_array_equal(dx, np.where(x < 0, 0, upstream).astype(dtype))
        assert not np.signbit(dx[x < 0]).any()


def test_subnormals(lib: Lib) -> None:
    """Kept or dropped by sign; a library that flushes them may count a negative one as 0 and keep it (JAX on CPU does)."""
    x = np.array([5e-324, -5e-324])
    flushes = lib.flushes
    passed = lib.numpy(r.relu_backward(lib.array(np.ones(2)), lib.array(x)))
    assert passed[0] == 1
    assert passed[1] in ((0, 1) if flushes else (0,))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_relu_takes_any_shape(lib: Lib, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, dout = rng.standard_normal(shape), rng.standard_normal(shape)
    out, cache = r.relu_forward(lib.array(x))
    assert lib.owns(out)
    np.testing.assert_array_equal(lib.numpy(out), ref.relu(x))
    np.testing.assert_array_equal(lib.numpy(r.relu_backward(lib.array(dout), cache)), np.where(x < 0, 0, dout))


@pytest.mark.parametrize("kind", ["bool", "int8", "int64", "uint8"])
def test_a_bool_or_integer_relu_cache_is_an_x(lib: Lib, kind: str) -> None:
    x = np.array([-3, 0, 5]).astype(kind)
    dx = lib.numpy(r.relu_backward(lib.array(np.array([1.0, 2.0, 3.0])), lib.array(x)))
    np.testing.assert_array_equal(dx, np.where(x < 0, 0, [1.0, 2.0, 3.0]))


def test_relu_into_out_at_the_edges(numpy_lib: Lib) -> None:
    x = np.array([np.nan, -0.0, 0.0, -np.inf, np.inf, -1.0])
    out, _ = r.relu_forward(numpy_lib.array(x), out=np.empty(6))
    np.testing.assert_array_equal(out, [np.nan, -0.0, 0.0, 0.0, np.inf, 0.0])
    np.testing.assert_array_equal(np.signbit(out), [False, True, False, False, False, False])


@pytest.mark.parametrize("upstream", [np.nan, np.inf, -np.inf])
def test_nothing_passes_where_nothing_was_kept(lib: Lib, upstream: float) -> None:
    """A dout of NaN or infinity leaves no trace in dx, dw and db where z was below 0: selected, not multiplied."""
    x, w = lib.array(np.array([[1.0, 2.0], [3.0, -1.0]])), lib.array(np.array([[-1.0, 1.0, 0.5], [-1.0, 2.0, 0.5]]))
    b, dout = lib.array(np.zeros(3)), np.ones((2, 3))
    _, cache = r.affine_relu_forward(x, w, b)
    dropped = lib.numpy(cache[1]) < 0
    assert dropped.sum() == 2
    dout[dropped] = upstream
    for got, want in zip(
        r.affine_relu_backward(lib.array(dout), cache), r.affine_backward(lib.array(np.where(dropped, 0, dout)), cache[0]), strict=True
    ):
        assert np.isfinite(lib.numpy(got)).all()
        np.testing.assert_array_equal(lib.numpy(got), lib.numpy(want))


def test_zero_is_kept_by_the_fused_layer_too(lib: Lib) -> None:
    """z of exactly 0, and NaN: the gradient passes, and the NaN stays."""
    x, w, b = lib.array(np.array([[1.0, np.nan]]).T), lib.array(np.array([[1.0, 0.0]])), lib.array(np.array([-1.0, 0.0]))
    out, cache = r.affine_relu_forward(x, w, b)
    np.testing.assert_array_equal(lib.numpy(out), [[0.0, 0.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(lib.numpy(r.relu_backward(lib.array(np.full((2, 2), 3.0)), cache[1])), 3.0)
    np.testing.assert_array_equal(lib.numpy(r.affine_relu_backward(lib.array(np.full((2, 2), 3.0)), cache)[2]), 6.0)
