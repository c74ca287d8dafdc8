"""dask arrays: the layer functions on chunks of every kind, and training over worker processes that may die."""

from __future__ import annotations

import doctest
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import rectilinear as r
from rectilinear import nn
from rectilinear.backends import registry

from .loopback import LoopbackBackend

pytestmark = pytest.mark.libraries


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


def compute(x: Any) -> Any:
    return x.compute(scheduler="synchronous") if hasattr(x, "compute") else x


# ---------------------------------------------------------------- the layer functions

N, D, M = 23, 6, 5

ROWS = {"one chunk": (23,), "chunks": (10, 10, 3), "many chunks": (1,) * 23, "an empty chunk": (10, 0, 13)}
FEATURES = {"D": (6,), "D in chunks": (4, 2)}
OUTPUTS = {"M": (5,), "M in chunks": (2, 3)}


def passes(x: Any, w: Any, b: Any, dout: Any, y: Any) -> list[Any]:
    """All that the layer functions make of these, flat."""
    out, cache = r.affine_relu_forward(x, w, b)
    loss, dx = r.softmax_loss(r.affine_forward(x, w, b)[0], y) if x.ndim == 2 else (0.0, 0.0)
    return [
        out,
        np.sign(cache[1]) if isinstance(cache[1], np.ndarray) else cache[1],
        loss,
        dx,
        *r.affine_relu_backward(dout, cache),
        *r.affine_backward(dout, (x, w, b)),
        r.affine_relu_backward(dout, cache, needs=(True, False, False))[0],
        r.affine_backward(dout, (x, w, b), needs=(False, True, False))[1],
        r.affine_backward(dout, (x, w, b), needs=(False, False, True))[2],
        r.relu_forward(x)[0],
        r.relu_backward(dout, cache[1]),
        r.relu_backward(x, x),
    ]


def arrays(rng: np.random.Generator, *lead: int) -> list[np.ndarray]:
    shapes = ((*lead, N, D), (*lead, D, M), (*lead, M), (*lead, N, M))
    return [rng.standard_normal(shape) for shape in shapes]


