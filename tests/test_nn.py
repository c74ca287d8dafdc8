"""Layer objects: they call the layer functions and keep what lies between, wherever their parameters lie."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import rectilinear
from rectilinear import DTypeError, ShapeError, layers
from rectilinear.backends import registry
from rectilinear.backends.numpy_backend import NumpyBackend
from rectilinear.nn import SGD, Affine, AffineReLU, ReLU, SoftmaxCrossEntropy

from .nets import OTHER_LIBRARIES, brought, layouts, library, namespace, net_of, read_only


@pytest.fixture(params=[None, *OTHER_LIBRARIES])
def xp(request):
    return namespace(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---------------------------------------------------------------- layers are the functions


@pytest.mark.parametrize(
    ("layer_class", "forward", "backward"),
    [(Affine, layers.affine_forward, layers.affine_backward), (AffineReLU, layers.affine_relu_forward, layers.affine_relu_backward)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_affine_layers_are_their_functions(layer_class, forward, backward, bias, rng):
    layer = layer_class(6, 4, rng=rng, bias=bias, dtype="float64")
    if bias:
        layer.params["b"] = rng.standard_normal(4)
    x, dout = read_only(rng.standard_normal((5, 2, 3))), read_only(rng.standard_normal((5, 4)))
    out, cache = forward(x, layer.params["w"], layer.params.get("b"))
    dx, dw, db = backward(dout, cache)
    np.testing.assert_array_equal(layer.forward(x), out)
    np.testing.assert_array_equal(layer.backward(dout), dx)
    np.testing.assert_array_equal(layer.grads["w"], dw)
    assert list(layer.grads) == list(layer.params) == (["w", "b"] if bias else ["w"])
    if bias:
        np.testing.assert_array_equal(layer.grads["b"], db)


def test_relu_is_its_function(rng):
    x, dout = rng.standard_normal((5, 4)), rng.standard_normal((5, 4))
    x[0, 0] = 0.0
    layer = ReLU()
    np.testing.assert_array_equal(layer.forward(x), layers.relu_forward(x)[0])
    np.testing.assert_array_equal(layer.backward(dout), layers.relu_backward(dout, x))
    assert layer.params == layer.grads == {}
    assert layer.backward(dout, need_dx=False) is None


def test_backward_overwrites_the_gradients(rng):
    layer = Affine(3, 2, rng=rng)
    layer.forward(np.ones((4, 3), "f4"))
    layer.backward(np.ones((4, 2), "f4"))
    layer.backward(np.full((4, 2), 2, "f4"))
    np.testing.assert_array_equal(layer.grads["b"], np.full(2, 8, "f4"))


@pytest.mark.parametrize("layer", [ReLU(), Affine(2, 2, rng=np.random.default_rng(0)), SoftmaxCrossEntropy()])
def test_backward_needs_a_forward(layer):
    name = type(layer).__name__
    with pytest.raises(RuntimeError, match=f"^{name}.backward: no forward to go back from; call forward first$"):
        layer.backward(*(() if name == "SoftmaxCrossEntropy" else (np.ones((1, 2)),)))


def test_whole_net_against_differences(rng):
    net, loss = net_of(rng, dtype="float64"), SoftmaxCrossEntropy()
    for _, layer in net.leaves():
        if "b" in layer.params:
            layer.params["b"] = rng.standard_normal(layer.params["b"].shape)
    x, y, h = rng.standard_normal((7, 6)), rng.integers(3, size=7), 1e-6
    loss.forward(net.forward(x), y)
    dx = net.backward(loss.backward(), need_dx=True)
    for values, gradient in [(x, dx), *((net.params[name], net.grads[name]) for name in net.params)]:
        for index in np.ndindex(values.shape):
            kept = values[index]
            sides = []
            for step in (h, -h):
                values[index] = kept + step
                sides.append(loss.forward(net.forward(x), y))
            values[index] = kept
            assert gradient[index] == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-8)


# ---------------------------------------------------------------- initialisation


def test_weights_are_he_normal_and_biases_zero(rng):
    layer = Affine(400, 300, rng=rng)
    w = layer.params["w"]
    assert w.dtype == np.float32
    assert np.std(w) == pytest.approx(np.sqrt(2 / 400), rel=0.02)  # 120,000 draws: standard error 0.2 %
    assert abs(np.mean(w)) < 5 * np.sqrt(2 / 400 / w.size)
    np.testing.assert_array_equal(layer.params["b"], np.zeros(300, "f4"))


def test_equal_seeds_give_equal_weights_everywhere(xp):
    here = Affine(3, 2, rng=np.random.default_rng(0), dtype="float32")
    there = Affine(3, 2, rng=np.random.default_rng(0), dtype="float32", xp=xp)
    np.testing.assert_array_equal(rectilinear.to_numpy(there.params["w"]), here.params["w"])
    precise = Affine(3, 2, rng=np.random.default_rng(0), dtype="float64")
    np.testing.assert_array_equal(precise.params["w"].astype("f4"), here.params["w"])


def test_one_generator_serves_layer_after_layer():
    rng = np.random.default_rng(0)
    assert not np.array_equal(Affine(3, 2, rng=rng).params["w"], Affine(3, 2, rng=rng).params["w"])


def test_layer_without_inputs_or_outputs(rng):
    assert Affine(0, 2, rng=rng).forward(np.ones((3, 0))).shape == (3, 2)
    assert Affine(2, 0, rng=rng).forward(np.ones((3, 2))).shape == (3, 0)


def test_generator_is_explicit():
    with pytest.raises(TypeError, match=r"^Affine: rng is 0, wanted a numpy\.random\.Generator, as numpy\.random\.default_rng"):
        Affine(3, 2, rng=0)


@pytest.mark.parametrize("dtype", [np.float64, float, "f8", np.dtype("f8"), "float64"])
def test_a_dtype_may_be_given_as_numpy_takes_it(dtype, rng):
    assert Affine(3, 2, rng=rng, dtype=dtype).params["w"].dtype == np.float64


@pytest.mark.parametrize("extents", [(2.0, 3), (-2, 3), ("2", 3), (2, None), (True, 3)])
def test_extents_are_whole_numbers(extents, rng):
    with pytest.raises(ValueError, match=r"Affine: n_(in|out) is .*, wanted a whole number, 0 or more"):
        Affine(*extents, rng=rng)
    assert Affine(np.int64(2), np.int32(3), rng=rng).params["w"].shape == (2, 3)


def test_a_device_is_one_of_a_library(rng):
    with pytest.raises(ValueError, match="device is 'cuda', and xp is not given"):
        Affine(2, 3, rng=rng, device="cuda")


def test_a_layer_with_stacked_parameters_shows_itself(rng):
    layer = Affine(4, 3, rng=rng)
    assert repr(layer) == "Affine(4, 3)"
    layer.params.update(w=np.ones((5, 4, 3), "f4"), b=np.ones((5, 3), "f4"))
    assert repr(layer) == "Affine(4, 3, stacked 5 times)"


@pytest.mark.parametrize("dtype", ["int32", "complex64", np.longdouble, "bfloat16", None])
def test_parameters_are_floating(dtype, rng):
    with pytest.raises(DTypeError, match="wanted 'float16', 'float32' or 'float64'"):
        Affine(3, 2, rng=rng, dtype=dtype)


@pytest.mark.libraries
def test_float64_in_a_jax_that_has_none(rng):
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False), pytest.raises(DTypeError, match="jax_enable_x64"):
        Affine(3, 2, rng=rng, dtype="float64", xp=jax.numpy)


# ---------------------------------------------------------------- where parameters lie, and what comes to them


def test_everything_stays_with_the_parameters(xp, rng):
    net, loss = net_of(rng, xp), SoftmaxCrossEntropy()
    optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.01)
    x, y = read_only(rng.standard_normal((4, 2, 3)).astype("f4")), read_only(np.array([0, 2, 1, 0]))
    home = "numpy" if xp is None else xp.__name__.partition(".")[0]
    for _ in range(2):
        value = loss.forward(net.forward(x), y)
        dx = net.backward(loss.backward(), need_dx=True)
        optimizer.step()
        arrays = [dx, loss.backward(), *net.params.values(), *net.grads.values(), *optimizer.velocity.values(), value]
        assert {library(array) for array in arrays} == {home}
        assert {str(array.dtype).rpartition(".")[2] for array in arrays} == {"float32"}


def test_same_steps_as_numpy(xp, rng):
    x, y, trained = rng.standard_normal((4, 6)), [0, 2, 1, 0], []
    for home in (None, xp):
        net, loss = net_of(np.random.default_rng(0), home), SoftmaxCrossEntropy()
        optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(5):
            loss.forward(net.forward(x), y)
            net.backward(loss.backward())
            optimizer.step()
        trained.append(net.state_dict())
    for name, values in trained[0].items():
        np.testing.assert_allclose(trained[1][name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int64", "bool"])
def test_inputs_are_cast_to_the_layers_dtype(dtype, xp, rng):
    layer = Affine(3, 2, rng=rng, xp=xp)
    x = read_only((rng.standard_normal((4, 3)) > 0).astype(dtype))
    out = layer.forward(x)
    layer.backward(np.ones((4, 2)))
    assert {str(a.dtype).rpartition(".")[2] for a in (out, *layer.grads.values())} == {"float32"}
    np.testing.assert_allclose(rectilinear.to_numpy(out), x.astype("f4") @ rectilinear.to_numpy(layer.params["w"]), rtol=1e-6)


def test_input_of_another_library_comes_home(xp, rng):
    strict = pytest.importorskip("array_api_strict")
    layer = Affine(3, 2, rng=rng, xp=xp)
    x = rng.standard_normal((4, 3)).astype("f4")
    np.testing.assert_array_equal(rectilinear.to_numpy(layer.forward(strict.asarray(x))), rectilinear.to_numpy(layer.forward(x)))


def test_input_on_another_device_comes_home(rng):
    strict = pytest.importorskip("array_api_strict")
    far = strict.Device("device1")
    layer = Affine(3, 2, rng=rng, xp=strict, device=far)
    out = layer.forward(strict.asarray(rng.standard_normal((4, 3))))
    assert {array.device for array in (out, *layer.params.values())} == {far}


def test_parameters_lie_on_the_chosen_backend(rng):
    made = []

    class Recording(NumpyBackend):
        name = "recording"

        def asarray(self, x, dtype=None):
            made.append(np.asarray(x, dtype=dtype).view())
            return made[-1]

    registry.register("recording", Recording)
    try:
        with rectilinear.use_backend("recording"):
            layer = Affine(3, 2, rng=rng)
    finally:
        registry.unregister("recording")
    assert [id(array) for array in layer.params.values()] == [id(array) for array in made]


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        ([[1.0, 2.0, 3.0]], TypeError, r"^Affine: x is a list, not an array; pass rectilinear\.asarray\(x\)"),
        (np.ma.masked_array(np.ones((2, 3))), TypeError, "MaskedArray"),
        (np.ones((2, 3), complex), DTypeError, "complex128"),
        (np.ones((2, 4), "f4"), ShapeError, r"affine_forward: x has 4 features"),
    ],
)
def test_what_cannot_be_an_input(x, error, said, rng):
    with pytest.raises(error, match=said):
        Affine(3, 2, rng=rng).forward(x)


def test_labels_are_not_cast(rng):
    loss = SoftmaxCrossEntropy()
    with pytest.raises(DTypeError, match="softmax_loss"):
        loss.forward(rng.standard_normal((3, 2)), np.array([0.0, 1.0, 0.0]))


def test_nn_loads_no_file_format_and_no_other_library():
    code = "import sys, rectilinear.nn; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"safetensors", "torch", "jax", "dask", "cupy", "numba", "array_api_strict", "rich"} & set(loaded)


# ---------------------------------------------------------------- parameters of one's own


@pytest.mark.parametrize("kind", ["int64", "int8", "uint8", "bool"])
@pytest.mark.parametrize("layer_class", [Affine, AffineReLU])
def test_integer_parameters_do_not_cut_inputs(kind, layer_class, xp, rng):
    layer = layer_class(2, 1, rng=rng, bias=False, xp=xp)
    w = np.array([[1], [2]]).astype(kind)
    layer.params["w"] = brought(xp, w)
    x = np.array([[0.5, 0.5], [0.25, -0.125]])
    out = layer.forward(brought(xp, x))
    np.testing.assert_allclose(rectilinear.to_numpy(out), np.maximum(x @ w.astype("f8"), 0) if layer_class is AffineReLU else x @ w)
    dx = layer.backward(brought(xp, np.array([[0.5], [0.25]])))
    np.testing.assert_allclose(rectilinear.to_numpy(dx), np.array([[0.5], [0.25]]) @ w.T.astype("f8"))
    np.testing.assert_allclose(rectilinear.to_numpy(layer.grads["w"]), x.T @ np.array([[0.5], [0.25]]))
    if kind != "bool":  # which array_api_strict promotes with no integer
        assert "float" in str(layer.forward(brought(xp, np.array([[1, 2]]))).dtype)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", "bfloat16"])
def test_parameters_of_any_layout_and_dtype_compute_the_same(dtype, rng):
    import ml_dtypes  # noqa: F401  # teaches NumPy the name

    dtype = np.dtype(dtype)
    w, x = rng.integers(-4, 5, (3, 3)).astype(dtype), rng.integers(-4, 5, (2, 3)).astype("f4")
    for name, values in layouts(w).items():
        layer = Affine(3, 3, rng=rng, bias=False)
        layer.params["w"] = values
        out = layer.forward(x)
        assert out.dtype == dtype.newbyteorder("="), name
        np.testing.assert_array_equal(out.astype("f8"), x.astype("f8") @ w.astype("f8"), err_msg=name)


@pytest.mark.libraries
@pytest.mark.parametrize("name", ["torch", "jax.numpy"])
def test_bfloat16_of_other_libraries(name, rng):
    """No other library takes NumPy's bfloat16, so what comes to it has to get round it."""
    xp = namespace(name)
    layer = Affine(3, 2, rng=rng, xp=xp)
    layer.params = {key: xp.asarray(value, dtype=xp.bfloat16) for key, value in layer.params.items()}
    out = layer.forward(np.ones((4, 3)))
    layer.backward(np.ones((4, 2)))
    SGD(layer, lr=0.5).step()
    assert {str(a.dtype).rpartition(".")[2] for a in (out, *layer.grads.values(), *layer.params.values())} == {"bfloat16"}
    np.testing.assert_array_equal(rectilinear.to_numpy(layer.params["b"]).astype("f4"), [-2, -2])
    state = layer.state_dict()
    layer.load_state_dict(state)
    assert {str(value.dtype) for value in layer.state_dict().values()} == {"bfloat16"}


def test_a_parameter_that_is_no_array_is_named(rng):
    layer = Affine(2, 1, rng=rng)
    layer.params["b"] = [0.0]
    with pytest.raises(TypeError, match=r"^Affine: params\['b'\] is of type list, not an array$"):
        SGD(layer, lr=0.1).step()
    layer.params["w"] = [[1.0], [2.0]]
    with pytest.raises(TypeError, match=r"^Affine: a parameter is of type list, not an array; put an array into params"):
        layer.forward(np.ones((3, 2)))
