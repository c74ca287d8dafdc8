"""Everything about the cupy backend that only a GPU can tell, in one run of at most six minutes: ``python tools/gpu_check.py``.

Needs CuPy and NumPy and a checkout of the source; the other parts say what else they need where it is missing (bfloat16 ml_dtypes, the
project's tests what ``pip install -e '.[smoke]'`` brings, the side-by-side whichever of PyTorch and JAX are installed). The parts,
in this order, each in a process and a time of its own: what crashes or takes too long is cut, said so, and stops no other.
``--first`` keeps to the first two, in two minutes. Writes one JSON file and a page beside it, and ends non-zero if a number is wrong or
something breaks off. ``--readme FILE`` prints the line for the README instead: on which GPU, and when, the backend last ran for real.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "gpu-check.json"
STORED = ROOT / "tests" / "cuda"


def import_project() -> None:
    """Make the package's CUDA part importable without what the rest of it needs beside NumPy."""
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]
    try:
        import rectilinear  # noqa: F401
    except ImportError:
        package = types.ModuleType("rectilinear")
        package.__path__ = [str(ROOT / "rectilinear")]
        sys.modules["rectilinear"] = package
        # Imported by name only: a mask's bits are all that is read of it here.
        compat = types.ModuleType("array_api_compat")
        vars(compat).update(array_namespace=None, device=None)
        sys.modules["array_api_compat"] = compat


if "rectilinear" not in sys.modules:
    import_project()

import gpu_cases  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_page  # noqa: E402
from gpu_measure import Leave  # noqa: E402

from rectilinear.backends import cupy_loader  # noqa: E402
from rectilinear.backends.cupy_backend import CupyBackend  # noqa: E402


class Check:
    """What the steps share. `small` shrinks sizes and repetitions, for the test of this script on a CPU."""

    def __init__(self, backend: CupyBackend, small: bool = False) -> None:
        self.backend, self.small = backend, small
        self.wrong: list[str] = []

    @property
    def cp(self) -> Any:
        return self.backend.runtime.cp

    @property
    def dtypes(self) -> tuple[str, ...]:
        try:
            gpu_cases.numpy_dtype("bfloat16")
        except ImportError:
            return gpu_cases.DTYPES[:-1]
        return gpu_cases.DTYPES

    def expect(self, right: Any, words: str) -> bool:
        if not right:
            self.wrong.append(words)
        return bool(right)

    def layer(self, n: int, d: int, m: int, dtype: str = "float32", seed: int = 1) -> tuple[list[np.ndarray], list[Any]]:
        """x, w, b, dout on the host and on the device."""
        shapes = ((n, d), (d, m), (m,), (n, m))
        host = [gpu_cases.uniform(shape, seed + i).astype(gpu_cases.numpy_dtype(dtype)) for i, shape in enumerate(shapes)]
        return host, [self.backend.asarray(a) for a in host]

    def step(self, arrays: list[Any]) -> list[Any]:
        """One affine + ReLU forward and backward: y, mask bits, dx, dw, db."""
        x, w, b, dout = arrays
        y, mask = self.backend.affine_relu_forward(x, w, b, None)
        return [y, mask.bits, *self.backend.affine_backward(dout, x, w, mask, (True, True, True), (None, None, None))]

    def bits(self, arrays: list[Any]) -> list[bytes]:
        return [self.backend.to_numpy(a).tobytes() for a in arrays]


# ---------------------------------------------------------------- the steps


def environment(check: Check) -> dict[str, Any]:
    """1. Device and versions."""
    cp, runtime = check.cp, check.cp.cuda.runtime
    properties = runtime.getDeviceProperties(cp.cuda.Device().id)
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_GiB": round(properties["totalGlobalMem"] / 2**30, 1),
        "clock_kHz": properties.get("clockRate"),
        "devices": runtime.getDeviceCount(),
        "cupy": cp.__version__,
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": _nvrtc_version(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "CUPY_TF32": os.environ.get("CUPY_TF32"),
    }


