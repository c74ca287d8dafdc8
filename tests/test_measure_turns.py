"""The harness: true times, equal subjects, wrong results, missing and crashing subjects, sleeping while others measure.

The subjects below run in processes of their own, which import this file.
"""

import os
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from rectilinear.measure import turns, worker
from rectilinear.measure.cases import Case
from rectilinear.measure.figures import ratio
from rectilinear.measure.record import Figure
from rectilinear.measure.subjects import IN_FRAMEWORKS, PEERS, Run, Subject, backend_subjects
from rectilinear.measure.turns import environment, started, take_turns

RELU = Case("relu_forward", (10, 100), "float32")
NAP = 0.01


def relu(data):
    return (np.where(data["x"] < 0, 0, data["x"]).astype("f4"),)


def sleeper(case, data):
    """Sleeps, and writes down how long that really took."""
    log = os.environ.get("NAPS")

    def call():
        start = time.perf_counter()
        time.sleep(NAP)
        if log:
            with Path(log).open("a") as file:
                file.write(f"{time.perf_counter() - start}\n")
        return relu(data)

    return Run(call, tuple)


def liar(case, data):
    return Run(lambda: (relu(data)[0] + 1e-3,), tuple)


def crasher(case, data):
    def call():
        print("about to crash", file=__import__("sys").stderr)
        os._exit(3)

    return Run(call, tuple)


def thrower(case, data):
    raise RuntimeError("cannot do " + case.name)


def spinner(case, data):
    def spin():
        end = time.perf_counter() + 20
        while time.perf_counter() < end:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return Run(lambda: relu(data), tuple)


def chatterbox(case, data):
    print("libraries print to standard output")
    os.write(1, b"also past Python\n")
    return Run(lambda: relu(data), tuple)


def subject(function, name=None, **variables):
    return Subject(name or function.__name__, f"{__name__}:{function.__name__}", environment=variables)


def measured(*subjects, case=RELU, rounds=3, seconds=0.05):
    with started(list(subjects), 1) as (children, _, missing):
        assert not missing
        return take_turns(case, children, rounds, seconds)


def test_a_sleeping_subject_is_reported_at_its_true_time(tmp_path):
    times, refused, left_out, _ = measured(subject(sleeper, NAPS=str(tmp_path / "naps")), rounds=5)
    naps = [float(line) for line in (tmp_path / "naps").read_text().split()]
    assert not refused
    assert not left_out
    assert median(times["sleeper"]) >= NAP
    assert median(times["sleeper"]) == pytest.approx(median(naps), rel=0.05)


def test_a_turn_is_the_median_of_its_batches():
    clock = iter([0, 9, 10, 11, 20, 22, 30, 33, 40, 44, 50, 150])  # a warm-up of 9, then 1, 2, 3, 4 and 100
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "perf_counter", lambda: next(clock))
        assert worker.per_call(lambda: called.append(1), 0.5, 0.09) == 3
    assert len(called) == 6


def test_equal_subjects_come_out_at_a_ratio_of_one():
    times, _, _, _ = measured(subject(sleeper, "a"), subject(sleeper, "b"), rounds=12)
    found = ratio(Figure(RELU.kind, RELU.shape, RELU.dtype, times), "a", "b")
    assert found.low <= 1 <= found.high
    assert found.high < 2  # the spread says something


def test_wrong_results_are_refused_by_name_and_have_no_figure():
    times, refused, _, _ = measured(subject(liar), subject(sleeper))
    assert set(times) == {"sleeper"}
    assert set(refused) == {"liar"}
    assert "differs in 1000 of 1000" in refused["liar"]


@pytest.mark.smoke
def test_subjects_take_turns():
    order = []
    with started([subject(sleeper, name) for name in "abc"], 1) as (children, _, _):
        take_turns(RELU, children, 2, 0.001, order.append)
    assert "".join(order) == "abc" + "abcabc" + "abc"  # prepare, two rounds, check


def test_a_subject_that_crashes_is_left_out_with_its_last_words():
    with started([subject(crasher), subject(sleeper)], 1) as (children, _, _):
        times, _, left_out, _ = take_turns(RELU, children, 2, 0.001)
        assert set(times) == {"sleeper"}
        assert "status 3: about to crash" in left_out["crasher"]
        times, _, left_out, _ = take_turns(RELU, children, 2, 0.001)
        assert set(times) == {"sleeper"}
        assert not left_out


def test_a_subject_that_cannot_do_a_case_stays_for_the_next():
    with started([subject(thrower)], 1) as (children, _, _):
        for _ in range(2):
            times, _, left_out, _ = take_turns(RELU, children, 2, 0.001)
            assert not times
            assert left_out == {"thrower": "RuntimeError: cannot do relu_forward-10x100-float32"}


