"""`rectilinear.profile`: every call is counted once, by what it was, whoever made it; looking changes nothing and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear import nn, profiling
from rectilinear.backends import registry
from rectilinear.layers import *  # noqa: F403  # as users do, who have the functions by name before a profile opens
from rectilinear.measure import ceilings
from rectilinear.measure.cases import Case
from rectilinear.measure.figures import roof

from . import subprocesses

CEILINGS = {
    "flops": {"float32": 1e11, "float64": 5e10},
    "levels": [
        {"level": "L2", "capacity": 1 << 20, "read": 2e11, "copy": 1e11},
        {"level": "memory", "capacity": None, "read": 2e10, "copy": 1e10},
    ],
    "threads": 2,
}


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine was measured at is not to decide a test."""
    monkeypatch.setattr(ceilings, "kept", lambda: None)


def counts(p: Any) -> dict[Any, int]:
    return {(row.function, row.shape): row.calls for row in p.rows()}


@pytest.fixture
def arrays(rng: np.random.Generator) -> tuple[Any, ...]:
    return tuple(rng.standard_normal(shape).astype("f4") for shape in ((6, 5), (5, 4), (4,), (6, 4)))


def call_everything(x: Any, w: Any, b: Any, dout: Any) -> list[Any]:
    z, cache = affine_forward(x, w, b)  # noqa: F405
    y, fused = affine_relu_forward(x, w, b)  # noqa: F405
    return [
        z,
        y,
        *affine_backward(dout, cache),  # noqa: F405
        *affine_relu_backward(dout, fused),  # noqa: F405
        affine_backward(dout, cache, needs=(False, True, True))[1],  # noqa: F405
        affine_backward(dout, cache, needs=(False, False, True))[2],  # noqa: F405
        relu_forward(z)[0],  # noqa: F405
        relu_backward(dout, z),  # noqa: F405
        softmax_loss(z, np.zeros(len(z), int))[1],  # noqa: F405
    ]


LAYER, OUT = (6, 5, 4), (6, 4)
EVERYTHING = {
    ("affine_forward", LAYER): 1,
    ("affine_relu_forward", LAYER): 1,
    ("affine_backward", LAYER): 1,
    ("affine_relu_backward", LAYER): 1,
    ("affine_backward (dw, db)", LAYER): 1,
    ("affine_backward (db)", OUT): 1,
    ("relu_forward", OUT): 1,
    ("relu_backward", OUT): 1,
    ("softmax_loss", OUT): 1,
}


def test_every_function_is_seen_and_computes_the_same(numpy_lib: Any, arrays: Any) -> None:
    given = [numpy_lib.array(a) for a in arrays]
    want = call_everything(*given)
    with r.profile() as p:
        got = call_everything(*given)
    call_everything(*given)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert counts(p) == EVERYTHING
    assert {(row.dtype, row.backend) for row in p.rows()} == {("float32", numpy_lib.backend)}
    for row in p.rows():
        assert 0 < row.shortest <= row.seconds


def test_other_libraries_and_dtypes(arrays: Any) -> None:
    strict = pytest.importorskip("array_api_strict")
    x, w, b, _ = arrays
    with r.profile() as p, r.use_backend("numpy"):
        r.affine_forward(*(strict.asarray(a) for a in (x, w, b)))
        r.affine_forward(x.astype("f2"), w.astype("f2"), None)
        r.affine_forward(x[None], w[None], b[None])
        r.relu_forward(np.float64(1.0))
    assert {(row.function, row.shape, row.dtype, row.backend) for row in p.rows()} == {
        ("affine_forward", LAYER, "float32", "generic (array_api_strict)"),
        ("affine_forward", LAYER, "float32", "numpy"),  # in which 16 bits are computed
        ("affine_forward", (1, *LAYER), "float32", "numpy"),
        ("relu_forward", (), "float64", "numpy"),
    }


@pytest.mark.libraries
def test_time_that_is_not_the_works_gives_no_rates(arrays: Any) -> None:
    import dask.array as da
    import jax

    with r.profile() as p:
        jax.jit(lambda x, w: r.affine_forward(x, w, None)[0])(*arrays[:2])
        r.relu_forward(da.ones((4, 3))[da.ones(4) > 0])
    assert counts(p) == {("affine_forward", LAYER): 1, ("relu_forward", ("?", 3)): 1}
    assert {row.bandwidth for row in p.rows()} == {None}
    assert "does not wait" in p.table()
    assert "relu_forward" in p.table()


