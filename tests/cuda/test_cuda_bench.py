"""The benchmarks of GPU subjects on the stand-in: what is within a time and what is not, and a whole run with its report.

No time here is a GPU's. The clock below is made up, so that every figure can be told beforehand.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_standin
import numpy as np
import pytest
import standin
from host_backend import Host

import rectilinear
from rectilinear.backends import cupy_loader, registry
from rectilinear.backends.contract import Probe
from rectilinear.measure import gpu, ours, report, worker
from rectilinear.measure.cases import Case
from rectilinear.measure.gpu import COPIES, LAUNCHED, WARM_UP, Events
from rectilinear.measure.peers import cs231n
from rectilinear.measure.record import load
from rectilinear.measure.reference import check, inputs
from rectilinear.measure.run import Plan, run
from rectilinear.measure.subjects import BASELINE, PEERS, Run, Subject

ROOT = Path(__file__).parents[2]
RELU = Case("relu_forward", (10, 100), "float32")


class Clock:
    """A host that queues work and a device that does it later, in seconds; `journal` has what they were told, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        self.journal: list[str] = []
        monkeypatch.setattr(standin, "time", SimpleNamespace(perf_counter=lambda: max(self.host, self.device)))
        for module in (gpu, worker):
            monkeypatch.setattr(module, "perf_counter", lambda: self.host)
        record = standin.Event.record
        monkeypatch.setattr(standin.Event, "record", lambda event, stream=None: (self.note("record", stream), record(event, stream))[1])
        monkeypatch.setattr(standin.Event, "synchronize", lambda event: self.wait("wait for the event", event.time))
        monkeypatch.setattr(standin.Stream, "synchronize", lambda stream: self.wait("wait for the stream", self.device))
        monkeypatch.setattr(standin.Device, "synchronize", lambda device: self.wait("wait for the device", self.device))

    def note(self, what: str, stream: Any = None) -> None:
        self.journal.append(what if stream is None else f"{what} on {stream.name}")

    def wait(self, what: str, until: float) -> None:
        self.note(what)
        self.host = max(self.host, until)

    def work(self, what: str, launch: float, kernel: float) -> Callable[..., Any]:
        """Something that takes the host `launch` to queue and the device `kernel` to do; gives back what it is given."""

        def call(value: Any = None) -> Any:
            self.note(what)
            self.host += launch
            self.device = max(self.device, self.host) + kernel
            return value

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def on_standin(put: Any = None, fetch: Any = None) -> Events:
    return Events(standin.StandIn(), put, fetch)


# ---------------------------------------------------------------- the timer


def test_a_batch_is_a_pair_of_events_on_the_current_stream_and_waits_for_nothing_within(clock: Clock) -> None:
    call = clock.work("call", 1, 5)
    for stream in (standin.Stream(), standin.Stream.null):
        stream.name = "mine"  # type: ignore[attr-defined]
        clock.journal.clear()
        with stream:
            on_standin().elapsed(call, 4)
        assert clock.journal == ["record on mine", *["call"] * 4, "record on mine", "wait for the event"]


@pytest.mark.parametrize(("launch", "kernel", "elapsed"), [(1, 5, 1 + 10 * 5), (5, 1, 10 * 5 + 1)])
def test_elapsed_time_has_the_gaps_that_launching_leaves_and_the_hosts_share_has_no_waiting(
    clock: Clock, launch: float, kernel: float, elapsed: float
) -> None:
    standin.Stream.null.name = "null"  # type: ignore[attr-defined]
    call = clock.work("call", launch, kernel)
    assert on_standin().elapsed(call, 10) == pytest.approx(elapsed)
    clock.device += 1000  # still busy with something else
    clock.journal.clear()
    assert on_standin().launch(call) == pytest.approx(launch)
    assert clock.journal == ["wait for the stream", *["call"] * LAUNCHED, "wait for the stream"]


def test_copies_are_timed_until_they_are_done_and_without_the_first(clock: Clock) -> None:
    costs = iter([100.0, 100.0, *[2.0] * 2 * COPIES])
    there = lambda a: clock.work("put", 0, next(costs))(a)  # noqa: E731 - queued: the host alone would see nothing
    back = clock.work("fetch", 3, 0)
    arrays = [np.zeros((10, 100), "f4"), np.zeros(10, "i8")]
    found = on_standin(there, back).copies(arrays, arrays[:1])
    assert found == {"to_device": {"bytes": 4080, "seconds": [4.0] * COPIES}, "to_host": {"bytes": 4000, "seconds": [3.0] * COPIES}}


