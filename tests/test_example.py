"""The main job: the two-layer net on handwritten digits, the same script under every backend, and the demo around it."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import rectilinear
from rectilinear.backends.registry import NEVER_CHOSEN

EXAMPLES = Path(__file__).parent.parent / "examples"
BACKENDS = [info.name for info in rectilinear.list_backends() if info.usable and info.name not in NEVER_CHOSEN]

# Products this small gain nothing from a second BLAS thread, and on a busy machine its waiting costs minutes.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import two_layer_net

    return two_layer_net


@pytest.fixture
def build(example):
    return functools.partial(example.two_layer_net, dtype="float64", xp=None)


@pytest.fixture
def demo(example):
    import demo

    return demo


def script(*options: str, backend: str) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / "two_layer_net.py", *options]
    return subprocess.run(command, env=os.environ | ONE_THREAD | {"RECTILINEAR_BACKEND": backend}, capture_output=True, text=True)


# ---------------------------------------------------------------- the main job


def test_accuracy(example, build):
    scores = [example.run(build, seed, example.WIDTH, example.EPOCHS).accuracy for seed in (0, 1, 2, 3, 4)]
    assert np.mean(scores) >= 0.97
    assert min(scores) >= 0.96


def test_capture_changes_nothing(example, build):
    """Of NumPy arrays nothing is recorded; on a GPU's see tests/cuda/test_cuda_capture.py."""
    plain, captured = (example.run(build, 0, 32, 2, capture=capture) for capture in (False, True))
    assert captured.losses == plain.losses
    assert captured.predicted == plain.predicted


