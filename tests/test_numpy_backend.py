"""The numpy backend's own ways of selecting, multiplying and summing: exact for every size and layout."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.backends import numpy_backend
from rectilinear.backends.numpy_backend import NumpyBackend

BACKEND = NumpyBackend()
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1.5, -1.5, 1e-45, -1e-45]

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "Fortran": lambda a: np.asfortranarray(a),
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "gaps": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.fixture(params=[True, False], ids=["by clip", "by bits"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not numpy_backend._CLIP_SELECTS:
        return  # this NumPy has the other way alone
    monkeypatch.setattr(numpy_backend, "_CLIP_SELECTS", request.param)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 24), (35, 11), (0, 5), (5, 0), (2, 30, 50)], ids=str)
def test_selection_to_the_bit(rng: np.random.Generator, dtype: str, layout: str, shape: tuple[int, ...]) -> None:
    """The sign of a zero and NaN included, into fresh arrays, into arrays of any layout, and in place."""
    x = LAYOUTS[layout](rng.choice(np.array(SPECIAL, dtype), shape))
    dout = LAYOUTS[layout](rng.choice(np.array(SPECIAL, dtype), shape))
    forward, backward = np.where(x < 0, 0, x).astype(dtype), np.where(x < 0, 0, dout).astype(dtype)
    assert BACKEND.relu_forward(x, None).tobytes() == forward.tobytes()
    assert BACKEND.relu_backward(dout, x, None).tobytes() == backward.tobytes()
    for out in (np.empty(shape, dtype), np.empty(shape[::-1], dtype).T, np.empty((*shape, 2), dtype)[..., 0]):
        assert BACKEND.relu_forward(x, out) is out
        assert out.tobytes() == forward.tobytes()
        assert BACKEND.relu_backward(dout, x, out) is out
        assert out.tobytes() == backward.tobytes()
    here = dout.copy("K")
    assert BACKEND.relu_backward(here, x, here) is here
    assert here.tobytes() == backward.tobytes()


@pytest.mark.usefixtures("_way")
def test_an_array_without_axes_stays_one() -> None:
    for value in SPECIAL:
        result = BACKEND.relu_forward(np.array(value), None)
        assert type(result) is np.ndarray
        assert result.tobytes() == np.where(np.array(value) < 0, 0.0, value).tobytes()


def test_a_clip_that_loses_zeros_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(np.ndarray):
        def clip(self, low: Any, high: Any, out: Any = None) -> Any:  # type: ignore[override]
            return np.minimum(np.where(np.asarray(self) > low, self, low), high)

    assert numpy_backend._CLIP_SELECTS == numpy_backend._clip_selects()
    array = np.array
    monkeypatch.setattr(np, "array", lambda *args: array(*args).view(Other))
    assert not numpy_backend._clip_selects()


@pytest.fixture(params=[True, False], ids=["dot", "matmul alone"])
def _product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not numpy_backend._DOT_REPORTS:
        return  # this NumPy has the other way alone
    monkeypatch.setattr(numpy_backend, "_DOT_REPORTS", request.param)


EMPTY: dict[str, Callable[[tuple[int, ...], np.dtype], Any]] = {
    "fresh": lambda shape, dtype: None,
    "C": lambda shape, dtype: np.empty(shape, dtype),
    "Fortran": lambda shape, dtype: np.empty(shape[::-1], dtype).T,
    "gaps": lambda shape, dtype: np.empty((*shape, 2), dtype)[..., 0],
    "unaligned": lambda shape, dtype: np.empty(math.prod(shape) * dtype.itemsize + 1, np.uint8)[1:].view(dtype).reshape(shape),
}


def products(x: np.ndarray, w: np.ndarray, dout: np.ndarray, empty: Callable[[tuple[int, ...], np.dtype], Any]) -> tuple[Any, ...]:
    """out, dx and dw of an affine layer without bias, into what `empty` makes for a shape."""
    outs = [empty(shape, x.dtype) for shape in (dout.shape, x.shape, w.shape)]
    out = BACKEND.affine_forward(x, w, None, outs[0])
    dx, dw, _ = BACKEND.affine_backward(dout, x, w, None, (True, True, False), (outs[1], outs[2], None))
    got = (out, dx, dw)
    assert all(result is given for result, given in zip(got, outs, strict=True) if given is not None)
    return got


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_keep_nan_and_infinity(rng: np.random.Generator, dtype: str, layout: str) -> None:
    """Also 0 times NaN, whichever extents are 1: there each way to multiply has a special case."""
    values = np.array([0, -0.0, 1, -2, np.nan, np.inf], dtype)
    extents = [0, 1, 2, 5]
    for n, d, m in itertools.product(extents, repeat=3):
        for _ in range(4):
            x, w, dout = (LAYOUTS[layout](rng.choice(values, shape)) for shape in ((n, d), (d, m), (n, m)))
            with np.errstate(invalid="ignore"):
                want = [(a[:, :, None] * b).sum(axis=1) for a, b in ((x, w), (dout, w.T), (x.T, dout))]
                for empty in EMPTY.values():
                    for got, wish in zip(products(x, w, dout, empty), want, strict=True):
                        np.testing.assert_array_equal(got, wish)


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize("shape", [(100, 3, 100), (101, 3, 100), (101, 1, 100), (1, 101, 100), (100, 101, 1), (3, 100, 101)], ids=str)
def test_products_of_small_integers_are_exact(rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
    n, d, m = shape
    x, w, dout = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((n, d), (d, m), (n, m)))
    for empty in EMPTY.values():
        for got, wish in zip(products(x, w, dout, empty), (x @ w, dout @ w.T, x.T @ dout), strict=True):
            np.testing.assert_array_equal(got, wish)


@pytest.mark.usefixtures("_product")
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 3, 4), (3, 1, 4), (101, 2, 100)], ids=str)
def test_products_tell_of_overflow(shape: tuple[int, int, int]) -> None:
    n, d, m = shape
    x, w, dout = (np.full(shape, 1e200) for shape in ((n, d), (d, m), (n, m)))
    nothing = (None, None, None)
    with np.errstate(over="raise"):
        with pytest.raises(FloatingPointError):
            BACKEND.affine_forward(x, w, None, None)
        for wanted in ((True, False, False), (False, True, False)):
            with pytest.raises(FloatingPointError):
                BACKEND.affine_backward(dout, x, w, None, wanted, nothing)


def test_long_operands_are_not_copied() -> None:
    """``dot`` copies what BLAS does not take as it lies."""
    long = np.broadcast_to(1.0, (1 << 22, 1))
    one = np.ones((1, 1))
    tracemalloc.start()
    try:
        assert BACKEND.affine_forward(long.T, long, None, None) == 1 << 22
        _, dw, db = BACKEND.affine_backward(long, long, one, None, (False, True, True), (None, None, None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dw == db == 1 << 22
    assert peak < long.shape[0]  # an eighth of a copy of one


def test_a_dot_that_is_silent_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numpy_backend._DOT_REPORTS == numpy_backend._dot_reports()

    class Silent(np.ndarray):
        def dot(self, b: Any, out: Any = None) -> Any:  # type: ignore[override]
            with np.errstate(over="ignore"):
                return np.asarray(self).dot(b, out)

    full = np.full
    monkeypatch.setattr(np, "full", lambda *args: full(*args).view(Silent))
    assert not numpy_backend._dot_reports()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 100, 1023, 1024, 1025])
@pytest.mark.parametrize("n", [0, 1, 31, 127, 128, 129, 255, 256, 1000, 4097])
def test_sums_of_small_integers_are_exact(rng: np.random.Generator, n: int, m: int, layout: str) -> None:
    for groups in ((), (2,)):
        a = LAYOUTS[layout](rng.integers(-8, 8, (*groups, n, m)).astype(np.float32))
        want = a.sum(axis=-2, dtype=np.float64).astype(np.float32)
        np.testing.assert_array_equal(BACKEND.bias_backward(a, None), want)
        out = np.empty((*groups, m, 2), np.float32)[..., 0]
        assert BACKEND.bias_backward(a, out) is out
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("m", [1, 3, 100])
def test_long_sums_keep_their_digits(rng: np.random.Generator, m: int) -> None:
    n = 10**6 if m < 100 else 10**5
    for a in (np.full((n, m), 0.1, np.float32), rng.random((n, m), np.float32)):
        want = a.sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(BACKEND.bias_backward(a, None), want, rtol=1e-5)


def test_overflow_is_the_callers_and_follows_errstate() -> None:
    """Underflow is nobody's: rectilinear.testing asks that of every backend."""
    with rectilinear.use_backend("numpy"):
        x = np.full((2, 2), 1e200)
        with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
            rectilinear.affine_forward(x, x, None)
        with np.errstate(all="ignore"):
            assert np.isinf(rectilinear.affine_forward(x, x, None)[0]).all()