def _nvrtc_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def probe(check: Check) -> dict[str, Any]:
    """2. The probe says usable; with no device visible, a fresh process says so."""
    found = check.backend.probe()
    check.expect(found.usable, f"probe: not usable: {found.reason}")
    result = {"reason": found.reason, "device": found.device, "simd": found.simd}
    if check.small:
        return result
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import gpu_check; print(gpu_check.cupy_loader.make().probe().reason)"
    hidden = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    result["no device visible"] = hidden.stdout.strip() or hidden.stderr[-500:]
    check.expect("no CUDA device is visible" in hidden.stdout, f"probe: without a visible device it says {result['no device visible']!r}")
    return result


def resources(check: Check) -> dict[str, Any]:
    """3. The kernels load; registers and shared memory are what NVRTC reported without a GPU. No local memory."""
    stored = json.loads((STORED / "resources.json").read_text())
    arch = check.cp.cuda.Device().compute_capability
    differ: dict[str, Any] = {}
    for key, row in stored["kernels"].items():
        dtype, name = key.split()
        if dtype not in check.dtypes:
            continue
        function = check.backend.runtime.kernels(dtype).get_function(name)
        check.expect(function.local_size_bytes == 0, f"resources: {key} has {function.local_size_bytes} bytes of local memory")
        got = [function.num_regs, function.shared_size_bytes]
        if arch in row and got != row[arch]:
            differ[key] = {"here": got, "stored": row[arch]}
    same_compiler = stored["nvrtc"] == _nvrtc_version()
    check.expect(not (differ and same_compiler), f"resources: {len(differ)} kernels differ though NVRTC is the same")
    return {"kernels": len(stored["kernels"]), "same NVRTC": same_compiler, "stored architecture": arch, "differ": differ}


def parity(check: Check) -> dict[str, Any]:
    """4. Every case of the tests: against NumPy, and bit for bit against the kernels run on a CPU."""
    digests = json.loads((STORED / "digests.json").read_text())
    count, same = 0, 0
    for dtype in check.dtypes:
        for case in gpu_cases.cases(dtype):
            given = gpu_cases.inputs(case)
            got = gpu_cases.run(check.backend, case, given)
            check.wrong += gpu_cases.errors(case, given, got)
            count += 1
            if case.name in digests:
                same += check.expect(gpu_cases.digest(got) == digests[case.name], f"{case.name}: other bits than on the CPU")
    return {"cases": count, "bit for bit": same}


def layers(check: Check) -> dict[str, Any]:
    """4. Whole layers, cuBLAS included, within the bounds of the specification; plain and stacked."""
    worst: dict[str, float] = {}
    sizes = [(5, 7, 3), (64, 8, 32)] if check.small else [(5, 7, 3), (100, 3072, 100), (1000, 333, 257), (4096, 1024, 1024)]
    for dtype in check.dtypes:
        for n, d, m in sizes:
            host, on = check.layer(n, d, m, dtype)
            groups = [on, [check.backend.asarray(np.stack([a, -a])) for a in host]]
            for arrays, first in zip(groups, (slice(None), 0), strict=True):
                got = [check.backend.to_numpy(a)[first] for a in check.step(arrays)]
                ratio = _layer_error(host, got, dtype)
                worst[dtype] = max(worst.get(dtype, 0), ratio)
                check.expect(ratio <= 1, f"layers: {dtype} {(n, d, m)}: {ratio:.2f} of the bound")
    return {"largest error as a fraction of its bound": worst}


