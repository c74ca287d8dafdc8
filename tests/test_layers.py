"""What the layer functions compute, on every backend and library: values, shapes, dtypes, aliasing, gradients."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rectilinear as r

from . import reference as ref
from .conftest import Lib

SHAPES = [(1, 1, 1), (5, 6, 4), (0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 64, 10), (33, 17, 31), (130, 3, 2)]
STACKS: list[tuple[int, ...]] = [(), (1,), (3,), (0,)]


def operands(rng: np.random.Generator, stack: tuple[int, ...], n: int, d: int, m: int, dtype: str = "float64") -> tuple[Any, Any, Any, Any]:
    made = (rng.standard_normal((*stack, *shape)) for shape in ((n, d), (d, m), (m,), (n, m)))
    x, w, b, dout = (a.astype(dtype) for a in made)
    return x, w, b, dout


def assert_close(got: Any, want: Any, dtype: str = "float64") -> None:
    tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_and_fused_values(
    lib: Lib, rng: np.random.Generator, shape: tuple[int, int, int], stack: tuple[int, ...], dtype: str
) -> None:
    x, w, b, dout = operands(rng, stack, *shape, dtype)
    X, W, B, D = map(lib.array, (x, w, b, dout))

    out, cache = r.affine_forward(X, W, B)
    dx, dw, db = r.affine_backward(D, cache)
    for got, want in zip((out, dx, dw, db), (ref.affine_forward(x, w, b), *ref.affine_backward(dout, x, w)), strict=True):
        assert lib.owns(got)
        assert lib.numpy(got).dtype == dtype
        assert_close(lib.numpy(got), want, dtype)

    out, cache = r.affine_relu_forward(X, W, B)
    assert_close(lib.numpy(out), ref.relu(ref.affine_forward(x, w, b)), dtype)
    # Backward is compared with the keep-set that the forward chose: a z that rounds to the other side of 0 is no error.
    kept = ref.keep(lib.numpy(cache[1]))
    for got, want in zip(r.affine_relu_backward(D, cache), ref.affine_backward(np.where(kept, dout, 0), x, w), strict=True):
        assert lib.owns(got)
        assert lib.numpy(got).dtype == dtype
        assert_close(lib.numpy(got), want, dtype)
    assert_close(lib.numpy(r.relu_backward(D, cache[1])), np.where(kept, dout, 0), dtype)


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


def test_one_axis_means_one_feature(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = operands(rng, (), 6, 1, 3)
    out, cache = r.affine_relu_forward(lib.array(x[:, 0]), lib.array(w), lib.array(b))
    assert_close(lib.numpy(out), ref.relu(ref.affine_forward(x, w, b)))
    dx, _, _ = r.affine_backward(lib.array(dout), cache[0])
    assert lib.numpy(dx).shape == (6,)


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


EDGES = [np.nan, -np.nan, 0.0, -0.0, np.inf, -np.inf, 5e-324, -5e-324, 1.0, -1.0, 2.5e-308, -2.5e-308]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_at_the_edges(lib: Lib, dtype: str) -> None:
    info = np.finfo(dtype)
    normal = float(info.smallest_normal)
    x = np.array([*(e for e in EDGES if abs(e) > 1e-300 or e == 0 or e != e), normal, -normal], dtype)
    out, cache = r.relu_forward(lib.array(x))
    got = lib.numpy(out)
    want = np.where(x < 0, np.zeros((), dtype), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[x == 0]), np.signbit(x[x == 0]))  # -0.0 stays -0.0
    for upstream in (np.nan, np.inf, 1.0):
        dx = lib.numpy(r.relu_backward(lib.array(np.full_like(x, upstream)), cache))
        np.testing.assert_array_equal(dx, np.where(x < 0, 0, upstream).astype(dtype))
        assert not np.signbit(dx[x < 0]).any()


def test_subnormals(lib: Lib) -> None:
    """Kept or dropped by sign; a library that flushes them may count a negative one as 0 and keep it (JAX on CPU does)."""
    x = np.array([5e-324, -5e-324])
    flushes = lib.name == "jax"
    passed = lib.numpy(r.relu_backward(lib.array(np.ones(2)), lib.array(x)))
    assert passed[0] == 1
    assert passed[1] in ((0, 1) if flushes else (0,))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
def test_relu_takes_any_shape(lib: Lib, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, dout = rng.standard_normal(shape), rng.standard_normal(shape)
    out, cache = r.relu_forward(lib.array(x))
    assert lib.owns(out)
    np.testing.assert_array_equal(lib.numpy(out), ref.relu(x))
    np.testing.assert_array_equal(lib.numpy(r.relu_backward(lib.array(dout), cache)), np.where(x < 0, 0, dout))


@pytest.mark.parametrize("kind", ["bool", "int8", "int64", "uint8"])
def test_a_bool_or_integer_relu_cache_is_an_x(lib: Lib, kind: str) -> None:
    x = np.array([-3, 0, 5]).astype(kind)
    dx = lib.numpy(r.relu_backward(lib.array(np.array([1.0, 2.0, 3.0])), lib.array(x)))
    np.testing.assert_array_equal(dx, np.where(x < 0, 0, [1.0, 2.0, 3.0]))


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
    with np.errstate(over="ignore" if lib.name == "dask" else "warn"):  # dask computes, and warns, here
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
    for labels in (lib.array(np.zeros(0, np.int64)), []):
        loss, dx = r.softmax_loss(lib.array(np.zeros((0, 3), np.float32)), labels)
        assert np.isnan(lib.numpy(loss))
        assert lib.numpy(loss).dtype == np.float32
        assert lib.numpy(dx).shape == (0, 3)


def test_softmax_loss_is_a_scalar_in_numpy(numpy_lib: Lib) -> None:
    loss, _ = r.softmax_loss(numpy_lib.array(np.zeros((2, 3), np.float32)), [0, 1])
    assert type(loss) is np.float32
    loss, _ = r.softmax_loss(numpy_lib.array(np.zeros((2, 3), np.float16)), [0, 1])
    assert type(loss) is np.float16


# ---------------------------------------------------------------- gradients against differences


def numeric_gradient(f: Any, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (f(up) - f(down)) / (2 * h)
    return gradient


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


def test_numeric_gradient_of_softmax_loss(lib: Lib, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 3)), np.array([0, 2, 1, 1])
    _, dx = r.softmax_loss(lib.array(x), lib.array(y))
    want = numeric_gradient(lambda v: float(r.softmax_loss(v, y)[0]), x)
    np.testing.assert_allclose(lib.numpy(dx), want, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- properties


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
    signs = np.asarray(cache[1])
    for got, want in zip(r.affine_relu_backward(dout, cache), ref.affine_backward(np.where(signs < 0, 0, dout), x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4 if dtype == "float32" else 1e-12, atol=1e-4 if dtype == "float32" else 1e-12)
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


# ---------------------------------------------------------------- dtypes


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
    if lib.name == "strict" and "float16" in (x_dtype, w_dtype):
        with pytest.raises(TypeError):  # the standard has no float16: the library refuses to make such an array
            lib.array(np.ones(2, "float16"))
        return
    want = "float32" if want == "default" and lib.name == "torch" else "float64" if want == "default" else want
    x, w, b = np.ones((3, 2), x_dtype), np.ones((2, 4), w_dtype), np.ones(4, w_dtype)
    out, cache = r.affine_relu_forward(lib.array(x), lib.array(w), lib.array(b))
    assert lib.numpy(out).dtype == want
    np.testing.assert_array_equal(lib.numpy(out), 3)
    for gradient in r.affine_relu_backward(lib.array(np.ones((3, 4), want)), cache):
        assert lib.numpy(gradient).dtype == want
    assert lib.numpy(r.relu_forward(lib.array(x))[0]).dtype == (x_dtype if "float" in x_dtype else default_float(lib))


def default_float(lib: Lib) -> str:
    return "float32" if lib.name == "torch" else "float64"


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
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=2e-2, atol=2e-2)


def test_a_half_that_rounds_to_zero_is_kept_by_forward_and_backward_alike(numpy_lib: Lib) -> None:
    """z = -1e-9 is -0.0 in float16: kept by both, or dropped by both."""
    x, w = np.full((1, 1), 1e-4, np.float16), np.full((1, 1), -1e-5, np.float16)
    out, cache = r.affine_relu_forward(x, w, None)
    assert out == 0
    assert np.signbit(out[0, 0]) == (r.relu_backward(np.ones((1, 1), np.float16), cache[1])[0, 0] == 1)


# ---------------------------------------------------------------- results


@pytest.mark.smoke
def test_results_are_fresh(numpy_lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = map(numpy_lib.array, operands(rng, (), 5, 6, 4))
    out, cache = r.affine_relu_forward(x, w, b)
    dx, dw, db = r.affine_relu_backward(dout, cache)
    relu = r.relu_forward(x)[0]
    results = [out, dx, dw, db, relu, r.relu_backward(dout, cache[1]), r.softmax_loss(x, [0] * 5)[1]]
    for i, a in enumerate(results):
        assert type(a) is np.ndarray
        assert a.flags.writeable
        for other in [x, w, b, dout, *results[:i], *([cache[1]] if isinstance(cache[1], np.ndarray) else [])]:
            assert not np.shares_memory(a, other)


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
