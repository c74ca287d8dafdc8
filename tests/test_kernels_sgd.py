"""The step of SGD as a kernel: NumPy's bits at every tail, nothing touched outside, and what it leaves to others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.kernels.loops import passes
from rectilinear.kernels.loops.elementwise import RUN_BYTES
from rectilinear.kernels.micro.library import host_simd
from rectilinear.kernels.runtime import forks
from rectilinear.kernels.runtime.memory import CHANGED
from rectilinear.nn import SGD, Affine, Module, Sequential
from rectilinear.nn.sgd import Rates, moved
from rectilinear.threads import num_threads

from . import subprocesses
from .nets import net_of, square_net

backend = NumbaBackend()

RATES = [Rates(0.1, momentum, decay) for momentum in (0.0, 0.9) for decay in (0.0, 0.01)]


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype[Any]:
    return np.dtype(request.param)


@pytest.fixture(params=RATES, ids=lambda rates: f"momentum {rates.momentum} decay {rates.weight_decay}")
def rates(request: pytest.FixtureRequest) -> Rates:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


class Arrays:
    """w, dw and v of parameters of these shapes, full of normal values."""

    def __init__(self, rng: np.random.Generator, dtype: Any, *shapes: Any) -> None:
        self.w, self.dw, self.v = (tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes) for _ in range(3))

    def wanted(self, rates: Rates, decayed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What NumPy makes of w and v."""
        w, v = [], []
        for i, arrays in enumerate(zip(self.w, self.dw, self.v, strict=True)):
            with np.errstate(all="ignore"):
                value, velocity = moved(*arrays, rates if i < decayed else rates._replace(weight_decay=0.0))
            w.append(value)
            v.append(arrays[2].copy() if velocity is None else velocity)
        return w, v

    def step(self, rates: Rates, decayed: int) -> bool | None:
        return backend.sgd_step(self.w, self.dw, self.v if rates.momentum else (), decayed, *rates)

    def assert_hold(self, wanted: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
        """These values to the bit; NaNs may be any."""
        for got, values in zip((*self.w, *self.v), (*wanted[0], *wanted[1]), strict=True):
            np.testing.assert_array_equal(got, values)
            np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(values[~np.isnan(values)]))


# ---------------------------------------------------------------- values


def test_every_tail(dtype: np.dtype[Any], rates: Rates, rng: np.random.Generator) -> None:
    lanes = host_simd().lanes(dtype.itemsize)
    for count in [*range(4 * lanes + 2), 1001]:
        arrays = Arrays(rng, dtype, count)
        wanted = arrays.wanted(rates, 1)
        assert arrays.step(rates, 1) is False
        arrays.assert_hold(wanted)


def test_all_parameters_of_any_rank_in_one_call(dtype: np.dtype[Any], rates: Rates, rng: np.random.Generator) -> None:
    arrays = Arrays(rng, dtype, (5, 7), (), (0, 3), (2, 3, 4), 7, 1, 0)
    wanted = arrays.wanted(rates, 3)
    assert arrays.step(rates, 3) is False
    arrays.assert_hold(wanted)


def test_columns_and_unaligned_elements(dtype: np.dtype[Any], rates: Rates, rng: np.random.Generator) -> None:
    arrays = Arrays(rng, dtype, (9, 5), (8, 3))

    def elsewhere(a: np.ndarray) -> np.ndarray:
        made: np.ndarray = np.ndarray(a.shape, dtype, np.zeros(a.nbytes + 1, "u1"), 1, order="F")
        made[...] = a
        return made

    arrays.w, arrays.dw, arrays.v = (tuple(map(elsewhere, some)) for some in (arrays.w, arrays.dw, arrays.v))
    assert not arrays.w[0].flags.aligned
    wanted = arrays.wanted(rates, 2)
    assert arrays.step(rates, 2) is False
    arrays.assert_hold(wanted)


def test_long_ones_are_the_same_for_every_number_of_threads(dtype: np.dtype[Any], rates: Rates, rng: np.random.Generator) -> None:
    run = RUN_BYTES // dtype.itemsize
    arrays = Arrays(rng, dtype, 3, 2 * run, 0, run - 1, run + 1, 5, 3 * run + 7, 0)
    wanted, before = arrays.wanted(rates, 4), [a.copy() for a in (*arrays.w, *arrays.v)]
    for threads in (1, 2, 3):
        for array, values in zip((*arrays.w, *arrays.v), before, strict=True):
            array[...] = values
        with num_threads(threads):
            assert arrays.step(rates, 4) is False
        arrays.assert_hold(wanted)


