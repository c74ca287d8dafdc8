"""(c) `rectilinear.capture` on the stand-in: n calls have the effect of n calls, on memory of the graph's own, or an error says why not."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bench_standin
import gpu_cases
import numpy as np
import pytest
import standin
from host_backend import Host

import rectilinear
from rectilinear import graphs, nn, profiling
from rectilinear.backends import cupy_scratch, registry
from rectilinear.backends.cupy_backend import CupyBackend
from rectilinear.backends.cupy_gemm import Gemm
from rectilinear.keepmask import KeepMask


@pytest.fixture
def cp(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in in CuPy's place."""
    monkeypatch.setattr(registry, "_loaded", {})
    bench_standin.install(host, monkeypatch.setattr)
    with rectilinear.use_backend("cupy"):
        yield host.cp


class Calls:
    """A function that counts how often Python runs it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.function(*args, **kwargs)


def values(n: int, *shape: int, dtype: Any = "f4") -> np.ndarray:
    return np.random.default_rng(n).standard_normal(shape).astype(dtype)


def occupy(cp: Any, *shapes: tuple[int, ...]) -> list[Any]:
    """Arrays of ones, to lie where anything has been freed."""
    arrays = [cp.empty(shape, "f4") for shape in shapes for _ in range(20)]
    for array in arrays:
        array.fill(1)
    return arrays


def layer(x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = rectilinear.affine_relu_forward(x, w, b)
    return out, *rectilinear.affine_relu_backward(dout, cache)


SHAPES = ((9, 4), (4, 8), (8,), (9, 8))


# ---------------------------------------------------------------- what a call does


@pytest.mark.parametrize("copies", [False, True])
def test_every_call_gives_what_the_function_gives(cp: Any, copies: bool, way: None) -> None:
    function = Calls(layer)
    captured = rectilinear.capture(function, copies=copies)
    for n in range(6):
        given = [values(10 * n + i, *shape) for i, shape in enumerate(SHAPES)]
        wanted = [array.get() for array in layer(*map(cp.asarray, given))]
        on = [cp.asarray(array) for array in given]
        got = captured(*on)
        for array, before in zip(on, given, strict=True):
            assert np.array_equal(array.get(), before), "the caller's array was written to"
        del on
        occupied = occupy(cp, *SHAPES)
        for a, b in zip(got, wanted, strict=True):
            assert np.array_equal(a.get(), b)
        assert all((array.get() == 1).all() for array in occupied)
    assert function.count == 2


def test_a_recording_computes_nothing_by_itself(cp: Any) -> None:
    total = cp.asarray(np.zeros(3, "f4"))

    def add(x: Any) -> Any:
        nonlocal total
        total += x
        return total + x

    captured = rectilinear.capture(add)
    for n in range(1, 6):
        assert captured(cp.asarray(np.ones(3, "f4"))).get().tolist() == [n + 1.0] * 3
        assert total.get().tolist() == [n] * 3


def test_results_are_overwritten_by_the_next_call_unless_copies_are_asked_for(cp: Any) -> None:
    for copies in (False, True):
        captured = rectilinear.capture(lambda x: {"y": (x + 1, [x * 2])}, copies=copies)
        kept = [captured(cp.asarray(np.full(4, n, "f4"))) for n in range(5)]
        latest = range(5) if copies else (0, 4, 4, 4, 4)
        assert [float(each["y"][0].get()[0]) for each in kept] == [n + 1 for n in latest]
        assert [float(each["y"][1][0].get()[0]) for each in kept] == [2 * n for n in latest]
        kept[3]["y"][1].clear()  # the caller's own list
        assert len(captured(cp.asarray(np.zeros(4, "f4")))["y"][1]) == 1


def test_copies_have_the_layout_of_the_results(cp: Any) -> None:
    for copies in (False, True):
        captured = rectilinear.capture(lambda x: ((x + 1).T, None, "as it is"), copies=copies)
        for n in range(4):
            turned, none, text = captured(cp.asarray(values(n, 3, 5)))
            assert np.array_equal(turned.get(), values(n, 3, 5).T + 1)
            assert (turned.strides, none, text) == ((4, 20), None, "as it is")


def test_temporaries_lie_in_a_pool_that_stays_with_the_graph(cp: Any) -> None:
    captured = rectilinear.capture(lambda x: ((x + 1) * 2 + 3) * 4)
    for _ in range(3):
        captured(cp.asarray(np.zeros(100, "f4")))
    gc.collect()
    occupied = occupy(cp, (100,))
    assert (captured(cp.asarray(np.ones(100, "f4"))).get() == 28).all()
    assert all((array.get() == 1).all() for array in occupied)


@pytest.mark.parametrize("refused", [1, 2])
def test_a_full_gpu(cp: Any, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """A pool gives back what is free in it when there is no memory left; of what is recorded some lies there."""

    def function(x: Any) -> Any:
        some = cp.empty((3000 + refused,), "f4")  # as large as nothing else
        some.fill(2)
        y = some[:100] + x
        del some
        if cupy_scratch.is_recording() and armed:
            standin.Memory._refused = armed.pop()
        large = cp.empty((5000 + refused,), "f4")  # more than anything that is free
        large.fill(3)
        return y + large[:100], large

    monkeypatch.setattr(standin.Memory, "_refused", 0)
    armed = [refused]
    captured = rectilinear.capture(function)
    given = [cp.asarray(np.full(100, n, "f4")) for n in range(6)]
    captured(given[0])
    if refused == 2:
        with pytest.raises(MemoryError, match=r"rectilinear.capture: the GPU has no \d+ bytes left for a record"):
            captured(given[1])
    occupied: list[Any] = []
    for n in range(1, 6):
        got = captured(given[n])[0]
        assert (got.get() == n + 5).all()
        assert all((array.get() == 1).all() for array in occupied)
        occupied = occupied or occupy(cp, (3000 + refused,))


def test_a_workspace_is_the_graphs_own(cp: Any, no_small_layers: None) -> None:
    captured = rectilinear.capture(lambda x, w: rectilinear.affine_forward(x, w, None)[0])
    x, w = cp.asarray(values(0, 4, 500)), cp.asarray(values(1, 500, 4))  # a long sum, which is split
    for _ in range(3):
        captured(x, w)
    scratches = registry.serving("cupy").scratches
    scratches.current(cp, 0, 0)._workspace.fill(1)
    captured(x, w)
    assert (scratches.current(cp, 0, 0)._workspace.get() == 1).all()


def test_counters_are_zero_before_a_replay_and_are_not_set_by_it(cp: Any) -> None:
    def count(x: Any) -> Any:
        stream = standin.get_current_stream()
        counters = registry.serving("cupy").scratches.current(cp, 0, stream.ptr).counters(8)
        bare = standin._bare(counters._host)
        standin.device_work(lambda: seen.append(bare[:8].tolist()))
        return x + 1

    seen: list[list[int]] = []
    captured = rectilinear.capture(count)
    for _ in range(4):
        captured(cp.asarray(np.zeros(4, "f4")))
    assert seen == [[0] * 8] * 4
    (graph,) = captured._seen.values()
    assert len(graph._graph._nodes) == 2


def test_a_graph_and_a_stream_do_not_count_together(cp: Any) -> None:
    """They may run at the same time: while one is caught in the midst of counting, the other adds up right, and leaves it alone."""
    x, w, b, labels = (cp.asarray(a) for a in (values(0, 3000, 8), values(1, 8, 8), values(2, 8), np.arange(3000) % 8))

    def sums(x: Any, labels: Any) -> tuple[Any, ...]:
        db = rectilinear.affine_backward(x, (x, w, b), needs=(False, False, True))[2]
        return db, *rectilinear.softmax_loss(x, labels)

    captured = rectilinear.capture(sums)
    for _ in range(3):
        captured(x, labels)
    (graph,) = captured._seen.values()
    of_stream = registry.serving("cupy").scratches.current(cp, 0, 0)
    for n, (caught, call) in enumerate(((of_stream, captured), (graph.scratch, sums)), start=3):
        x[...] = cp.asarray(values(n, 3000, 8))  # where nothing is added up, the sums of before are left
        wanted = [array.get() for array in sums(x, labels)]
        caught._counters.fill(7)
        assert same([array.get() for array in call(x, labels)], wanted)
        assert (caught._counters.get() == 7).all()
        caught._counters.fill(0)


def test_counters_that_are_outgrown_stay_zero(cp: Any) -> None:
    def count(x: Any) -> Any:
        scratch = registry.serving("cupy").scratches.current(cp, 0, standin.get_current_stream().ptr)
        bare = standin._bare(scratch.counters(8)._host)
        standin.device_work(lambda: seen.append(bare[:8].tolist()))
        if cupy_scratch.is_recording():
            scratch.counters(4000)
        return (x + 1) * 2

    seen: list[list[int]] = []
    captured = rectilinear.capture(count)
    for _ in range(4):
        assert (captured(cp.asarray(np.ones(4, "f4"))).get() == 4).all()
    assert seen == [[0] * 8] * 4


# ---------------------------------------------------------------- arguments


def layouts(a: np.ndarray) -> list[np.ndarray]:
    spaced = np.zeros((2 * a.shape[0], 3 * a.shape[1]), a.dtype)[::2, ::3]
    spaced[...] = a
    unaligned = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    unaligned[...] = a
    shifted = np.zeros(a.size + 1, a.dtype)[1:].reshape(a.shape)
    shifted[...] = a
    return [a, np.asfortranarray(a), a[::-1, ::-1].copy()[::-1, ::-1], spaced, unaligned, shifted, np.broadcast_to(a[:1], a.shape)]


def test_arguments_of_any_layout(cp: Any, way: None) -> None:
    captured = rectilinear.capture(Calls(lambda x, w: (rectilinear.affine_forward(x, w, None)[0], rectilinear.relu_forward(x)[0])))
    w = cp.asarray(values(9, 8, 4))
    for n in range(4):
        for array in layouts(values(n, 6, 8)):
            x = cp.ndarray._of(array)
            product, relu = captured(x, w)
            assert np.allclose(product.get(), array @ w.get(), atol=1e-5)
            assert np.array_equal(relu.get(), array.clip(0))
    for shape in ((0, 8), (1, 8)):
        for n in range(3):
            x = values(n, *shape)
            assert np.allclose(captured(cp.asarray(x), w)[0].get(), x @ w.get(), atol=1e-5)


def test_copies_of_arguments_are_no_better_aligned(cp: Any, no_small_layers: None) -> None:
    """What is not aligned is multiplied as a copy, whose plan is the one that the first call has made."""
    captured = rectilinear.capture(lambda x, w: rectilinear.affine_forward(x, w, None)[0])
    w = values(9, 12, 3)
    for n in range(4):
        x = values(n, 5, 13)[:, 1:]
        assert np.allclose(captured(cp.asarray(values(n, 5, 13))[:, 1:], cp.asarray(w)).get(), x @ w, atol=1e-5)


def test_what_is_not_the_arguments_is_not_read(cp: Any) -> None:
    """Between the elements of a view there may be anything, another thread's results say."""
    captured = rectilinear.capture(lambda x: x + 1)
    for n in range(3):
        memory = values(n, 8, 8)
        captured(cp.ndarray._of(memory[::2, ::2]))
    (graph,) = captured._seen.values()
    buffer = graph.arrays[0]
    assert np.array_equal(buffer.get(), memory[::2, ::2])
    around = standin._bytes_at(buffer.data.ptr, 16).view("f4")
    assert np.isnan(around[1])


