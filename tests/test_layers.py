"""What the layer functions do in single libraries, beyond what the kit asks of every backend."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import pickle
import sys
import weakref

import numpy as np
import pytest

import rectilinear as r
from rectilinear import layers


@pytest.mark.libraries
def test_torch_results_are_outside_autograd() -> None:
    import torch

    x, w = torch.ones((2, 3), requires_grad=True), torch.ones((3, 4), requires_grad=True)
    out, cache = r.affine_relu_forward(x, w, None)
    grads = r.affine_relu_backward(torch.ones((2, 4)), cache)
    assert cache[0][0] is x
    assert not any(t.requires_grad for t in (out, *grads[:2], r.relu_forward(x)[0], r.softmax_loss(x, [0, 1])[1]))


@pytest.mark.libraries
@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_the_libraries_own_halves(rng: np.random.Generator, library: str, half: str) -> None:
    """Computed in float32 and rounded once: a sum of 1,000 halves in bfloat16 itself would stop at 256."""
    xp = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[library])
    dtype = getattr(xp, half)
    x, w = xp.ones((3, 1000), dtype=dtype), xp.ones((1000, 2), dtype=dtype)
    out, cache = r.affine_relu_forward(x, w, xp.zeros(2, dtype=dtype))
    grads = r.affine_relu_backward(xp.ones((3, 2), dtype=dtype), cache)
    loss, dx = r.softmax_loss(x, [1, 2, 3])
    for got in (out, *grads, r.relu_forward(x)[0], loss, dx):
        assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(r.to_numpy(out), np.float64), 1000)
    np.testing.assert_array_equal(np.asarray(r.to_numpy(grads[2]), np.float64), 3)


def test_capture_without_cupy_only_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the arguments are, and without holding on to them."""
    monkeypatch.delitem(sys.modules, "cupy", raising=False)

    class Odd:
        __hash__ = object.__hash__

        def __eq__(self, other: object) -> bool:
            raise ArithmeticError

    kept = r.capture(lambda *given: given[0])
    ring: list[object] = []
    ring.append(ring)
    for given in (Odd(), Odd(), ring, np.ones(2)):
        assert kept(given) is given
    odd = Odd()
    watched = weakref.ref(odd)
    kept(odd)
    del odd, given
    gc.collect()
    assert watched() is None
    for copied in (copy.deepcopy(r.capture(np.sum)), pickle.loads(pickle.dumps(r.capture(np.sum, copies=True)))):
        assert copied(np.ones(3)) == 3
    assert pickle.loads(pickle.dumps(total)) is copy.copy(total) is total
    assert copy.copy(r.capture(functools.partial(np.sum)))(np.ones(3)) == 3


@r.capture
def total(x: np.ndarray) -> float:
    return float(x.sum())


@pytest.mark.parametrize("shapes", [((4, 2, 3), (6, 5), (5,)), ((2, 4, 6), (2, 6, 5), (2, 5))], ids=["images", "stacked"])
def test_images_and_stacks_are_seen_at_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shapes: tuple[tuple[int, ...]]
) -> None:
    """With the same numbers as by the look that takes everything, which costs 10 to 30 us."""
    x, w, b = (rng.standard_normal(shape) for shape in shapes)

    def results() -> list[np.ndarray]:
        out, cache = r.affine_relu_forward(x, w, b)
        z, affine_cache = r.affine_forward(x, w, b)
        assert cache[0][0] is affine_cache[0] is x
        dx = r.affine_relu_backward(out, cache)[0]
        assert dx is not None
        assert dx.shape == x.shape
        return [out, z, *r.affine_relu_backward(out, cache), *r.affine_backward(z, affine_cache)]  # type: ignore[list-item]

    with monkeypatch.context() as patched:
        patched.setattr(layers, "resolve", lambda *arguments: pytest.fail("not seen at once"))
        at_once = results()
    monkeypatch.setattr(layers, "plain_backend", lambda *arguments, **named: None)
    for got, wanted in zip(at_once, results(), strict=True):
        np.testing.assert_array_equal(got, wanted)