@pytest.mark.parametrize("backend", BACKENDS)
def test_script_under_every_backend(backend, example, build, tmp_path):
    done = script("--epochs", "3", "--seeds", "1", "2", "--json", tmp_path / "runs.json", backend=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{backend} backend, float64 parameters in ")
    runs = [example.Run(**run) for run in json.loads((tmp_path / "runs.json").read_text())]
    with rectilinear.use_backend("numpy"):
        for run in runs:
            here = example.run(build, run.seed, example.WIDTH, 3)
            np.testing.assert_allclose(run.losses, here.losses, rtol=1e-10)
            assert run.predicted == here.predicted
            assert f"{here.accuracy:.2%}" in done.stdout
    assert f"lowest {min(run.accuracy for run in runs):.2%}" in done.stdout


def test_script_on_another_library(tmp_path):
    done = script("--epochs", "1", "--seeds", "0", "--xp", "array_api_strict", "--json", tmp_path / "runs.json", backend="numpy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("numpy backend, float64 parameters in array_api_strict\n")
    assert len(json.loads((tmp_path / "runs.json").read_text())[0]["losses"]) == 43


def test_script_under_a_backend_that_is_none():
    done = script("--epochs", "1", "--seeds", "0", backend="nmupy")
    assert done.returncode != 0
    assert "BackendError" in done.stderr
    assert "nmupy" in done.stderr


# ---------------------------------------------------------------- the data and the choice


@pytest.mark.parametrize("seed", [0, 1])
def test_a_quarter_is_set_aside_with_every_digit_in_proportion(seed, example):
    training, test = example.digits(seed)
    assert (len(training.x), len(test.x)) == (1347, 450)
    assert 0 <= training.x.min() < training.x.max() <= 1
    share = np.bincount(test.y) / np.bincount(np.concatenate([training.y, test.y]))
    assert np.abs(share - 0.25).max() < 0.005
    assert not np.array_equal(test.x, example.digits(seed + 1)[1].x)


def test_validation_sees_no_test_image(example, build, monkeypatch):
    monkeypatch.setattr(example, "TRIED_EPOCHS", (1, 2))
    scores = example.validate(build, 0, 8)
    training, _ = example.digits(0)
    monkeypatch.setattr(example, "digits", lambda seed: (training, None))
    assert example.validate(build, 0, 8) == scores
    assert len(scores) == 2


def test_choice_is_the_best_pair(example, build, monkeypatch, capsys):
    monkeypatch.setattr(example, "TRIED_EPOCHS", (1, 3))
    monkeypatch.setattr(example, "TRIED_WIDTHS", (2, 16))
    example.choose(build, [0], example.Console(width=100))
    said = capsys.readouterr().out
    assert "best: width 16, 3 epochs" in said
    assert "seed 0 alone would take width 16, 3 epochs: test accuracy" in said


# ---------------------------------------------------------------- the demo


def test_demo(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--trainings", "1", "--epochs", "2", "--no-hot-path"]
    command += ["--out", tmp_path / "out" / "demo.png"]
    done = subprocess.run(command, env=os.environ | ONE_THREAD | {"COLUMNS": "120"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == [*sorted(BACKENDS, key=lambda name: name != "numpy"), "array-api-strict"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    told = " ".join(done.stdout.split())
    for info in rectilinear.list_backends():
        assert info.usable or f"not run: {info.name}: {info.reason}" in told


def test_demo_compares_with_the_numpy_backend(demo, example):
    def result(name, losses, seconds):
        runs = [example.Run(0, each, losses, losses[-1], 0.5, [1]) for each in seconds]
        return demo.Result(name, runs)

    results = [result("numpy", [2.0, 1.0], (2.0, 1.0, 9.0)), result("other", [2.0, 1.25], (4.0, 6.0, 5.0))]
    cells = [list(column.cells) for column in demo.table(results, 3).columns]
    assert cells == [["numpy", "other"], ["2.00", "5.00"], ["1.000000", "1.250000"], ["50.00%", "50.00%"], ["-", "2.5e-01"]]


def test_demo_says_what_failed(demo):
    with pytest.raises(SystemExit, match=r"(?s)^nobody: training failed.*BackendError"):
        demo.train(demo.Contestant("nobody", "nobody", (), 1), epochs=1)


def test_demo_names_what_it_leaves_out(demo, monkeypatch):
    info = type(rectilinear.list_backends()[0])
    table = [info("absent", False, "not installed; install it"), info("fast", True), info("numpy", True), info("generic", True)]
    monkeypatch.setattr(rectilinear, "list_backends", lambda: table)
    assert demo.left_out() == ["not run: absent: not installed; install it"]
    assert [contestant.name for contestant in demo.contestants(3)] == ["numpy", "fast", "array-api-strict"]


def test_the_picture_of_the_graph_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "docs" / "figures")
    import graph

    assert (EXAMPLES.parent / "docs" / "figures" / "graph.svg").read_text(encoding="utf-8") == graph.draw()


def test_links_of_the_mathematics_lead_somewhere():
    page = EXAMPLES.parent / "docs" / "mathematics.md"
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    near = [link for link in links if not link.startswith("https://")]
    assert len(near) > 10
    assert [link for link in near if not (page.parent / link).is_file()] == []


def test_hot_path_shows_every_contestant(demo, tmp_path, capsys):
    """The table and the picture of a run that is made up: speed itself is not for tests."""
    import hot_path
    from rich.console import Console

    from rectilinear.measure.record import Figure, Record

    seconds = {"numba": [1e-3, 1e-3], "cs231n": [2e-3, 2e-3], "torch-lean": [4e-3, 3e-3]}
    record = Record("", {"rounds": 2, "threads": 2}, {}, subjects={key: {} for key in seconds})
    record.figures = [Figure("step", shape, "float32", seconds) for shape in hot_path.SHAPES]
    Console(width=120).print(hot_path.table(record))
    shown = capsys.readouterr().out
    assert "numba 2.00 x" in shown
    assert "numba 3.50 x" in shown
    assert "PyTorch, autograd" not in shown
    hot_path.picture(record.figures, tmp_path / "hot_path.png")
    assert (tmp_path / "hot_path.png").read_bytes().startswith(b"\x89PNG")