def agree(got: list[Any], want: list[Any]) -> None:
    for i, (have, wanted) in enumerate(zip(got, want, strict=True)):
        have = compute(have)
        assert have.dtype == (np.int8 if i == 1 else np.float64) if isinstance(wanted, np.ndarray) else True
        np.testing.assert_allclose(have, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("numpy_w", [False, True], ids=["w of dask", "w of NumPy"])
@pytest.mark.parametrize("m", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("d", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("n", ROWS.values(), ids=ROWS)
def test_chunks_of_every_kind(rng: np.random.Generator, n: Any, d: Any, m: Any, numpy_w: bool) -> None:
    import dask
    import dask.array as da

    given = arrays(rng)
    y = rng.integers(0, M, N)
    want = passes(*given, y)
    chunks = ((n, d), (d, m), (m,), (n, m))
    lazy = [a if numpy_w and i in (1, 2) else da.from_array(a, chunks=c) for i, (a, c) in enumerate(zip(given, chunks, strict=True))]
    with dask.config.set(scheduler=refuse):
        got = passes(*lazy, da.from_array(y, chunks=(n,)))
    if numpy_w:
        for changed in lazy[1:3]:
            changed[...] = np.nan  # what was asked for is not touched by what the caller does later
    agree(got, want)


@pytest.mark.parametrize("groups", [(3,), (1, 2)], ids=["groups", "groups in chunks"])
def test_stacked_chunks(rng: np.random.Generator, groups: Any) -> None:
    import dask.array as da

    given = arrays(rng, 3)
    n = (10, 13)
    chunks = ((groups, n, (4, 2)), (3, (6,), (2, 3)), (groups, M), (groups, n, M))
    lazy = [da.from_array(a, chunks=c) for a, c in zip(given, chunks, strict=True)]
    agree(passes(*lazy, None), passes(*given, None))


def test_unknown_numbers_of_rows(rng: np.random.Generator) -> None:
    import dask
    import dask.array as da

    given = arrays(rng)
    y, kept = rng.integers(0, M, N), rng.random(N) < 0.7
    mask = da.from_array(kept, chunks=10)
    x, dout, labels = (da.from_array(a, chunks=(10, 4)[: a.ndim])[mask] for a in (given[0], given[3], y))
    with dask.config.set(scheduler=refuse):
        got = passes(x, given[1], given[2], dout, labels)
    agree(got, passes(given[0][kept], given[1], given[2], given[3][kept], y[kept]))


def test_unknown_numbers_of_features(rng: np.random.Generator) -> None:
    import dask.array as da

    given = arrays(rng)
    kept = np.array([True, False, True, True, True, False])
    x, w = (da.from_array(a, chunks=-1) for a in given[:2])
    mask = da.from_array(kept, chunks=-1)
    out, cache = r.affine_relu_forward(x[:, mask], w[mask], given[2])
    want, want_cache = r.affine_relu_forward(given[0][:, kept], given[1][kept], given[2])
    np.testing.assert_allclose(compute(out), want)
    dout = da.from_array(given[3], chunks=-1)
    for have, wanted in zip(r.affine_relu_backward(dout, cache), r.affine_relu_backward(given[3], want_cache), strict=True):
        np.testing.assert_allclose(compute(have), wanted, rtol=1e-12)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_the_relu_half_of_the_cache(backend: str) -> None:
    """+1 where not (z < 0), -1 elsewhere, as int8."""
    import dask.array as da

    x = np.array([[0.0], [-0.0], [np.nan], [-1.0], [np.inf], [-np.inf], [2.0]])
    with r.use_backend(backend):
        keep = r.affine_relu_forward(da.from_array(x, chunks=(3, 1)), np.ones((1, 1)), None)[1][1]
    assert keep.dtype == np.int8
    np.testing.assert_array_equal(compute(keep).ravel(), [1, 1, 1, -1, 1, -1, 1])


def test_a_pass_is_one_task_a_chunk(rng: np.random.Generator) -> None:
    """Beside what takes results apart and adds them up."""
    import dask.array as da
    from dask.base import collections_to_expr

    def tasks(*arrays: Any) -> list[str]:
        graph = collections_to_expr(arrays).optimize().__dask_graph__()
        return [str(key) for key in graph if "ones_like" not in str(key)]

    x, dout = da.ones((64, D), chunks=(4, D)), da.ones((64, M), chunks=(4, M))
    w, b = np.ones((D, M)), np.ones(M)
    assert len(tasks(r.affine_forward(x, w, b)[0])) <= 16 + 4  # and w, b
    assert len(tasks(r.affine_relu_forward(x, w, b)[0])) <= 16 + 4
    backward = tasks(*r.affine_backward(dout, (x, w, b), needs=(False, True, True))[1:])
    assert len(backward) <= 16 + 2 + 1 + 2 + 4  # sums of eight, their sum, taken apart
    out, cache = r.affine_relu_forward(x, w, b)
    both = tasks(out, *r.affine_relu_backward(dout, cache))
    assert sum(key.startswith(("('affine", "('gradients")) for key in both) == 2 * 16
    assert len(both) <= (2 + 2) * 16 + 2 + 1 + 2 + 4  # both passes; out and dx taken out of what they made


def test_a_bad_label_in_one_of_many_chunks(rng: np.random.Generator) -> None:
    import dask.array as da

    x, y = rng.standard_normal((9, 3)), np.array([0, 1, 2, 0, 7, 1, -1, 0, 1])
    loss, dx = r.softmax_loss(da.from_array(x, chunks=(3, 3)), da.from_array(y, chunks=4))
    assert np.isnan(compute(loss))
    np.testing.assert_array_equal(np.isnan(compute(dx)).all(axis=1), (y < 0) | (y > 2))


def test_arrays_of_numpy_beside_those_of_dask(rng: np.random.Generator) -> None:
    """Only for w and b, where both can be meant."""
    import dask.array as da

    x, w, b, dout = arrays(rng)
    X, W = da.from_array(x, chunks=10), da.from_array(w, chunks=-1)
    for call in (
        lambda: r.affine_forward(x, W, b),
        lambda: r.relu_backward(X, x),
        lambda: r.affine_backward(dout, (X, w, b)),
        lambda: r.softmax_loss(X, np.zeros(N, int)),
    ):
        with pytest.raises(TypeError, match=r"is a (numpy|dask) array but .* is a (numpy|dask) array; bring both to one library"):
            call()
    with pytest.raises(r.ShapeError, match="b has shape"):
        r.affine_forward(X, w, b[:2])


def test_the_chosen_backend_works_on_the_chunks() -> None:
    import dask.array as da

    x = da.ones((6, 3), chunks=(2, 3))
    with r.use_backend("loopback"):
        out = r.affine_forward(x, np.ones((3, 2)), None)[0]
    LoopbackBackend.calls.clear()
    compute(out)
    assert LoopbackBackend.calls["affine_forward"] == 3


def test_dask_is_never_chosen() -> None:
    with pytest.raises(r.BackendError, match="'dask' serves dask arrays by itself and is never chosen"):
        r.set_backend("dask")
    (row,) = (row for row in r.list_backends() if row.name == "dask")
    assert row.usable
    assert registry.serving("dask").name == "dask"


def test_synchronize_and_to_numpy() -> None:
    import dask.array as da

    x = da.ones(3, chunks=1)
    r.synchronize(x)
    assert type(r.to_numpy(x)) is np.ndarray


def test_threads_of_a_task() -> None:
    """One where dask runs others beside it; all where it runs alone; what somebody chose, in any case."""
    from rectilinear.backends.dask_backend import as_told

    def inside() -> int:
        with as_told(None):
            return r.get_num_threads()

    def in_thread() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(inside()))
        thread.start()
        thread.join()
        return seen[0]

    assert in_thread() == 1
    assert inside() == r.get_num_threads()
    r.set_num_threads(3)
    try:
        assert in_thread() == 3
    finally:
        r.set_num_threads(None)


# ---------------------------------------------------------------- training, over processes


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


ROWS_OF_DATA, BATCH, EPOCHS, STEPS = 150, 40, 2, 8


def net_of(seed: int, dtype: str = "float64") -> nn.Sequential:
    rng = np.random.default_rng(seed)
    shared = nn.Affine(8, 8, rng=rng, dtype=dtype)
    return nn.Sequential(nn.AffineReLU(6, 8, rng=rng, dtype=dtype), shared, nn.ReLU(), shared, nn.Affine(8, 3, rng=rng, dtype=dtype))


def problem(dtype: str = "float64") -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((ROWS_OF_DATA, 6)).astype(dtype)
    return x, np.abs(x[:, :3]).argmax(axis=1)


def lazily(x: np.ndarray) -> Any:
    """In chunks that batches do not keep to."""
    import dask.array as da

    return da.from_array(x, chunks=(16, 4))


class Trained(NamedTuple):
    losses: list[float]
    net: nn.Sequential
    optimizer: nn.SGD


def train(client: Any, dtype: str = "float64", **how: Any) -> Trained:
    from rectilinear.dask import fit

    x, y = problem(dtype)
    net = net_of(0, dtype)
    optimizer = nn.SGD(net, lr=0.1, momentum=0.9)
    how = {"epochs": EPOCHS, "batch_size": BATCH, "progress": False, "client": client} | how
    return Trained(fit(net, lazily(x), y, loss=nn.SoftmaxCrossEntropy(), optimizer=optimizer, **how), net, optimizer)


@pytest.fixture(scope="module")
def whole(client: Any) -> Trained:
    """A training that nothing happens to."""
    return train(client)


def same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def test_fit_is_what_one_process_does(whole: Trained) -> None:
    """With a layer that is used twice, momentum, and chunks that batches do not keep to."""
    x, y = problem()
    want, criterion = net_of(0), nn.SoftmaxCrossEntropy()
    optimizer = nn.SGD(want, lr=0.1, momentum=0.9)
    wanted = []
    for _, start in itertools.product(range(EPOCHS), range(0, ROWS_OF_DATA, BATCH)):
        batch = slice(start, start + BATCH)
        wanted.append(float(criterion.forward(want.forward(x[batch]), y[batch])))
        want.backward(criterion.backward())
        optimizer.step()
    np.testing.assert_allclose(whole.losses, wanted, rtol=0, atol=1e-10)
    for have, value in zip(whole.net.state_dict().values(), want.state_dict().values(), strict=True):
        np.testing.assert_allclose(have, value, rtol=0, atol=1e-10)


def test_the_same_bits_for_any_number_of_workers(client: Any) -> None:
    """Two of one thread, and one of two, which share a net."""
    from dask.distributed import Client

    lazy, w, b = lazily(problem("float32")[0]), np.ones((6, 6), "f4"), np.ones(6, "f4")
    with r.use_backend("numba"):
        dw = r.affine_backward(lazy, (lazy, w, b))[1]
        with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0", set_as_default=False) as one:
            same_bits(train(client, "float32").net, train(one, "float32").net)
    np.testing.assert_array_equal(client.compute(dw).result(), compute(dw))


def test_a_worker_killed_in_mid_epoch_changes_nothing(client: Any, whole: Trained) -> None:
    killed = []

    def kill(state: Any) -> None:
        if state.step == 2:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    trained = train(client, progress=kill)
    assert killed
    assert killed[0] not in client.run(os.getpid).values()
    assert trained.losses == whole.losses
    same_bits(trained.net, whole.net)
    client.wait_for_workers(2)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4])