def test_the_same_arrays_are_read_where_they_are_until_others_come(cp: Any) -> None:
    function = Calls(lambda x, y: x * y)
    captured = rectilinear.capture(function)
    x = cp.asarray(np.full(5, 2, "f4"))
    for n in range(4):
        x.fill(n)
        cp.counts.clear()
        y = cp.asarray(np.full(5, 3, "f4"))
        assert (captured(x, y).get() == 3 * n).all()
    assert function.count == 2
    (graph,) = captured._seen.values()
    assert [buffer.own for buffer in graph._memory.buffers] == [False, True]
    other = cp.asarray(np.full(5, 7, "f4"))
    for _ in range(3):
        assert (captured(other, y).get() == 21).all()
        assert (captured(x, y).get() == 9).all()
    assert function.count == 3
    assert (x.get() == 3).all()


class Pair(NamedTuple):
    a: Any
    b: Any


def test_arguments_in_trees(cp: Any) -> None:
    def function(tree: Any, *, mask: KeepMask, factor: float, pair: Pair) -> Any:
        return {"sum": (tree["a"][0] + tree["b"]) * factor, "mask": mask, "pair": Pair(pair.b, pair.a)}

    counted = Calls(function)
    captured = rectilinear.capture(counted)
    for n in range(4):
        a, b, bits = np.full(3, n, "f4"), np.full(3, 10 * n, "f4"), np.full((3, 1), n, np.uint8)
        got = captured(
            {"a": [cp.asarray(a)], "b": cp.asarray(b)},
            mask=KeepMask(cp.asarray(bits), (3, 5)),
            factor=2.0,
            pair=Pair(cp.asarray(a), cp.asarray(b)),
        )
        assert np.array_equal(got["sum"].get(), 2 * (a + b))
        assert isinstance(got["mask"], KeepMask)
        assert np.array_equal(got["mask"].bits.get(), bits)
        assert got["pair"].a.get()[0] == 10 * n
    assert counted.count == 2


