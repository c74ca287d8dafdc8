"""What must not read or write memory that is not its own: odd strides, arrays that change meanwhile, first calls from many threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import rectilinear as r
from rectilinear.backends import registry

from .subprocesses import run

ODD_STRIDES = (0, -8, 24, -(1 << 40), 1 << 40)


@pytest.fixture
def numba() -> Iterator[None]:
    with r.use_backend("numba"):
        yield


def oddly(a: np.ndarray, stride: int) -> np.ndarray:
    """a, with that stride on its axes of length 1."""
    return as_strided(a, a.shape, tuple(stride if n == 1 else s for n, s in zip(a.shape, a.strides, strict=True)))


# ---------------------------------------------------------------- strides that mean nothing


@pytest.mark.parametrize("stride", ODD_STRIDES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("extents", [(3, 1, 1), (1, 5, 7), (16, 1, 13), (5, 3, 1), (1, 1, 1), (1, 40, 1), (1, 1, 70)])
def test_strides_of_axes_of_length_1_mean_nothing(numba: None, extents: tuple[int, int, int], dtype: str, stride: int) -> None:
    n, d, m = extents
    rng = np.random.default_rng(0)
    x, w, b, dout = (rng.integers(-3, 4, shape).astype(dtype) for shape in ((n, d), (d, m), (m,), (n, m)))
    odd = [oddly(a, stride) for a in (x, w, b, dout)]
    z = x @ w + b
    dz = np.where(z < 0, 0, dout)

    out, (_, keep) = r.affine_relu_forward(*odd[:3])
    assert np.array_equal(out, np.maximum(z, 0))
    mask = r.KeepMask(oddly(keep.bits, stride), keep.shape)
    for each in (keep, mask, oddly(z, stride)):
        grads = r.affine_relu_backward(odd[3], (odd[:3], each))
        assert all(np.array_equal(got, want) for got, want in zip(grads, (dz @ w.T, x.T @ dz, dz.sum(axis=0)), strict=True))
        assert np.array_equal(r.relu_backward(odd[3], each), dz)
    into = oddly(np.zeros((n, m), dtype), stride)
    assert np.array_equal(r.affine_forward(*odd[:3], out=into)[0], z)
    assert np.array_equal(r.affine_backward(odd[3], odd[:3], needs=(False, False, True))[2], dout.sum(axis=0))
    scores, (loss, dx) = np.zeros((n, m), dtype), r.softmax_loss(np.zeros((n, m), dtype), [0] * n)
    odd_loss, odd_dx = r.softmax_loss(oddly(scores, stride), oddly(np.zeros(n, int), stride))
    assert odd_loss == loss
    assert np.array_equal(odd_dx, dx)


# ---------------------------------------------------------------- arrays that change meanwhile


def test_a_pass_refuses_extents_that_do_not_fit(numba: None) -> None:
    # What `layers` has checked may have been changed by another thread by the time a pass reads it.
    backend = registry.active()
    x, w, b, dout = (np.ones(shape) for shape in ((4, 3), (3, 5), (5,), (4, 5)))
    wanted, nowhere, keep = (True, True, True), (None, None, None), np.ones((4, 5))
    other = np.ones((40, 30))
    calls = [
        lambda: backend.affine_forward(other, w, b, None),
        lambda: backend.affine_forward(x, other, b, None),
        lambda: backend.affine_forward(x, w, other[0], None),
        lambda: backend.affine_forward(x, w, b, other),
        lambda: backend.affine_backward(other, x, w, keep, wanted, nowhere),
        lambda: backend.affine_backward(dout, other, w, keep, wanted, nowhere),
        lambda: backend.affine_backward(dout, x, other, keep, wanted, nowhere),
        lambda: backend.affine_backward(dout, x, w, other, wanted, nowhere),
        lambda: backend.affine_backward(dout, x, w, None, wanted, (other, None, None)),
        lambda: backend.affine_backward(dout, x, w, None, wanted, (None, other, None)),
        lambda: backend.affine_backward(dout, x, w, None, wanted, (None, None, other[0])),
        lambda: backend.bias_backward(dout, other[0]),
        lambda: backend.relu_forward(x, other),
        lambda: backend.relu_backward(dout, other, None),
        lambda: backend.relu_backward(dout[:, ::2], other, None),
        lambda: backend.softmax_loss(x, np.zeros(3, int), None),
        lambda: backend.softmax_loss(x, np.zeros(4, int), other),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(RuntimeError, match="was changed by another thread"):
            call()
        assert (other == 1).all(), number


# ---------------------------------------------------------------- first calls under fire


@pytest.mark.parametrize("seed", [0, 4, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 5, 2))])
def test_first_calls_of_many_threads_with_a_warm_cache(seed: int) -> None:
    # Freed memory is overwritten, so that whoever still points there is seen.
    run(f"from tests.first_use import main; main({seed})", MALLOC_PERTURB_="165")


@pytest.mark.nightly  # all kernels compile
@pytest.mark.parametrize("dtypes", [("f4",), ("f4", "f8")], ids=str)
def test_first_calls_of_many_threads_with_an_empty_cache_and_a_fork(tmp_path: Path, dtypes: tuple[str, ...]) -> None:
    run(f"from tests.first_use import main; main(1, {dtypes})", limit_s=250, MALLOC_PERTURB_="165", RECTILINEAR_CACHE_DIR=str(tmp_path))