def test_a_missing_library_is_named():
    absent = Subject("absent", "no_such_library.peer:build")
    with started([absent, subject(sleeper)], 1) as (children, _, missing):
        assert set(children) == {"sleeper"}
        assert missing == {"absent": "No module named 'no_such_library'"}


def test_what_libraries_print_does_not_disturb():
    times, _, left_out, _ = measured(subject(chatterbox))
    assert set(times) == {"chatterbox"}
    assert not left_out


def test_processor_time_between_turns_is_noticed(monkeypatch):
    monkeypatch.setattr(turns, "ASLEEP_WITHIN", 0.05)
    with started([subject(spinner), subject(sleeper)], 2) as (children, _, _):
        take_turns(RELU, children, 4, 0.1)
        share = {name: child.idle_cpu_seconds / child.idle_seconds for name, child in children.items()}
    # How much of it the scheduler grants is its affair; that it is many times a sleeper's, which is none, is not.
    assert share["spinner"] > 0.03
    assert share["sleeper"] < 0.01


def test_subjects_get_no_kernel_override_and_equal_threads(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    monkeypatch.setenv("RECTILINEAR_BACKEND", "nonsense")
    given = environment(subject(sleeper, EXTRA="1"), 3)
    assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "RECTILINEAR_BACKEND"} & set(given)
    assert {given[name] for name in turns.THREAD_VARIABLES} == {"3"}
    assert given["EXTRA"] == "1"


def test_a_case_that_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(turns, "memory_available", lambda: 10**4)
    times, _, left_out, _ = measured(subject(sleeper))
    assert not times
    assert "GiB together" in left_out["sleeper"]


def test_processes_end():
    with started([subject(sleeper), subject(spinner)], 1) as (children, _, _):
        pids = [child.process.pid for child in children.values()]
        take_turns(RELU, children, 1, 0.001)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


SMALL = [
    Case(kind, shape, dtype)
    for dtype in ("float32", "float64")
    for kind, shape in (
        ("affine", (16, 128, 128)),
        ("forward", (16, 128, 128)),
        ("backward", (16, 128, 128)),
        ("step", (1, 64, 64)),
        ("step", (16, 128, 128)),
        ("step_fortran", (16, 128, 128)),
        ("stacked", (4, 8, 16, 24)),
        ("relu_forward", (10, 100)),
        ("relu_backward", (10, 100)),
        ("db", (100, 100)),
        ("softmax", (128, 10)),
        ("infer", (32,)),
        ("infer", (4, 24, 16, 16, 10)),
        ("train", (32,)),
        ("train", (4, 24, 16, 16, 10)),
    )
]


def all_right(subjects, cases):
    with started(subjects, 1) as (children, _, missing):
        assert not missing
        for case in cases:
            times, refused, left_out, _ = take_turns(case, children, 1, 0.001)
            assert not refused
            assert not left_out
            assert set(times) == {s.name for s in subjects if s.covers(case)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.nightly)])
def test_backends_and_the_baseline_are_right_in_every_pass(dtype):
    # loopback is registered by these tests, in this process only
    backends = [subject for subject in backend_subjects()[0] if subject.backend != "loopback"]
    assert {"numpy", "numpy-out"} <= {s.name for s in backends}
    baseline = [peer for peer in (*PEERS, *IN_FRAMEWORKS) if peer.name in ("cs231n", "sklearn", "sklearn-accelerated")]
    all_right([*backends, *baseline], [case for case in SMALL if case.dtype == dtype])


@pytest.mark.libraries
@pytest.mark.nightly  # a minute
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_peers_are_right_in_every_pass(dtype):
    names = {"torch", "torch-lean", "torch-nn", "torch-accelerated", "jax", "thinc"}
    peers = [peer for peer in (*PEERS, *IN_FRAMEWORKS) if peer.name in names]
    assert len(peers) == len(names)
    all_right(peers, [case for case in SMALL if case.dtype == dtype])


@pytest.mark.libraries
@pytest.mark.nightly  # Inductor compiles
@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("torch-compile", [c for c in SMALL if c.kind == "softmax" or c.shape == (16, 128, 128) or c.name == "train-32-float32"]),
        ("torch-nn-compile", [Case("infer", (32,), "float32")]),
    ],
)
def test_torch_compile_is_right(name, cases):
    all_right([peer for peer in PEERS if peer.name == name], [case for case in cases if case.dtype == "float32"])
