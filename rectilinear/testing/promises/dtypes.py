"""One dtype a call, that of all array arguments together, and every result of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.cases import operands
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "want"),
    [
        ("float32", "float32", "float32"),
        ("float32", "float64", "float64"),
        ("float16", "float16", "float16"),
        ("float16", "float32", "float32"),
        ("int64", "int64", "default"),
        ("bool", "float32", "float32"),
        ("int8", "float32", "float32"),
    ],
)
def test_one_dtype_per_call(lib: Lib, x_dtype: str, w_dtype: str, want: str) -> None:
    if "float16" in (x_dtype, w_dtype) and not lib.has("float16"):
        with pytest.raises(TypeError):  # there are no such arrays to be had
            lib.array(np.ones(2, "float16"))
        return
    want = lib.default_float if want == "default" else want
    x, w, b = np.ones((3, 2), x_dtype), np.ones((2, 4), w_dtype), np.ones(4, w_dtype)
    out, cache = r.affine_relu_forward(lib.array(x), lib.array(w), lib.array(b))
    assert lib.numpy(out).dtype == want
    np.testing.assert_array_equal(lib.numpy(out), 3)
    for gradient in r.affine_relu_backward(lib.array(np.ones((3, 4), want)), cache):
        assert lib.numpy(gradient).dtype == want
    assert lib.numpy(r.relu_forward(lib.array(x))[0]).dtype == (x_dtype if "float" in x_dtype else lib.default_float)


@pytest.mark.parametrize("odd", ["dout", "x", "w", "b", "z"])
def test_every_array_has_a_say_in_the_dtype(numpy_lib: Lib, rng: np.random.Generator, odd: str) -> None:
    shapes = {"dout": (5, 4), "x": (5, 6), "w": (6, 4), "b": (4,), "z": (5, 4)}
    arrays = {name: rng.standard_normal(shape).astype("f8" if name == odd else "f4") for name, shape in shapes.items()}
    wide = {name: array.astype("f8") for name, array in arrays.items()}
    for layer in ("affine", "affine_relu"):
        if odd in ("x", "w", "b"):
            out = getattr(r, f"{layer}_forward")(*(arrays[name] for name in ("x", "w", "b")))[0]
            assert out.dtype == np.float64
            np.testing.assert_array_equal(out, getattr(r, f"{layer}_forward")(*(wide[name] for name in ("x", "w", "b")))[0])
        if odd == "z" and layer == "affine":
            continue
        got, want = (_backward(layer, a) for a in (arrays, wide))
        for have, wish in zip(got, want, strict=True):
            assert have.dtype == np.float64
            np.testing.assert_array_equal(have, wish)
    if odd in ("dout", "z"):
        assert r.relu_backward(arrays["dout"], arrays["z"]).dtype == np.float64


def _backward(layer: str, a: dict[str, np.ndarray]) -> tuple[Any, ...]:
    cache = a["x"], a["w"], a["b"]
    return r.affine_backward(a["dout"], cache) if layer == "affine" else r.affine_relu_backward(a["dout"], (cache, a["z"]))


@pytest.mark.smoke
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_halves_compute_in_float32_and_round_once(half: str, numpy_lib: Lib, rng: np.random.Generator) -> None:
    import ml_dtypes

    dtype = np.dtype(half if half == "float16" else ml_dtypes.bfloat16)
    x, w, b, dout = (a.astype(dtype) for a in operands(rng, (), 40, 600, 7))
    out, cache = r.affine_relu_forward(*map(numpy_lib.array, (x, w, b)))
    z = ref.affine_forward(x, w, b)
    half_ulp = np.spacing(np.abs(z).astype(np.float32) if half == "bfloat16" else np.abs(z).astype(dtype)).astype(np.float64) / 2
    if half == "bfloat16":
        half_ulp = half_ulp * 2.0**16
    bound = ref.affine_bound(x.astype(np.float64), w.astype(np.float64), b.astype(np.float64), 600, np.float32) + half_ulp
    assert out.dtype == dtype
    assert (np.abs(out.astype(np.float64) - ref.relu(z)) <= bound).all()
    kept = ref.keep(np.asarray(cache[1]).astype(np.float64))
    for got, want in zip(
        r.affine_relu_backward(numpy_lib.array(dout), cache),
        ref.affine_backward(np.where(kept, dout, 0).astype(np.float64), x, w),
        strict=True,
    ):
        assert np.asarray(got).dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-2, atol=2e-2)


def test_a_half_that_rounds_to_zero_is_kept_by_forward_and_backward_alike(numpy_lib: Lib) -> None:
    """z = -1e-9 is -0.0 in float16: kept by both, or dropped by both."""
    x, w = np.full((1, 1), 1e-4, np.float16), np.full((1, 1), -1e-5, np.float16)
    out, cache = r.affine_relu_forward(x, w, None)
    assert out == 0
    assert np.signbit(out[0, 0]) == (r.relu_backward(np.ones((1, 1), np.float16), cache[1])[0, 0] == 1)