def test_a_net_and_its_step_are_seen(rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.AffineReLU(5, 4, rng=rng), nn.Affine(4, 3, rng=rng))
    optimizer = nn.SGD(net, lr=0.1, momentum=0.9)
    # Where an overflow is an error, as all warnings are here, steps go another way.
    with r.use_backend("numba"), r.profile() as p, np.errstate(over="ignore", invalid="ignore"):
        for _ in range(3):
            _, dscores = r.softmax_loss(net.forward(np.ones((6, 5), "f4")), [0] * 6)
            net.backward(dscores, need_dx=False)
            optimizer.step()
    assert counts(p) == {
        ("affine_relu_forward", (6, 5, 4)): 3,
        ("affine_forward", (6, 4, 3)): 3,
        ("softmax_loss", (6, 3)): 3,
        ("affine_backward", (6, 4, 3)): 3,
        ("affine_relu_backward (dw, db)", (6, 5, 4)): 3,
        ("sgd_step", (39,)): 2,  # the first makes the velocity
    }


def test_a_call_that_fails_is_none(arrays: Any) -> None:
    with r.profile() as p, pytest.raises(r.ShapeError):
        r.affine_forward(arrays[0], arrays[3], None)
    assert p.rows() == []
    assert "together" in p.table()


# ---------------------------------------------------------------- open and closed


def test_profiles_inside_of_one_another_each_see_all(arrays: Any) -> None:
    before = registry.active, registry.serving
    with r.profile() as outer:
        relu_forward(arrays[0])  # noqa: F405
        with contextlib.suppress(ZeroDivisionError), r.profile() as inner:
            relu_forward(arrays[0])  # noqa: F405
            raise ZeroDivisionError
        relu_forward(arrays[0])  # noqa: F405
        with pytest.raises(RuntimeError, match=r"rectilinear\.profile\(\) makes another"), outer:
            pass
    assert [p.rows()[0].calls for p in (outer, inner)] == [3, 1]
    assert (registry.active, registry.serving) == before
    with outer:
        relu_forward(arrays[0])  # noqa: F405
    assert outer.rows()[0].calls == 4


