"""Finds out whether CuPy can work here, and hands it to the backend; the only file that imports CuPy or nvmath-python.

An installed CuPy says nothing: it imports without a GPU, and with one it may still lack NVRTC, headers or cuBLAS. So the probe asks
the driver first, which is quick, and then lets the backend itself compute a small layer.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime
from rectilinear.backends.cupy_gemm import Gemm, Products
from rectilinear.backends.cupy_lt import Plans
from rectilinear.backends.cupy_scratch import Scratches
from rectilinear.extras import how_to_install

SOURCE = Path(__file__).parents[1] / "kernels" / "cuda" / "layers.cu"

_log = logging.getLogger(__name__)

_NO_DEVICE = 100  # cudaErrorNoDevice
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver

_INSTALL = f"{how_to_install('cuda13')} (cuda12 in its place for a driver of CUDA 12)"


def make() -> CupyBackend:
    """The cupy backend. CuPy is imported at the first use, not here."""
    return CupyBackend(connect, examine)


def connect() -> Runtime:
    """CuPy and the kernels, each dtype of which is compiled when it is first needed (and kept by CuPy's cache on disk)."""
    import cupy

    @functools.cache
    def kernels(dtype: str) -> Any:
        return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=compile_options(dtype))

    # Made once, an argument needs no conversion at a launch. The class has no documentation: NumPy's numbers do as well.
    number = getattr(cupy.cuda.function, "CIntptr", np.int64)
    return Runtime(cupy, kernels, products, number, number(0))


def products(cp: Any, scratches: Scratches) -> Products:
    """cuBLASLt's where nvmath-python has it work on the current device, else CuPy's, which say why."""
    try:
        return Plans(cp, scratches, _cublaslt(), _tf32())
    except Exception as error:  # no module, no library, no memory: each has an error type of its own, some of them private
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "nvmath"
        why = "without nvmath-python" if missing else f"since nvmath-python does not work here: {_first_line(error)}"
        _log.debug("products on the GPU are CuPy's, %s", why)
        return Gemm(cp, scratches, _tf32(), why)


def _cublaslt() -> Any:
    from nvmath.bindings import cublasLt

    return cublasLt


def _tf32() -> bool:
    """As CuPy reads it."""
    return int(os.environ.get("CUPY_TF32", "0")) > 0


def compile_options(dtype: str) -> tuple[str, ...]:
    """What `cupy.RawModule` is to give NVRTC. CuPy adds -ftz=true after these; layers.cu says how the kernels live with that."""
    return (f"-DDTYPE_{dtype}",)


def examine(backend: CupyBackend) -> Probe:
    """What `CupyBackend.probe` answers: the first thing that is missing, and its remedy."""
    try:
        cp = backend.runtime.cp
    except ImportError as error:
        return _unusable(_import_reason(error))
    version = str(cp.__version__)
    reason = _driver_reason(cp)
    if reason is None:
        try:
            wrong = _wrong_numbers(backend)
        except Exception as error:  # each missing part has an error type of its own, some of them private
            reason = _incomplete_reason(error)
        else:
            reason = wrong and f"the GPU computes wrong numbers ({wrong}); run tools/gpu_check.py of the source and report what it says"
    if reason is not None:
        return _unusable(reason, version)
    return Probe(True, version=version, device=_device(cp), simd=backend.products.about)


def _unusable(reason: str, version: str | None = None) -> Probe:
    return Probe(False, reason=" ".join(reason.split()), version=version)


def _import_reason(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        return f"CuPy is not installed; {_INSTALL}"
    return f"CuPy is installed but does not import ({_first_line(error)}); reinstall it: {_INSTALL}"


def _driver_reason(cp: Any) -> str | None:
    """What is wrong with driver or devices, None if nothing."""
    runtime = cp.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
        if driver == 0:
            return "no NVIDIA driver on this machine; install the driver of its GPU (nvidia.com/drivers), or use another backend"
        if runtime.getDeviceCount() > 0:
            return None
    except runtime.CUDARuntimeError as error:
        if error.status == _OLD_DRIVER:
            built = _dotted(runtime.runtimeGetVersion())
            return (
                f"the NVIDIA driver is too old: it serves CUDA {_dotted(driver)}, this CuPy is built for CUDA {built}; "
                f"update the driver, or put cuda12 in place of cuda13: {how_to_install('cuda12')}"
            )
        if error.status != _NO_DEVICE:
            return f"CUDA does not start ({_first_line(error)}); see whether nvidia-smi works"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no CUDA device is visible, CUDA_VISIBLE_DEVICES is {visible!r}; unset it or give it the number of a device"
    return "no CUDA device is visible though there is a driver; see whether nvidia-smi lists one, and whether this container was given it"


def _incomplete_reason(error: Exception) -> str:
    text = str(error)
    for missing, sign in (("NVRTC", "nvrtc"), ("the CUDA headers", "headers"), ("cuBLAS", "cublas")):
        if sign in text:
            return f"CuPy is installed without {missing} ({_first_line(error)}); install it: {_INSTALL}"
    return f"CuPy cannot compute on this GPU ({type(error).__name__}: {_first_line(error)}); see whether nvidia-smi works, or {_INSTALL}"


def _wrong_numbers(backend: CupyBackend) -> str | None:
    """Run a layer of small integers, which float32 holds exactly, both ways; what differs, None if nothing does.

    As it is, the layer is a small one, which a kernel does whole; where x and w lie by columns, cuBLAS and other kernels do it.
    """
    x, w, b = np.array([[1, 2], [-3, 1], [0, 0]], "f4"), np.array([[1, -1, 2], [2, 1, -2]], "f4"), np.array([0, 1, -1], "f4")
    z = x @ w + b
    keep, dout = z >= 0, np.arange(1, 10, dtype="f4").reshape(3, 3)
    dz = np.where(keep, dout, 0)
    wanted = {"out": np.where(keep, z, 0), "the keep-mask": keep, "dx": dz @ w.T, "dw": x.T @ dz, "db": dz.sum(axis=0)}
    wrong: dict[str, None] = {}
    gpu_b, gpu_dout, *by_rows = (backend.asarray(array) for array in (b, dout, x, w))
    by_columns = [backend.asarray(np.ascontiguousarray(array.T)).T for array in (x, w)]
    for gpu_x, gpu_w in (by_rows, by_columns):
        y, mask = backend.affine_relu_forward(gpu_x, gpu_w, gpu_b, None)
        gradients = backend.affine_backward(gpu_dout, gpu_x, gpu_w, mask, (True, True, True), (None, None, None))
        got = [backend.to_numpy(array) for array in (y, mask, *gradients)]
        got[1] = got[1].to_bool()
        wrong |= {name: None for (name, want), a in zip(wanted.items(), got, strict=True) if not np.array_equal(a, want)}
    return ", ".join(wrong) or None


def _device(cp: Any) -> str:
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    return f"{properties['name'].decode()} (sm_{properties['major']}{properties['minor']})"


def _dotted(version: int) -> str:
    """13020 -> 13.2, as CUDA counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