def test_numbers_are_frozen_and_others_make_another_record(cp: Any) -> None:
    counted = Calls(lambda x, factor: x * factor)
    captured = rectilinear.capture(counted)
    x = cp.asarray(np.ones(3, "f4"))
    for factor in (2, 2.0, True, 0.0, -0.0, np.float32(3), np.float32(-0.0)):
        for _ in range(3):
            got = captured(x, factor)
            assert np.array_equal(got.get(), np.ones(3, "f4") * factor)
            assert np.array_equal(np.signbit(got.get()), np.signbit(np.ones(3, "f4") * factor))
            assert got.dtype == (np.ones(3, "f4") * factor).dtype
    assert counted.count == 14
    for _ in range(3):
        assert np.isnan(captured(x, float("nan")).get()).all()
    assert counted.count == 16


def test_shapes_and_dtypes_have_records_of_their_own_and_there_are_not_many(cp: Any) -> None:
    counted = Calls(lambda x: x + 1)
    captured = rectilinear.capture(counted)
    for _ in range(3):
        for dtype in ("f4", "f8"):
            for n in (3, 4):
                got = captured(cp.asarray(np.zeros(n, dtype)))
                assert (got.shape, got.dtype) == ((n,), dtype)
    assert counted.count == 8
    for n in range(40):
        for _ in range(2):
            captured(cp.asarray(np.zeros(n, "f4")))
    assert len(captured._seen) == graphs._MOST_SIGNATURES