def test_stop_and_go_on(client: Any, whole: Trained, tmp_path: Path, at: int) -> None:
    """From the file alone, to the same bits, wherever it was stopped."""
    file = tmp_path / "net.safetensors"

    def stop(state: Any) -> None:
        if state.step == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(client, checkpoint=file, progress=stop)
    nn.load(net_of(1), file)  # an ordinary file
    trained = train(client, checkpoint=file)
    assert trained.losses == whole.losses[at:]
    same_bits(trained.net, whole.net)
    velocity, wanted = trained.optimizer.velocity, whole.optimizer.velocity
    for name in wanted:
        np.testing.assert_array_equal(velocity[name], wanted[name])
    assert train(client, checkpoint=file).losses == []  # nothing is left to do
    with pytest.raises(ValueError, match="is of a training with batch_size 40, not 41"):
        train(client, checkpoint=file, batch_size=41)


def test_an_interrupt_while_waiting_keeps_what_was_reached(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rectilinear.dask

    gradient, steps = rectilinear.dask._gradient, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return gradient(*arguments)

    monkeypatch.setattr(rectilinear.dask, "_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(client, checkpoint=tmp_path / "net")
    assert len(train(client, checkpoint=tmp_path / "net").losses) == STEPS - 3


def test_progress_is_told(client: Any, whole: Trained) -> None:
    told: list[Any] = []
    train(client, progress=told.append)
    assert [state.step for state in told] == list(range(1, STEPS + 1))
    assert [state.epoch for state in told] == [1] * 4 + [2] * 4
    assert [state.loss for state in told] == whole.losses
    assert {state.steps for state in told} == {STEPS}


def test_a_large_net_is_no_reason_to_warn(client: Any) -> None:
    """Dask warns of large graphs, which is about data that should have been elsewhere; a net is where it is."""
    import dask
    import dask.array as da

    from rectilinear.dask import fit

    net = nn.Affine(6, 2000, rng=np.random.default_rng(0))
    x, y = da.ones((8, 6), chunks=(4, 6)), da.zeros(8, dtype=int, chunks=4)
    how = {"loss": nn.SoftmaxCrossEntropy(), "optimizer": nn.SGD(net, 0.1), "epochs": 1, "batch_size": 8, "progress": False}
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "20 kB"}):
        assert len(fit(net, x, y, **how, client=client)) == 1


