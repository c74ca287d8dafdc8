"""(c), (d) The call path of CuPy arrays: the fast look decides as the general one does, and what a call costs does not creep up.

On the stand-in, and on genuine arrays where nothing has to be computed.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_standin
import gpu_cases
import host_cost
import numpy as np
import pytest
from genuine import Genuine, genuine
from host_backend import Host
from standin import Device

import rectilinear as r
from rectilinear import layers, plain
from rectilinear.backends import registry
from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime
from rectilinear.keepmask import KeepMask

Make = Callable[..., Any]
"""An array of the library in question with these values, on a device of this number."""

N, D, M = 5, 6, 8


@pytest.fixture(params=["numpy", "stand-in", "genuine"])
def make(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The public functions serve the arrays that this makes."""
    if request.param == "numpy":
        monkeypatch.setattr(registry, "active", lambda: registry._load("numpy").backend)  # type: ignore[union-attr]
        return lambda values, device=0: values
    backend = host.backend
    if request.param == "stand-in":
        bench_standin.install(host, monkeypatch.setattr)
    else:
        cp: Any = Genuine()
        backend = CupyBackend(lambda: Runtime(cp, host.modules.__getitem__), lambda backend: Probe(True))
        for module in host.modules.values():
            module.cp = cp
    monkeypatch.setattr(registry, "serving", lambda library: backend)
    return genuine if request.param == "genuine" else lambda values, device=0: host.cp.ndarray._of(values, Device(device))


@pytest.fixture
def on_standin(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[np.ndarray], Any]:
    bench_standin.install(host, monkeypatch.setattr)
    monkeypatch.setattr(registry, "serving", lambda library: host.backend)
    return host.cp.ndarray._of


def general_look_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "plain_backend", lambda *arguments, **named: None)


# ---------------------------------------------------------------- bad calls


class Given:
    """What a bad call is made of: good arguments, and a way to make others."""

    def __init__(self, make: Make, dtype: Any = "f4") -> None:
        self.make, self.dtype = make, np.dtype(dtype)
        self.x, self.w, self.b, self.dout, self.z = (self.of(*shape) for shape in ((N, D), (D, M), (M,), (N, M), (N, M)))
        self.mask = KeepMask(self.of(N, 1, dtype="u1"), (N, M))
        self.labels = make(np.arange(N))
        self.cache = ((self.x, self.w, self.b), self.mask)

    def of(self, *shape: int, dtype: Any = None, device: int = 0) -> Any:
        return self.make(np.ones(shape, self.dtype if dtype is None else dtype), device)

    def room(self, *places: tuple[int, tuple[int, ...]]) -> list[Any]:
        """Arrays in one piece of memory, each from its element on."""
        memory = np.ones(500, self.dtype)
        return [self.make(memory[start : start + int(np.prod(shape))].reshape(shape)) for start, shape in places]


def overlapping(call: Callable[[Given, Any, Any], Any], first: tuple[int, ...], second: tuple[int, ...]) -> Callable[[Given], Any]:
    return lambda g: call(g, *g.room((0, first), (int(np.prod(first)) - 1, second)))