@pytest.mark.parametrize("bad", [np.zeros(3), {1, 2}, (cp for cp in ()), bytearray(b"a")])
def test_what_cannot_be_told_apart_is_refused(cp: Any, bad: Any) -> None:
    captured = rectilinear.capture(lambda x, y: x)
    x = cp.asarray(np.zeros(3, "f4"))
    if hasattr(bad, "__next__"):
        assert captured(x, bad) is x  # as good as any object: itself and no other
        return
    with pytest.raises(TypeError, match=r"capture: .*(numpy.ndarray; bring all to the GPU|which has no hash)"):
        captured(x, bad)


def test_arrays_of_other_libraries_only_call_the_function() -> None:
    import array_api_strict

    for xp in (np, array_api_strict):
        counted = Calls(lambda x, how: x + len(how))
        captured = rectilinear.capture(counted, copies=True)
        for n in range(4):
            assert float(captured(xp.asarray([float(n)]), ["not", {"hashable"}])[0]) == n + 2
        assert counted.count == 4
    assert rectilinear.capture(lambda n: n + 1)(2) == 3


def test_a_function_without_arguments_works_on_what_it_holds(cp: Any) -> None:
    x = cp.asarray(np.zeros(3, "f4"))
    counted = Calls(lambda: x + 1)
    captured = rectilinear.capture(counted)
    for n in range(5):
        x.fill(n)
        assert (captured().get() == n + 1).all()
    assert counted.count == 2


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="capture: function is of type int, which cannot be called"):
        rectilinear.capture(3)  # type: ignore[arg-type]


def test_a_captured_function_within_another_is_a_part_of_its_record(cp: Any) -> None:
    inner = Calls(lambda x: x * 2)
    captured = rectilinear.capture(inner)
    outer = rectilinear.capture(lambda x: captured(x) + 1)
    for n in range(6):
        assert (outer(cp.asarray(np.full(3, n, "f4"))).get() == 2 * n + 1).all()
    assert inner.count == 2


# ---------------------------------------------------------------- what the function holds


class Holder:
    def __init__(self, w: Any) -> None:
        self.w = w
        self.step = rectilinear.capture(self._step)

    def _step(self, x: Any) -> Any:
        return x * self.w


_global: Any = None


def _of_global(x: Any) -> Any:
    return x * _global


