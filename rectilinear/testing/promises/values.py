"""What the layers compute: values, shapes, caches, and gradients against differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rectilinear as r
from rectilinear.testing import reference as ref
from rectilinear.testing.cases import assert_close, assert_layers_are_right, numeric_gradient, operands
from rectilinear.testing.lib import Lib

STACKS: list[tuple[int, ...]] = [(), (1,), (3,), (0,)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 6, 4), (33, 17, 31), (130, 3, 2)])
def test_affine_and_fused_values(lib: Lib, rng: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> None:
    assert_layers_are_right(lib, operands(rng, (), *shape, dtype), dtype)


@pytest.mark.parametrize("stack", STACKS)
def test_samples_of_any_shape_are_flattened(lib: Lib, rng: np.random.Generator, stack: tuple[int, ...]) -> None:
    x, w, b, dout = operands(rng, stack, 4, 24, 5)
    images = x.reshape(*stack, 4, 2, 3, 4)
    out, cache = r.affine_forward(*map(lib.array, (images, w, b)))
    assert_close(lib.numpy(out), ref.affine_forward(x, w, b))
    dx, dw, _ = r.affine_backward(lib.array(dout), cache)
    want_dx, want_dw, _ = ref.affine_backward(dout, x, w)
    assert_close(lib.numpy(dx), want_dx.reshape(images.shape))
    assert_close(lib.numpy(dw), want_dw)


@pytest.mark.smoke
@pytest.mark.parametrize("stack", STACKS)
def test_without_bias(lib: Lib, rng: np.random.Generator, stack: tuple[int, ...]) -> None:
    x, w, _, dout = operands(rng, stack, 5, 6, 4)
    out, cache = r.affine_forward(lib.array(x), lib.array(w), None)
    assert_close(lib.numpy(out), ref.affine_forward(x, w, None))
    assert cache[2] is None
    dx, dw, db = r.affine_backward(lib.array(dout), cache)
    assert db is None
    assert_close(lib.numpy(dx), ref.affine_backward(dout, x, w)[0])
    assert_close(lib.numpy(dw), ref.affine_backward(dout, x, w)[1])
    out, cache2 = r.affine_relu_forward(lib.array(x), lib.array(w), None)
    assert r.affine_relu_backward(lib.array(dout), cache2)[2] is None


def test_one_axis_means_one_feature(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = operands(rng, (), 6, 1, 3)
    out, cache = r.affine_relu_forward(lib.array(x[:, 0]), lib.array(w), lib.array(b))
    assert_close(lib.numpy(out), ref.relu(ref.affine_forward(x, w, b)))
    dx, _, _ = r.affine_backward(lib.array(dout), cache[0])
    assert lib.numpy(dx).shape == (6,)


def test_caches_hold_the_callers_own_arrays(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b = map(lib.array, operands(rng, (), 5, 6, 4)[:3])
    for cache in (r.affine_forward(x, w, b)[1], r.affine_relu_forward(x, w, b)[1][0]):
        assert cache[0] is x
        assert cache[1] is w
        assert cache[2] is b
    assert r.relu_forward(x)[1] is x


@pytest.mark.smoke
def test_plain_cs231n_caches_are_accepted(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = operands(rng, (), 5, 6, 4)
    z = ref.affine_forward(x, w, b)
    X, W, B, D, Z = map(lib.array, (x, w, b, dout, z))
    got = r.affine_relu_backward(D, ((X, W, B), Z))
    for have, want in zip(got, ref.affine_backward(np.where(z >= 0, dout, 0), x, w), strict=True):
        assert_close(lib.numpy(have), want)


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("layer", ["affine", "affine_relu"])
def test_numeric_gradients(numpy_lib: Lib, rng: np.random.Generator, layer: str, stack: tuple[int, ...]) -> None:
    forward, backward = getattr(r, f"{layer}_forward"), getattr(r, f"{layer}_backward")
    x, w, b, dout = operands(rng, stack, 3, 4, 2)
    array = numpy_lib.array
    got = backward(array(dout), forward(array(x), array(w), array(b))[1])
    want = (
        numeric_gradient(lambda v: (forward(v, w, b)[0] * dout).sum(), x),
        numeric_gradient(lambda v: (forward(x, v, b)[0] * dout).sum(), w),
        numeric_gradient(lambda v: (forward(x, w, v)[0] * dout).sum(), b),
    )
    for have, wish in zip(got, want, strict=True):
        np.testing.assert_allclose(have, wish, rtol=1e-6, atol=1e-8)


def arrays(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-30])
    return hnp.arrays(np.float64, shape, elements=values)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    n, d, m = (draw(st.integers(0, 9)) for _ in range(3))
    stack = draw(st.sampled_from([(), (1,), (2,)]))
    return tuple(draw(arrays((*stack, *shape))) for shape in ((n, d), (d, m), (m,), (n, m)))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_small_case(lib: Lib, case: tuple[Any, ...]) -> None:
    x, w, b, dout = case
    out, cache = r.affine_relu_forward(*map(lib.array, (x, w, b)))
    z = ref.affine_forward(x, w, b)
    bound = ref.affine_bound(ref.flat(x, w), w, b, w.shape[-2], "float64")
    assert (np.abs(lib.numpy(out) - ref.relu(z)) <= bound).all()
    kept = ref.keep(lib.numpy(cache[1]))
    assert (np.abs(z)[kept != ref.keep(z)] <= bound[kept != ref.keep(z)]).all()
    dz = np.where(kept, dout, 0)
    dx, dw, db = map(lib.numpy, r.affine_relu_backward(lib.array(dout), cache))
    want_dx, want_dw, want_db = ref.affine_backward(dz, x, w)
    n, m = dout.shape[-2:]
    transposed = np.swapaxes(x, -1, -2)
    assert (np.abs(dx - want_dx) <= ref.affine_bound(dz, np.swapaxes(w, -1, -2), None, m, "float64")).all()
    assert (np.abs(dw - want_dw) <= ref.affine_bound(transposed, dz, None, n, "float64")).all()
    ones = np.ones((*dz.shape[:-2], 1, n))
    assert (np.abs(db - want_db) <= ref.affine_bound(ones, dz, None, n, "float64")[..., 0, :]).all()
