"""The layers in JAX: the same results and gradients whichever way a call goes, and who computes it."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import reference as ref

from . import subprocesses

pytestmark = pytest.mark.libraries

LARGE = (128, 512, 512)
"""n, d, m beyond the break-even."""


@pytest.fixture
def jax() -> Any:
    import jax

    return jax


@pytest.fixture
def ours(jax: Any) -> Any:
    import rectilinear.jax

    return rectilinear.jax


@pytest.fixture
def x64(jax: Any) -> Iterator[Any]:
    """Turns 64-bit types on or off; what was is restored."""
    before = jax.config.jax_enable_x64
    yield lambda on: jax.config.update("jax_enable_x64", on)
    jax.config.update("jax_enable_x64", before)


def arguments(rng: np.random.Generator, n: int, d: int, m: int, *lead: int) -> list[np.ndarray]:
    return [rng.standard_normal((*lead, *shape)).astype(np.float32) for shape in ((n, d), (d, m), (m,))]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this way was not to be taken")


def ways(jax: Any, function: Any) -> dict[str, Any]:
    def called(*arrays: Any) -> Any:
        return function(*arrays, callback=True)

    return {"eager": function, "jit": jax.jit(function), "kernels": called, "callback": jax.jit(called)}


# ---------------------------------------------------------------- results

SHAPES = {
    "plain": ((5, 3), (3, 9), (9,)),
    "image": ((4, 2, 3), (6, 2), (2,)),
    "one axis": ((4,), (1, 2), (2,)),
    "stacked": ((2, 5, 3), (2, 3, 4), (2, 4)),
    "no bias": ((5, 3), (3, 9), None),
    "nothing": ((0, 3), (3, 2), (2,)),
    "no features": ((3, 0), (0, 2), (2,)),
    "no outputs": ((3, 2), (2, 0), (0,)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_way_gives_the_layers_results_and_gradients(jax: Any, ours: Any, rng: np.random.Generator, shapes: Any) -> None:
    x, w, b = (None if shape is None else rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    z = ref.affine_forward(x, w, b)
    dout = rng.standard_normal(z.shape).astype(np.float32)
    wanted = [ref.relu(z), *ref.affine_backward(np.where(z < 0, 0, dout), x, w)]
    for way, call in ways(jax, ours.affine_relu).items():
        out, back = jax.vjp(call, x, w, b)
        got = [out, *back(dout)]
        assert (got.pop() is None) if b is None else True, way
        for mine, theirs in zip(got, wanted, strict=b is not None):
            assert isinstance(mine, jax.Array), way
            assert mine.dtype == np.float32, way
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=way)


@pytest.mark.parametrize("shapes", [SHAPES["image"], SHAPES["stacked"]], ids=["image", "stacked"])
def test_every_way_without_relu(jax: Any, ours: Any, rng: np.random.Generator, shapes: Any) -> None:
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    z = ref.affine_forward(x, w, b)
    dout = rng.standard_normal(z.shape).astype(np.float32)
    for way, call in ways(jax, ours.affine).items():
        np.testing.assert_allclose(call(x, w, b), z, rtol=1e-5, atol=1e-5, err_msg=way)
        for mine, theirs in zip(jax.vjp(call, x, w, b)[1](dout), ref.affine_backward(dout, x, w), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=way)


@pytest.mark.parametrize("on", [False, True])
def test_dtypes_are_those_that_jax_promotes_to(jax: Any, ours: Any, x64: Any, on: bool) -> None:
    x64(on)
    jnp = jax.numpy
    largest = "float64" if on else "float32"
    cases = [
        ("float64", "float64", largest),
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "bfloat16", "float32"),
        ("int32", "float16", "float16"),
        ("int8", "int8", largest),
    ]
    for of_x, of_w, wanted in cases:
        x, w = np.ones((2, 3), jnp.dtype(of_x)), np.ones((3, 2), jnp.dtype(of_w))
        for way, call in ways(jax, ours.affine_relu).items():
            assert str(jax.eval_shape(call, x, w, None).dtype) == wanted, (of_x, of_w, way)
        assert str(ours.affine(x, w, callback=True).dtype) == wanted
    weak = jnp.full((2, 3), 1.0)
    assert weak.aval.weak_type
    for way, call in ways(jax, ours.affine).items():
        out = call(weak, jnp.ones((3, 2), jnp.bfloat16), None)
        assert (out.dtype, out.aval.weak_type) == (jnp.bfloat16, False), way


def test_16_bit_types_are_rounded_once(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    import ml_dtypes

    x, w, b = (a.astype(ml_dtypes.bfloat16) for a in arguments(rng, 16, 300, 8))
    exact = ref.affine_forward(x, w, b)
    for way, call in ways(jax, ours.affine).items():
        np.testing.assert_allclose(np.asarray(call(x, w, b), np.float64), exact, rtol=2**-8, atol=1e-4, err_msg=way)


def test_relu_keeps_what_is_not_negative_and_so_does_its_gradient(jax: Any, ours: Any) -> None:
    x = np.array([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf, np.nan], np.float32)
    dout = np.array([np.nan, np.inf, 3.0, 4.0, 5.0, 6.0, 7.0], np.float32)
    eye, zero = np.eye(1, dtype=np.float32), np.zeros(1, np.float32)
    through = {way: lambda x, call=call: call(x, eye, zero) for way, call in ways(jax, ours.affine_relu).items()}
    for way, call in {"relu": ours.relu, "jit": jax.jit(ours.relu)}.items() | through.items():
        out, back = jax.vjp(call, x)
        np.testing.assert_array_equal(np.ravel(out), [0, 0, -0.0, 0, 2, np.inf, np.nan], err_msg=way)
        np.testing.assert_array_equal(np.ravel(back(dout.reshape(out.shape))[0]), [0, 0, 3, 4, 5, 6, 7], err_msg=way)
    assert np.signbit(ours.relu(x)[2])
    tangent = jax.jvp(ours.relu, (x,), (dout,))[1]
    np.testing.assert_array_equal(tangent, [0, 0, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(ours.relu)))(x), np.zeros(7))


def test_checkpoint_and_forward_mode(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    args = arguments(rng, 6, 5, 4)
    want = jax.jit(jax.grad(lambda *a: ours.affine_relu(*a).sum(), (0, 1, 2)))(*args)
    for way in ("jit", "callback"):
        call = jax.checkpoint(ways(jax, ours.affine_relu)[way])
        got = jax.jit(jax.grad(lambda *a, call=call: call(*a).sum(), (0, 1, 2)))(*args)
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    tangents = arguments(rng, 6, 5, 4)
    forward = jax.jvp(jax.jit(ours.affine_relu), args, tangents)[1]
    np.testing.assert_allclose(forward.sum(), sum(map(np.vdot, want, tangents)), rtol=1e-4)  # <J t, 1> = <t, J^T 1>


@pytest.mark.parametrize("lead", [(), (2,)], ids=["plain", "stacked"])
@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0)], ids=["x", "w", "b"])
def test_vmap_of_a_callback(jax: Any, ours: Any, rng: np.random.Generator, axes: Any, lead: Any) -> None:
    """Of results and gradients, each alone and summed; and two of them, one in the other."""
    single = arguments(rng, 5, 4, 3, *lead)
    args = [a if axis is None else np.stack([a, 2 * a, a - 1]) for a, axis in zip(single, axes, strict=True)]

    def everything(call: Any, x: Any, w: Any, b: Any) -> Any:
        def loss(*args: Any) -> Any:
            return jax.numpy.sin(call(*args)).sum()

        each = jax.vmap(jax.grad(loss, (0, 1, 2)), axes)(x, w, b)
        summed = jax.grad(lambda *a: jax.vmap(loss, axes)(*a).sum(), (0, 1, 2))(x, w, b)
        twice = jax.vmap(jax.vmap(call, axes), (None, 0, None))(x, jax.numpy.stack([w, -w]), b)
        return jax.vmap(call, axes)(x, w, b), each, summed, twice

    both = [jax.jit(everything, static_argnums=0)(ways(jax, ours.affine_relu)[way], *args) for way in ("eager", "kernels")]
    for mine, theirs in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- who computes


def test_nothing_traced_leaves_jax(jax: Any, ours: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_on_kernels", refuse)
    monkeypatch.setattr(jax, "pure_callback", refuse)
    args = list(map(jax.numpy.asarray, arguments(rng, *LARGE)))
    with pytest.raises(AssertionError, match="this way"):
        ours.affine_relu(*args)
    jax.jit(ours.affine_relu)(*args)
    jax.vmap(ours.affine_relu, (0, None, None))(args[0][None], *args[1:])
    jax.jvp(ours.affine_relu, args, args)
    jax.grad(lambda w: ours.affine_relu(args[0], w, args[2]).sum())(args[1])


def test_what_no_tracer_comes_to_is_a_constant_of_the_trace(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    args = list(map(jax.numpy.asarray, arguments(rng, *LARGE)))
    traced = jax.make_jaxpr(lambda scale: ours.affine(*args) * scale)(2.0)
    assert "dot_general" not in str(traced)
    got = jax.jit(lambda scale: ours.affine(*args) * scale)(2.0)
    np.testing.assert_allclose(got, 2 * ref.affine_forward(*args), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["affine_forward", "relu_forward", "affine_relu_forward"])
def test_large_eager_calls_go_to_the_kernels_without_a_copy(
    jax: Any, ours: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, met = getattr(r.layers, name), {}

    def look(*arrays: Any, out: Any) -> Any:
        met["in"] = [array.ctypes.data for array in arrays]
        met["out"] = out.ctypes.data
        return real(*arrays, out=out)

    monkeypatch.setattr(r.layers, name, look)
    args = list(map(jax.numpy.asarray, arguments(rng, *LARGE)))
    if name == "relu_forward":
        args = [jax.numpy.asarray(rng.standard_normal((4096, 1024)), "float32")]
    out = getattr(ours, name.removesuffix("_forward"))(*args)
    assert met == {"in": [array.unsafe_buffer_pointer() for array in args], "out": out.unsafe_buffer_pointer()}
    # XLA may write into what is donated to it; the array is then gone, and what was computed right.
    want = np.array(out) + 1
    np.testing.assert_array_equal(jax.jit(lambda a: a + 1, donate_argnums=0)(out), want)
    with pytest.raises(RuntimeError, match="deleted"):
        ours.relu(out)


def test_the_rest_is_jaxs_own(jax: Any, ours: Any, x64: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_on_kernels", refuse)
    x64(False)
    x, w, b = map(jax.numpy.asarray, arguments(rng, *LARGE))
    ours.affine(x[:8], w, b)  # few rows
    ours.affine(x, w[:, :8], b[:8])  # little work
    ours.affine(x.astype("bfloat16"), w, b)  # several types
    ours.relu(x)
    with r.use_backend("numpy"):
        ours.affine(x, w, b)


def test_a_kernel_waits_for_what_it_reads(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    """JAX returns before it has computed."""
    x, w, b = map(jax.numpy.asarray, arguments(rng, *LARGE))
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, a: jax.numpy.tanh(a @ w), x))
    pending = slow(x)
    got = ours.affine(pending, w, b)
    np.testing.assert_allclose(got, ref.affine_forward(slow(x), w, b), rtol=1e-4, atol=1e-3)


def test_a_gradient_that_nobody_wants_is_not_called_for(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    def loss(w: Any, x: Any) -> Any:
        return ours.affine_relu(x, w, callback=True).sum()

    x, w, _ = arguments(rng, 6, 5, 4)
    for wanted, calls in ((0, 2), ((0, 1), 3)):  # one of them forward
        text = jax.jit(jax.grad(loss, wanted)).lower(w, x).compile().as_text()
        assert text.count(" custom-call(") == calls


def test_callbacks_end_on_one_core_and_on_two() -> None:
    """A callback that computes in JAX waits for the threads that wait for it: with one core it is still doing so a minute later."""
    code = """
    import os
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])
    import jax
    from rectilinear import jax as ours

    @jax.jit
    def train(w):
        def loss(w):
            side_by_side = sum(ours.affine_relu(x * i, w, callback=True) for i in range(4))
            return ours.affine_relu(side_by_side, w, callback=True).sum()
        return jax.lax.scan(lambda w, _: (w - 1e-9 * jax.grad(loss)(w), None), w, None, length=5)[0]

    x = jax.numpy.ones((200, 200))
    for _ in range(5):
        w = train(x)
        last = jax.numpy.tanh(w @ x)  # behind it in the queue
    print(last.block_until_ready().shape)
    """
    started = [subprocesses.start(code.format(cores=cores), JAX_PLATFORMS="cpu") for cores in (1, 2)]
    for process in started:
        assert subprocesses.finish(process, limit_s=60) == "(200, 200)\n"


def test_sharded_arrays_stay_in_jax() -> None:
    code = """
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from rectilinear import jax as ours

    ours._on_kernels = None
    mesh = Mesh(np.array(jax.devices()), ("d",))
    x = jax.device_put(np.ones((256, 1024), "f4"), NamedSharding(mesh, P("d", None)))
    w = jax.device_put(np.ones((1024, 256), "f4"), NamedSharding(mesh, P()))
    print(len(ours.affine(x, w).sharding.device_set))
    print(ours.affine(np.asarray(x), np.asarray(w)).committed)
    """
    flags = "--xla_force_host_platform_device_count=2"
    assert subprocesses.run(code, JAX_PLATFORMS="cpu", XLA_FLAGS=flags).split() == ["2", "False"]


# ---------------------------------------------------------------- errors


def test_errors_are_those_of_the_layer_functions_while_tracing_too(jax: Any, ours: Any) -> None:
    x, w, b = np.ones((4, 3), np.float32), np.ones((3, 2), np.float32), np.ones(2, np.float32)
    for args in ((x, w[:2], b), (x, w, b[:1]), (x[0, 0], w, b), (x, w[0], b), (x, w[None], b)):
        with pytest.raises(r.ShapeError) as wanted:
            r.affine_forward(*map(np.asarray, args))
        for call in ways(jax, ours.affine).values():
            with pytest.raises(r.ShapeError) as met:
                call(*args)
            assert str(met.value) == str(wanted.value)
    with pytest.raises(r.DTypeError, match=r"x complex\d+, w float32"):
        ours.affine(x.astype(complex), w)
    with pytest.raises(r.DTypeError, match="x has dtype float128, which JAX has not"):
        ours.affine(x.astype(np.longdouble), w)
    with pytest.raises(TypeError, match=r"x is of type list, .* pass jax\.numpy\.asarray\(x\)"):
        ours.relu([1.0])
    with pytest.raises(TypeError, match=r"w is of type NoneType"):
        ours.affine(x, None, b)
    with pytest.raises(TypeError, match=r"pass jax\.numpy\.asarray\(x\.filled\(0\)\)"):
        ours.affine(np.ma.ones((4, 3)), w, b)


def test_what_a_callback_does_not_do_is_refused(jax: Any, ours: Any, rng: np.random.Generator) -> None:
    x, w, b = arguments(rng, 6, 5, 4)
    call = ways(jax, ours.affine)["kernels"]
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda x: call(x, w, b), (x,), (x,))
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.hessian(lambda x: jax.numpy.sin(call(x, w, b)).sum())(x)


# ---------------------------------------------------------------- the page


def test_the_page_and_the_docstrings_say_what_happens(ours: Any, x64: Any) -> None:
    x64(False)
    page = Path(__file__).parents[1] / "docs" / "jax.md"
    for failed, tried in (doctest.testmod(ours), doctest.testfile(str(page), module_relative=False)):
        assert tried
        assert not failed
