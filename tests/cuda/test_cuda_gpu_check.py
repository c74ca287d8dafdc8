"""tools/gpu_check.py on the stand-in: each of its steps runs, a planted bug makes it end non-zero, and its report can be read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_check_standin
import gpu_measure
import gpu_page
import host_build
import numpy as np
import pytest
import standin
from host_backend import Host

from rectilinear.backends import cupy_loader, cupy_lt
from rectilinear.backends.cupy_backend import CupyBackend, Runtime


@pytest.fixture
def make(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A maker of the backend on the stand-in, whose kernels pretend to take what the compiler said."""
    gpu_check_standin.pretend(lambda *given: monkeypatch.setattr(*given, raising=False))
    runtime = Runtime(host.cp, host.modules.__getitem__, host.backend.runtime.products)
    return lambda: CupyBackend(lambda: runtime, cupy_loader.examine)


@pytest.fixture
def one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what any dtype shows."""
    monkeypatch.setattr(gpu_check.Check, "dtypes", ("float32",))


def run(make: Any, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = folder / "report.json"
    status = gpu_check.main(["--out", str(file), *arguments], gpu_check_standin.setup(make))
    return status, json.loads(file.read_text())


def step(report: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(report["parts"]["correctness"]["rows"][name])


@pytest.mark.nightly  # half a minute
def test_all_parts(make: Any, libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("KERNELS", str(libraries["float32"].parent))
    status, report = run(make, tmp_path)
    said = capfd.readouterr().out
    assert list(report["parts"]) == ["correctness", "host_cost", "tests", "bandwidth", "steps"]
    assert {name: part["state"] for name, part in report["parts"].items()} == dict.fromkeys(report["parts"], "ended"), report
    rows = {name: part["rows"] for name, part in report["parts"].items()}
    states = {name: row["state"] for part in rows.values() for name, row in part.items()}
    left_out = {name for name, state in states.items() if state == "left out"}
    assert {name for name, state in states.items() if state not in ("right", "left out")} == set(), report
    assert left_out == set()
    assert list(rows["correctness"]) == [each.__name__ for each in gpu_check.STEPS]
    assert (status, report["passed"], report["gpu"]) == (0, True, "a stand-in")
    assert report["commit"]
    assert rows["correctness"]["parity"]["found"]["cases"] > 400
    assert "NotImplementedError" in rows["correctness"]["streams"]["found"]["cupy.matmul under capture"]
    host = rows["host_cost"]["host us 1x64x64 float32"]["found"]
    assert host["affine_relu_forward"] > host["np.maximum of 64 numbers"] > 0
    assert "a captured step" in host
    assert any(name.startswith("cupy_") for name in rows["host_cost"]["profile of a step"]["found"])
    tests = rows["tests"]["pytest"]["found"]
    assert tests["passed"] == 18  # two tests, four stacks or two dtypes, three libs
    assert tests["left out"]
    rates = rows["bandwidth"]["GB/s 64x32 bfloat16"]["found"]["GB/s"]
    assert all(isinstance(rate, float) for rate in rates.values())
    assert set(rates) == {"copy", "bias + ReLU + mask", "ReLU", "select by mask", "bias reduction", "select + bias reduction"}
    timed = rows["steps"]["step-16x128x128-float32"]["found"]
    assert set(timed["us"]) == {"cupy", "cupy-out", "cs231n"}
    assert timed["checked against float64"]
    missing = rows["steps"]["subjects"]["found"]["missing"]
    assert "No module named" in missing["absent"]
    assert missing["never"] == "not usable"
    assert "all right on a stand-in" in said
    assert all(name in said for name in states)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("every number right", "select + bias reduction", "16x128x128", "No module named", "left out: tests, why", *left_out):
        assert words in page
    assert "What is wrong" not in page


# ---------------------------------------------------------------- what is cut, crashes or is missing


def sleeps(check: Any, rows: Any) -> None:
    rows.add("quick", lambda: {"found": 1})
    rows.add("slow", lambda: time.sleep(60) or {})


def crashes(check: Any, rows: Any) -> None:
    rows.add("quick", lambda: {"found": 1})
    rows.add("fatal", lambda: (print("the last words", file=sys.stderr, flush=True), os._exit(3)))


def throws(check: Any, rows: Any) -> None:
    rows.add("quick", lambda: {"found": 1 / 0})
    rows.add("after", lambda: {"found": 1})


def found_by(parts: list[str], seconds: float, whole: float) -> dict[str, Any]:
    """The report of functions of this file as parts, each in a process of its own."""
    script = f"import sys; sys.path[:0] = {[str(gpu_check_standin.HERE), *sys.path]}\n"
    script += "import gpu_check, test_cuda_gpu_check as parts; from pathlib import Path; _, _, name, _, file = sys.argv\n"
    script += "getattr(parts, name)(None, gpu_check.Rows(gpu_check.Check(None), Path(file)))"
    known = {name: gpu_check.Part(seconds, globals()[name]) for name in parts}
    setup = gpu_check.Setup(command=(sys.executable, "-c", script), parts=known)
    return gpu_check.report(gpu_check.run(parts, whole, setup), setup, None)


START = 15.0
"""Seconds in which a process of Python with NumPy and pytest has started, on a busy machine too."""


@pytest.mark.nightly  # it waits for the budget of a part to end
def test_a_part_that_overruns_is_cut_with_what_it_has_and_the_next_runs() -> None:
    report = found_by(["sleeps", "throws"], START, 2 * START)
    cut, after = report["parts"].values()
    assert (cut["state"], cut["why"]) == ("cut", f"not done after {START:.0f} s")
    assert {name: row["state"] for name, row in cut["rows"].items()} == {"quick": "right", "slow": "cut"}
    assert after["state"] == "ended"
    for must_end in (True, False):
        known = {"sleeps": gpu_check.Part(START, sleeps, must_end)}
        assert gpu_check.passed({"sleeps": cut}, gpu_check.Setup(parts=known)) is not must_end
    page = gpu_page.html(report)
    for words in ("What is wrong", "not done when the part", "ZeroDivisionError"):
        assert words in page


def test_a_part_that_crashes_says_how_and_the_next_runs() -> None:
    report = found_by(["crashes", "throws"], START, 2 * START)
    crashed, after = report["parts"].values()
    assert crashed["state"] == "broke off"
    assert "status 3: the last words" in crashed["why"]
    assert crashed["rows"]["quick"]["found"] == {"found": 1}
    assert {name: row["state"] for name, row in after["rows"].items()} == {"quick": "broke off", "after": "right"}
    assert not report["passed"]


def test_what_a_part_leaves_is_the_next_ones_and_the_last_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, float] = {}
    now = [0.0]
    taken = {"correctness": 20.0, "host_cost": 10.0, "tests": 500.0, "bandwidth": 5.0, "steps": 0.0}

    def run_part(name: str, limit: float, setup: Any) -> dict[str, Any]:
        limits[name] = limit
        now[0] += min(limit, taken[name])
        return {"state": "ended", "seconds": 0.0, "rows": {}}

    monkeypatch.setattr(gpu_check, "run_part", run_part)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    gpu_check.run(tuple(gpu_check.PARTS), gpu_check.WHOLE, gpu_check.Setup())
    given = {name: part.seconds for name, part in gpu_check.PARTS.items()}
    assert sum(given.values()) == gpu_check.WHOLE == 360
    assert limits["correctness"] == given["correctness"]
    assert limits["host_cost"] == given["host_cost"] + given["correctness"] - 20
    assert limits["bandwidth"] == given["bandwidth"]  # the tests took all that was left over
    assert limits["steps"] == given["steps"] + given["bandwidth"] - 5
    assert now[0] <= gpu_check.WHOLE
    assert sum(given[name] for name in gpu_check.FIRST) <= gpu_check.FIRST_WHOLE == 120
    now[0], taken = 0.0, dict.fromkeys(taken, 1000.0)
    gpu_check.run(tuple(gpu_check.PARTS), 180, gpu_check.Setup())  # --within: half of the time for each
    assert limits == pytest.approx({name: seconds / 2 for name, seconds in given.items()})


def test_the_tests_on_cupy_fail_where_a_kernel_is_wrong(
    make: Any, libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32's kernels in float64's place: what they write is not what was asked for."""
    for dtype in libraries:
        (tmp_path / f"{dtype}.so").symlink_to(libraries["float32" if dtype == "float64" else dtype])
    monkeypatch.setenv("KERNELS", str(tmp_path))
    status, report = run(make, tmp_path, "--part", "tests")
    row = report["parts"]["tests"]["rows"]["pytest"]
    assert (status, row["state"]) == (1, "WRONG")
    assert "tests/test_conformance.py::test_without_bias[cupy-stack0]" in row["wrong"]
    assert row["found"]["said"]


