"""The optimiser: what a step is, that one which fails moves nothing, and its rates and state."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest

import rectilinear
from rectilinear import DTypeError, ShapeError
from rectilinear.nn import SGD, Affine, Sequential, SoftmaxCrossEntropy, load, save

from .nets import OTHER_LIBRARIES, brought, home_of, layouts, namespace, net_of, read_only, square_net, unchanged


@pytest.fixture(params=[None, *OTHER_LIBRARIES])
def xp(request):
    return namespace(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(params=["with exceptions", "without"])
def either_way(request):
    """Warnings are errors in these tests, so that all new values are worked out first; where overflows are ignored, kernels may serve."""
    with np.errstate(**({} if request.param == "with exceptions" else {"over": "ignore", "invalid": "ignore"})):
        yield


# ---------------------------------------------------------------- a step


def stepped(steps: int, **settings) -> tuple[np.ndarray, np.ndarray]:
    """w and b of a 1 x 1 layer after steps along constant gradients of 1, from w = 2 and b = 3."""
    layer = Affine(1, 1, rng=np.random.default_rng(0), dtype="float64")
    layer.params = {"w": np.array([[2.0]]), "b": np.array([3.0])}
    layer.grads = {"w": np.array([[1.0]]), "b": np.array([1.0])}
    optimizer = SGD(layer, **settings)
    for _ in range(steps):
        optimizer.step()
    return layer.params["w"].item(), layer.params["b"].item()


@pytest.mark.usefixtures("either_way")
def test_plain_descent():
    assert stepped(3, lr=0.5) == (0.5, 1.5)


@pytest.mark.usefixtures("either_way")
def test_momentum():
    # Moves of 0.5, 0.5 (1 + 0.5), 0.5 (1 + 0.5 + 0.25).
    assert stepped(3, lr=0.5, momentum=0.5) == (2 - 0.5 - 0.75 - 0.875, 3 - 0.5 - 0.75 - 0.875)


@pytest.mark.usefixtures("either_way")
def test_weights_decay_and_biases_do_not():
    # dw = 1 + 0.5 w: 2 -> 2 - 0.5 * 2 -> 1 - 0.5 * 1.5
    assert stepped(2, lr=0.5, weight_decay=0.5) == (0.25, 2.0)


@pytest.mark.usefixtures("either_way")
def test_learning_rate_may_change(rng):
    layer = Affine(1, 1, rng=rng, bias=False, dtype="float64")
    layer.params["w"], layer.grads["w"] = np.array([[2.0]]), np.array([[1.0]])
    optimizer = SGD(layer, lr=0.5)
    optimizer.step()
    optimizer.lr = 0.25
    optimizer.step()
    assert layer.params["w"].item() == 1.25


@pytest.mark.usefixtures("either_way")
def test_gradients_and_velocity_do_not_alias(rng):
    layer = Affine(2, 2, rng=rng, dtype="float64")
    optimizer = SGD(layer, lr=0.5, momentum=0.5)
    layer.forward(np.ones((3, 2)))
    layer.backward(np.ones((3, 2)))
    gradients = {name: grad.copy() for name, grad in layer.grads.items()}
    for _ in range(2):
        optimizer.step()
    for name, grad in layer.grads.items():
        np.testing.assert_array_equal(grad, gradients[name])
        assert not np.shares_memory(optimizer.velocity[name], layer.params[name])


def test_step_needs_gradients(rng):
    with pytest.raises(RuntimeError, match=r"^SGD\.step: 0\.w has no gradient; call the model's backward first$"):
        SGD(Sequential(Affine(2, 2, rng=rng)), lr=0.1).step()


@pytest.mark.parametrize("settings", [{"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"lr": 1, "momentum": 1}, {"lr": 1, "weight_decay": -1}])
def test_settings_out_of_range(settings, rng):
    with pytest.raises(ValueError, match="wanted lr > 0, 0 <= momentum < 1, weight_decay >= 0"):
        SGD(Affine(2, 2, rng=rng), **settings)


def with_gradients(net, rng, xp=None):
    """The net with a gradient of random values for every parameter."""
    for _, layer in net.leaves():
        layer.grads = {name: brought(xp, rng.standard_normal(value.shape).astype("f4")) for name, value in layer.params.items()}
    return net


@pytest.mark.usefixtures("either_way")
def test_parameters_and_velocity_are_updated_in_place(xp, rng):
    net = with_gradients(net_of(rng, xp), rng, xp)
    optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    params, velocity = net.params, dict(optimizer.velocity)
    optimizer.step()
    in_place = home_of(xp) not in ("jax", "dask")
    assert all((net.params[name] is params[name]) == in_place for name in params)
    assert all((optimizer.velocity[name] is velocity[name]) == in_place for name in velocity)
    assert list(velocity) == list(params)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "bfloat16"])
def test_parameters_of_any_layout_and_dtype_are_moved(dtype, rng):
    """In place, in their own dtype; 16 bits are computed in float32 and rounded once."""
    import ml_dtypes  # noqa: F401  # teaches NumPy the name

    w, grad = rng.standard_normal((3, 3)).astype(np.dtype(dtype)), rng.standard_normal((3, 3))
    for name, values in layouts(w).items():
        if name == "read-only":
            continue
        layer = Affine(3, 3, rng=rng, bias=False)
        layer.params["w"] = values
        optimizer = SGD(layer, lr=np.float64(0.1), momentum=np.float64(0.9), weight_decay=np.float64(0.01))
        compute = "f4" if values.itemsize < 8 else "f8"
        exact, v = w.astype(compute), np.zeros((3, 3), compute)
        for _ in range(3):
            layer.grads["w"] = grad.astype(values.dtype)
            optimizer.step()
            v = 0.9 * v - 0.1 * (layer.grads["w"].astype(compute) + 0.01 * exact)
            exact, v = (exact + v).astype(values.dtype).astype(compute), v.astype(values.dtype).astype(compute)
        assert layer.params["w"] is values, name
        assert optimizer.velocity["w"].dtype == values.dtype.newbyteorder("="), name
        np.testing.assert_allclose(values.astype(compute), exact, rtol=1e-5 if values.itemsize > 2 else 2e-2, err_msg=name)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_parameters_without_axes_are_moved_in_place(dtype, rng):
    layer = Affine(2, 2, rng=rng)
    scale = layer.params["scale"] = np.array(2, dtype)
    layer.grads = {"w": np.ones((2, 2)), "b": np.ones(2), "scale": np.float64(1)}
    optimizer = SGD(layer, lr=0.5, momentum=0.5)
    optimizer.step()
    optimizer.step()
    assert layer.params["scale"] is scale
    assert scale == 2 - 0.5 - 0.75
    assert optimizer.velocity["scale"].dtype == dtype


@pytest.mark.usefixtures("either_way")
def test_gradients_of_another_dtype_or_library(xp, rng):
    layer = Affine(2, 2, rng=rng, xp=xp)
    strict = pytest.importorskip("array_api_strict")
    before = layer.state_dict()
    layer.grads = {"w": np.ones((2, 2), "i8"), "b": strict.asarray(np.ones(2))}
    SGD(layer, lr=0.5).step()
    for name, values in layer.state_dict().items():
        np.testing.assert_array_equal(values, before[name] - np.float32(0.5))
        assert values.dtype == np.float32


# ---------------------------------------------------------------- ties


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("how", ["same", "view", "transposed", "twice"])
def test_tied_parameters_move_once_by_the_sum_of_their_gradients(how, rng):
    net = square_net(rng, dtype="float64")
    if how == "twice":
        net = Sequential(net[0], net[0])
    else:
        w = net[0].params["w"]
        net[1].params["w"] = {"same": w, "view": w[...], "transposed": w.T}[how]
    net[0].params["b"] = net[1].params["b"] = np.zeros(3)
    w, v = net[0].params["w"].copy(), np.zeros((3, 3))
    optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        first, second = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
        net[0].grads, net[1].grads = {"w": first, "b": np.ones(3)}, {"w": second, "b": np.ones(3)}
        optimizer.step()
        total = second if how == "twice" else first + (second.T if how == "transposed" else second)
        v = 0.9 * v - 0.1 * (total + 0.5 * w)
        w = w + v
    np.testing.assert_allclose(net[0].params["w"], w, rtol=1e-13)
    np.testing.assert_allclose(optimizer.velocity["0.w"], v, rtol=1e-13)
    assert list(optimizer.velocity) == ["0.w", "0.b"]


@pytest.mark.usefixtures("either_way")
def test_ties_made_between_steps(rng):
    """The velocity is that of the first name from then on, and nothing of the other one is left."""
    net = with_gradients(square_net(rng), rng)
    optimizer = SGD(net, lr=0.1, momentum=0.5)
    optimizer.step()
    net[1].params["w"] = net[0].params["w"]
    first, total = optimizer.velocity["0.w"].copy(), net.grads["0.w"] + net.grads["1.w"]
    optimizer.step()
    np.testing.assert_allclose(optimizer.velocity["0.w"], 0.5 * first - np.float32(0.1) * total, rtol=1e-6)
    assert list(optimizer.velocity) == ["0.w", "0.b", "1.b"]


# ---------------------------------------------------------------- steps that fail


def spoil(net, optimizer, what, xp):
    """Make the last layer one that cannot be moved; the error and what it says."""
    layer = net[-1]
    match what:
        case "read-only":
            layer.params["b"] = read_only(np.asarray(layer.params["b"]))
            return ValueError, r"^SGD\.step: 3\.b is read-only; put a writable array"
        case "no gradient":
            del layer.grads["b"]
            return RuntimeError, r"^SGD\.step: 3\.b has no gradient; call the model's backward first$"
        case "shape":
            layer.grads["b"] = brought(xp, np.ones(1, "f4"))
            return ShapeError, r"^SGD\.step: the gradient of 3\.b has shape \(1,\), wanted \(3,\)$"
        case "complex":
            layer.grads["b"] = brought(xp, np.ones(3, "c8"))
            return DTypeError, r"^SGD\.step: the gradient of 3\.b has dtype complex64"
        case "integers":
            layer.params["b"] = brought(xp, np.ones(3, "i4"))
            return DTypeError, r"^SGD\.step: 3\.b has dtype int32, wanted float16"
        case "velocity":
            optimizer.velocity["3.b"] = brought(xp, np.ones(4, "f4"))
            return ShapeError, r"^SGD\.step: the velocity of 3\.b has shape \(4,\), wanted \(3,\)$"
        case "list":
            layer.grads["b"] = [1.0, 2.0, 3.0]
            return TypeError, r"^SGD\.step: the gradient of 3\.b is a list, not an array"
        case "overflow of the move":
            layer.grads["b"] = np.full(3, 3e38, "f4")
            return RuntimeWarning, "overflow"
        case "overflow of the sum":
            layer.params["b"], layer.grads["b"] = np.full(3, 3e38, "f4"), np.full(3, -3e38, "f4")
            return RuntimeWarning, "overflow"
        case "overflow of the rounding":
            layer.params["b"] = np.full(3, 6e4, "f2")
            layer.grads["b"] = np.full(3, -6e4, "f2")
            return RuntimeWarning, "overflow"
    raise AssertionError(what)


ANYWHERE = ["no gradient", "shape", "complex", "integers", "velocity", "list"]
ON_NUMPY = ["read-only", "overflow of the move", "overflow of the sum", "overflow of the rounding"]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("what", [*ANYWHERE, *ON_NUMPY])
def test_a_step_that_fails_moves_nothing(what, xp, rng):
    xp = None if what in ON_NUMPY else xp
    net = with_gradients(net_of(rng, xp), rng, xp)
    optimizer = SGD(net, lr=10.0, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    velocity = optimizer.state_dict()["velocity"]
    error, said = spoil(net, optimizer, what, xp)
    same, held = unchanged(net), dict(optimizer.velocity)
    told = {"over": "warn", "invalid": "warn"} if error is RuntimeWarning else {}
    with np.errstate(**told), pytest.raises(error, match=said):
        optimizer.step()
    assert same()
    assert list(optimizer.velocity) == list(held)
    for name, array in held.items():
        assert optimizer.velocity[name] is array
        if (what, name) != ("velocity", "3.b"):
            np.testing.assert_array_equal(rectilinear.to_numpy(array), velocity[name])


def test_steps_raise_what_numpy_is_told_to_raise(rng):
    net = with_gradients(square_net(rng), rng)
    net[1].grads["b"] = np.full(3, 3e38, "f4")
    same = unchanged(net)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        SGD(net, lr=10.0).step()
    assert same()


@pytest.mark.usefixtures("either_way")
def test_broadcast_parameters_are_replaced(rng):
    layer = Affine(3, 3, rng=rng, bias=False)
    layer.params["w"] = np.lib.stride_tricks.as_strided(np.zeros(3, "f4"), (3, 3), (0, 4))
    layer.grads["w"] = np.arange(9, dtype="f4").reshape(3, 3)
    SGD(layer, lr=1.0).step()
    np.testing.assert_array_equal(layer.params["w"], -layer.grads["w"])


# ---------------------------------------------------------------- rates


NUMBERS = {
    "float64": np.float64,
    "float32": np.float32,
    "0-d": np.array,
    "0-d float16": lambda value: np.array(value, "f2"),
    "of another library": lambda value: namespace("array_api_strict").asarray(value),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("when", ["made", "set"])
def test_rates_change_no_dtype(number, when, xp, rng):
    net, plain = (with_gradients(net_of(np.random.default_rng(0), xp), np.random.default_rng(1), xp) for _ in range(2))
    rates = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}
    if when == "made":
        optimizer = SGD(net, *map(number, rates.values()))
    else:
        optimizer = SGD(net, 1.0)
        for name, value in rates.items():
            setattr(optimizer, name, number(value))
    assert {name: getattr(optimizer, name) for name in rates} == rates
    assert {type(getattr(optimizer, name)) for name in rates} == {float}
    reference = SGD(plain, **rates)
    for _ in range(2):
        optimizer.step()
        reference.step()
    for name, values in plain.state_dict().items():
        np.testing.assert_array_equal(net.state_dict()[name], values)
    for arrays in (net.params, optimizer.velocity):
        assert {str(array.dtype).rpartition(".")[2] for array in arrays.values()} == {"float32"}


OUT_OF_RANGE = [
    ("lr", 0),
    ("lr", -1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("momentum", 1),
    ("momentum", -0.1),
    ("momentum", float("nan")),
    ("weight_decay", -1),
    ("weight_decay", np.float64("nan")),
    ("weight_decay", float("inf")),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_rates_are_checked_when_they_are_set(name, value, rng):
    layer = Affine(2, 2, rng=rng)
    good = {"lr": 0.5, "momentum": 0.25, "weight_decay": 0.125}
    said = f"^SGD: .*{name}={value}.*; wanted lr > 0, 0 <= momentum < 1, weight_decay >= 0, all of them finite$"
    with pytest.raises(ValueError, match=said):
        SGD(layer, **(good | {name: value}))
    optimizer = SGD(layer, **good)
    with pytest.raises(ValueError, match=said):
        setattr(optimizer, name, value)
    assert {name: getattr(optimizer, name) for name in good} == good


@pytest.mark.parametrize("value", [None, "fast", 1j, [0.1], np.ones(2)])
def test_rates_are_numbers(value, rng):
    with pytest.raises(TypeError, match=r"^SGD: lr=.*; wanted numbers$"):
        SGD(Affine(2, 2, rng=rng), value)


@pytest.mark.parametrize("model", [[], None, {"w": np.ones(2)}, SGD, types.SimpleNamespace(params={})])
def test_a_model_is_a_module(model):
    with pytest.raises(TypeError, match=r"^SGD: model is of type .*; wanted a Module, such as Sequential"):
        SGD(model, 0.1)


@pytest.mark.usefixtures("either_way")
def test_momentum_may_change(rng):
    """Without momentum there is no velocity to go on with."""
    layer = Affine(1, 1, rng=rng, bias=False, dtype="float64")
    layer.params["w"], layer.grads["w"] = np.array([[0.0]]), np.array([[1.0]])
    optimizer, places = SGD(layer, lr=1.0, momentum=0.5), []
    for momentum in (0.5, 0.5, 0.0, 0.5, 0.5):
        optimizer.momentum = momentum
        optimizer.step()
        places.append(layer.params["w"].item())
    assert list(itertools.pairwise([0.0, *places])) == [(0.0, -1.0), (-1.0, -2.5), (-2.5, -3.5), (-3.5, -4.5), (-4.5, -6.0)]


# ---------------------------------------------------------------- state


def train(net, optimizer, steps):
    x, y, loss = np.random.default_rng(1).standard_normal((4, 6)), [0, 2, 1, 0], SoftmaxCrossEntropy()
    for _ in range(steps):
        loss.forward(net.forward(x), y)
        net.backward(loss.backward())
        optimizer.step()
    return net.state_dict()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("through", ["state", "file"])
@pytest.mark.parametrize("momentum", [0.9, pytest.param(0.0, marks=pytest.mark.nightly)])
def test_training_goes_on_from_a_state(through, momentum, xp, rng, tmp_path):
    net, other = net_of(rng, xp), net_of(rng, xp)
    optimizer, fresh = SGD(net, 0.1, momentum, 0.01), SGD(other, 0.5)
    train(net, optimizer, 3)
    if through == "state":
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict(optimizer.state_dict())
    else:
        save(net, tmp_path / "net.safetensors", optimizer)
        load(other, tmp_path / "net.safetensors", fresh)
    assert (fresh.lr, fresh.momentum, fresh.weight_decay) == (0.1, momentum, 0.01)
    wanted = train(net, optimizer, 3)
    for name, values in train(other, fresh, 3).items():
        np.testing.assert_array_equal(values, wanted[name])


def test_state_is_floats_and_a_copy_both_ways(rng):
    net = with_gradients(net_of(rng), rng)
    optimizer = SGD(net, np.float64(0.1), np.float64(0.9))
    assert optimizer.state_dict() == {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "velocity": {}}
    optimizer.step()
    state = optimizer.state_dict()
    assert {type(state[name]) for name in ("lr", "momentum", "weight_decay")} == {float}
    assert list(state["velocity"]) == list(net.params)
    before = {name: values.copy() for name, values in state["velocity"].items()}
    optimizer.step()
    optimizer.load_state_dict(state)
    for name, values in state["velocity"].items():
        np.testing.assert_array_equal(values, before[name])
        values[...] = 7
        np.testing.assert_array_equal(optimizer.velocity[name], before[name])


def test_loaded_velocity_takes_the_parameters_dtype_and_place(xp, rng):
    net = net_of(rng, xp)
    optimizer = SGD(net, 0.1, 0.9)
    state = optimizer.state_dict()
    state["velocity"] = {"0.w": np.asfortranarray(np.ones((6, 5), ">f8")), "1.w": np.ones((4, 5), "i8").T}
    optimizer.load_state_dict(state)
    assert list(optimizer.velocity) == ["0.w", "1.w"]
    for value in optimizer.velocity.values():
        assert str(value.dtype).rpartition(".")[2] == "float32"
        assert type(value) is type(net.params["0.w"])
    optimizer.load_state_dict(state | {"velocity": {}})
    assert optimizer.velocity == {}


@pytest.mark.usefixtures("either_way")
def test_velocity_of_tied_parameters_goes_in_and_out_once(rng):
    net = square_net(rng)
    net[1].params["w"] = net[0].params["w"].T
    optimizer = SGD(with_gradients(net, rng), 0.1, 0.9)
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state["velocity"]) == ["0.w", "0.b", "1.b"]
    v = state["velocity"]["0.w"]
    for velocity in ({"0.w": v}, {"1.w": v.T}, {"0.w": v, "1.w": v.T}):
        optimizer.load_state_dict(state | {"velocity": velocity})
        assert list(optimizer.velocity) == ["0.w"]
        np.testing.assert_array_equal(optimizer.velocity["0.w"], v)
    with pytest.raises(ValueError, match=r"^SGD\.load_state_dict: 0\.w and 1\.w are one array in this model"):
        optimizer.load_state_dict(state | {"velocity": {"0.w": v, "1.w": v}})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"lr": -1.0}, ValueError, r"lr=-1\.0.*wanted lr > 0"),
        ({"momentum": "fast"}, TypeError, "wanted numbers"),
        ({"nesterov": True}, ValueError, "missing: nothing; unknown: nesterov; wanted lr, momentum, weight_decay, velocity"),
        ({"velocity": {"7.w": np.ones(2)}}, ValueError, r"^SGD\.load_state_dict: not in this model: 7\.w\. "),
        ({"velocity": {"3.b": np.ones(2)}}, ShapeError, r"3\.b has shape \(2,\), wanted \(3,\)"),
        ({"velocity": {"0.b": np.ones(5), "3.b": np.ones(3, complex)}}, DTypeError, "complex128"),
        ({"velocity": {"0.b": np.ones(5), "3.b": np.full(3, 1e300)}}, RuntimeWarning, "overflow"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, said, rng):
    net = with_gradients(net_of(rng), rng)
    optimizer = SGD(net, 0.1, 0.9, 0.01)
    optimizer.step()
    state, held = optimizer.state_dict(), dict(optimizer.velocity)
    with pytest.raises(error, match=said):
        optimizer.load_state_dict(state | {"lr": 0.5} | change)
    with pytest.raises(ValueError, match="missing: lr; unknown: nothing"):
        optimizer.load_state_dict({key: value for key, value in state.items() if key != "lr"})
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 0.01)
    assert all(optimizer.velocity[name] is held[name] for name in held)
    for name, values in state["velocity"].items():
        np.testing.assert_array_equal(optimizer.velocity[name], values)


def test_file_with_an_optimizer_serves_the_net_alone(rng, tmp_path):
    net, other = with_gradients(net_of(rng), rng), net_of(rng)
    optimizer = SGD(net, 0.1, 0.9)
    optimizer.step()
    save(net, tmp_path / "net.safetensors", optimizer)
    load(other, tmp_path / "net.safetensors")
    for name, values in net.params.items():
        np.testing.assert_array_equal(other.params[name], values)
    save(net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"^nn\.load: .*net\.safetensors holds no optimiser's state; "):
        load(other, tmp_path / "net.safetensors", SGD(other, 0.1))