BAD: dict[str, Callable[[Given], Any]] = {
    "features": lambda g: r.affine_relu_forward(g.x, g.of(D + 1, M), g.b),
    "bias": lambda g: r.affine_relu_forward(g.x, g.w, g.of(M + 1)),
    "bias of two axes": lambda g: r.affine_forward(g.x, g.w, g.of(1, M)),
    "0-d x": lambda g: r.affine_forward(g.of(), g.w, g.b),
    "w of one axis": lambda g: r.affine_forward(g.x, g.b, g.b),
    "groups": lambda g: r.affine_forward(g.of(2, N, D), g.of(3, D, M), None),
    "bias of the plain form": lambda g: r.affine_forward(g.of(3, N, D), g.of(3, D, M), g.b),
    "features of images": lambda g: r.affine_relu_forward(g.of(N, 2, 2), g.w, g.b),
    "features of no images": lambda g: r.affine_forward(g.of(0, 2, 2), g.w, g.b),
    "bias for images": lambda g: r.affine_forward(g.of(N, 2, 3), g.w, g.of(M + 1)),
    "out for images": lambda g: r.affine_relu_forward(g.of(N, 2, 3), g.w, g.b, out=g.of(N, M + 1)),
    "dout for images": lambda g: r.affine_backward(g.of(N, M + 1), (g.of(N, 2, 3), g.w, g.b)),
    "mask for images": lambda g: r.affine_relu_backward(g.dout, ((g.of(N, 2, 3), g.w, g.b), g.of(N, M + 1))),
    "needs for images": lambda g: r.affine_backward(g.dout, (g.of(N, 2, 3), g.w, g.b), needs=(1, 1)),  # type: ignore[arg-type]
    "number for outs for images": lambda g: r.affine_backward(g.dout, (g.of(N, 2, 3), g.w, g.b), out=5),  # type: ignore[arg-type]
    "dx of flat samples": lambda g: r.affine_backward(g.dout, (g.of(N, 2, 3), g.w, g.b), out=(g.of(N, D), None, None)),
    "out over images": overlapping(lambda g, x, out: r.affine_relu_forward(x, g.w, g.b, out=out), (N, 2, 3), (N, M)),
    "features of a stack": lambda g: r.affine_relu_forward(g.of(2, N, D + 1), g.of(2, D, M), None),
    "dout for a stack": lambda g: r.affine_backward(g.of(2, N, M + 1), (g.of(2, N, D), g.of(2, D, M), g.of(2, M))),
    "out for a stack": lambda g: r.affine_forward(g.of(2, N, D), g.of(2, D, M), None, out=g.of(N, 2, M)),
    "db for a stack": lambda g: r.affine_backward(g.of(2, N, M), (g.of(2, N, D), g.of(2, D, M), g.of(2, M)), out=(None, None, g.of(M, 2))),
    "dx over dw of a stack": overlapping(
        lambda g, dx, dw: r.affine_backward(g.of(2, N, M), (g.of(2, N, D), g.of(2, D, M), None), out=(dx, dw, None)), (2, N, D), (2, D, M)
    ),
    "dout": lambda g: r.affine_backward(g.of(N, M + 1), g.cache[0]),
    "dout of a fused layer": lambda g: r.affine_relu_backward(g.of(M, N), g.cache),
    "mask of another shape": lambda g: r.affine_relu_backward(g.dout, (g.cache[0], KeepMask(g.of(N, 1, dtype="u1"), (N, M - 1)))),
    "z of another shape": lambda g: r.affine_relu_backward(g.dout, (g.cache[0], g.of(N, M + 1))),
    "relu of another shape": lambda g: r.relu_backward(g.dout, g.of(M, N)),
    "mask for x": lambda g: r.affine_forward(g.mask, g.w, g.b),
    "mask for dout": lambda g: r.relu_backward(g.mask, g.z),
    "mask for out": lambda g: r.relu_forward(g.x, out=g.mask),
    "None for w": lambda g: r.affine_relu_forward(g.x, None, g.b),
    "list for x": lambda g: r.relu_forward([1.0]),
    "list for w": lambda g: r.affine_forward(g.x, [[1.0]], g.b),
    "complex": lambda g: r.affine_forward(g.x, g.of(D, M, dtype="c8"), g.b),
    "another library": lambda g: r.affine_relu_forward(g.x, OTHER(np.ones((D, M), "f4")), g.b),
    "another library first": lambda g: r.affine_relu_forward(OTHER(np.ones((N, D), "f4")), g.w, g.b),
    "another library's mask": lambda g: r.relu_backward(g.dout, KeepMask(OTHER(np.ones((N, 1), "u1")), (N, M))),
    "another library's out": lambda g: r.relu_forward(g.x, out=OTHER(np.ones((N, D), "f4"))),
    "another library's labels": lambda g: r.softmax_loss(g.x, OTHER(np.arange(N))),
    "float labels": lambda g: r.softmax_loss(g.x, g.of(N)),
    "too few labels": lambda g: r.softmax_loss(g.x, g.make(np.arange(N - 1))),
    "labels of two axes": lambda g: r.softmax_loss(g.x, g.make(np.ones((N, 1), int))),
    "scores of one axis": lambda g: r.softmax_loss(g.b, g.labels),
    "no classes": lambda g: r.softmax_loss(g.of(N, 0), g.labels),
    "no bias to sum for": lambda g: r.affine_backward(g.dout, (g.x, g.w, None), out=(None, None, g.of(M))),
    "out of what is not needed": lambda g: r.affine_backward(g.dout, g.cache[0], needs=(False, True, True), out=(g.of(N, D), None, None)),
    "needs": lambda g: r.affine_relu_backward(g.dout, g.cache, needs=(1, 1)),  # type: ignore[arg-type]
    "shape of out": lambda g: r.affine_relu_forward(g.x, g.w, g.b, out=g.of(M, N)),
    "dtype of out": lambda g: r.affine_relu_forward(g.x, g.w, g.b, out=g.of(N, M, dtype="f8")),
    "shape of dw": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(None, g.of(M, D), None)),
    "dtype of db": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(None, None, g.of(M, dtype="f8"))),
    "one array for out": lambda g: r.affine_relu_backward(g.dout, g.cache, out=g.of(N, D)),
    "out is x": lambda g: r.relu_forward(g.x, out=g.x),
    "out is the cache": lambda g: r.relu_backward(g.dout, g.z, out=g.z),
    "dx is x": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(g.x, None, None)),
    "dw is w": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(None, g.w, None)),
    "db is b": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(None, None, g.b)),
    "out over x": overlapping(lambda g, x, out: r.affine_relu_forward(x, g.w, g.b, out=out), (N, D), (N, M)),
    "out over w": overlapping(lambda g, w, out: r.affine_relu_forward(g.x, w, g.b, out=out), (D, M), (N, M)),
    "out over b": overlapping(lambda g, b, out: r.affine_relu_forward(g.x, g.w, b, out=out), (M,), (N, M)),
    "out under b": overlapping(lambda g, out, b: r.affine_relu_forward(g.x, g.w, b, out=out), (N, M), (M,)),
    "out over labels' scores": overlapping(lambda g, x, out: r.softmax_loss(x, g.labels, out=out), (N, D), (N, D)),
    "out over dout in part": overlapping(lambda g, dout, out: r.relu_backward(dout, g.mask, out=out), (N, M), (N, M)),
    "dx over dw": overlapping(lambda g, dx, dw: r.affine_backward(g.dout, g.cache[0], out=(dx, dw, None)), (N, D), (D, M)),
    "dw over db": overlapping(lambda g, dw, db: r.affine_backward(g.dout, g.cache[0], out=(None, dw, db)), (D, M), (M,)),
    "dx is x, among others": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(g.x, g.of(D, M), g.of(M))),
    "dx over db": overlapping(lambda g, dx, db: r.affine_backward(g.dout, g.cache[0], out=(dx, g.of(D, M), db)), (N, D), (M,)),
    "one row of out for all": lambda g: r.relu_forward(g.x, out=g.make(np.lib.stride_tricks.as_strided(np.ones(D, "f4"), (N, D), (0, 4)))),
    "out over reversed x": overlapping(lambda g, x, out: r.relu_forward(x[::-1], out=out), (N, D), (N, D)),
    "out within a column": lambda g: r.relu_forward((big := g.of(N, 2 * D))[:, ::2], out=big[:, :D]),
    "out over the mask's bits": lambda g: _out_over_bits(g),
}