def held_in_closure(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    def replace(other: Any) -> None:
        nonlocal w
        w = other

    return lambda x: x * w, replace


def held_in_global(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    globals()["_global"] = w
    return _of_global, lambda other: globals().update(_global=other)


def held_in_dict(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    params = {"layers": ({"w": w},)}
    return lambda x: x * params["layers"][0]["w"], lambda other: params["layers"][0].update(w=other)


def held_in_list(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    params = [w]
    return lambda x: x * params[0], lambda other: params.__setitem__(0, other)


def held_in_an_attribute(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    holder = Holder(w)
    return holder.step.__wrapped__, lambda other: setattr(holder, "w", other)


class Slotted:
    __slots__ = ("__hidden", "w")

    def __init__(self, w: Any) -> None:
        self.w, self.__hidden = w, w

    def step(self, x: Any) -> Any:
        return x * self.w

    def step_hidden(self, x: Any) -> Any:
        return x * self.__hidden

    def hide(self, w: Any) -> None:
        self.__hidden = w


def held_in_a_slot(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    holder = Slotted(w)
    return holder.step, lambda other: setattr(holder, "w", other)


def held_in_a_private_slot(w: Any) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    holder = Slotted(w)
    return holder.step_hidden, holder.hide


HOLDERS = [held_in_closure, held_in_global, held_in_dict, held_in_list, held_in_an_attribute, held_in_a_slot, held_in_a_private_slot]


@pytest.mark.parametrize("held", HOLDERS)
def test_an_array_that_is_replaced_is_noticed_and_one_that_is_written_to_is_heard(cp: Any, held: Any) -> None:
    w = cp.asarray(np.full(100, 2, "f4"))
    function, replace = held(w)
    counted = Calls(function)
    captured = rectilinear.capture(counted)
    ones = np.ones(100, "f4")
    for _ in range(4):
        assert (captured(cp.asarray(ones)).get() == 2).all()
    w.fill(3)
    assert (captured(cp.asarray(ones)).get() == 3).all()
    assert counted.count == 2
    replace(cp.asarray(np.full(100, 5, "f4")))
    del w
    gc.collect()
    occupied = occupy(cp, (100,))
    for _ in range(4):
        assert (captured(cp.asarray(ones)).get() == 5).all()
    assert counted.count == 4
    del occupied


def test_what_a_record_reads_stays_alive(cp: Any) -> None:
    """Where a function makes a new dict at every call, nobody can see that another array was put into it; the record reads the old one."""
    box = {"params": {"w": cp.asarray(np.full(100, 2, "f4"))}}

    def function(x: Any) -> Any:
        box["params"] = dict(box["params"])
        return x * box["params"]["w"]

    captured = rectilinear.capture(function)
    for _ in range(3):
        captured(cp.asarray(np.ones(100, "f4")))
    address = box["params"]["w"].data.ptr
    box.clear()
    gc.collect()
    assert all(array.data.ptr != address for array in occupy(cp, (100,)))


def test_a_method_that_is_captured_by_its_own_object(cp: Any) -> None:
    holder = Holder(cp.asarray(np.full(3, 2, "f4")))
    counted = holder.step.__wrapped__
    assert counted.__self__ is holder
    runs = []
    plain, holder._step = holder._step, lambda x: (runs.append(1), plain(x))[1]  # type: ignore[method-assign]
    holder.step = rectilinear.capture(lambda x: holder._step(x))
    for n in range(5):
        assert (holder.step(cp.asarray(np.full(3, n, "f4"))).get() == 2 * n).all()
    assert len(runs) == 2


class Scaled:
    def __init__(self, w: Any) -> None:
        self.w = w

    @rectilinear.capture
    def times(self, x: Any) -> Any:
        """Python."""
        runs.append(self)
        return x * self.w


runs: list[Any] = []


def test_methods(cp: Any) -> None:
    runs.clear()
    two, three = (Scaled(cp.asarray(np.full(3, factor, "f4"))) for factor in (2, 3))
    for n in range(4):
        x = cp.asarray(np.full(3, n, "f4"))
        assert (two.times(x).get() == 2 * n).all()
        assert (three.times(x=x).get() == 3 * n).all()
    assert runs == [two, three] * 2
    assert (Scaled.times.__doc__, Scaled.times.__name__) == ("Python.", "times")
    two.w.fill(5)
    assert (two.times(x).get() == 15).all()
    two.w = cp.asarray(np.full(3, 6, "f4"))
    assert (two.times(x).get() == 18).all()


def test_all_is_given_back_with_the_callable(cp: Any) -> None:
    gc.collect()
    before, pools = standin._default_pool.used_bytes(), _pools()
    captured = rectilinear.capture(layer)
    for n in range(4):
        result = captured(*[cp.asarray(values(n + i, *shape)) for i, shape in enumerate(SHAPES)])
    assert _pools() == pools + 1
    wanted = [array.get() for array in result]
    del captured
    gc.collect()
    occupied = occupy(cp, *SHAPES)
    assert all(np.array_equal(a.get(), b) for a, b in zip(result, wanted, strict=True)), "results outlive it"
    del result, occupied
    gc.collect()
    assert _pools() == pools
    scratch = sum(array.nbytes for array in (registry.serving("cupy").scratches.current(cp, 0, 0)._workspace,) if array is not None)
    assert standin._default_pool.used_bytes() <= before + scratch


def _pools() -> int:
    return sum(type(x) is standin.MemoryPool for x in gc.get_objects())


# ---------------------------------------------------------------- streams and threads


def test_it_works_on_the_current_stream_and_records_on_one_of_its_own(cp: Any) -> None:
    streams = []

    def function(x: Any) -> Any:
        streams.append(standin.get_current_stream())
        return x + 1

    mine = standin.Stream()
    captured = rectilinear.capture(function)
    launched = []
    for _ in range(4):
        with mine:
            captured(cp.asarray(np.zeros(3, "f4")))
            (graph,) = captured._seen.values()
            launched.append(graph)
    assert streams[0] is mine
    assert streams[1] not in (mine, standin.Stream.null)
    assert not streams[1].is_capturing()


def test_a_replay_on_another_stream_waits_for_the_one_before(cp: Any) -> None:
    captured = rectilinear.capture(lambda x: x + 1)
    a, b = standin.Stream(), standin.Stream()
    for stream in (a, a, a, b, b, a):
        with stream:
            captured(cp.asarray(np.zeros(3, "f4")))
    assert [event._stream for event in b._waited] == [a]
    assert [event._stream for event in a._waited] == [b]


def test_per_thread_streams_are_others_in_other_threads(cp: Any) -> None:
    captured = rectilinear.capture(lambda x: x + 1)
    ptds = standin.Stream(ptds=True)
    with ptds:
        for _ in range(4):
            captured(cp.asarray(np.zeros(3, "f4")))
    assert len(ptds._waited) == 2


def test_many_threads(cp: Any) -> None:
    w = cp.asarray(values(1, 4, 8))
    captured = rectilinear.capture(lambda x, factor: rectilinear.relu_forward(x * w)[0] * factor, copies=True)
    wrong, start = [], threading.Barrier(4)

    def work(mine: int) -> None:
        start.wait()
        with standin.Stream(), rectilinear.use_backend("cupy"):
            for n in range(30):
                x = values(100 * mine + n, 4, 8)
                got = captured(cp.asarray(x), mine % 2 + 1).get()
                if not np.array_equal(got, (x * w.get()).clip(0) * np.float32(mine % 2 + 1)):
                    wrong.append((mine, n))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_thread_computes_while_one_records(cp: Any) -> None:
    got = []

    def function(x: Any) -> Any:
        if cupy_scratch.is_recording():
            thread = threading.Thread(target=lambda: got.append((cp.asarray(np.ones(3, "f4")) + 1).get().tolist()))
            thread.start()
            thread.join()
        return x + 1

    captured = rectilinear.capture(function)
    for _ in range(3):
        captured(cp.asarray(np.zeros(3, "f4")))
    assert got == [[2, 2, 2]]


# ---------------------------------------------------------------- what cannot be recorded


def reads(x: Any) -> Any:
    x.get()
    return x + 1


def waits(x: Any) -> Any:
    standin.get_current_stream().synchronize()
    return x + 1


def waits_and_hides_it(x: Any) -> Any:
    with contextlib.suppress(RuntimeError):
        standin.get_current_stream().synchronize()
    return x + 1


def brings(x: Any) -> Any:
    return x * nn.parameters.bring("here", "y", np.ones(3), x)


def multiplies(x: Any) -> Any:
    xp = registry.serving("cupy").runtime.cp
    return xp.matmul(x.reshape(1, 3), x.reshape(3, 1))


def plans(x: Any) -> Any:
    wide = x.reshape(3, 1) if cupy_scratch.is_recording() else x.reshape(1, 3)
    return rectilinear.affine_forward(wide, wide.T, None)[0]


def fails(x: Any) -> Any:
    if cupy_scratch.is_recording():
        raise KeyError("mine")
    return x + 1


REFUSED = [
    (reads, RuntimeError, r"rectilinear.capture: the function waits for the GPU or reads a value.*outside of the captured function"),
    (waits, RuntimeError, r"rectilinear.capture: the function waits for the GPU.*StreamCaptureUnsupported"),
    (waits_and_hides_it, RuntimeError, r"rectilinear.capture: the function waits for the GPU.*StreamCaptureInvalidated"),
    (brings, RuntimeError, r"rectilinear.capture: here: y comes from numpy while a graph is recorded; make it an argument"),
    (multiplies, RuntimeError, r"rectilinear.capture: CuPy's own products cannot be recorded.*rectilinear\[cuda13\]"),
    (
        plans,
        RuntimeError,
        r"rectilinear.capture: a product of shapes \(3, 1\) and \(1, 3\) is met for the first time while a graph is recorded",
    ),
    (fails, KeyError, "mine"),
]


@pytest.mark.parametrize(("function", "error", "words"), REFUSED, ids=[function.__name__ for function, *_ in REFUSED])
def test_what_cannot_be_recorded_is_an_error_that_leaves_nothing_behind(
    cp: Any, monkeypatch: pytest.MonkeyPatch, function: Any, error: Any, words: str, no_small_layers: None
) -> None:
    with_it = True

    def sometimes(x: Any) -> Any:
        return function(x) if with_it else x + 1

    captured = rectilinear.capture(sometimes)
    x = cp.asarray(np.zeros(3, "f4"))
    gc.collect()
    pools, streams = _pools(), []
    monkeypatch.setattr(cp.cuda, "Stream", lambda **how: streams.append(standin.Stream(**how)) or streams[-1])
    for _ in range(2):
        captured(x)
        with pytest.raises(error, match=words):
            captured(x)
    assert [stream.is_capturing() for stream in streams] == [False] * 2
    gc.collect()
    assert _pools() == pools
    assert not cupy_scratch.is_recording()
    assert standin.get_current_stream() is standin.Stream.null
    assert cp.empty(3, "f4").get().shape == (3,)
    with_it = False
    for n in range(4):
        x.fill(n)
        assert (captured(x).get() == n + 1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_nvmath_it_says_what_brings_products(cp: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, no_small_layers: None) -> None:
    backend = registry.serving("cupy")
    monkeypatch.setattr(backend, "products", Gemm(cp, backend.scratches))
    captured = rectilinear.capture(layer)
    given = [cp.asarray(values(i, *shape), gpu_cases.numpy_dtype(dtype)) for i, shape in enumerate(SHAPES)]
    captured(*given)
    with pytest.raises(RuntimeError, match=r"CuPy's own products cannot be recorded.*with nvmath-python.*rectilinear\[cuda13\]"):
        captured(*given)


# ---------------------------------------------------------------- nn


class Step:
    """A training step of a net, its parameters drawn anew for every one of these."""

    def __init__(self, cp: Any, dtype: str, capture: bool, accumulate: bool = False, **rates: float) -> None:
        rng = np.random.default_rng(0)
        name = "float32" if dtype == "bfloat16" else dtype
        self.net = nn.Sequential(nn.AffineReLU(6, 16, rng=rng, dtype=name), nn.Affine(16, 3, rng=rng, dtype=name))
        if dtype == "bfloat16":
            for _, leaf in self.net.leaves():
                leaf.params = {key: cp.asarray(value.get(), standin._bfloat16()) for key, value in leaf.params.items()}
        self.cp, self.loss, self.optimizer = cp, nn.SoftmaxCrossEntropy(), nn.SGD(self.net, **rates)
        self.accumulate, self.runs = accumulate, 0
        self.step = rectilinear.capture(self._step, copies=True) if capture else self._step

    def _step(self, x: Any, y: Any) -> Any:
        self.runs += 1
        loss = self.loss.forward(self.net.forward(x), y)
        self.net.backward(self.loss.backward(), accumulate=self.accumulate)
        self.optimizer.step()
        return loss, self.net.grads

    def train(self, n: int, size: int = 10) -> list[np.ndarray]:
        x, y = values(n, size, 6), np.arange(n, n + size) % 3
        loss, grads = self.step(self.cp.asarray(x, self.net.params["0.w"].dtype), self.cp.asarray(y))
        return [loss.get(), *[grad.get() for grad in grads.values()], *[w.get() for w in self.net.params.values()]]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rates", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}])
def test_a_training_step_to_the_same_bits(cp: Any, dtype: str, rates: dict[str, float], way: None) -> None:
    eager, captured = Step(cp, dtype, False, **rates), Step(cp, dtype, True, **rates)
    for n in range(8):
        assert same(captured.train(n), eager.train(n)), n
    for n in range(6):  # a smaller batch now and then
        assert same(captured.train(n, 7 if n % 2 else 10), eager.train(n, 7 if n % 2 else 10)), n
    assert captured.runs == 4


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rates", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}])
def test_sgd_is_a_launch_a_parameter_to_the_bits_of_the_long_way(
    host: Host, cp: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, rates: dict[str, float]
) -> None:
    step, long = Step(cp, dtype, False, **rates), Step(cp, dtype, False, **rates)
    for n in range(3):
        for module in host.modules.values():
            module.launched.clear()
        got = step.train(n)
        begins = n == 0 and "momentum" in rates  # there is no velocity yet
        assert sum("sgd_step" in name for name in host.launched) == (0 if begins else 4)
        with monkeypatch.context() as patched:
            patched.setattr(CupyBackend, "sgd_step", lambda *given: None)
            assert same(got, long.train(n)), n


def _by_columns(cp: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    params["w"] = cp.asarray(np.ascontiguousarray(params["w"].get().T)).T


def _on_one_memory(cp: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    grads["w"] = params["w"]


def _of_other_shape(cp: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    grads["w"] = grads["w"][:1]


def _of_two_dtypes(cp: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    grads["b"] = cp.asarray(grads["b"].get().astype("f8"))


def _of_numpy(cp: Any, params: dict[str, Any], grads: dict[str, Any]) -> None:
    grads["b"] = grads["b"].get()


@pytest.mark.parametrize("spoil", [_by_columns, _on_one_memory, _of_other_shape, _of_two_dtypes, _of_numpy])
def test_what_no_kernel_moves_in_place_goes_the_long_way(host: Host, cp: Any, spoil: Callable[..., None]) -> None:
    layer = nn.Affine(4, 3, rng=np.random.default_rng(0))
    layer.backward(layer.forward(cp.asarray(values(0, 5, 4))))
    spoil(cp, layer.params, layer.grads)
    before, grads = (
        {name: array.get() if hasattr(array, "get") else array for name, array in of.items()} for of in (layer.params, layer.grads)
    )
    with contextlib.nullcontext() if spoil is not _of_other_shape else pytest.raises(rectilinear.ShapeError, match="gradient of w"):
        nn.SGD(layer, lr=0.5).step()
    assert not any("sgd_step" in name for name in host.launched)
    for name, array in layer.params.items():
        moved = 0 if spoil is _of_other_shape else np.float32(-0.5) * grads[name].astype("f4")
        assert np.array_equal(array.get(), before[name] + moved)


@pytest.mark.parametrize("accumulate", [False, True])
def test_rates_are_heard_and_so_is_a_load(cp: Any, accumulate: bool) -> None:
    steps = [Step(cp, "float32", capture, accumulate, lr=0.1, momentum=0.5) for capture in (False, True)]

    def both(*numbers: int) -> None:
        for n in numbers:
            assert same(steps[1].train(n), steps[0].train(n)), n

    both(0, 1, 2, 3)
    for name, value in (("lr", 0.05), ("momentum", 0.9), ("lr", 0.2)):
        for step in steps:
            setattr(step.optimizer, name, value)
        both(4, 5)
    assert steps[1].runs == 2
    state, of_optimizer = steps[0].net.state_dict(), steps[0].optimizer.state_dict()
    both(6)
    for step in steps:
        step.net.load_state_dict(state)
        step.optimizer.load_state_dict(of_optimizer | {"lr": 0.3})
    both(7, 8, 9)
    runs = steps[1].runs
    for step in steps:
        step.optimizer.weight_decay = 0.1  # what was left out of the record
    both(10, 11, 12, 13)
    assert steps[1].runs == runs + 2
    for step in steps:
        step.net[0].params["w"] = cp.asarray(values(99, 6, 16))
    both(14, 15, 16)
    for step in steps:
        step.optimizer.momentum = 0
    both(17, 18, 19)
    for step in steps:
        step.optimizer.momentum = 0.7
    both(20, 21, 22)
    for step in steps:
        step.optimizer.load_state_dict(step.optimizer.state_dict() | {"velocity": {}})
    both(23, 24, 25, 26)


def test_gradients_that_are_added_to_from_call_to_call(cp: Any) -> None:
    plain, recorded = (nn.Affine(4, 3, rng=np.random.default_rng(0)) for _ in range(2))
    counted = Calls(lambda x, dout: (recorded.forward(x), recorded.backward(dout, accumulate=True))[1])
    captured = rectilinear.capture(counted)
    for n in range(8):
        x, dout = cp.asarray(values(n, 5, 4)), cp.asarray(values(n + 50, 5, 3))
        plain.forward(x)
        assert np.array_equal(captured(x, dout).get(), plain.backward(dout, accumulate=True).get())
        for name in ("w", "b"):
            assert np.array_equal(recorded.grads[name].get(), plain.grads[name].get())
        assert counted.count == (min(n + 1, 2) if n < 4 else min(n - 1, 4))
        if n == 3:
            plain.grads, recorded.grads = {}, {}


def test_a_layer_that_is_used_twice(cp: Any) -> None:
    def net_and_step() -> tuple[nn.Sequential, Calls]:
        twice = nn.AffineReLU(4, 4, rng=np.random.default_rng(0))
        net = nn.Sequential(twice, nn.ReLU(), twice)
        optimizer = nn.SGD(net, lr=0.1, momentum=0.9)

        def step(x: Any) -> Any:
            out = net.forward(x)
            net.backward(out)
            optimizer.step()
            return out

        return net, Calls(step)

    (plain, step), (recorded, counted) = net_and_step(), net_and_step()
    captured = rectilinear.capture(counted)
    for n in range(6):
        x = cp.asarray(values(n, 5, 4))
        assert np.array_equal(captured(x).get(), step(x).get())
        assert np.array_equal(recorded.grads["0.w"].get(), plain.grads["0.w"].get())
        assert np.array_equal(recorded.params["0.w"].get(), plain.params["0.w"].get())
    assert counted.count == 2


def test_labels_from_the_host_say_what_to_do(cp: Any) -> None:
    step = Step(cp, "float32", True, lr=0.1)
    captured = rectilinear.capture(lambda x: step._step(x, [0, 1, 2]))
    x = cp.asarray(values(0, 3, 6))
    captured(x)
    with pytest.raises(RuntimeError, match=r"rectilinear.capture: softmax_loss: y comes from the host.*argument"):
        captured(x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_example_trains_captured_as_it_does_otherwise(cp: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import two_layer_net as example

    build = functools.partial(example.two_layer_net, dtype=dtype)
    plain, captured = (example.run(build, 0, 32, 2, capture=capture) for capture in (False, True))
    assert captured.losses == plain.losses
    assert captured.predicted == plain.predicted


# ---------------------------------------------------------------- profiles


def test_a_profile_sees_replays_and_nothing_of_what_is_recorded(cp: Any) -> None:
    layer = rectilinear.capture(lambda x, w: rectilinear.affine_forward(x, w, None)[0])
    x, w = cp.asarray(values(0, 4, 8)), cp.asarray(values(1, 8, 4))
    with rectilinear.profile() as p:
        for _ in range(5):  # as it is, recorded and replayed, replayed
            layer(x, w)
    rows = {row.function: row for row in p.rows()}
    assert {name: row.calls for name, row in rows.items()} == {"affine_forward": 1, "replay of a capture": 4}
    assert {(row.backend, row.flops, row.bandwidth, row.share) for row in rows.values()} == {("cupy", None, None, None)}
    assert rows["affine_forward"].shape == (4, 8, 4)
    layer(x, w)
    assert graphs._Graph.replay is profiling._replay
