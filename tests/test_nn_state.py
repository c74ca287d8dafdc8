"""Parameters in and out: state dictionaries, files, ties, pickles and copies; and that a load which fails changes nothing."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import numpy as np
import pytest

import rectilinear
from rectilinear import DTypeError, ShapeError
from rectilinear.nn import SGD, Affine, ReLU, Sequential, SoftmaxCrossEntropy, load, save

from .nets import OTHER_LIBRARIES, brought, home_of, layouts, library, namespace, net_of, read_only, square_net, unchanged


@pytest.fixture(params=[None, *OTHER_LIBRARIES])
def xp(request):
    return namespace(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---------------------------------------------------------------- state


def test_state_is_a_copy_both_ways(xp, rng):
    net = net_of(rng, xp)
    state = net.state_dict()
    before = {name: values.copy() for name, values in state.items()}
    net.forward(np.ones((2, 6)))
    net.backward(np.ones((2, 3)))
    SGD(net, lr=1.0).step()
    for name, values in state.items():
        np.testing.assert_array_equal(values, before[name])
    net.load_state_dict(state)
    for values in state.values():
        values[...] = -1
    for name, values in net.state_dict().items():
        np.testing.assert_array_equal(values, before[name])


def test_file_round_trip(xp, rng, tmp_path):
    net, other = net_of(rng, xp), net_of(rng)
    save(net, tmp_path / "net.safetensors")
    load(other, tmp_path / "net.safetensors")
    for name, values in net.state_dict().items():
        np.testing.assert_array_equal(other.params[name], values)
    load(net, tmp_path / "net.safetensors")
    assert {library(array) for array in net.params.values()} == {"numpy" if xp is None else xp.__name__.partition(".")[0]}


def test_file_is_safetensors(rng, tmp_path):
    from safetensors.numpy import load_file

    net = Sequential(Affine(3, 2, rng=rng), Affine(2, 2, rng=rng, dtype="float64", bias=False))
    save(net, tmp_path / "net.safetensors")
    found = load_file(tmp_path / "net.safetensors")
    assert {name: (values.shape, values.dtype.name) for name, values in found.items()} == {
        "0.w": ((3, 2), "float32"),
        "0.b": ((2,), "float32"),
        "1.w": ((2, 2), "float64"),
    }


def test_loaded_arrays_take_the_layers_dtype(rng):
    layer = Affine(3, 2, rng=rng, dtype="float16")
    layer.load_state_dict({"w": np.ones((3, 2)), "b": np.array([1, 2])})
    assert [array.dtype.name for array in layer.params.values()] == ["float16", "float16"]
    np.testing.assert_array_equal(layer.params["b"], [1, 2])


def test_wrong_names_are_named_and_nothing_is_changed(rng):
    net = Sequential(Affine(3, 2, rng=rng), ReLU(), Affine(2, 2, rng=rng))
    before = net.state_dict()
    state = {name: values + 1 for name, values in before.items()}
    state["0.v"], state["1.w"] = state.pop("0.w"), state.pop("2.b")
    with pytest.raises(ValueError, match=r"^load_state_dict: missing: 0\.w, 2\.b; not in this model: 0\.v, 1\.w\. "):
        net.load_state_dict(state)
    state = {name: values + 1 for name, values in before.items()}
    state["2.w"] = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"^load_state_dict: 2\.w has shape \(2, 3\), wanted \(2, 2\)\. "):
        net.load_state_dict(state)
    with pytest.raises(DTypeError, match=r"^load_state_dict: 2\.w has dtype complex128"):
        net.load_state_dict(state | {"2.w": np.ones((2, 2), complex)})
    for name, values in net.state_dict().items():
        np.testing.assert_array_equal(values, before[name])


DTYPES = ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", "bfloat16", "<i8", ">i4", "u1", "bool"]


def kind(name: str) -> np.dtype:
    import ml_dtypes  # noqa: F401  # teaches NumPy the name

    return np.dtype(name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_and_dtype_goes_through_a_file(dtype, rng, tmp_path):
    w = rng.integers(-100, 100, (3, 3)).astype(kind(dtype))
    for name, values in layouts(w).items():
        net, other = square_net(rng), square_net(rng)
        net[0].params["w"] = values
        other[0].params["w"] = np.zeros((3, 3), values.dtype.newbyteorder("="))
        save(net, tmp_path / "net.safetensors")
        load(other, tmp_path / "net.safetensors")
        found = other[0].params["w"]
        assert found.dtype == values.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(found, w, err_msg=name)
        np.testing.assert_array_equal(other[1].params["w"], net[1].params["w"])
        state = net.state_dict()["0.w"]
        assert state.flags.c_contiguous, name
        assert state.dtype.isnative, name
        assert not np.shares_memory(state, values), name


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f2", "bfloat16"])
def test_any_layout_and_dtype_is_loaded_into(dtype, rng, tmp_path):
    w = rng.integers(-100, 100, (3, 3)).astype("f4")
    for name, there in layouts(np.zeros((3, 3), kind(dtype))).items():
        net = square_net(rng)
        net[0].params["w"] = there
        net.load_state_dict(net.state_dict() | {"0.w": w})
        found = net[0].params["w"]
        np.testing.assert_array_equal(found, w, err_msg=name)
        assert (found is there) == (name != "read-only"), name
        assert found.dtype.newbyteorder("=") == there.dtype.newbyteorder("="), name
        if name == "gaps":
            assert np.count_nonzero(there.base) == np.count_nonzero(w)  # nothing lies between


def test_transposed_arrays_of_every_library(xp, rng, tmp_path):
    net, other = Affine(3, 2, rng=rng, xp=xp), Affine(3, 2, rng=rng)
    w = rng.standard_normal((2, 3)).astype("f4")
    net.params["w"] = np.transpose(w) if xp is None else brought(xp, w).T
    save(net, tmp_path / "net.safetensors")
    load(other, tmp_path / "net.safetensors")
    np.testing.assert_array_equal(other.params["w"], w.T)
    if xp is not None:
        net.load_state_dict({"w": brought(xp, np.ascontiguousarray(w.T) + 1).T.T, "b": np.zeros(2)})
        np.testing.assert_array_equal(rectilinear.to_numpy(net.params["w"]), w.T + 1)


def test_memory_maps(rng, tmp_path):
    mapped = np.lib.format.open_memmap(tmp_path / "w.npy", "w+", np.float32, (3, 3))
    net = square_net(rng)
    net[0].params["w"] = mapped
    net.load_state_dict({name: np.full_like(values, 3) for name, values in net.state_dict().items()})
    assert net[0].params["w"] is mapped
    assert type(net.state_dict()["0.w"]) is np.ndarray
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), np.full((3, 3), 3))


def test_nothing_is_cut_off_on_the_way_in(rng):
    """A parameter of integers takes the dtype of what is loaded."""
    layer = Affine(2, 1, rng=rng, bias=False)
    layer.params["w"] = np.array([[1], [2]], "i1")
    layer.load_state_dict({"w": np.array([[300], [-1]])})
    np.testing.assert_array_equal(layer.params["w"], [[300], [-1]])
    layer.load_state_dict({"w": np.array([[0.5], [0.25]])})
    np.testing.assert_array_equal(layer.params["w"], [[0.5], [0.25]])


def test_one_memory_for_many_elements_is_no_place_to_copy_to(rng):
    layer = Affine(3, 3, rng=rng, bias=False)
    for strides in ((0, 4), (4, 4)):
        layer.params["w"] = np.lib.stride_tricks.as_strided(np.zeros(9, "f4"), (3, 3), strides)
        w = rng.standard_normal((3, 3)).astype("f4")
        layer.load_state_dict({"w": w})
        np.testing.assert_array_equal(layer.params["w"], w)


def test_parameters_that_trade_places(rng):
    """The live arrays of the net itself, crosswise."""
    net = square_net(rng)
    before, held = net.state_dict(), net.params
    net.load_state_dict({"0.w": held["1.w"], "0.b": held["1.b"], "1.w": held["0.w"], "1.b": held["0.b"]})
    for here, there in (("0", "1"), ("1", "0")):
        np.testing.assert_array_equal(net.params[f"{here}.w"], before[f"{there}.w"])
    assert all(net.params[name] is held[name] for name in held)


def test_loading_writes_to_the_arrays_that_are_there(xp, rng):
    net = net_of(rng, xp)
    held = net.params
    net.load_state_dict({name: values + 1 for name, values in net.state_dict().items()})
    for name, array in net.params.items():
        assert (array is held[name]) == (home_of(xp) not in ("jax", "dask")), name


# ---------------------------------------------------------------- loads that fail


def spoiled(state: dict[str, np.ndarray]) -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    """States that cannot be loaded; what is wrong is at the end."""
    last = list(state)[-1]
    shape = state[last].shape
    return {
        "shape": (state | {last: np.zeros((*shape, 2))}, ShapeError, f"{last} has shape"),
        "missing": ({key: value for key, value in state.items() if key != last}, ValueError, f"missing: {last}"),
        "no name": (state | {9: np.zeros(2)}, ValueError, "not in this model: 9"),
        "unknown": (state | {"9.w": np.zeros(2)}, ValueError, "not in this model: 9.w"),
        "complex": (state | {last: np.zeros(shape, complex)}, DTypeError, f"{last} has dtype complex128"),
        "text": (state | {last: np.full(shape, "a")}, DTypeError, f"{last} has dtype <U1"),
        "objects": (state | {last: np.full(shape, None)}, DTypeError, f"{last} has dtype object"),
        "overflow": (state | {last: np.full(shape, 1e300)}, RuntimeWarning, "overflow encountered in cast"),
        "masked": (state | {last: np.ma.masked_array(np.zeros(shape))}, TypeError, "masked"),
    }


@pytest.mark.parametrize("what", ["shape", "missing", "unknown", "no name", "complex", "text", "objects", "overflow", "masked"])
def test_a_load_that_fails_changes_nothing(what, xp, rng):
    net = net_of(rng, xp)
    state, error, said = spoiled({name: values + 1 for name, values in net.state_dict().items()})[what]
    same = unchanged(net)
    with pytest.raises(error, match=said):
        net.load_state_dict(state)
    assert same()


@pytest.mark.parametrize(
    "what", ["shape", "missing", "unknown", "overflow", "rate", "no velocity's shape", "no optimizer", "another dtype"]
)
def test_a_file_that_does_not_fit_changes_neither_net_nor_optimizer(what, rng, tmp_path):
    from safetensors.numpy import load_file, save_file

    net, path = net_of(rng), tmp_path / "net.safetensors"
    optimizer = SGD(net, lr=0.1, momentum=0.9)
    net.forward(np.ones((2, 6)))
    net.backward(np.ones((2, 3)))
    optimizer.step()
    save(net, path, optimizer)
    tensors = {name: np.asarray(values + values.dtype.type(0.01)) for name, values in load_file(path).items()}
    last = "3.b"
    match what:
        case "shape":
            tensors[last] = np.zeros(7)
        case "missing":
            del tensors[last]
        case "unknown":
            tensors["7.w"] = np.zeros(7)
        case "overflow":
            tensors[last] = np.full(3, 1e300)
        case "rate":
            tensors["optimizer.lr"] = np.array(-1.0)
        case "no velocity's shape":
            tensors[f"optimizer.velocity.{last}"] = np.zeros(7)
        case "no optimizer":
            tensors = {name: values for name, values in tensors.items() if not name.startswith("optimizer")}
        case "another dtype":
            tensors[f"optimizer.velocity.{last}"] = np.zeros(3, np.complex64)
    save_file(tensors, path)
    same, state = unchanged(net), optimizer.state_dict()
    with pytest.raises((ValueError, DTypeError, RuntimeWarning)):
        load(net, path, optimizer)
    assert same()
    after = optimizer.state_dict()
    for name, values in state.pop("velocity").items():
        np.testing.assert_array_equal(after["velocity"][name], values)
    del after["velocity"]
    assert after == state


@pytest.mark.parametrize("dtype", ["longdouble", "complex64"])
def test_a_save_that_fails_leaves_the_file_that_was_there(dtype, rng, tmp_path):
    net, path = square_net(rng), tmp_path / "net.safetensors"
    save(net, path)
    before = path.read_bytes()
    net[1].params["w"] = net[1].params["w"].astype(dtype)
    with pytest.raises(DTypeError, match=rf"^nn\.save: 1\.w has dtype {np.dtype(dtype)}, which safetensors files do not have"):
        save(net, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_saves_at_the_same_time_do_not_meet(rng, tmp_path):
    net, path, failed = square_net(rng), tmp_path / "net.safetensors", []

    def save_often():
        try:
            for _ in range(20):
                save(net, path)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=save_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_by_a_link_and_by_bytes(rng, tmp_path):
    net, link, path = square_net(rng), tmp_path / "latest", tmp_path / "net.safetensors"
    link.symlink_to(path)
    save(net, os.fsencode(link))
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["latest", "net.safetensors"]
    other = square_net(rng)
    load(other, os.fsencode(path))
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)


def test_a_save_of_what_cannot_be_loaded_is_refused(rng, tmp_path):
    class Named(Affine):
        def leaves(self, prefix=""):
            yield f"{prefix}optimizer.", self

    for model, optimizer, error, what in (
        (Named(3, 2, rng=rng), None, ValueError, r"^nn\.save: optimizer\.w is a name of the optimiser's"),
        (square_net(rng), "x", TypeError, r"^nn\.save: optimizer is of type str; it takes an SGD"),
    ):
        with pytest.raises(error, match=what):
            save(model, tmp_path / "net.safetensors", optimizer)
    assert os.listdir(tmp_path) == []


def test_a_save_that_is_interrupted_leaves_the_file_that_was_there(rng, tmp_path, monkeypatch):
    import safetensors.numpy

    net, path = square_net(rng), tmp_path / "net.safetensors"
    save(net, path)
    before = path.read_bytes()

    def interrupted(tensors, where):
        with open(where, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(net, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# ---------------------------------------------------------------- ties


def tied_net(rng, xp=None, how="same"):
    net = square_net(rng, xp)
    first, second = net
    match how:
        case "same":
            second.params["w"] = first.params["w"]
        case "view":
            second.params["w"] = first.params["w"][...]
        case "transposed":
            second.params["w"] = first.params["w"].T
        case "transposed, first":
            first.params["w"] = second.params["w"].T
        case "backwards":
            first.params["w"] = first.params["w"][::-1]
            second.params["w"] = first.params["w"].T
    second.params["b"] = first.params["b"]
    return net


def tied(net, how="same") -> bool:
    """Whether writing to one parameter writes to the other; by identity where a library allows no writing."""
    first, second = (layer.params["w"] for layer in net)
    if how == "same" and first is not second:
        return False
    if isinstance(first, np.ndarray):
        turned = second.T if "transposed" in how or how == "backwards" else second
        return np.shares_memory(first, second) and np.array_equal(first, turned)
    return True


VIEWS = ["same", "view", "transposed", "transposed, first", "backwards"]


@pytest.mark.parametrize("how", VIEWS)
def test_ties_stay_through_load_and_step(how, rng, tmp_path):
    net, source = tied_net(rng, how=how), tied_net(rng, how=how)
    assert tied(net, how)
    net.load_state_dict(source.state_dict())
    assert tied(net, how)
    save(source, tmp_path / "net.safetensors")
    load(net, tmp_path / "net.safetensors")
    assert tied(net, how)
    net.forward(np.ones((2, 3)))
    net.backward(np.ones((2, 3)))
    SGD(net, lr=0.1, momentum=0.9).step()
    assert tied(net, how)
    for name, values in source.state_dict().items():
        assert not np.array_equal(net.params[name], values)


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: pickle.loads(pickle.dumps(net, 2))]
)
def test_ties_stay_through_copies(how, copied, rng):
    net = tied_net(rng, how=how)
    for made in (copied(net), copied(Sequential(net))[0], copied(SGD(net, 0.1)).model):
        assert tied(made, how)
        assert made[0].params["b"] is made[1].params["b"]
        assert not np.shares_memory(made[0].params["w"], net[0].params["w"])
        for name, values in net.state_dict().items():
            np.testing.assert_array_equal(made.params[name], values)


def test_ties_of_every_library(xp, rng):
    net = tied_net(rng, xp)
    net.load_state_dict({name: values + 1 for name, values in net.state_dict().items()})
    assert net[0].params["w"] is net[1].params["w"]
    net.forward(np.ones((2, 3)))
    net.backward(np.ones((2, 3)))
    SGD(net, lr=0.1).step()
    assert net[0].params["w"] is net[1].params["w"]
    made = copy.deepcopy(net)
    assert made[0].params["w"] is made[1].params["w"]


def test_ties_stay_where_arrays_are_replaced(rng):
    """A read-only array cannot be copied to: then both names get the new one."""
    net = square_net(rng)
    net[0].params["w"] = net[1].params["w"] = read_only(net[0].params["w"])
    state = {name: np.ones_like(values) for name, values in net.state_dict().items()}
    net.load_state_dict(state)
    assert net[0].params["w"] is net[1].params["w"]
    np.testing.assert_array_equal(net[0].params["w"], np.ones((3, 3)))
    w = read_only(rng.standard_normal((3, 3)))
    net[0].params["w"], net[1].params["w"] = w, w.T
    state["0.w"], state["1.w"] = np.arange(9.0).reshape(3, 3), np.arange(9.0).reshape(3, 3).T
    net.load_state_dict(state)
    assert tied(net, "transposed")
    np.testing.assert_array_equal(net[0].params["w"], np.arange(9.0).reshape(3, 3))


@pytest.mark.parametrize("how", ["same", "transposed"])
def test_tied_parameters_are_given_one_value(how, xp, rng):
    net = tied_net(rng, None if how == "transposed" else xp, how)
    state = net.state_dict()
    state["1.w"] = state["1.w"] + 1
    state["0.b"] = state["1.b"] = state["0.b"] + 1
    same = unchanged(net)
    with pytest.raises(ValueError, match=r"^load_state_dict: 0\.w and 1\.w are one array in this model, but are given different values; "):
        net.load_state_dict(state)
    assert same()
    state = net.state_dict()
    state["0.w"][0, 0] = np.nan
    state["1.w"][0, 0] = np.nan
    net.load_state_dict(state)  # the same NaN is no difference


def test_one_layer_twice_is_loaded_once(rng):
    layer = Affine(3, 3, rng=rng)
    net = Sequential(layer, layer)
    state = {name: values + 1 for name, values in net.state_dict().items()}
    assert list(state) == ["0.w", "0.b", "1.w", "1.b"]
    net.load_state_dict(state)
    np.testing.assert_array_equal(layer.params["w"], state["0.w"])
    with pytest.raises(ValueError, match="are given different values"):
        net.load_state_dict(state | {"1.b": state["1.b"] + 1})


def test_neighbours_in_one_buffer_are_neither_tied_nor_refused(rng):
    """Parameters that are views of one flat vector, side by side or interleaved."""
    flat = rng.standard_normal(36)
    net = square_net(rng)
    net[0].params = {"w": flat[:9].reshape(3, 3), "b": flat[9:12]}
    net[1].params = {"w": flat[12:30:2].reshape(3, 3), "b": flat[13:19:2]}
    state = {name: rng.standard_normal(values.shape) for name, values in net.state_dict().items()}
    net.load_state_dict(state)
    for name, values in state.items():
        np.testing.assert_array_equal(net.params[name], values)
    np.testing.assert_array_equal(flat[:9], state["0.w"].ravel())


@pytest.mark.parametrize("view", [lambda w: w[::-1], lambda w: w[:2], lambda w: w[1:, :2], lambda w: w.reshape(-1)[1:4], lambda w: w[0]])
def test_parameters_that_share_memory_in_part_are_refused(view, rng):
    """Which one was written last would decide. Copies of such a net are fine."""
    net = square_net(rng)
    net[1].params["b"] = view(net[0].params["w"])
    net[0].grads, net[1].grads = ({name: np.ones_like(value) for name, value in layer.params.items()} for layer in net)
    same = unchanged(net)
    said = r"^(0\.w shares memory with 1\.b|1\.b shares memory with 0\.w), but is neither the same array nor its transpose; give it"
    for change in (lambda: net.load_state_dict(net.state_dict()), SGD(net, lr=0.1).step):
        with pytest.raises(ValueError, match=said):
            change()
        assert same()
    made = copy.deepcopy(net)
    for name, values in net.state_dict().items():
        np.testing.assert_array_equal(made.params[name], values)


# ---------------------------------------------------------------- pickles and copies


@pytest.mark.parametrize("make", [lambda rng: Affine(6, 3, rng=rng), net_of, lambda rng: Sequential(net_of(rng), ReLU())])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_hold_parameters_and_no_activations(make, copied, rng):
    net = make(rng)
    size = len(pickle.dumps(net))
    x, dout = rng.standard_normal((1000, 6)), np.ones((1000, 3))
    out = net.forward(x)
    net.backward(dout)
    assert len(pickle.dumps(net)) <= size
    made = copied(net)
    with pytest.raises(RuntimeError, match="no forward to go back from; call forward first"):
        made.backward(dout)
    assert made.grads == {}
    np.testing.assert_array_equal(made.forward(x), out)
    made.backward(dout)
    for name in net.params:
        np.testing.assert_array_equal(made.grads[name], net.grads[name])
        assert not np.shares_memory(made.params[name], net.params[name])
    net.backward(dout)  # and the original is as it was


def test_copies_of_an_evaluated_net(rng):
    net = net_of(rng)
    net.forward(np.ones((2, 6)), training=False)
    with pytest.raises(RuntimeError, match="no forward to go back from"):
        copy.deepcopy(net).backward(np.ones((2, 3)))


def test_copies_of_the_loss_hold_no_gradient(rng):
    loss = SoftmaxCrossEntropy()
    size = len(pickle.dumps(loss))
    loss.forward(rng.standard_normal((1000, 3)), [0] * 1000)
    assert len(pickle.dumps(loss)) <= size
    with pytest.raises(RuntimeError, match="call forward first"):
        copy.deepcopy(loss).backward()


def test_copies_of_training_go_on_alike(xp, rng):
    net, loss = net_of(rng, xp), SoftmaxCrossEntropy()
    optimizer = SGD(net, lr=0.1, momentum=0.9, weight_decay=0.01)
    x, y = rng.standard_normal((4, 6)), [0, 2, 1, 0]

    def train(net, optimizer):
        for _ in range(2):
            loss.forward(net.forward(x), y)
            net.backward(loss.backward())
            optimizer.step()
        return net.state_dict()

    train(net, optimizer)
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    assert all(its_optimizer.model is its_net for its_net, its_optimizer in copies)
    wanted = train(net, optimizer)
    for its_net, its_optimizer in copies:
        for name, values in train(its_net, its_optimizer).items():
            np.testing.assert_array_equal(values, wanted[name])
        assert its_optimizer.lr == 0.1


def test_a_shallow_copy_shares_the_layers(rng):
    net = tied_net(rng, how="transposed")
    held = net.params
    made = copy.copy(net)
    assert made.layers == net.layers
    assert all(made.params[name] is held[name] for name in held)