def _out_over_bits(g: Given) -> Any:
    memory = np.ones(N * M, g.dtype)
    bits = g.make(memory.view(np.uint8)[-N:].reshape(N, 1))
    return r.relu_backward(g.dout, KeepMask(bits, (N, M)), out=g.make(memory.reshape(N, M)))


ON_TWO_DEVICES: dict[str, Callable[[Given], Any]] = {
    "w": lambda g: r.affine_relu_forward(g.x, g.of(D, M, device=1), g.b),
    "b": lambda g: r.affine_relu_forward(g.x, g.w, g.of(M, device=1)),
    "x": lambda g: r.affine_forward(g.of(N, D, device=1), g.w, g.b),
    "dout": lambda g: r.affine_relu_backward(g.of(N, M, device=1), g.cache),
    "mask": lambda g: r.relu_backward(g.dout, KeepMask(g.of(N, 1, dtype="u1", device=1), (N, M))),
    "z": lambda g: r.affine_relu_backward(g.dout, (g.cache[0], g.of(N, M, device=1))),
    "labels": lambda g: r.softmax_loss(g.x, g.make(np.arange(N), 1)),
    "out": lambda g: r.relu_forward(g.x, out=g.of(N, D, device=1)),
    "dw": lambda g: r.affine_relu_backward(g.dout, g.cache, out=(None, g.of(D, M, device=1), None)),
}


def OTHER(values: np.ndarray) -> Any:  # noqa: N802 - a library that is neither NumPy nor CuPy
    import array_api_strict

    return array_api_strict.asarray(values)