def _layer_error(host: list[np.ndarray], got: list[np.ndarray], dtype: str) -> float:
    """The largest error of a step as a fraction of the specification's bound."""
    x, w, b, dout = (a.astype(np.float64) for a in host)
    y, bits, dx, dw, db = got
    keep = np.unpackbits(bits, axis=-1, count=y.shape[-1], bitorder="little").astype(bool)
    dz = np.where(keep, dout, 0)
    ones = np.ones((1, len(x)))
    eps = np.finfo(gpu_cases.sum_dtype(gpu_cases.numpy_dtype(dtype))).eps
    half = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 0)
    worst = 0.0
    for result, a, c, extra in ((y, x, w, b), (dx, dz, w.T, 0), (dw, x.T, dz, 0), (db[None], ones, dz, 0)):
        want = a @ c + extra
        want = np.where(keep, want, 0) if result is y else want
        bound = 2 * (a.shape[1] + 2) * eps * (np.abs(a) @ np.abs(c) + np.abs(extra)) + half * np.abs(want) + 1e-30
        error = (np.abs(result.astype(np.float64) - want) / bound).max()
        worst = max(worst, float("inf") if np.isnan(error) else float(error))  # max would pass over NaN
    return worst


def large(check: Check) -> dict[str, Any]:
    """4. Large arrays: (65536, 8192), and more than 2**31 elements, whose last rows are looked at."""
    result: dict[str, Any] = {}
    rows, cols = (128, 64) if check.small else (65536, 8192)
    block = gpu_cases.uniform((64, cols), 3).astype("f4")
    z = check.backend.asarray(np.tile(block, (rows // 64, 1)))
    y = check.backend.to_numpy(check.backend.relu_forward(z, None))
    check.expect(all(np.array_equal(part, np.where(block < 0, 0, block)) for part in (y[:64], y[-64:])), "large: relu")
    db = check.backend.to_numpy(check.backend.bias_backward(z, None)).astype(np.float64)
    error = np.abs(db - block.astype(np.float64).sum(0) * (rows // 64)).max() / np.abs(block).astype(np.float64).sum(0).max() / (rows // 64)
    check.expect(error < 1e-6, f"large: column sums off by {error:.1e}")
    result["column sums, relative"] = float(error)
    del z, y
    rows, cols = (131, 72) if check.small else (2**18 + 5, 8200)
    needed = rows * cols * 2 * 3
    free = check.cp.cuda.runtime.memGetInfo()[0]
    if needed > 0.8 * free:
        result["beyond 2**31"] = f"left out: needs {needed >> 30} GiB"
        return result
    dout = check.backend._empty((rows, cols), np.float16)
    dout.fill(0)
    end = gpu_cases.uniform((64, cols), 5).astype("f2")
    dout[-64:] = check.backend.asarray(end)
    y = check.backend.relu_forward(dout, None)
    check.expect(np.array_equal(check.backend.to_numpy(y[-64:]), np.where(end < 0, np.float16(0), end)), "large: relu beyond 2**31")
    mask = check.backend._empty((rows, -(-cols // 8)), np.uint8)
    mask.fill(0)
    mask[-64:] = check.backend.asarray(np.packbits(end >= 0, axis=1, bitorder="little"))
    y.fill(0)
    check.backend._mask_backward(dout, mask, y)
    check.expect(np.array_equal(check.backend.to_numpy(y[-64:]), np.where(end < 0, np.float16(0), end)), "large: mask beyond 2**31")
    db = check.backend.to_numpy(check.backend.bias_backward(dout, None)).astype(np.float64)
    check.expect(np.allclose(db, end.astype(np.float64).sum(0), rtol=2e-3, atol=1e-3), "large: column sums beyond 2**31")
    result["beyond 2**31"] = rows * cols
    return result


def specials(check: Check) -> dict[str, Any]:
    """5. NaN, infinities, zeros and subnormals through ReLU, bit for bit; what sums do with float32 subnormals."""
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40], "f4")
    y = check.backend.to_numpy(check.backend.relu_forward(check.backend.asarray(x), None))
    want = np.where(x < 0, np.float32(0), x)
    check.expect((gpu_cases.bits(y) == gpu_cases.bits(want)).all(), f"specials: relu gives {y}")
    small = check.backend.asarray(np.full((1, 1), 1e-40, "f4"))
    total = check.backend.to_numpy(check.backend.bias_backward(small, None))
    product = check.backend.to_numpy(check.backend.affine_forward(small, check.backend.asarray(np.ones((1, 1), "f4")), None, None))
    return {"a sum flushes subnormals": bool(total[0] == 0), "cuBLAS flushes subnormals": bool(product[0, 0] == 0)}


def determinism(check: Check) -> dict[str, Any]:
    """6. The same bits a hundred times, and with two streams at once."""
    cp, runs = check.cp, 3 if check.small else 100
    _, on = check.layer(*((40, 8, 24) if check.small else (5000, 256, 384)))
    first = check.bits(check.step(on))
    names = ("y", "mask", "dx", "dw", "db")
    changed = {name for _ in range(runs) for name, a, b in zip(names, check.bits(check.step(on)), first, strict=True) if a != b}
    check.expect(not changed & {"y", "mask", "db"}, f"determinism: {sorted(changed)} differ between runs")
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    cp.cuda.Device().synchronize()  # the operands were made on the default stream
    results: list[Any] = []
    for _ in range(5):
        for stream in streams:
            with stream:
                results.append(check.step(on))
    for stream in streams:
        stream.synchronize()
    check.expect(all(check.bits(result) == first for result in results), "determinism: other bits on two streams at once")
    return {"runs": runs, "outputs that changed": sorted(changed)}


def tensor_cores(check: Check) -> dict[str, Any]:
    """7. The error of products against float64 by type of computation, as a root mean square in units of eps sqrt(K)."""
    cp = check.cp
    found: dict[str, Any] = {}
    k = 64 if check.small else 1024
    for dtype in check.dtypes:
        host, on = check.layer(k, k, k, dtype)
        got = check.backend.to_numpy(check.backend.affine_forward(on[0], on[1], None, None)).astype(np.float64)
        x, w = (a.astype(np.float64) for a in host[:2])
        scale = np.sqrt(x**2 @ w**2)
        found[dtype] = float(np.sqrt(np.mean(((got - x @ w) / scale) ** 2)))
    eps = float(np.finfo(np.float32).eps)
    check.expect(found["float32"] <= np.sqrt(k + 16) * eps, f"products: float32 has an error of {found['float32']:.1e}: is TF32 on?")
    if hasattr(cp, "_core") and int(cp.cuda.Device().compute_capability) >= 80:
        from cupy._core import _routines_linalg as linalg

        before = linalg.get_compute_type(np.float32)
        linalg.set_compute_type(np.float32, linalg.COMPUTE_TYPE_TF32)
        try:
            host, on = check.layer(k, k, k)
            got = check.backend.to_numpy(cp.matmul(on[0], on[1])).astype(np.float64)  # by CuPy, which alone has such a switch
            x, w = (a.astype(np.float64) for a in host[:2])
            found["float32 as TF32"] = float(np.sqrt(np.mean(((got - x @ w) / np.sqrt(x**2 @ w**2)) ** 2)))
        finally:
            linalg.set_compute_type(np.float32, before)
    return found


def streams(check: Check) -> dict[str, Any]:
    """8. On a stream of one's own; the kernels can be captured in a graph, so nothing in them waits; cuBLAS under capture."""
    cp, be = check.cp, check.backend
    _, on = check.layer(64, 16, 32)
    want = check.bits(check.step(on))
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        got = check.step(on)
    stream.synchronize()
    check.expect(check.bits(got) == want, "streams: other bits on a stream of its own")
    result: dict[str, Any] = {}
    y = be.affine_forward(*on[:3], None)
    dx, db = be._empty(y.shape, y.dtype), be._empty((y.shape[-1],), y.dtype)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        try:
            be.relu_backward(on[3], y, dx)
            be.bias_backward(on[3], db)
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    same = check.bits([dx, db]) == check.bits([be.relu_backward(on[3], y, None), be.bias_backward(on[3], None)])
    check.expect(same, "streams: a captured graph of the kernels gives other bits")
    with stream:
        stream.begin_capture()
        try:
            cp.matmul(on[0], on[1], out=y)
            result["cupy.matmul under capture"] = "works"
        except NotImplementedError as error:
            result["cupy.matmul under capture"] = f"NotImplementedError: {error}"
        finally:
            try:
                stream.end_capture()
            except Exception as error:
                result["end of that capture"] = f"{type(error).__name__}: {error}"[:200]
    return result


def memory(check: Check) -> dict[str, Any]:
    """10. The pool does not grow over a thousand steps; running out of memory leaves the backend usable."""
    cp = check.cp
    pool = cp.get_default_memory_pool()
    _, on = check.layer(64, 32, 48)
    check.step(on)
    used, total = pool.used_bytes(), pool.total_bytes()
    for _ in range(5 if check.small else 1000):
        check.step(on)
    check.expect(pool.used_bytes() == used, f"memory: the pool's used bytes grew from {used} to {pool.used_bytes()}")
    result = {"used": used, "total before": total, "total after": pool.total_bytes()}
    want = check.bits(check.step(on))
    try:
        check.backend._empty((1 << 50,), np.uint8)
        result["out of memory"] = "a petabyte was handed out"
    except MemoryError as error:
        result["out of memory"] = type(error).__name__
    check.expect(check.bits(check.step(on)) == want, "memory: other bits after running out of memory")
    return result


def sanitizer(check: Check) -> dict[str, Any]:
    """compute-sanitizer on the cases of step 4: `--only sanitizer`, since it takes many minutes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Leave("compute-sanitizer is not installed")
    result = {}
    for kind in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--only", "parity", "--out", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        result[kind] = done.returncode
        check.expect(done.returncode == 0, f"sanitizer: {kind} ends with {done.returncode}: {done.stdout[-300:]}")
    return result


def several_devices(check: Check) -> dict[str, Any]:
    """11. With more than one device: arrays decide where the work is done, with the same bits."""
    cp = check.cp
    if cp.cuda.runtime.getDeviceCount() < 2:
        raise Leave("one device")
    host, on = check.layer(200, 32, 48)
    with cp.cuda.Device(1):
        there = [check.backend.asarray(a) for a in host]
    results = check.step(there)  # from device 0
    check.expect({a.device.id for a in results} == {1}, "several devices: results are not where the arguments are")
    same = check.bits(results)[1] == check.bits(check.step(on))[1]
    return {"devices": cp.cuda.runtime.getDeviceCount(), "same keep-mask": same}


STEPS: tuple[Callable[[Check], dict[str, Any]], ...] = (
    environment,
    probe,
    resources,
    parity,
    layers,
    large,
    specials,
    determinism,
    tensor_cores,
    streams,
    memory,
    several_devices,
)


# ---------------------------------------------------------------- the parts


class Rows:
    """What a part has found, row by row, each with how it went; kept in `file` after every row, so that what is cut keeps what it has."""

    def __init__(self, check: Check, file: Path | None = None) -> None:
        self.check, self.file, self.rows = check, file, {}  # type: ignore[var-annotated]
        self._kept = 0.0

    def add(self, name: str, find: Callable[[], dict[str, Any]]) -> None:
        self.check.wrong = []
        self.rows[name] = entry = {"state": "cut", "why": "not done when the part's time was up", "wrong": [], "seconds": 0.0, "found": {}}
        self.keep()
        start, state, why = time.monotonic(), "right", None
        try:
            entry["found"] = find()
        except Leave as reason:
            state, why = "left out", str(reason)
        except Exception as error:  # no row stops the others
            state, why = "broke off", f"{type(error).__name__}: {error}"[:500]
        if self.check.wrong:
            state = "WRONG"
        entry |= {"state": state, "why": why, "wrong": self.check.wrong[:50], "seconds": round(time.monotonic() - start, 2)}
        self.keep()
        print(f"  {name:<34} {state:<9} {entry['seconds']:7.1f} s  {'; '.join(entry['wrong'][:3]) or why or ''}", flush=True)

    def so_far(self, found: dict[str, Any]) -> None:
        """Of the row that is being found, at most twice a second."""
        if time.monotonic() - self._kept > 0.5:
            next(reversed(self.rows.values()))["found"] = found
            self.keep()

    def keep(self) -> None:
        if self.file:
            beside = self.file.with_suffix(".part")
            beside.write_text(json.dumps(self.rows))
            beside.replace(self.file)
        self._kept = time.monotonic()


def correctness(check: Check, rows: Rows) -> None:
    """Numbers, bits, memory and streams; all of these steps must be right."""
    for step in STEPS:
        rows.add(step.__name__, lambda step=step: step(check))  # type: ignore[misc]


class Part(NamedTuple):
    seconds: float
    """What it is given, and what earlier parts have left; derived from an H100's run, some three times what it took there."""
    work: Callable[[Check, Rows], None]
    must_end: bool = False
    """Whether it proves something, so that a run in which it was cut has not passed."""


PARTS = {
    "correctness": Part(75, correctness, must_end=True),
    "host_cost": Part(25, gpu_measure.host_cost),
    "tests": Part(90, gpu_measure.project_tests, must_end=True),
    "bandwidth": Part(30, gpu_measure.bandwidth),
    "steps": Part(140, gpu_measure.steps),
}
FIRST = ("correctness", "host_cost")
WHOLE, FIRST_WHOLE = 360.0, 120.0
"""Seconds of a whole run, and of one with --first; --within gives others."""


# ---------------------------------------------------------------- running and reporting


class Setup(NamedTuple):
    """How the script runs: on a GPU, or, for its own test, on a stand-in."""

    make: Callable[[], CupyBackend] = cupy_loader.make
    small: bool = False
    command: tuple[str, ...] = (sys.executable, str(Path(__file__).resolve()))
    """What runs one part in a process of its own, followed by --part and --rows."""
    parts: Mapping[str, Part] = MappingProxyType(PARTS)


def run_part(name: str, limit: float, setup: Setup) -> dict[str, Any]:
    """The entry of a part in the report: how it went, why, and its rows."""
    print(f"{name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder, "rows.json"), Path(folder, "log")
        with log.open("wb") as errors:
            command = [*setup.command, "--part", name, "--rows", str(file)]
            process = subprocess.Popen(command, stderr=errors, start_new_session=True)
            try:
                status = process.wait(limit)
                state, why = ("ended", None) if status == 0 else ("broke off", f"its process ended with status {status}: {_last_line(log)}")
            except subprocess.TimeoutExpired:
                state, why = "cut", f"not done after {limit:.0f} s"
            finally:
                _end_group(process)
        rows = json.loads(file.read_text()) if file.exists() else {}
    if state != "ended":
        print(f"  {state}: {why}", flush=True)
    return {"state": state, "why": why, "seconds": round(time.monotonic() - start, 1), "limit": round(limit), "rows": rows}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """The part and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1][:300]


def passed(parts: dict[str, Any], setup: Setup) -> bool:
    """Whether every number is right, nothing broke off, and what proves something came to its end."""
    rows = [row["state"] for part in parts.values() for row in part["rows"].values()]
    ended = all(part["state"] == "ended" or (part["state"] == "cut" and not setup.parts[name].must_end) for name, part in parts.items())
    return ended and not {"WRONG", "broke off"} & set(rows)


def run(names: Sequence[str], whole: float, setup: Setup) -> dict[str, Any]:
    """The parts of the report, one after another. Time that one leaves is the next one's, and the last one's own is kept for it.

    Where all have less than they are given, each has less in proportion.
    """
    start = time.monotonic()
    share = min(1.0, whole / sum(setup.parts[name].seconds for name in names))
    parts = {}
    for i, name in enumerate(names):
        later = share * sum(setup.parts[each].seconds for each in names[i + 1 :])
        parts[name] = run_part(name, max(1.0, whole - (time.monotonic() - start) - later), setup)
    return parts


def report(parts: dict[str, Any], setup: Setup, device: str | None) -> dict[str, Any]:
    about = parts.get("correctness", {}).get("rows", {}).get("environment", {}).get("found", {})
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "gpu": about.get("gpu") or device,
        "passed": passed(parts, setup),
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "parts": parts,
    }


def _commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None where git does not say."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def readme_line(file: Path) -> str:
    """What the README says of the last run on a GPU."""
    if not file.exists():
        return "The cupy backend last ran on a real GPU: never yet."
    report = json.loads(file.read_text())
    found = gpu_page.correctness_rows(report).get("parity", {}).get("found", {})
    parts = report.get("parts", {})
    wrong = [name for part in parts.values() for name, row in part["rows"].items() if row.get("state") in ("WRONG", "broke off")]
    ended_early = [name for name, part in parts.items() if part.get("state") != "ended"]
    how = "every check right"
    if wrong:
        how = f"all right but {', '.join(wrong)}, see docs/gpu-check.json"
    elif not report["passed"]:
        how = f"all right as far as it came (not to its end: {', '.join(ended_early)}), see docs/gpu-check.json"
    cases = f" ({found['cases']} kernel cases, {found['bit for bit']} of them with the bits of a CPU)" if "bit for bit" in found else ""
    return f"The cupy backend last ran on a real GPU on {report['date']}: {report['gpu']}, {how}{cases}."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes, and the page beside it (default: docs/gpu-check.json)")
    parser.add_argument("--first", action="store_true", help="correctness and host cost alone, in two minutes")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="of all parts together, each cut in proportion (default: 360, or 120)"
    )
    parser.add_argument("--part", choices=PARTS, help="one part alone")
    parser.add_argument("--only", choices=[step.__name__ for step in (*STEPS, sanitizer)], help="one step of the correctness alone")
    parser.add_argument("--rows", type=Path, metavar="JSON", help=argparse.SUPPRESS)  # this is a part's process, and this where its rows go
    parser.add_argument("--readme", type=Path, metavar="JSON", help="print the README's line from a report and end")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, setup: Setup = Setup()) -> int:  # noqa: B008 - a constant
    options = parse(arguments)
    if options.readme:
        print(readme_line(options.readme))
        return 0
    if options.rows:
        check = Check(setup.make(), setup.small)
        setup.parts[options.part].work(check, Rows(check, options.rows))
        return 0
    backend = setup.make()
    found = backend.probe()
    if not found.usable and "wrong numbers" not in (found.reason or ""):
        print(f"nothing to check here: {found.reason}", file=sys.stderr)
        return 2
    if options.only:
        rows = Rows(Check(backend, setup.small))
        step = next(step for step in (*STEPS, sanitizer) if step.__name__ == options.only)
        rows.add(options.only, lambda: step(rows.check))
        parts = {"correctness": {"state": "ended", "why": None, "seconds": 0.0, "rows": rows.rows}}
    else:
        names = (options.part,) if options.part else FIRST if options.first else tuple(PARTS)
        parts = run(names, options.within or (FIRST_WHOLE if options.first else WHOLE), setup)
    made = report(parts, setup, found.device)
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    where = str(options.out)
    if options.out != Path(os.devnull):
        page = options.out.with_suffix(".html")
        page.write_text(gpu_page.html(made), encoding="utf-8")
        where += f" and {page}"
    print(f"{'all right' if made['passed'] else 'NOT RIGHT'} on {made['gpu']}; report in {where}")
    return 0 if made["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
