"""Softmax loss and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import numeric_gradient
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("label_dtype", ["int8", "uint8", "int16", "int32", "int64", "uint16"])
def test_softmax_loss(lib: Lib, rng: np.random.Generator, label_dtype: str) -> None:
    x, y = rng.standard_normal((7, 5)) * 10, np.array([0, 4, 2, 2, 1, 3, 0], label_dtype)
    loss, dx = r.softmax_loss(lib.array(x), lib.array(y))
    e = np.exp(x - x.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    assert lib.numpy(loss).shape == ()
    np.testing.assert_allclose(lib.numpy(loss), -np.log(p[np.arange(7), y]).mean(), rtol=1e-12)
    np.testing.assert_allclose(lib.numpy(dx), (p - np.eye(5)[y]) / 7, atol=1e-15)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_loss_is_stable(lib: Lib, dtype: str) -> None:
    big = float(np.finfo(dtype).max)
    x = np.array([[big, -big, 0.0], [1e4, 1e4, -1e4], [-big, -big, -big]], dtype)
    loss, dx = r.softmax_loss(lib.array(x), [0, 1, 2])
    with np.errstate(over="ignore" if lib.lazy else "warn"):  # where it computes, and warns, here
        loss, dx = lib.numpy(loss), lib.numpy(dx)
    np.testing.assert_allclose(loss, (0 + np.log(2) + np.log(3)) / 3, rtol=1e-5)
    assert np.isfinite(dx).all()
    assert loss.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mean_within_range_is_found_though_the_sum_is_not(lib: Lib, dtype: str) -> None:
    big = float(np.finfo(dtype).max) * 0.9
    with np.errstate(all="raise"):
        loss, _ = r.softmax_loss(lib.array(np.array([[big, 0.0], [big, 0.0]], dtype)), [1, 1])
    np.testing.assert_allclose(lib.numpy(loss), big, rtol=1e-6)


def test_softmax_loss_of_nothing(lib: Lib) -> None:
    no_labels: list[Any] = [lib.array(np.zeros(0, np.int64)), []]
    for labels in no_labels:
        loss, dx = r.softmax_loss(lib.array(np.zeros((0, 3), np.float32)), labels)
        assert np.isnan(lib.numpy(loss))
        assert lib.numpy(loss).dtype == np.float32
        assert lib.numpy(dx).shape == (0, 3)


def test_softmax_loss_is_a_scalar_in_numpy(numpy_lib: Lib) -> None:
    loss, _ = r.softmax_loss(numpy_lib.array(np.zeros((2, 3), np.float32)), [0, 1])
    assert type(loss) is np.float32
    loss, _ = r.softmax_loss(numpy_lib.array(np.zeros((2, 3), np.float16)), [0, 1])
    assert type(loss) is np.float16


def test_numeric_gradient_of_softmax_loss(lib: Lib, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 3)), np.array([0, 2, 1, 1])
    _, dx = r.softmax_loss(lib.array(x), lib.array(y))
    want = numeric_gradient(lambda v: float(r.softmax_loss(v, y)[0]), x)
    np.testing.assert_allclose(lib.numpy(dx), want, rtol=1e-6, atol=1e-9)
