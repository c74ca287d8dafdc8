"""tools/gpu_check.py on the stand-in: each of its steps runs, a planted bug makes it end non-zero, and its report can be read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import host_build
import numpy as np
import pytest
from host_backend import Host

from rectilinear.backends import cupy_loader
from rectilinear.backends.cupy_backend import CupyBackend, Runtime


@pytest.fixture
def make(host: Host, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A maker of the backend on the stand-in, whose kernels pretend to take what the compiler said."""
    stored = json.loads((gpu_check.STORED / "resources.json").read_text())["kernels"]

    def of(kernel: host_build.HostKernel, which: int) -> int:
        return int(stored[f"{kernel.module.dtype} {kernel.name}"]["90"][which])

    monkeypatch.setattr(host_build.HostKernel, "num_regs", property(lambda self: of(self, 0)), raising=False)
    monkeypatch.setattr(host_build.HostKernel, "shared_size_bytes", property(lambda self: of(self, 1)), raising=False)
    monkeypatch.setattr(host_build.HostKernel, "local_size_bytes", 0, raising=False)
    runtime = Runtime(host.cp, host.modules.__getitem__)
    return lambda: CupyBackend(lambda: runtime, cupy_loader.examine)


@pytest.fixture
def one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what any dtype shows."""
    monkeypatch.setattr(gpu_check.Check, "dtypes", ("float32",))


def run(make: Any, folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = folder / "report.json"
    status = gpu_check.main(["--out", str(file), *arguments], make, small=True)
    return status, json.loads(file.read_text())


def test_all_steps(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run(make, tmp_path)
    assert {name: step["state"] for name, step in report["steps"].items()} == {
        step.__name__: "left out" if step.__name__ in ("cublaslt", "sanitizer") else "right" for step in gpu_check.STEPS
    }, report
    assert (status, report["passed"]) == (0, True)
    assert report["gpu"] == "a stand-in"
    assert report["steps"]["parity"]["found"]["cases"] > 400
    assert "NotImplementedError" in report["steps"]["streams"]["found"]["cupy.matmul under capture"]
    said = capsys.readouterr().out
    assert "all right on a stand-in" in said
    assert all(step.__name__ in said for step in gpu_check.STEPS)


@pytest.mark.usefixtures("one_dtype")
@pytest.mark.parametrize(
    ("kernel", "steps"),
    [
        ("relu_wide", {"parity", "large", "specials"}),
        ("colsum_wide", {"parity"}),
        ("bias_relu_mask_wide", {"parity"}),
        ("mask_backward_wide", {"parity", "large"}),
        ("softmax_loss", {"parity"}),
        ("small_forward", {"parity", "layers", "determinism", "memory"}),
    ],
)
def test_a_kernel_that_does_nothing_is_found(
    make: Any, tmp_path: Path, kernel: str, steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = host_build.HostKernel.__call__
    monkeypatch.setattr(host_build.HostKernel, "__call__", lambda self, *args: None if self.name == kernel else launch(self, *args))
    for step in steps & {"parity", "large", "specials", "layers"}:
        status, report = run(make, tmp_path, "--only", step)
        assert (status, report["passed"]) == (1, False), step
        assert report["steps"][step]["state"] == "WRONG"


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
    assert all("other bits than on the CPU" in words for words in report["steps"]["parity"]["wrong"])


@pytest.mark.usefixtures("one_dtype")
def test_a_step_that_breaks_off_stops_no_other_and_counts(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(make().runtime.cp.cuda, "Event")
    status, report = run(make, tmp_path)
    assert status == 1
    assert report["steps"]["times"]["state"] == "broke off"
    assert "Event" in report["steps"]["times"]["why"]
    assert report["steps"]["memory"]["state"] == "right"


@pytest.mark.usefixtures("one_dtype", "no_small_layers")
def test_tf32_would_be_noticed(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cp = make().runtime.cp
    right = cp.matmul

    def rounded(a: Any, b: Any, out: Any) -> Any:
        if a.dtype != np.float32:
            return right(a, b, out=out)
        a, b = (cp.ndarray._of((x._host.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)) for x in (a.copy(), b.copy()))
        return right(a, b, out=out)

    monkeypatch.setattr(cp, "matmul", rounded)
    status, report = run(make, tmp_path, "--only", "tensor_cores")
    assert status == 1
    assert "is TF32 on?" in report["steps"]["tensor_cores"]["wrong"][0]


def test_the_plain_step_is_the_same_layer(host: Host) -> None:
    check = gpu_check.Check(host.backend)
    arrays, on = check.layer(20, 6, 9)
    got = [host.backend.to_numpy(a) for a in check.step(on)]
    for plain, own in zip(gpu_check.plain_step(np, *arrays), [got[0], *got[2:]], strict=True):
        assert np.allclose(plain, own, atol=1e-5)


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
    file.write_text(json.dumps({"date": "2027-01-02", "gpu": "NVIDIA X", "passed": True}))
    assert gpu_check.main(["--readme", str(file)]) == 0
    assert capsys.readouterr().out.strip() == "The cupy backend last ran on a real GPU on 2027-01-02: NVIDIA X, every check right."
    file.write_text(json.dumps({"date": "2027-01-02", "gpu": "NVIDIA X", "passed": False}))
    assert "with wrong numbers" in gpu_check.readme_line(file)


def test_the_readme_says_it() -> None:
    """Whenever the report changes, so does the README."""
    readme = (gpu_check.ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_check.readme_line(gpu_check.OUT) in readme