def test_threads_and_tasks_are_all_seen(arrays: Any, tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(200):
            r.relu_forward(arrays[0])

    async def tasks() -> None:
        await asyncio.gather(*(asyncio.to_thread(r.relu_forward, arrays[1]) for _ in range(5)))

    with r.profile() as p:
        threads = [threading.Thread(target=work, name=f"worker {i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(tasks())
    assert counts(p) == {("relu_forward", (6, 5)): 800, ("relu_forward", (5, 4)): 5}
    p.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert {f"worker {i}" for i in range(4)} <= set(names)
    calls = [event for event in events if event["ph"] == "X"]
    assert len({event["tid"] for event in calls}) == len(names)
    for row in p.rows():
        times = [event["dur"] for event in calls if event["args"]["shape"] == "x".join(map(str, row.shape))]
        np.testing.assert_allclose([row.seconds * 1e6, row.shortest * 1e6], [sum(times), min(times)])


def test_nothing_is_loaded_or_looked_at_without_a_profile() -> None:
    code = """
    import sys, numpy, rectilinear
    print("rectilinear.profiling" in sys.modules, "profile" in rectilinear.__all__)
    from rectilinear.backends import registry
    before = registry.active
    with rectilinear.profile():
        assert registry.active is not before
    print(registry.active is before)
    """
    assert subprocesses.run(code).split() == ["False", "True", "True"]


def test_a_fork_of_a_process_that_profiles() -> None:
    code = """
    import os, signal, numpy as np, rectilinear as r
    from rectilinear import profiling
    with r.use_backend("numpy"), r.profile() as p:
        profiling._lock.acquire()  # as a thread that opens a profile at this moment
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            with r.profile() as q:
                r.relu_forward(np.ones(3))
            os._exit(0 if [x.rows()[0].calls for x in (p, q)] == [1, 1] else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        profiling._lock.release()
    """
    assert subprocesses.run(code, limit_s=30) == "0\n"


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("function", "kind", "shape"),
    [
        ("affine_forward", "affine", (6, 5, 4)),
        ("affine_relu_forward", "forward", (3, 6, 5, 4)),
        ("affine_relu_backward", "backward", (6, 5, 4)),
        ("affine_relu_backward", "backward", (3, 6, 5, 4)),
        ("relu_forward", "relu_forward", (6, 4)),
        ("relu_backward", "relu_backward", (6, 4)),
        ("affine_backward (db)", "db", (6, 4)),
        ("softmax_loss", "softmax", (6, 4)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_work_is_what_the_benchmark_counts(function: str, kind: str, shape: tuple[int, ...], dtype: str) -> None:
    case, work = Case(kind, shape, dtype), profiling._work(function, shape, dtype)
    assert work == profiling.Work(case.flops, case.bytes_read, case.bytes_written, dtype)


def test_work_of_some_gradients_adds_up() -> None:
    parts = [profiling._work(f"affine_relu_backward ({name})", (6, 5, 4), "float32") for name in ("dx", "dw", "db")]
    whole = profiling._work("affine_relu_backward", (6, 5, 4), "float32")
    assert sum(part.flops for part in parts) == whole.flops
    assert sum(part.bytes_written for part in parts) == whole.bytes_written
    assert all(part.bytes_read <= whole.bytes_read for part in parts)


def test_rates_and_shares(arrays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "kept", lambda: CEILINGS)
    with r.profile() as p:
        for _ in range(3):
            call_everything(*arrays)
    by_name = {row.function: row for row in p.rows()}
    row, case = by_name["affine_relu_backward"], Case("backward", LAYER, "float32")
    limit = roof(case, CEILINGS)
    np.testing.assert_allclose(row.flops, 3 * case.flops / row.seconds)
    np.testing.assert_allclose(row.bandwidth, 3 * (case.bytes_read + case.bytes_written) / row.seconds)
    np.testing.assert_allclose(row.share, 3 * limit.seconds / row.seconds)
    assert row.bound == limit.bound
    assert by_name["relu_forward"].flops is None
    assert by_name["relu_forward"].bound == "L2"
    lines = p.table().splitlines()
    (line,) = (line for line in lines if line.startswith("affine_relu_backward"))
    assert line.split()[1:5] == ["6x5x4", "float32", r.get_backend(), "3"]
    assert f"{row.share:.0%} {row.bound}" in line
    assert "bench" not in lines[-1]
    monkeypatch.setattr(ceilings, "kept", lambda: None)
    assert {row.share for row in p.rows()} == {None}
    assert "python -m rectilinear bench" in p.table()


def test_ceilings_are_kept_for_the_machine_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real `kept`
    monkeypatch.setenv("RECTILINEAR_CACHE_DIR", str(tmp_path))
    assert ceilings.kept() is None
    ceilings.keep({**CEILINGS, "threads": ceilings.available_cpus() + 1})
    assert ceilings.kept() is None
    mine = {**CEILINGS, "threads": ceilings.available_cpus()}
    ceilings.keep(mine)
    assert ceilings.kept() == mine
    here = ceilings.describe()
    monkeypatch.setattr(ceilings, "describe", lambda: here | {"cpu": "another"})
    assert ceilings.kept() is None


def test_the_trace_has_every_call_in_its_time(arrays: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_MOST_EVENTS", 5)
    with r.profile() as p:
        for _ in range(7):
            r.affine_forward(*arrays[:3])
    p.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    calls = [event for event in saved["traceEvents"] if event["ph"] == "X"]
    assert len(calls) == 5
    assert saved["otherData"]["calls left out, since they were too many"] == 2
    for event in calls:
        assert event["name"] == "affine_forward"
        assert event["args"] == {"shape": "6x5x4", "dtype": "float32", "backend": r.get_backend()}
        assert event["dur"] > 0
    ends = [0.0, *(event["ts"] + event["dur"] for event in calls)]
    assert all(event["ts"] >= end for event, end in zip(calls, ends, strict=False))
    assert p.rows()[0].calls == 7


def test_the_log_says_what_was_chosen_and_why(arrays: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "rectilinear"):
        r.set_backend("numba")
        with r.profile():
            for _ in range(2):
                out, cache = r.affine_relu_forward(*arrays[:3])
            r.affine_relu_backward(np.ones_like(out), cache)
    assert "NumPy arrays go to backend numba, chosen by process" in caplog.text
    (line,) = (record.getMessage() for record in caplog.records if "affine_relu_forward" in record.getMessage())
    assert "6x5x4 float32: numba, chosen by process; plan by " in line
    assert "depth=" in line
    (line,) = (record.getMessage() for record in caplog.records if "affine_relu_backward" in record.getMessage())
    for product in ("dx: ", "dw: "):
        assert line.count(f"{product}width=") == line.count(f"{product}rows=") == 1
    caplog.clear()
    with r.profile():
        r.affine_relu_forward(*arrays[:3])
    assert not caplog.records


def test_the_log_says_what_auto_passed_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_AUTO_ORDER", ("nobody", "numpy"))
    with caplog.at_level(logging.DEBUG, "rectilinear"):
        r.relu_forward(np.ones(3))
    assert "backend numpy is usable" in caplog.text
    assert "NumPy arrays go to backend numpy, chosen by auto; auto passed over nobody: unknown" in caplog.text
