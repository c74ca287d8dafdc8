"""Operands of any layout: strides, alignment, byte order, subclasses, files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.cases import assert_close, operands
from rectilinear.testing.lib import Lib


def strided(x: np.ndarray, how: str) -> np.ndarray:
    """The values of x in another layout."""
    if how == "fortran":
        return np.asfortranarray(x)
    if how == "transposed":
        return np.ascontiguousarray(x.T).T
    if how == "negative":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if how == "every other":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1] + 1), np.nan, x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "unaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)
        view = raw[1:].view(x.dtype).reshape(x.shape)
        view[...] = x
        return view
    if how == "big-endian":
        return x.astype(x.dtype.newbyteorder(">"))
    raise AssertionError(how)


LAYOUTS = ["fortran", "transposed", "negative", "every other", "unaligned", "big-endian"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_any_layout(numpy_lib: Lib, rng: np.random.Generator, how: str, stack: tuple[int, ...], dtype: str) -> None:
    plain = operands(rng, stack, 35, 18, 33, dtype)
    x, w, b, dout = (strided(a, how) for a in plain)
    if numpy_lib.readonly_inputs:
        for a in (x, w, b, dout):
            a.setflags(write=False)
    kept = [a.copy() for a in (x, w, b, dout)]
    out, cache = r.affine_relu_forward(x, w, b)
    assert out.dtype == np.dtype(dtype)
    assert out.dtype.isnative
    z = ref.affine_forward(plain[0], plain[1], plain[2])
    assert_close(out, ref.relu(z), dtype)
    signs, tolerance = np.asarray(cache[1]), 1e-4 if dtype == "float32" else 1e-12
    for got, want in zip(r.affine_relu_backward(dout, cache), ref.affine_backward(np.where(signs < 0, 0, dout), x, w), strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(r.relu_forward(x)[0], ref.relu(x))
    np.testing.assert_array_equal(r.relu_backward(dout, (dout * -1)), np.where(dout > 0, 0, dout))
    for a, before in zip((x, w, b, dout), kept, strict=True):
        np.testing.assert_array_equal(a, before)


def test_broadcast_inputs(numpy_lib: Lib, rng: np.random.Generator) -> None:
    """Strides of 0 in each operand."""
    w, row, column = rng.standard_normal((4, 3)), rng.standard_normal(4), rng.standard_normal((6, 1))
    x = np.broadcast_to(row, (6, 4))
    dout = np.broadcast_to(column, (6, 3))
    b = np.broadcast_to(np.float64(0.25), (3,))
    out, cache = r.affine_relu_forward(x, w, b)
    z = ref.affine_forward(x, w, b)
    assert_close(out, ref.relu(z))
    for got, want in zip(r.affine_relu_backward(dout, cache), ref.affine_backward(np.where(z < 0, 0, dout), x, w), strict=True):
        assert_close(got, want)


def test_numpy_scalars_and_memmap(numpy_lib: Lib, rng: np.random.Generator, tmp_path: Any) -> None:
    out, _ = r.relu_forward(np.float32(-2))
    assert type(out) is np.ndarray
    assert out.shape == ()
    assert out == 0
    x = np.memmap(tmp_path / "x", np.float64, "w+", shape=(5, 6))
    x[...] = rng.standard_normal((5, 6))
    w = rng.standard_normal((6, 2))
    out, cache = r.affine_relu_forward(x, w, np.zeros(2))
    assert type(out) is np.ndarray
    assert cache[0][0] is x
    assert_close(out, ref.relu(ref.affine_forward(x, w, None)))
    assert type(r.relu_forward(x)[0]) is np.ndarray


def test_subclasses_of_ndarray_give_base_arrays(numpy_lib: Lib, rng: np.random.Generator) -> None:
    class Sub(np.ndarray):
        pass

    x, w, b, dout = (a.view(Sub) for a in operands(rng, (), 5, 6, 4))
    out, cache = r.affine_relu_forward(x, w, b)
    assert cache[0][0] is x
    labels = np.zeros(5, np.int64).view(Sub)
    for got in (out, *r.affine_relu_backward(dout, cache), r.relu_forward(x)[0], r.softmax_loss(x, labels)[1]):
        assert type(got) is np.ndarray


def transposed(lib: Lib, x: np.ndarray) -> Any:
    made = lib.array(np.ascontiguousarray(np.swapaxes(x, -1, -2)))
    return compat.array_namespace(made).matrix_transpose(made)


VIEWS: dict[str, Callable[[Lib, np.ndarray], Any]] = {
    "transposed": transposed,
    "every other column": lambda lib, a: lib.array(np.repeat(a, 2, axis=-1))[..., ::2],
    "a window": lambda lib, a: lib.array(np.pad(a, 3, constant_values=np.nan))[(slice(3, -3),) * a.ndim],
}
"""Name -> a view that has a's values, in any library whose slices are views."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("how", VIEWS)
def test_views_of_any_library(lib: Lib, rng: np.random.Generator, how: str, dtype: str) -> None:
    x, w, b, dout = operands(rng, (), 35, 18, 33, dtype)
    view = VIEWS[how]
    X, W, D = (view(lib, a) for a in (x, w, dout))
    B = lib.array(b) if how == "transposed" else view(lib, b)
    out, cache = r.affine_relu_forward(X, W, B)
    assert_close(lib.numpy(out), ref.relu(ref.affine_forward(x, w, b)), dtype)
    kept, tolerance = ref.keep(lib.numpy(cache[1])), 1e-4 if dtype == "float32" else 1e-12
    for got, want in zip(r.affine_relu_backward(D, cache), ref.affine_backward(np.where(kept, dout, 0), x, w), strict=True):
        np.testing.assert_allclose(lib.numpy(got), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(lib.numpy(r.relu_forward(X)[0]), ref.relu(x))
    np.testing.assert_array_equal(lib.numpy(r.relu_backward(D, D)), ref.relu(dout))
    np.testing.assert_allclose(lib.numpy(r.affine_backward(D, cache[0], needs=(False, False, True))[2]), dout.sum(axis=0), rtol=1e-4)
