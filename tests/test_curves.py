"""One training, the same in every array library: 1,000 float64 steps on the handwritten digits.

Rounding differs between libraries, and a training may amplify it. At a learning rate of 0.1 this one is unstable and does:
one rounding grows to 1e-3 within the 1,000 steps. At 0.02 it is stable, and curves that agree to 1e-10 say that every layer
computes the same thing. They say so only if each library did its own work, so every array that goes into a layer's cache,
out of the layer, or into its parameters is asserted to be of the library.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import rectilinear
from rectilinear.nn import SGD, Affine, AffineReLU, Layer, ReLU, Sequential, SoftmaxCrossEntropy

STEPS, BATCH = 1000, 32


def library(array: object) -> str:
    return type(array).__module__.partition(".")[0].removesuffix("lib")


def arrays_in(cache: object) -> list[object]:
    if isinstance(cache, tuple):
        return [array for part in cache for array in arrays_in(part)]
    return [] if cache is None else [cache]


def watch(layer: Layer, home: str) -> None:
    """Have the layer assert, at every step, that what it returns and keeps is of the library and float64."""
    forward, backward = layer.forward, layer.backward

    def check(where: str, *arrays: object) -> None:
        for array in arrays:
            assert library(array) == home, f"{layer}.{where}"
            assert str(array.dtype).endswith("float64"), f"{layer}.{where}"

    def watched_forward(x):
        out = forward(x)
        check("forward", out, *arrays_in(layer._cache))
        return out

    def watched_backward(dout, *, need_dx=True):
        dx = backward(dout, need_dx=need_dx)
        check("backward", dout, *([] if dx is None else [dx]), *layer.grads.values(), *layer.params.values())
        return dx

    layer.forward, layer.backward = watched_forward, watched_backward


def curve(xp, home: str) -> np.ndarray:
    """The loss of every step of a net with fused and composed layers."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.data / 16, digits.target
    rng = np.random.default_rng(0)
    where = {"rng": rng, "dtype": "float64", "xp": xp}
    net = Sequential(AffineReLU(64, 48, **where), Affine(48, 32, **where), ReLU(), Affine(32, 10, **where))
    for layer in net.layers:
        watch(layer, home)
    criterion, optimizer, losses = SoftmaxCrossEntropy(), SGD(net, lr=0.02, momentum=0.9, weight_decay=1e-4), []
    with threadpool_limits(1):  # on products this small, threads wait for one another longer than they work
        for _ in range(STEPS):
            batch = rng.choice(len(x), BATCH, replace=False)
            loss = criterion.forward(net.forward(x[batch]), y[batch])
            assert library(loss) == home
            net.backward(criterion.backward())
            optimizer.step()
            losses.append(float(loss))
    return np.array(losses)


@pytest.fixture(scope="module")
def numpy_curve() -> np.ndarray:
    with rectilinear.use_backend("numpy"):
        return curve(np, "numpy")


def test_numpy_curve_is_of_a_training_that_works(numpy_curve):
    assert numpy_curve[:50].mean() > 1 > 0.05 > numpy_curve[-50:].mean()


@pytest.mark.parametrize(
    "module",
    [
        "array_api_strict",
        pytest.param("torch", marks=pytest.mark.libraries),
        pytest.param("jax.numpy", marks=[pytest.mark.libraries, pytest.mark.nightly]),  # half a minute
    ],
)
def test_curve_in_another_library(module, numpy_curve):
    xp, home = importlib.import_module(module), module.partition(".")[0]
    with float64(home):
        found = curve(xp, home)
    np.testing.assert_allclose(found, numpy_curve, rtol=1e-10, atol=0)


@contextmanager
def float64(home: str):
    """JAX has float64 only when told."""
    if home != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