def test_the_name_of_the_device() -> None:
    assert on_standin().device == "a stand-in"


# ---------------------------------------------------------------- the worker


@pytest.mark.parametrize(("expected", "warm_up"), [(1e-3, 50), (0.02, WARM_UP), (0.4, WARM_UP), (50.0, WARM_UP)])
def test_at_least_three_calls_warm_up_in_every_turn(expected: float, warm_up: int) -> None:
    batches: list[int] = []
    counting: Any = SimpleNamespace(elapsed=lambda call, calls: (batches.append(calls), calls)[1])
    assert worker.per_call(lambda: None, 0.5, expected, counting) == 1
    assert batches[0] == warm_up >= 3
    assert len(batches) > 1


def test_no_copy_is_in_the_time_of_a_pass(clock: Clock) -> None:
    standin.Stream.null.name = "null"  # type: ignore[attr-defined]
    answer = np.maximum(inputs(RELU)["x"], 0)

    def build(case: Case, data: dict[str, Any]) -> Run:
        on = Events(standin.StandIn(), clock.work("put", 1000, 1000), clock.work("fetch", 500, 500))
        for a in data.values():
            on.put(a)
        call = clock.work("call", 0.001, 0.25)
        return Run(lambda: call((answer,)), lambda value: tuple(map(on.fetch, value)), on)

    subject = worker._Worker(build)
    subject.prepare([RELU.kind, RELU.shape, RELU.dtype])
    put = clock.journal.count("put")
    measured = [subject.measure(5.0) for _ in range(2)]
    assert clock.journal.count("put") == put == 2  # dout and x, once
    assert "fetch" not in clock.journal
    for turn in measured:  # 4 calls a batch: the first has to be launched
        assert turn == {"seconds": pytest.approx(0.25 + 0.001 / 4), "launch": pytest.approx(0.001)}
    checked = subject.check()
    assert checked["wrong"] is None
    assert checked["gpu"] == {
        "device": "a stand-in",
        "to_device": {"bytes": 8000, "seconds": [pytest.approx(3000)] * COPIES},  # the second is queued while the first is under way
        "to_host": {"bytes": 4000, "seconds": [pytest.approx(1000)] * COPIES},
    }


# ---------------------------------------------------------------- whole runs

SMALL = [
    Case("affine", (16, 32, 24), "float32"),
    Case("forward", (16, 32, 24), "float32"),
    Case("backward", (16, 32, 24), "float32"),
    Case("step", (1, 64, 64), "float32"),
    Case("step", (8, 16, 24), "float64"),
    Case("stacked", (4, 8, 16, 24), "float32"),
    RELU,
    Case("relu_backward", (10, 100), "float64"),
    Case("db", (100, 100), "float32"),
    Case("softmax", (32, 10), "float64"),
    Case("train", (4,), "float32"),
]


# A training step takes over a second here, and is called some thirty times by each subject.
@pytest.mark.parametrize(
    "cases", [pytest.param([c for c in SMALL if c.kind != "train"], id="passes"), pytest.param(SMALL, id="all", marks=pytest.mark.nightly)]
)
def test_a_run_with_subjects_on_a_gpu(libraries: dict[str, Path], tmp_path: Path, cases: list[Case]) -> None:
    environment = {"RECTILINEAR_BACKEND": "cupy", "KERNELS": str(libraries["float32"].parent)}
    subjects = [
        Subject(name, f"bench_standin:{function}", backend="cupy", environment=environment)
        for name, function in (("cupy", "build"), ("cupy-out", "build_out"))
    ]
    subjects.append(next(peer for peer in PEERS if peer.name == BASELINE))
    file = tmp_path / "run.json"
    record = run(Plan(cases, subjects, {}, rounds=2, seconds=0.001, ceilings=False), save=lambda r: r.save(file))
    assert not record.refused
    assert not record.left_out
    assert not record.missing
    assert [f.case for f in record.figures] == cases
    for f in record.figures:
        assert set(f.seconds) == {"cupy", "cupy-out", BASELINE}
        assert set(f.gpu) == {"cupy", "cupy-out"}
        for about in f.gpu.values():
            assert about["device"] == "a stand-in"
            assert len(about["launch"]) == 2
            assert min(about["launch"]) > 0
            assert about["to_device"]["bytes"] == sum(a.nbytes for a in inputs(f.case).values())
    step = next(f for f in record.figures if f.case == Case("step", (1, 64, 64), "float32"))
    assert step.gpu["cupy"]["to_host"]["bytes"] == 4 * (64 + 64 + 64 * 64 + 64)
    assert load(file) == record
    text = report.markdown(record)
    assert "## On the GPU: launches and copies\n" in text
    assert "| GPU | a stand-in |" in text