def test_without_a_gpu_the_switch_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py"]
    variables = {**os.environ, "TESTS_ON_CUPY": "1", "PYTHONPATH": str(gpu_check.ROOT)}
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TESTS_ON_CUPY=1 asks for the tests on a GPU" in done.stderr
    assert "no NVIDIA driver" in done.stderr


def test_the_page_counts_what_a_run_comes_to() -> None:
    """Geometric means by hand: 2 and 8 give 4; the best other of 16 bits is half as fast as ours, and a tenth faster."""
    small, large = gpu_measure.SMALL_SHAPES[:2], gpu_measure.LARGE_SHAPES[:1]

    def row(**us: float) -> dict[str, Any]:
        return {"found": {"us": {name.replace("_", "-"): each for name, each in us.items()}}}

    rows = {
        f"step-{gpu_measure._size(shape)}-float32": row(cupy=10, torch_lean_cuda=10 * by) for shape, by in zip(small, (2, 8), strict=True)
    }
    name = f"step-{gpu_measure._size(large[0])}"
    rows |= {f"{name}-bfloat16": row(cupy=10, jax_cuda=20, torch_cuda=30), f"{name}-float16": row(cupy=10, torch_cuda=9)}
    shares = {"bias reduction": 0.9}
    bandwidth = {
        "GB/s 8192x8192 float32": {"found": {"of a copy": shares}},
        "GB/s 16384x4096 float32": {"found": {"of a copy": {"bias reduction": 0.8}}},
    }
    found = gpu_page.summary({"parts": {"steps": {"rows": rows}, "bandwidth": {"rows": bandwidth}}})
    figures = {what: figure for what, figure, _ in found if figure}
    assert figures == {
        "float32, small shapes, eager, against PyTorch's leanest": "4.00",
        "16 bits, large shapes, against the best other": "1.34",  # sqrt(2 * 0.9)
        "bias reduction of a device copy, float32": "0.80",
    }


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize(
    ("kernel", "steps"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("relu_wide", {"parity", "large", "specials"}),
                ("colsum_wide", {"parity"}),
                ("bias_relu_mask_wide", {"parity"}),
                ("mask_backward_wide", {"parity", "large"}),
                ("softmax_loss", {"parity"}),
            )
        ),
        ("small_forward", {"parity", "layers", "determinism", "memory"}),
    ],
)
def test_a_kernel_that_does_nothing_is_found(
    make: Any, tmp_path: Path, kernel: str, steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = host_build.HostKernel.__call__
    monkeypatch.setattr(host_build.HostKernel, "__call__", lambda self, *args: None if self.name == kernel else launch(self, *args))
    for name in steps & {"parity", "large", "specials", "layers"}:
        status, report = run(make, tmp_path, "--only", name)
        assert (status, report["passed"]) == (1, False), name
        assert step(report, name)["state"] == "WRONG"


@pytest.mark.usefixtures("one_dtype")
def test_one_other_bit_is_found(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sum, within every bound: only the stored bits tell."""
    launch = host_build.HostKernel.__call__

    def nudged(self: host_build.HostKernel, grid: Any, block: Any, args: Any) -> None:
        launch(self, grid, block, args)
        if self.name == "colsum" and args[5].dtype == np.float32:
            args[5]._host.view(np.int32).reshape(-1)[0] += 1

    monkeypatch.setattr(host_build.HostKernel, "__call__", nudged)
    status, report = run(make, tmp_path, "--only", "parity")
    assert status == 1
    assert all("other bits than on the CPU" in words for words in step(report, "parity")["wrong"])


@pytest.mark.usefixtures("one_dtype")
def test_a_step_that_breaks_off_counts(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(standin.Device, "synchronize")
    status, report = run(make, tmp_path, "--only", "determinism")
    assert status == 1
    assert step(report, "determinism")["state"] == "broke off"
    assert "synchronize" in step(report, "determinism")["why"]
    assert "broke off" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("one_dtype", "no_small_layers")
def test_tf32_would_be_noticed(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_lt, "COMPUTE_32F", cupy_lt.COMPUTE_32F_FAST_TF32)
    status, report = run(make, tmp_path, "--only", "tensor_cores")
    assert status == 1
    assert "is TF32 on?" in step(report, "tensor_cores")["wrong"][0]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "none.json")]) == 2
    assert "nothing to check here: no NVIDIA driver" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_it_needs_no_more_than_cupy_and_numpy() -> None:
    """What else the package depends on is hidden; the script gets as far as the driver, which is not here."""
    script = gpu_check.ROOT / "tools" / "gpu_check.py"
    code = (
        "import sys, runpy\n"
        "for name in ('array_api_compat', 'rich', 'safetensors', 'threadpoolctl', 'numba'): sys.modules[name] = None\n"
        f"sys.argv = ['gpu_check']; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().startswith("nothing to check here: no NVIDIA driver"), done.stderr
    assert done.returncode == 2


def test_the_readme_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert gpu_check.readme_line(file) == "The cupy backend last ran on a real GPU: never yet."
    about = {"date": "2027-01-02", "gpu": "NVIDIA X", "passed": True}
    rows = {"parity": {"found": {"cases": 12, "bit for bit": 11}}}
    says = "The cupy backend last ran on a real GPU on 2027-01-02: NVIDIA X, every check right"
    for report in (about | {"steps": rows}, about | {"parts": {"correctness": {"rows": rows}}}):  # the first: from before there were parts
        file.write_text(json.dumps(report))
        assert gpu_check.main(["--readme", str(file)]) == 0
        assert capsys.readouterr().out.strip() == says + " (12 kernel cases, 11 of them with the bits of a CPU)."
    cut = {"correctness": {"state": "ended", "rows": {}}, "tests": {"state": "cut", "rows": {}}}
    file.write_text(json.dumps(about | {"parts": cut, "passed": False}))
    assert gpu_check.readme_line(file).endswith("all right as far as it came (not to its end: tests), see docs/gpu-check.json.")
    file.write_text(json.dumps(about | {"parts": {"correctness": {"rows": {"layers": {"state": "WRONG"}}}}, "passed": False}))
    assert gpu_check.readme_line(file).endswith("NVIDIA X, all right but layers, see docs/gpu-check.json.")


def test_the_readme_says_it() -> None:
    """Whenever the report changes, so does the README."""
    readme = (gpu_check.ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_check.readme_line(gpu_check.OUT) in " ".join(readme.split())
