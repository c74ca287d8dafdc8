"""What NumPy is told to do about floating-point errors does not turn right results into exceptions: underflow is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.lib import Lib

INF, NAN = np.inf, np.nan


HOW = pytest.mark.parametrize("how", ["raise", "warn"])


@contextmanager
def told(lib: Lib, how: Any) -> Iterator[Callable[[Any], Any]]:
    """NumPy told to raise or to warn, and warnings made errors; gives what makes an array of this library of an array_like."""
    with np.errstate(all=how), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda a: lib.array(np.asarray(a))


def tiny(dtype: str) -> Any:
    return np.finfo(dtype).tiny


@HOW
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_products_that_underflow(any_lib: Lib, how: str, dtype: str, size: int) -> None:
    """To a subnormal, and to 0; with and without out, forward and backward, in every function of the affine layer."""
    if not any_lib.heeds_errstate:
        return
    with told(any_lib, how) as make:
        small = np.full((size, size), tiny(dtype), dtype)
        if not any_lib.has(dtype):
            return
        for factor in (0.25, 1e-3, tiny(dtype)):
            x, w, b, dout = make(small), make(np.full((size, size), factor, dtype)), make(small[0] * 0), make(np.full_like(small, factor))
            r.affine_forward(x, w, b)
            _, cache = r.affine_relu_forward(x, w, b)
            r.affine_relu_backward(dout, cache)
            db = r.affine_backward(x, (w, x, b))[2]
            assert db is not None
            assert (r.to_numpy(db) >= 0).all()
            r.affine_backward(dout, (x, w, b), needs=(False, False, True))
            if type(x) is np.ndarray:
                out = np.empty_like(x)
                want = r.affine_forward(x, w, b)[0]
                np.testing.assert_array_equal(r.affine_forward(x, w, b, out=out)[0], want)


@HOW
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 12, 5000])
def test_relu_of_everything(any_lib: Lib, how: str, dtype: str, size: int) -> None:
    if not any_lib.heeds_errstate:
        return
    with told(any_lib, how) as make:
        values = np.array([NAN, -NAN, INF, -INF, -0.0, 0.0, 1, -1, tiny(dtype) / 8, -tiny(dtype) / 8], dtype)
        x = np.resize(values, size)
        for dout in (x, x[::-1]):
            want, kept = np.where(x < 0, 0, x), np.where(x < 0, 0, dout)
            np.testing.assert_array_equal(r.to_numpy(r.relu_forward(make(x))[0]), want)
            np.testing.assert_array_equal(r.to_numpy(r.relu_backward(make(dout), make(x))), kept)
            if type(make(x)) is np.ndarray:
                np.testing.assert_array_equal(r.relu_forward(x, out=np.empty_like(x))[0], want)
                again = dout.copy()
                np.testing.assert_array_equal(r.relu_backward(again, x, out=again), kept)


SCORES: dict[str, tuple[Any, list[int], float]] = {
    "far apart": ([[0.0, -700.0, -745.0], [0.0, 0.0, 0.0]], [0, 0], np.log(3) / 2),
    "further apart than the dtype": ([[3e38, -3e38]], [0], 0.0),
    "-inf for what is masked out": ([[0.0, -INF, 0.0]], [0], np.log(2)),
    "-inf for the label": ([[0.0, -INF]], [1], INF),
    "subnormal": ([[1e-310, -1e-310]], [0], np.log(2)),
    "one class": ([[-1e300]], [0], 0.0),
}


@HOW
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SCORES)
def test_softmax_of_scores_far_apart(any_lib: Lib, how: str, dtype: str, name: str) -> None:
    if not any_lib.heeds_errstate:
        return
    with told(any_lib, how) as make:
        scores, labels, want = SCORES[name]
        with np.errstate(all="ignore"):
            x = np.clip(scores, np.finfo(dtype).min, None).astype(dtype) if name == "one class" else np.array(scores).astype(dtype)
        loss, dx = r.softmax_loss(make(x), labels)
        np.testing.assert_allclose(np.float64(loss), want, rtol=1e-6)
        np.testing.assert_allclose(r.to_numpy(dx).sum(axis=1), 0, atol=1e-6)


@HOW
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loss_that_underflows(any_lib: Lib, how: str, dtype: str) -> None:
    """Many samples share a gradient that is nearly nothing each."""
    if not any_lib.heeds_errstate:
        return
    with told(any_lib, how) as make:
        x = np.zeros((1000, 2), dtype)
        x[:, 1] = -100.0 if dtype == "float32" else -740.0  # whose exp is subnormal
        loss, dx = r.softmax_loss(make(x), [0] * 1000)
        assert 0 <= float(loss) < 1e-30
        assert (np.abs(r.to_numpy(dx)) < 1e-30).all()
