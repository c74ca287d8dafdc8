"""Operands that several promises share, and one pass through all layers compared with `rectilinear.testing.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.lib import Lib


def operands(rng: np.random.Generator, stack: tuple[int, ...], n: int, d: int, m: int, dtype: str = "float64") -> tuple[Any, Any, Any, Any]:
    """x, w, b and dout of a layer, standard normal."""
    made = (rng.standard_normal((*stack, *shape)) for shape in ((n, d), (d, m), (m,), (n, m)))
    x, w, b, dout = (a.astype(dtype) for a in made)
    return x, w, b, dout


FEATURES = pytest.mark.parametrize("features", [(2, 3), (6,)], ids=["images", "plain"])


def operands_of(rng: np.random.Generator, features: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(rng.standard_normal(shape) for shape in ((5, *features), (6, 4), (4,), (5, 4)))


def assert_close(got: Any, want: Any, dtype: str = "float64") -> None:
    tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def assert_layers_are_right(lib: Lib, case: tuple[Any, Any, Any, Any], dtype: str) -> None:
    """Affine and fused, forward and backward: values, shapes, dtypes, library."""
    x, w, b, dout = case
    X, W, B, D = map(lib.array, case)

    out, cache = r.affine_forward(X, W, B)
    dx, dw, db = r.affine_backward(D, cache)
    for got, want in zip((out, dx, dw, db), (ref.affine_forward(x, w, b), *ref.affine_backward(dout, x, w)), strict=True):
        assert lib.owns(got)
        assert lib.numpy(got).dtype == dtype
        assert_close(lib.numpy(got), want, dtype)

    out, relu_cache = r.affine_relu_forward(X, W, B)
    assert_close(lib.numpy(out), ref.relu(ref.affine_forward(x, w, b)), dtype)
    # Backward is compared with the keep-set that the forward chose: a z that rounds to the other side of 0 is no error.
    kept = ref.keep(lib.numpy(relu_cache[1]))
    for got, want in zip(r.affine_relu_backward(D, relu_cache), ref.affine_backward(np.where(kept, dout, 0), x, w), strict=True):
        assert lib.owns(got)
        assert lib.numpy(got).dtype == dtype
        assert_close(lib.numpy(got), want, dtype)
    assert_close(lib.numpy(r.relu_backward(D, relu_cache[1])), np.where(kept, dout, 0), dtype)


def step(lib: Lib, seed: int = 0, n: int = 65) -> list[np.ndarray]:
    """Results of a fused layer, forward and backward, on the host."""
    x, w, b, dout = map(lib.array, operands(np.random.default_rng(seed), (), n, 33, 17))
    out, cache = r.affine_relu_forward(x, w, b)
    return [lib.numpy(result) for result in (out, *r.affine_relu_backward(dout, cache))]


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))


def numeric_gradient(f: Any, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of f, a function of x that gives a number."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (f(up) - f(down)) / (2 * h)
    return gradient