# ---------------------------------------------------------------- the pytest suites


@pytest.fixture
def chosen(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The stand-in in CuPy's place, within this process and test."""
    monkeypatch.setattr(registry, "_loaded", {})
    bench_standin.install(host, monkeypatch.setattr)
    return host


@pytest.mark.parametrize("build", [ours.build, ours.build_out])
def test_a_pass_copies_nothing_between_host_and_device(chosen: Host, build: Any) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a copy between host and device")

    with rectilinear.use_backend("cupy"):
        for case in SMALL:
            subject = build(case, inputs(case))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chosen.cp, "asarray", refuse)
                patch.setattr(standin.ndarray, "get", refuse)
                value = subject.call()
            assert all(type(a) is chosen.cp.ndarray for a in value)
            assert check(case, inputs(case), subject.results(value)) is None, case.name


class Benchmark:
    """pytest-benchmark's fixture, as far as the suites go."""

    def __init__(self, clock: Clock) -> None:
        self.group, self.extra_info, self.clock = "", {}, clock  # type: ignore[var-annotated]

    def __call__(self, function: Callable[[], Any]) -> None:
        self.clock.journal.clear()
        function()
        self.journal = list(self.clock.journal)


def test_the_suites_wait_for_what_they_time_and_tell_the_rest(chosen: Host, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import suite

    standin.Stream.null.name = "null"  # type: ignore[attr-defined]
    launch = clock.work("kernel", 0.001, 0.01)
    monkeypatch.setattr(rectilinear, "relu_forward", lambda *a, then=rectilinear.relu_forward, **k: (launch(), then(*a, **k))[1])
    benchmark = Benchmark(clock)
    suite.run(benchmark, "cupy", RELU)
    assert benchmark.journal == ["kernel", "wait for the stream"]
    found = benchmark.extra_info
    assert found["gpu"] == "a stand-in"
    assert found["event_seconds"] == pytest.approx(0.01 + 0.001)  # one call a batch: TURN is 5 calls
    assert found["launch_seconds"] == pytest.approx(0.001)
    assert found["copies"]["to_device"]["bytes"] == 8000
    assert found["copies"]["to_host"]["bytes"] == 4000
    with rectilinear.use_backend("numpy"):
        plain = suite.ours.build(RELU, inputs(RELU))
    assert suite.waiting(plain) is plain.call


# ---------------------------------------------------------------- the peer


def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delitem(sys.modules, "rectilinear.measure.peers.cs231n_cupy", raising=False)
    from rectilinear.measure.peers import cs231n_cupy

    return cs231n_cupy


def test_without_a_gpu_the_peer_is_missing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="no NVIDIA driver"):
        peer(monkeypatch)


def test_the_peer_is_cs231ns_code_in_cupys_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy under another name in CuPy's place: the stand-in has no arithmetic."""
    used: list[str] = []

    class There(np.ndarray):
        """Results of what is there are there too."""

    class Elsewhere:
        cuda = standin.StandIn().cuda
        asarray = staticmethod(lambda a: np.array(a).view(There))
        asnumpy = staticmethod(np.array)

        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(np, name)

    monkeypatch.setattr(cupy_loader, "connect", lambda: SimpleNamespace(cp=Elsewhere()))
    monkeypatch.setattr(cupy_loader, "examine", lambda backend: Probe(True))
    made = peer(monkeypatch)
    for case in SMALL:
        subject = made.build(case, inputs(case))
        assert subject.gpu is not None
        value = subject.call()
        assert all(type(a) is There for a in value if a.ndim)
        assert check(case, inputs(case), subject.results(value)) is None, case.name
    assert {"maximum", "exp", "log", "arange", "sum"} <= set(used)
    assert cs231n.np is np


def test_cupy_has_what_cs231ns_code_asks_for() -> None:
    import cupy

    names = set(re.findall(r"\bnp\.(\w+)", inspect.getsource(cs231n)))
    assert {"maximum", "exp", "log", "arange"} <= names
    for name in names:
        assert hasattr(cupy, name), name