@pytest.mark.parametrize("count", [1, 5, 64, 200_001])
def test_overflow_is_what_comes_of_finite_values(count: int, dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    """Wherever it is; what was infinite or NaN before has overflowed earlier."""
    most = np.finfo(dtype).max
    rates = Rates(2.0, 0.5, 0.5)
    for place in {0, count // 2, count - 1}:
        for w, dw, v, overflows in [
            (1.0, most, 1.0, True),
            (-most, most, 0.0, True),
            (most, -most / 2, most, True),
            (most, 0.0, most, False),
            (most / 4, most / 4, 0.0, False),
            (np.inf, 1.0, 1.0, False),
            (1.0, -np.inf, 1.0, False),
            (1.0, 1.0, np.nan, False),
            (np.inf, np.inf, -np.inf, False),
        ]:
            arrays = Arrays(rng, dtype, count, 3)
            arrays.w[0][place], arrays.dw[0][place], arrays.v[0][place] = w, dw, v
            if count > 1:
                arrays.w[0][place - 1] = np.nan  # and does not hide it
            wanted = arrays.wanted(rates, 1)
            assert arrays.step(rates, 1) is overflows, (place, w, dw, v)
            arrays.assert_hold(wanted)


GUARDED = """
import numpy as np
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.nn.sgd import Rates, moved
from tests.guard import guarded

backend, rng = NumbaBackend(), np.random.default_rng(5)
for T in ("f4", "f8"):
    for count in (*range(70), 1021, 5000):
        for at_end in (False, True):
            w, dw, v = (guarded(rng.standard_normal(count).astype(T), at_end) for _ in range(3))
            for momentum in (0.0, 0.9):
                for decay in (0.0, 0.1):
                    rates = Rates(0.1, momentum, decay)
                    value, velocity = moved(w, dw, v, rates)
                    assert backend.sgd_step((w,), (dw,), (v,) if momentum else (), 1, *rates) is False
                    assert (w == value).all() and (not momentum or (v == velocity).all())
print("untouched")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="guard pages by mprotect")
def test_nothing_is_touched_outside() -> None:
    assert subprocesses.run(GUARDED, limit_s=250) == "untouched\n"


# ---------------------------------------------------------------- what it leaves to others


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


class Subclass(np.ndarray):
    """NumPy's arrays by another name."""


def put(name: str, make: Callable[[Arrays], Any]) -> Callable[[Arrays], None]:
    """Put something in place of the second w, dw or v."""

    def change(arrays: Arrays) -> None:
        first, _, last = getattr(arrays, name)
        setattr(arrays, name, (first, make(arrays), last))

    return change


UNUSUAL: dict[str, Callable[[Arrays], None]] = {
    "no gradient": put("dw", lambda a: None),
    "no velocity": put("v", lambda a: None),
    "a list": put("dw", lambda a: a.dw[1].tolist()),
    "a scalar": put("dw", lambda a: a.dw[1][0, 0]),
    "a subclass": put("w", lambda a: a.w[1].view(Subclass)),
    "another dtype": put("dw", lambda a: a.dw[1].astype("f2")),
    "integers": put("v", lambda a: a.v[1].astype("i4")),
    "another byte order": put("w", lambda a: a.w[1].astype(a.w[1].dtype.newbyteorder())),
    "a transposed gradient": put("dw", lambda a: np.asfortranarray(a.dw[1])),
    "a transposed velocity": put("v", lambda a: np.asfortranarray(a.v[1])),
    "another shape": put("dw", lambda a: a.dw[1][:, :-1].copy()),
    "another rank": put("v", lambda a: a.v[1].ravel()),
    "gaps": put("w", lambda a: np.repeat(a.w[1], 2, axis=1)[:, ::2]),
    "a stride of 0": put("dw", lambda a: np.broadcast_to(a.dw[1][0], a.dw[1].shape)),
    "backwards": put("v", lambda a: a.v[1][::-1]),
    "w read-only": put("w", lambda a: read_only(a.w[1])),
    "v read-only": put("v", lambda a: read_only(a.v[1])),
    "the same parameter twice": put("w", lambda a: a.w[0]),
    "a part of another parameter": put("w", lambda a: a.w[2].reshape(-1)[1:13].reshape(3, 4)),
    "its gradient is itself": put("dw", lambda a: a.w[1]),
    "its gradient is another parameter": put("dw", lambda a: a.w[0]),
    "its gradient is a velocity": put("dw", lambda a: a.v[2].reshape(-1)[-12:].reshape(3, 4)),
    "its velocity is a gradient": put("v", lambda a: a.dw[0]),
    "its velocity is another's": put("v", lambda a: a.v[0]),
    "its velocity is a parameter": put("v", lambda a: a.w[2].reshape(-1)[:12].reshape(3, 4)),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_the_unusual_is_left_to_others(unusual: str, dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    """Before anything is written, and whatever it is; the same without it is done."""
    rates = Rates(0.1, 0.9, 0.1)
    arrays = Arrays(rng, dtype, (3, 4), (3, 4), (5, 6))
    wanted = arrays.wanted(rates, 3)
    assert arrays.step(rates, 3) is False
    arrays.assert_hold(wanted)
    UNUSUAL[unusual](arrays)
    held = [(a, np.copy(a)) for a in (*arrays.w, *arrays.dw, *arrays.v) if isinstance(a, np.ndarray)]
    assert arrays.step(rates, 3) is None
    for array, values in held:
        np.testing.assert_array_equal(array, values)


def test_gradients_may_be_one(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    """They are only read."""
    arrays = Arrays(rng, dtype, (3, 4), (3, 4))
    arrays.dw = arrays.dw[:1] * 2
    wanted = arrays.wanted(RATES[-1], 1)
    assert arrays.step(RATES[-1], 1) is False
    arrays.assert_hold(wanted)


def test_only_native_floats_come_first(rng: np.random.Generator) -> None:
    for dtype in ("f2", ">f4", "i4", "c8", "O"):
        assert Arrays(rng, dtype, 3).step(RATES[0], 0) is None
    assert backend.sgd_step((None,), (None,), (), 0, *RATES[0]) is None


def test_a_child_that_cannot_compile_leaves_it_to_others(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    def refuse() -> None:
        raise forks.CannotCompileError

    monkeypatch.setattr("rectilinear.backends.numba_backend._passes", refuse)
    assert Arrays(rng, "f4", 3).step(RATES[0], 0) is None


# ---------------------------------------------------------------- as nn.SGD uses it


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the kernel did it, for each step of this test; warnings are warnings, as users have them."""
    answers: list[bool] = []

    def spy(self: NumbaBackend, *given: Any) -> bool | None:
        answer = sgd_step(self, *given)
        answers.append(answer is not None)
        return answer

    sgd_step = NumbaBackend.sgd_step
    monkeypatch.setattr(NumbaBackend, "sgd_step", spy)
    with rectilinear.use_backend("numba"), warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("always")
        yield answers


def with_gradients(net: Module, rng: np.random.Generator) -> Any:
    for _, layer in net.leaves():
        layer.grads = {name: rng.standard_normal(value.shape).astype(value.dtype) for name, value in layer.params.items()}
    return net


def test_a_plain_net_is_moved_by_it(served: list[bool], rates: Rates, dtype: np.dtype[Any]) -> None:
    """To the bits of the long way, in place, from the second step with momentum on, which has a velocity to go on with."""
    net, other = (with_gradients(net_of(np.random.default_rng(0), dtype=dtype.name), np.random.default_rng(1)) for _ in range(2))
    optimizer, reference = SGD(net, *rates), SGD(other, *rates)
    held = dict(net.params)
    for _ in range(3):
        optimizer.step()
        with rectilinear.use_backend("numpy"):
            reference.step()
    assert served == [rates.momentum == 0, True, True]
    assert all(net.params[name] is array for name, array in held.items())
    for got, wanted in ((net.params, other.params), (optimizer.velocity, reference.velocity)):
        assert list(got) == list(wanted)
        for name, values in wanted.items():
            np.testing.assert_array_equal(got[name], values)


def test_it_starts_and_ends_with_momentum(served: list[bool], rng: np.random.Generator) -> None:
    """Without a velocity, and with one that is to be dropped, the long way is gone."""
    optimizer = SGD(with_gradients(net_of(rng), rng), 0.1)
    for momentum in (0.0, 0.5, 0.5, 0.0, 0.0):
        optimizer.momentum = momentum
        optimizer.step()
        assert bool(optimizer.velocity) == bool(momentum)
    assert served == [True, False, True, True]  # it was not asked the one time that a velocity was dropped


@pytest.mark.parametrize("what", ["tied", "twice", "two dtypes", "float16", "gaps", "no layers"])
def test_other_nets_go_the_long_way(served: list[bool], what: str, rng: np.random.Generator) -> None:
    net = square_net(rng)
    match what:
        case "tied":
            net[1].params["w"] = net[0].params["w"].T
        case "twice":
            net = Sequential(net[0], net[0])
        case "two dtypes":
            net[1].params["b"] = np.zeros(3)
        case "float16":
            net = Affine(3, 3, rng=rng, dtype="float16")
        case "gaps":
            net[0].params["w"] = np.zeros((3, 6), "f4")[:, ::2]
        case "no layers":
            net = Sequential()
    before = {name: value.copy() for name, value in with_gradients(net, rng).params.items()}
    SGD(net, 0.5).step()
    assert served == ([] if what == "no layers" else [False])
    assert all((value != before[name]).any() for name, value in net.params.items())


@pytest.mark.parametrize("told", [{"over": "raise"}, {"invalid": "raise"}, {"under": "warn"}, {"over": "call"}, "error"])
def test_who_wants_exceptions_goes_the_long_way(served: list[bool], told: Any, rng: np.random.Generator) -> None:
    """What is moved in place could not be taken back."""
    optimizer = SGD(with_gradients(net_of(rng), rng), 0.1)
    if told == "error":
        warnings.simplefilter("error", RuntimeWarning)
        optimizer.step()
    else:
        with np.errstate(**told):
            optimizer.step()
    assert served == []
    with np.errstate(over="ignore", invalid="ignore"):  # then a filter has nothing to say
        optimizer.step()
    assert served == [True]


@pytest.mark.parametrize("told", ["warn", "ignore"])
def test_an_overflow_is_warned_of_once_and_all_has_moved(served: list[bool], told: Any, rng: np.random.Generator) -> None:
    net = with_gradients(net_of(rng), rng)
    net[0].grads["b"][1] = 3e38
    before = {name: value.copy() for name, value in net.params.items()}
    optimizer = SGD(net, 10.0)
    with warnings.catch_warnings(record=True) as caught, np.errstate(over=told):
        optimizer.step()
        optimizer.step()  # what is infinite by now is no news
    assert served == [True, True]
    assert [str(warning.message) for warning in caught] == (["overflow encountered in SGD.step"] if told == "warn" else [])
    assert all(warning.filename == __file__ for warning in caught)
    assert np.isinf(net.params["0.b"][1])
    assert all((value != before[name]).any() for name, value in net.params.items())


def test_backends_need_not_have_it(served: list[bool], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.delattr(NumbaBackend, "sgd_step")
    layer = with_gradients(Affine(2, 2, rng=rng), rng)
    before = layer.params["w"].copy()
    SGD(layer, 0.5).step()
    np.testing.assert_array_equal(layer.params["w"], before - np.float32(0.5) * layer.grads["w"])
    assert served == []


def test_tuples_of_unlike_lengths_are_read_no_further_than_they_go(dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    a = Arrays(rng, dtype, (3,), (4,))
    before = [w.copy() for w in a.w]
    step = passes.sgd[dtype.itemsize]
    for dw, v, momentum in ((a.dw[:1], a.v, 0.9), (a.dw, a.v[:1], 0.9), (a.dw[:1], a.v, 0.0)):
        assert step(id(a.w), id(dw), id(v), 0, 0.1, momentum, 0.0, 1) == CHANGED
    for w, was in zip(a.w, before, strict=True):
        np.testing.assert_array_equal(w, was)
    assert step(id(a.w), id(a.dw), id(a.v[:1]), 0, 0.1, 0.0, 0.0, 1) == 0  # without momentum v is not looked at