def test_chunks_are_held_for_two_steps_at_most(client: Any) -> None:
    """So that data beyond the workers' memory streams by."""
    import dask.array as da

    from rectilinear.dask import _Chunks

    data = _Chunks(da.ones((100, 3), chunks=(5, 3)), np.zeros(100, int), client)
    for start in (*range(0, 90, 10), 0):
        parts = data.parts(range(start, start + 10), range(start + 10, start + 20))
        assert sum(len(range(5)[rows]) for *_, rows in parts) == 10
        assert len(data._held) == 4


def test_tasks_in_workers_run_on_the_threads_that_dask_gave_them(client: Any) -> None:
    def inside() -> int:
        from rectilinear.backends.dask_backend import as_told

        with as_told(None):
            return r.get_num_threads()

    assert [client.submit(inside, workers=[worker], pure=False).result() for worker in client.nthreads()] == [1, 1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"net": None}, TypeError, "net is of type NoneType"),
        ({"x": np.ones((4, 6))}, TypeError, "x is of type ndarray; wanted a dask array"),
        ({"loss": r.softmax_loss}, TypeError, "wanted an object with forward and backward"),
        ({"optimizer": None}, TypeError, "optimizer is of type NoneType; wanted an SGD"),
        ({"optimizer": nn.SGD(net_of(1), 0.1)}, ValueError, r"moves another model than net; make it with SGD\(net"),
        ({"epochs": 0}, ValueError, "epochs is 0; wanted a whole number from 1 on"),
        ({"batch_size": 2.5}, ValueError, "batch_size is 2.5; wanted a whole number"),
        ({"y": [0] * 150}, TypeError, "y is of type list"),
        ({"y": np.zeros(149, int)}, ValueError, r"x has shape \(150, 6\) and y has \(149,\)"),
        ({"client": None}, RuntimeError, "there is no client; make one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_fit_does_not_take(change: dict[str, Any], error: type[Exception], words: str) -> None:
    from rectilinear.dask import fit

    x, y = problem()
    net = net_of(0)
    given = {"net": net, "x": lazily(x), "y": y, "loss": nn.SoftmaxCrossEntropy(), "optimizer": nn.SGD(net, 0.1), "epochs": 1}
    given |= {"batch_size": 40, "client": object(), "progress": False} | change
    with pytest.raises(error, match=words):
        fit(**given)


@pytest.mark.parametrize("missing", ["dask", "distributed"])
def test_fit_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rectilinear.dask import fit

    monkeypatch.setitem(sys.modules, missing, None)
    net = net_of(0)
    with pytest.raises(ImportError, match=rf"fit: {missing} is not installed; pip install 'rectilinear\[dask\]'"):
        fit(net, None, None, loss=None, optimizer=nn.SGD(net, 0.1), epochs=1, batch_size=4)


def test_unknown_rows_have_to_be_found_out_before_fit() -> None:
    import dask.array as da

    from rectilinear.dask import fit

    x, y = problem()
    net = net_of(0)
    unknown = lazily(x)[da.from_array(y == 0, chunks=16)]
    with pytest.raises(ValueError, match=r"x has an unknown extent .*x\.compute_chunk_sizes\(\)"):
        fit(net, unknown, y, loss=nn.SoftmaxCrossEntropy(), optimizer=nn.SGD(net, 0.1), epochs=1, batch_size=4, client=object())


def test_the_example_in_the_docstring() -> None:
    import rectilinear.dask

    outcome: Callable[..., Any] = doctest.testmod
    assert outcome(rectilinear.dask).failed == 0


@pytest.mark.nightly  # the kill itself is tested above, and make demo-dask shows the example
def test_the_example_trains_while_a_worker_dies() -> None:
    script = Path(__file__).resolve().parent.parent / "examples" / "two_layer_net_dask.py"
    done = subprocess.run(
        (sys.executable, script, "--workers", "2", "--rows", "16384"), capture_output=True, text=True, timeout=250, check=False
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy (\d+\.\d+)%", said)[1]) > 95, said  # type: ignore[index]
    assert "killed worker process" in said
    assert re.search(r"generated: 2 steps in .* loss 2\.\d+ to", said), said