def error_of(call: Callable[[Given], Any], given: Given) -> tuple[type[BaseException], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(given)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_gives_the_same_error_by_either_look(make: Make, host: Host, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given = Given(make)
    at_once = error_of(BAD[name], given)
    general_look_only(monkeypatch)
    assert error_of(BAD[name], given) == at_once
    assert host.launched == []
    assert host.cp.counts["products"] == 0


@pytest.mark.parametrize("name", ON_TWO_DEVICES)
def test_two_devices_give_the_same_error_by_either_look(make: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if isinstance(make(np.ones(1)), np.ndarray):
        return  # all of NumPy's are in one place
    given = Given(make)
    at_once = error_of(ON_TWO_DEVICES[name], given)
    assert "device" in at_once[1]
    general_look_only(monkeypatch)
    assert error_of(ON_TWO_DEVICES[name], given) == at_once


def test_numpy_arrays_among_those_of_a_device_are_told_by_either_look(host: Host, on_standin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors() -> Iterator[tuple[type[BaseException], str]]:
        x, w, b, out = (np.ones(shape, "f4") for shape in ((N, D), (D, M), (M,), (N, M)))
        for i, j in itertools.product(range(4), range(2)):
            arrays: list[Any] = [on_standin(a) if (k == i) == bool(j) else a for k, a in enumerate((x, w, b, out))]
            yield error_of(lambda g, a=arrays: r.affine_relu_forward(*a[:3], out=a[3]), Given(on_standin))

    at_once = list(errors())
    general_look_only(monkeypatch)
    assert list(errors()) == at_once


# ---------------------------------------------------------------- good calls


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_both_looks_come_to_the_same_numbers(on_standin: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    rng = np.random.default_rng(3)
    dtype_ = gpu_cases.numpy_dtype(dtype)
    shapes = ((N, D), (D, M), (M,), (N, M))
    x, w, b, dout = (on_standin(rng.standard_normal(shape).astype(dtype_)) for shape in shapes)
    labels = on_standin(np.arange(N))

    def results(with_out: bool) -> list[bytes]:
        def outs(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
            return tuple(on_standin(np.zeros(shape, dtype_)) if with_out else None for shape in shapes)

        y, cache = r.affine_relu_forward(x, w, b, out=outs((N, M))[0])
        found = [y, r.affine_forward(x, w, None, out=outs((N, M))[0])[0], r.relu_forward(x, out=outs((N, D))[0])[0]]
        for keep in (cache[1], y):
            gradients = outs((N, D), (D, M), (M,)) if with_out else None
            found += r.affine_relu_backward(dout, (cache[0], keep), out=gradients)
            found.append(r.relu_backward(dout, keep, out=outs((N, M))[0]))
        found += r.affine_backward(dout, cache[0], needs=(False, False, True))[2:]
        found += r.softmax_loss(x, labels, out=outs((N, D))[0])
        for given in (
            [on_standin(np.stack([a._host] * 2)) for a in (x, w, b, dout)],
            [on_standin(x._host.reshape(N, 2, 3)), w, b, dout],
        ):
            y, cache = r.affine_relu_forward(*given[:3])
            found += [r.affine_forward(*given[:3])[0], y, *r.affine_relu_backward(given[3], cache)]
            assert found[-3].shape == given[0].shape
        assert {a.dtype for a in found} == {dtype_}
        return [a.get().tobytes() for a in found]

    at_once = [results(with_out) for with_out in (False, True)]
    assert at_once[0] == at_once[1]
    general_look_only(monkeypatch)
    assert [results(with_out) for with_out in (False, True)] == at_once


@pytest.mark.parametrize("dtype", [*gpu_cases.DTYPES, "int32", ">f4"])
def test_which_genuine_arrays_are_seen_at_once(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    backend = object()
    monkeypatch.setattr(registry, "serving", lambda library: backend)
    native = dtype in gpu_cases.DTYPES
    T = gpu_cases.numpy_dtype(dtype) if native else np.dtype(dtype)
    x, w, b, mask = (genuine(np.zeros(shape, t)) for shape, t in (((N, D), T), ((D, M), T), ((M,), T), ((N, 1), "u1")))
    keep = KeepMask(mask, (N, M))
    assert (plain.plain_backend(x, (w,), b, keep) is backend) == native

    class Subclass(type(x)):  # type: ignore[misc]
        __module__ = "cupy"

    usual = [x, w, b, keep]
    subclasses = x.view(Subclass), w.view(Subclass), b.view(Subclass), KeepMask(mask.view(Subclass), (N, M))
    narrow = "i2" if T.itemsize != 2 else "i4"
    other_dtypes = *(genuine(np.zeros(a.shape, narrow)) for a in (x, w, b)), genuine(np.zeros((N, M), narrow))
    on_host = *(np.zeros(a.shape, T) for a in (x, w, b)), KeepMask(np.zeros((N, 1), "u1"), (N, M))
    for others in (subclasses, other_dtypes, on_host):
        for i, other in enumerate(others):
            first, second, third, fourth = (*usual[:i], other, *usual[i + 1 :])
            assert plain.plain_backend(first, (second,), third, fourth) is None


def test_what_is_seen_to_lie_apart_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of one piece of memory, two at a time; and those that are told to overlap without need are none of the usual ones."""
    rng = np.random.default_rng(4)
    memory = np.zeros(96, "f4")
    at_once = 0
    for _ in range(2000):
        views = []
        for _ in range(3):
            start, rows, cols = rng.integers(0, 60), rng.integers(0, 5), rng.integers(0, 5)
            view = memory[start : start + rows * cols].reshape(rows, cols)
            views.append([view, view[::-1], view.T, view[:, ::2]][rng.integers(0, 4)])
        out, *others = views
        fits = plain.fits_at_once(genuine(out), out.shape, out.dtype, [genuine(other) for other in others])
        overlaps = any(np.shares_memory(out, other) for other in others)
        assert not (fits and overlaps)
        bounds = [np.lib.array_utils.byte_bounds(a) for a in views]
        clear = all(a.size and (a.flags.c_contiguous or a.flags.f_contiguous) for a in views) and out.flags.c_contiguous
        if clear and all(bounds[0][1] <= low or high <= bounds[0][0] for low, high in bounds[1:]):
            assert fits
        at_once += fits
    assert at_once > 100


# ---------------------------------------------------------------- what a call costs

STEP = ("affine_relu_forward", "affine_relu_backward")


@pytest.fixture
def counts(host: Host, on_standin: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Counter[str]]:
    """What a call of the public functions does: allocations, launches, products, reads of arrays, Python calls inside the package."""
    found: Counter[str] = Counter()
    cp, array = host.cp, host.cp.ndarray
    package = str(Path(r.__file__).parent)
    quiet = [False]

    def counted(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found[name] += 1
            quiet[0] = True  # what CuPy reads is CuPy's
            try:
                return result(*arguments)
            finally:
                quiet[0] = False

        return call

    def read(self: Any, name: str) -> Any:
        if not quiet[0] and (name[0] != "_" or name.endswith("contiguous")):  # not what the stand-in reads of itself
            found["reads"] += 1
        return object.__getattribute__(self, name)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found["calls"] += 1

    class Kernels:
        def get_function(self, name: str) -> Callable[..., None]:
            return counted("launches", lambda grid, block, args: None)

    empty = cp.empty
    monkeypatch.setattr(cp, "empty", counted("allocations", lambda shape, dtype: empty(shape, dtype)))
    monkeypatch.setattr(cp.cuda, "alloc", counted("allocations", cp.cuda.alloc))
    backend = CupyBackend(lambda: Runtime(cp, lambda dtype: Kernels()), lambda backend: Probe(True))
    monkeypatch.setattr(backend, "_product", counted("products", lambda a, b, out, transposed: None))
    monkeypatch.setattr(registry, "_loaded", {"cupy": registry._Loaded(backend, Probe(True))})
    monkeypatch.setattr(registry, "serving", SERVING)
    monkeypatch.setattr(array, "__getattribute__", read, raising=False)
    for name in ("compute_capability", "__enter__", "__exit__"):
        monkeypatch.setattr(Device, name, property(lambda self: pytest.fail("a device was asked for or entered")))

    def of(call: Callable[[], Any]) -> Counter[str]:
        call()  # what is worked out once for a shape
        found.clear()
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(before)
        return found

    return of


SERVING = registry.serving

# allocations, launches, products; then reads of CuPy's arrays and Python calls within the package, which are to become fewer only
COSTS = {
    "small: forward": ((1, 1, 0), 21, 8),
    "small: forward, out=": ((1, 1, 0), 40, 12),
    "small: backward": ((1, 1, 0), 29, 10),
    "small: backward, out=": ((0, 1, 0), 73, 20),
    "large: forward": ((2, 1, 1), 18, 7),
    "large: forward, out=": ((1, 1, 1), 36, 11),
    "large: backward": ((4, 1, 2), 34, 16),
    "large: backward, out=": ((1, 1, 2), 76, 26),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_call_costs_no_more_than_it_did(counts: Any, on_standin: Any, name: str) -> None:
    layer, what = name.split(": ")
    n, d, m = host_cost.SHAPES[layer]
    given, results = ((n, d), (d, m), (m,), (n, m)), ((n, m), (n, d), (d, m), (m,))
    x, w, b, dout, y, dx, dw, db = (on_standin(host_cost.aligned(shape, "f4")) for shape in given + results)
    cache = (x, w, b), KeepMask(on_standin(host_cost.aligned((n, m // 8), "u1")), (n, m))
    call = {
        "forward": lambda: r.affine_relu_forward(x, w, b),
        "forward, out=": lambda: r.affine_relu_forward(x, w, b, out=y),
        "backward": lambda: r.affine_relu_backward(dout, cache),
        "backward, out=": lambda: r.affine_relu_backward(dout, cache, out=(dx, dw, db)),
    }[what]
    found = counts(call)
    work, reads, calls = COSTS[name]
    assert (found["allocations"], found["launches"], found["products"]) == work
    assert found["reads"] <= reads
    assert found["calls"] <= calls


def test_the_suite_that_times_it_runs() -> None:
    with host_cost.idle_backend():
        for layer, (n, _, m) in host_cost.SHAPES.items():
            for call in host_cost.calls(layer).values():
                call()
            y, (_, mask) = host_cost.calls(layer)["affine_relu_forward"]()
            assert y.shape == mask.shape == (n, m)


# ---------------------------------------------------------------- masks

COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("shape", [(N, M), (3, 13), (2, 3, 9), (0, 4), (4, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("compare", COMPARISONS)
def test_a_mask_on_a_device_is_compared_there(on_standin: Any, compare: Any, shape: tuple[int, ...]) -> None:
    keep = np.random.default_rng(5).random(shape) < 0.5
    mask = KeepMask(on_standin(np.packbits(keep, axis=-1, bitorder="little")), shape)
    signs = np.where(keep, 1, -1)
    array = np.random.default_rng(6).integers(-2, 3, shape).astype("f4")
    others: list[tuple[Any, Any]] = [(value, value) for value in (0, 0.0, 1, -1, np.nan, np.inf, np.float32(0), np.array(0.0), True)]
    others += [(on_standin(a), a) for a in (array, np.full(shape, np.nan, "f4"), array[..., :1])]
    for other, value in others:
        for got, want in ((compare(mask, other), compare(signs, value)), (compare(other, mask), compare(value, signs))):
            assert type(got) is type(mask.bits)
            assert got.dtype == bool
            assert np.array_equal(got.get(), want)
    assert np.array_equal(compare(mask, mask).get(), compare(signs, signs))


def test_backward_of_cs231n_runs_on_a_mask_of_a_device(on_standin: Any) -> None:
    rng = np.random.default_rng(7)
    x, w, b, dout = (on_standin(rng.standard_normal(shape).astype("f4")) for shape in ((N, D), (D, M), (M,), (N, M)))
    _, (_, cache) = r.affine_relu_forward(x, w, b)
    got = dout * (cache > 0)
    assert got.dtype == np.float32
    assert np.array_equal(got.get(), r.relu_backward(dout, cache).get())


@pytest.mark.parametrize("refused", [np.asarray, lambda mask: mask + 1, lambda mask: np.exp(mask), lambda mask: np.maximum(mask, 0)])
def test_nothing_else_is_computed_with_it(on_standin: Any, refused: Any) -> None:
    for wrap in (on_standin, genuine):
        with pytest.raises(TypeError, match="mask"):
            refused(KeepMask(wrap(np.zeros((N, 1), "u1")), (N, M)))


@pytest.mark.parametrize("compare", COMPARISONS)
def test_genuine_arrays_leave_a_comparison_to_the_mask(monkeypatch: pytest.MonkeyPatch, compare: Any) -> None:
    """In either order; there is no device to compute the answer."""

    class AskedError(Exception):
        pass

    def asked(self: KeepMask) -> Any:
        raise AskedError

    monkeypatch.setattr(KeepMask, "_signs", asked)
    mask, array = KeepMask(genuine(np.zeros((N, 1), "u1")), (N, M)), genuine(np.zeros((N, M), "f4"))
    for pair in ((mask, array), (array, mask), (mask, 0), (0, mask), (mask, mask)):
        with pytest.raises(AskedError):
            compare(*pair)
    with pytest.raises(TypeError, match="relu_backward"):
        array * mask
