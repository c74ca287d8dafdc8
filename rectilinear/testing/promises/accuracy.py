"""SPEC 5's accuracy: the bound on every element, the tighter one on the root mean square, and long bias reductions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.lib import Lib

SIZES = [(8, 4096, 5), (4096, 8, 5), (5, 8, 4096), (257, 300, 129), (1, 1, 1), (64, 1000, 10)]


def exact_products(x: Any, w: Any, b: Any) -> Any:
    """x w + b correctly rounded, through exact sums."""
    n, m = x.shape[0], w.shape[1]
    out = np.empty((n, m))
    for i in range(n):
        for j in range(m):
            # a float64 product is the sum of its rounded value and an error that fma-free splitting finds exactly
            out[i, j] = math.fsum([*_exact_terms(x[i], w[:, j]), b[j]])
    return out


def _exact_terms(a: Any, b: Any) -> list[float]:
    terms: list[float] = []
    for u, v in zip(a.tolist(), b.tolist(), strict=True):
        product = u * v
        terms += [product, _product_error(u, v, product)]
    return terms


def _product_error(u: float, v: float, product: float) -> float:
    """u * v - product, exactly (Dekker 1971)."""

    def split(a: float) -> tuple[float, float]:
        c = 134217729.0 * a
        high = c - (c - a)
        return high, a - high

    (uh, ul), (vh, vl) = split(u), split(v)
    return ((uh * vh - product) + uh * vl + ul * vh) + ul * vl


def outputs(lib: Lib, x: Any, w: Any, b: Any, dout: Any) -> list[tuple[str, Any, Any, Any, Any, int]]:
    """Each output of the fused layer with its two operands, its bias and the length of its sums."""
    out, cache = r.affine_relu_forward(*map(lib.array, (x, w, b)))
    signs = lib.numpy(cache[1])
    kept = ref.keep(signs)
    dx, dw, db = map(lib.numpy, r.affine_relu_backward(lib.array(dout), cache))
    dz = np.where(kept, dout, 0)
    n, d = x.shape
    m = w.shape[1]
    z = lib.numpy(r.affine_forward(*map(lib.array, (x, w, b)))[0])
    return [
        ("z", z, x, w, b, d),
        ("out", np.where(kept, lib.numpy(out), z), x, w, b, d),
        ("dx", dx, dz, w.T, None, m),
        ("dw", dw, x.T, dz, None, n),
        ("db", db[None, :], np.ones((1, n), x.dtype), dz, None, n),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_both_bounds(lib: Lib, rng: np.random.Generator, size: tuple[int, int, int], dtype: str) -> None:
    n, d, m = size
    x, w, b, dout = (rng.standard_normal(shape).astype(dtype) for shape in ((n, d), (d, m), (m,), (n, m)))
    wide = np.float64 if dtype == "float32" else np.longdouble
    eps = float(np.finfo(dtype).eps)
    for name, got, left, right, bias, k in outputs(lib, x, w, b, dout):
        left, right = left.astype(wide), right.astype(wide)
        exact = left @ right + (0 if bias is None else bias.astype(wide))
        error = (got.astype(wide) - exact).astype(np.float64)
        assert (np.abs(error) <= ref.affine_bound(left, right, bias, k, dtype)).all(), name
        size2 = np.sqrt((left**2 @ right**2).astype(np.float64))
        some = size2 > 0  # a column of dz may be all zeros
        if some.any():
            rms = np.sqrt(np.mean((error[some] / size2[some]) ** 2))
            assert rms <= math.sqrt(k + 16) * eps, name


def test_float64_against_exact_sums(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b = rng.standard_normal((3, 50)), rng.standard_normal((50, 4)), rng.standard_normal(4)
    got = lib.numpy(r.affine_forward(*map(lib.array, (x, w, b)))[0])
    assert (np.abs(got - exact_products(x, w, b)) <= ref.affine_bound(x, w, b, 50, "float64")).all()


@pytest.mark.smoke
def test_small_magnitudes(lib: Lib) -> None:
    """Where products underflow, the bound's last term speaks."""
    x, w = np.full((2, 3), 1e-25, np.float32), np.full((3, 2), 1e-25, np.float32)
    got = lib.numpy(r.affine_forward(lib.array(x), lib.array(w), None)[0])
    bound = 3 * float(np.finfo(np.float32).smallest_normal if lib.flushes else np.finfo(np.float32).smallest_subnormal)
    assert (np.abs(got) <= bound).all()


@pytest.mark.parametrize("data", ["constant", "uniform"])
def test_long_bias_reduction(lib: Lib, rng: np.random.Generator, data: str) -> None:
    """A float32 column sum of a million values, row after row, is wrong in the second digit."""
    n = 10**6
    dout = np.full((n, 2), 0.1, np.float32) if data == "constant" else rng.random((n, 2), np.float32)
    cache = tuple(map(lib.array, (np.zeros((n, 1), np.float32), np.zeros((1, 2), np.float32), np.zeros(2, np.float32))))
    exact = dout.astype(np.float64).sum(axis=0)
    for needs in ((False, False, True), (True, True, True)):
        db = lib.numpy(r.affine_backward(lib.array(dout), cache, needs=needs)[2])
        np.testing.assert_allclose(db, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(16, 150_528, 10), (3, 20_000, 300), (1, 10**6, 1), (1, 10**6, 2)], ids=str)
def test_long_sums_of_one_sign_keep_their_digits(any_lib: Lib, shape: tuple[int, int, int]) -> None:
    """In out, dx and dw alike, as `np.matmul` does, whatever the library's own product makes of them.

    One chain of float32 multiply-adds has 2e-5 at the first shape, where NumPy has 3e-7.
    """
    few, long, many = shape
    errors: dict[str, list[np.ndarray]] = {name: [] for name in ("out", "dx", "dw", "matmul")}
    for seed in range(2):
        rng = np.random.default_rng(seed)
        a, b = rng.random((few, long), "f4"), rng.random((long, many), "f4")
        exact = a.astype("f8") @ b.astype("f8")
        A, B, nothing = map(any_lib.array, (a, b, np.zeros((few, many), "f4")))
        out, _ = r.affine_forward(A, B, None)
        dx, _, _ = r.affine_backward(A, (nothing, any_lib.array(b.T), None), needs=(True, False, False))
        _, dw, _ = r.affine_backward(B, (any_lib.array(a.T), nothing, None), needs=(False, True, False))
        for name, got in (("out", out), ("dx", dx), ("dw", dw)):
            errors[name].append((any_lib.numpy(got) - exact) / exact)
        errors["matmul"].append((a @ b - exact) / exact)
    rms = {name: float(np.sqrt(np.mean(np.square(each)))) for name, each in errors.items()}
    limit = 4 * rms["matmul"] + 4 * np.finfo("f4").eps
    assert max(rms["out"], rms["dx"], rms["dw"]) <= limit, (rms, limit)
