"""The probe: each way of not working has its own reason and remedy; it asks once, and lazily. Real where it can be: no driver here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_backend import Host

from rectilinear.backends import cupy_loader
from rectilinear.backends.cupy_backend import CupyBackend, Runtime

ROOT = Path(cupy_loader.__file__).parents[2]

INSTALL = "pip install 'rectilinear[cuda13]', or '.[cuda13]' in a checkout (cuda12 in its place for a driver of CUDA 12)"


class CUDARuntimeError(RuntimeError):
    """Has the shape of CuPy's."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def fake(host: Host, driver: int = 13020, devices: Any = 1) -> Any:
    """A CuPy whose driver answers so; `devices` may be an error to raise."""

    def count() -> int:
        if isinstance(devices, Exception):
            raise devices
        return int(devices)

    cp = host.cp
    cp.__version__ = "14.2.0"
    vars(cp.cuda.runtime).update(CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: driver, getDeviceCount=count)
    return cp


def probe(host: Host, cp: Any, kernels: Any = None) -> Any:
    runtime = Runtime(cp, kernels or host.modules.__getitem__)
    return CupyBackend(lambda: runtime, cupy_loader.examine).probe()


def test_it_works(host: Host) -> None:
    found = probe(host, fake(host))
    assert found.usable
    assert (found.reason, found.version) == (None, "14.2.0")
    assert found.device == "a stand-in (sm_90)"
    assert found.simd == "cuBLAS 13.1.0"


def test_not_installed() -> None:
    def connect() -> Runtime:
        raise ModuleNotFoundError("No module named 'cupy'", name="cupy")

    found = CupyBackend(connect, cupy_loader.examine).probe()
    assert not found.usable
    assert found.reason == f"CuPy is not installed; {INSTALL}"


def test_installed_but_broken() -> None:
    def connect() -> Runtime:
        raise ImportError("libsomething.so.1: cannot open shared object file\nand a page of advice")

    reason = CupyBackend(connect, cupy_loader.examine).probe().reason
    assert reason.startswith("CuPy is installed but does not import (libsomething.so.1: cannot open shared object file); reinstall it")


@pytest.mark.parametrize(
    ("driver", "devices", "words"),
    [
        (0, 1, "no NVIDIA driver on this machine; install the driver"),
        (
            12040,
            CUDARuntimeError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient"),
            "the NVIDIA driver is too old: it serves CUDA 12.4, this CuPy is built for CUDA 13.2; update the driver, or put cuda12 in",
        ),
        (13020, CUDARuntimeError(999, "cudaErrorUnknown: unknown error"), "CUDA does not start (cudaErrorUnknown: unknown error)"),
    ],
)
def test_driver(host: Host, driver: int, devices: Any, words: str) -> None:
    found = probe(host, fake(host, driver, devices))
    assert not found.usable
    assert found.reason.startswith(words)
    assert found.version == "14.2.0"


@pytest.mark.parametrize("devices", [0, CUDARuntimeError(100, "cudaErrorNoDevice: no CUDA-capable device is detected")])
@pytest.mark.parametrize("variable", [None, "", "7"])
def test_no_device_visible(host: Host, devices: Any, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    reason = probe(host, fake(host, devices=devices)).reason
    assert reason.startswith("no CUDA device is visible")
    assert (f"CUDA_VISIBLE_DEVICES is {variable!r}; unset it" in reason) == (variable is not None)
    assert ("nvidia-smi" in reason) == (variable is None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError('Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: x\n  listdir'),
            "CuPy is installed without NVRTC (Fail",
        ),
        (
            RuntimeError("Failed to find CUDA headers. Please install CUDA toolkit headers"),
            "CuPy is installed without the CUDA headers (Failed to find",
        ),
        (ImportError("libcublas.so.13: cannot open shared object file"), "CuPy is installed without cuBLAS (libcublas.so.13"),
    ],
)
def test_incomplete(host: Host, error: Exception, words: str) -> None:
    def kernels(dtype: str) -> Any:
        raise error

    reason = probe(host, fake(host), kernels).reason
    assert reason.startswith(words)
    assert reason.endswith(f"install it: {INSTALL}")


def test_a_kernel_that_cannot_be_launched(host: Host) -> None:
    def launch(*args: Any) -> None:
        raise CUDARuntimeError(209, "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")

    reason = probe(host, fake(host), lambda dtype: SimpleNamespace(get_function=lambda name: launch)).reason
    assert reason.startswith("CuPy cannot compute on this GPU (CUDARuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU")


@pytest.mark.parametrize(
    ("kernel", "named"),
    [
        ("small_forward", "out, the keep-mask"),
        ("mask_small_backward", "dx, dw, db"),
        ("bias_relu_mask", "out, the keep-mask"),
        ("mask_colsum", "dx, dw, db"),
        ("softmax_loss", None),
    ],
)
def test_wrong_numbers(host: Host, kernel: str, named: str | None) -> None:
    """A launch that does nothing leaves fresh memory as it was. What no layer needs is not tried."""

    def kernels(dtype: str) -> Any:
        module = host.modules[dtype]
        return SimpleNamespace(get_function=lambda name: (lambda *args: None) if name == kernel else module.get_function(name))

    found = probe(host, fake(host), kernels)
    assert found.usable == (named is None)
    if named:
        assert found.reason.startswith("the GPU computes wrong numbers (")
        assert all(name in found.reason for name in named.split(", "))
        assert "tools/gpu_check.py" in found.reason


def test_wrong_products(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    cp, right = fake(host), host.cp.matmul

    def wrong(a: Any, b: Any, out: Any) -> Any:
        right(a, b, out=out)
        out._host[...] *= 1 + np.float32(2**-10)  # TF32's idea of a product
        return out

    monkeypatch.setattr(cp, "matmul", wrong)
    assert "wrong numbers" in probe(host, cp).reason


# ---------------------------------------------------------------- for real


def run(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env, timeout=60).stdout


def test_making_the_backend_imports_no_cupy() -> None:
    code = "import sys; from rectilinear.backends import cupy_loader as l; l.make(); print('cupy' in sys.modules)"
    assert run(code).strip() == "False"


def test_real_cupy_without_a_driver() -> None:
    import cupy

    if cupy.cuda.runtime.driverGetVersion() > 0:
        pytest.fail("this machine has a driver: run tools/gpu_check.py on it, and these tests on one without")
    found = cupy_loader.make().probe()
    assert found.reason.startswith("no NVIDIA driver on this machine")
    assert found.version == cupy.__version__


def test_compile_options_are_accepted_by_the_real_raw_module() -> None:
    """Lazy: constructing it asks no device."""
    runtime = cupy_loader.connect()
    module = runtime.kernels("float32")
    assert module is runtime.kernels("float32")
    assert type(module).__name__ == "RawModule"
    assert cupy_loader.SOURCE.is_file()


def test_the_real_array_module_has_what_the_backend_uses() -> None:
    import cupy

    for name in ("ndarray", "empty", "asarray", "ascontiguousarray", "matmul", "RawModule"):
        assert hasattr(cupy, name)
    assert hasattr(cupy.cuda.runtime.CUDARuntimeError(35), "status")
    for name in ("driverGetVersion", "runtimeGetVersion", "getDeviceCount", "getDeviceProperties"):
        assert callable(getattr(cupy.cuda.runtime, name))
