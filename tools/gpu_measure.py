"""What tools/gpu_check.py measures on a GPU: the host's cost of a call, each kernel's bandwidth, and whole steps beside other libraries.

Each function adds rows one by one, so that what is cut at the end of its time keeps what it has.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_cases
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


class Leave(Exception):  # noqa: N818 - not an error
    """A row that cannot be done here; says why."""


# ---------------------------------------------------------------- host cost

HOST_CALLS, HOST_BATCHES = 20, 9
"""Calls between two waits, few enough that no queue fills; the median of these batches counts."""
HOST_SHAPES = ((1, 64, 64), (128, 784, 256), (1024, 1024, 1024))
PROFILED = 200


def host_cost(check: Any, rows: Any) -> None:
    """Microseconds of the host's time per call on an idle device, from what a user calls down to a single launch."""
    for shape in HOST_SHAPES[:1] if check.small else HOST_SHAPES:
        rows.add(f"host us {_size(shape)} float32", lambda shape=shape: _host_us(check, shape))
    rows.add("profile of a step", lambda: _profile(check))


def _host_us(check: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    be, cp = check.backend, check.cp
    _, (x, w, b, dout) = check.layer(*shape)
    y, mask = be.affine_relu_forward(x, w, b, None)
    grads = (be._empty(x.shape, x.dtype), be._empty(w.shape, w.dtype), be._empty(b.shape, b.dtype))
    small = np.zeros(64, "f4")
    calls: dict[str, Callable[[], Any]] = {}
    if (rl := _package()) is not None:
        cache = rl.affine_relu_forward(x, w, b)[1]
        calls |= {
            "affine_relu_forward": lambda: rl.affine_relu_forward(x, w, b),
            "affine_relu_backward": lambda: rl.affine_relu_backward(dout, cache),
            "affine_relu_forward, out=": lambda: rl.affine_relu_forward(x, w, b, out=y),
            "affine_relu_backward, out=": lambda: rl.affine_relu_backward(dout, cache, out=grads),
        }
        if hasattr(rl, "capture"):
            captured = rl.capture(lambda x, w, b, dout: _step(rl, x, w, b, dout))
            for _ in range(2):  # the first runs as it is, the second records
                captured(x, w, b, dout)
            calls["a captured step"] = lambda: captured(x, w, b, dout)
    calls |= {
        "the backend's forward": lambda: be.affine_relu_forward(x, w, b, None),
        "the backend's backward": lambda: be.affine_backward(dout, x, w, mask, (True, True, True), (None, None, None)),
        "one kernel (ReLU into out)": lambda: be.relu_forward(y, y),
        "cupy.matmul(out=)": lambda: cp.matmul(x, w, out=y),
        "cupy.empty": lambda: cp.empty(y.shape, y.dtype),
        "np.maximum of 64 numbers": lambda: np.maximum(small, 0),
    }
    found: dict[str, Any] = {name: _host_time(check, call) for name, call in calls.items()}
    if rl is None:
        found["layer functions"] = "left out: array-api-compat is not installed"
    elif not hasattr(rl, "capture"):
        found["a captured step"] = "left out: this version has no rectilinear.capture"
    return found


def _host_time(check: Any, call: Callable[[], Any]) -> float:
    taken = []
    for _ in range(1 + (2 if check.small else HOST_BATCHES)):
        check.backend.synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        taken.append((time.perf_counter() - begin) / HOST_CALLS * 1e6)
    check.backend.synchronize()
    return round(statistics.median(taken[1:]), 2)


def _profile(check: Any) -> dict[str, Any]:
    """Where a step's host time goes, by function: calls a step, and microseconds of its own. The profiler itself adds to each call."""
    rl = _package()
    if rl is None:
        raise Leave("array-api-compat is not installed")
    _, arrays = check.layer(128, 784, 256)
    count = 5 if check.small else PROFILED
    _step(rl, *arrays)
    profile = cProfile.Profile()
    profile.enable()
    for i in range(count):
        _step(rl, *arrays)
        if i % HOST_CALLS == 0:
            check.backend.synchronize()
    profile.disable()
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(((own, calls, where) for where, (_, calls, own, _, _) in stats.items()), reverse=True)[:30]
    return {
        f"{Path(file).name}:{line} {name}" if line else name: {"calls": round(calls / count, 1), "us": round(own / count * 1e6, 1)}
        for own, calls, (file, line, name) in rows
    }


def _step(rl: Any, x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    y, cache = rl.affine_relu_forward(x, w, b)
    return (y, *rl.affine_relu_backward(dout, cache))


def _package() -> Any:
    """rectilinear, or None where only its CUDA part could be imported."""
    import rectilinear

    return rectilinear if hasattr(rectilinear, "affine_relu_forward") else None


# ---------------------------------------------------------------- bandwidth

BANDWIDTH_SHAPES = ((16384, 4096), (65536, 1024), (10**6, 64), (8192, 8192))
BATCH, BATCHES = 10, 7
"""Calls between two events, and batches of which the median counts: launching must not count, since a call takes some 100 us."""


def bandwidth(check: Any, rows: Any) -> None:
    """GB/s of the bytes that must move, each kernel beside a device copy of the same array."""
    for dtype in (name for name in ("float32", "bfloat16", "float16") if name in check.dtypes):
        for shape in ((64, 32),) if check.small else BANDWIDTH_SHAPES:
            rows.add(f"GB/s {_size(shape)} {dtype}", lambda shape=shape, dtype=dtype: _bandwidth(check, shape, dtype))


def _bandwidth(check: Any, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    be = check.backend
    n, m = shape
    rng = np.random.default_rng(7)
    block = rng.standard_normal((min(n, 4096), m), "f4").astype(gpu_cases.numpy_dtype(dtype))
    z = be.asarray(np.resize(block, shape))
    y, b = be._empty(shape, z.dtype), be.asarray(block[0])
    none = be._empty((n, 0), z.dtype), be._empty((0, m), z.dtype)  # without features there are no products
    keep = be.affine_relu_forward(*none, b, None)[1]
    biased = _given_to_bias(be, z, y)
    size, mask = z.nbytes, n * -(-m // 8)
    cases: dict[str, tuple[Callable[[], Any], float]] = {
        "copy": (lambda: y.__setitem__(Ellipsis, z), 2 * size),
        "ReLU": (lambda: be.relu_forward(z, y), 2 * size),
        "select by mask": (lambda: be.relu_backward(z, keep, y), 2 * size + mask),
        "bias reduction": (lambda: be.bias_backward(z, None), size),
        "select + bias reduction": (lambda: be.affine_backward(z, *none, keep, (True,) * 3, (None,) * 3), 2 * size + mask),
    }
    arrays = {id(a): a for a in biased[1:] if hasattr(a, "nbytes")}
    # z is read and y written, which may be one array.
    cases["bias + ReLU + mask"] = (
        lambda: be._bias(*biased),
        sum(a.nbytes for a in arrays.values()) + (size if biased[1] is biased[3] else 0),
    )
    found: dict[str, Any] = {}
    for name, (call, moved) in cases.items():
        try:
            us = device_us(check, call)
            found[name] = round(moved / us / 1e3, 1) if us else None
        except Exception as error:  # the next kernel is measured all the same
            found[name] = f"{type(error).__name__}: {error}"[:200]
            check.wrong.append(f"{name}: {found[name]}")
    copy = found["copy"] if isinstance(found["copy"], float) else 0.0
    shares = {name: round(rate / copy, 3) for name, rate in found.items() if copy and isinstance(rate, float)}
    return {"GB/s": found, "of a copy": shares}


def _given_to_bias(be: Any, z: Any, y: Any) -> tuple[Any, ...]:
    """What the backend itself gives its kernel after the product of a layer with few features: x by columns, so that there is a product."""
    (n, m), features = z.shape, 8
    x, w, b = (be._empty(shape, z.dtype) for shape in ((features, n), (features, m), (m,)))
    for a in (x, w, b):
        a.fill(0)
    seen: list[tuple[Any, ...]] = []
    own = be._bias
    be._bias = lambda *given: (seen.append(given), own(*given))[1]
    try:
        be.affine_relu_forward(x.T, w, b, y)
    finally:
        del be._bias
    return seen[0]


def device_us(check: Any, call: Callable[[], Any]) -> float:
    """Microseconds of a call on the device: between two events around a batch, the median of some batches."""
    cuda = check.cp.cuda
    taken = []
    for _ in range(1 + (2 if check.small else BATCHES)):
        start, end = cuda.Event(), cuda.Event()
        start.record()
        for _ in range(BATCH):
            call()
        end.record()
        end.synchronize()
        taken.append(cuda.get_elapsed_time(start, end) * 1e3 / BATCH)
    return float(statistics.median(taken[1:]))


# ---------------------------------------------------------------- whole steps, side by side

SMALL_SHAPES = ((1, 64, 64), (16, 128, 128), (100, 3072, 100), (128, 784, 256), (512, 512, 512))
"""The sizes of CS231n's nets, where the host decides."""
LARGE_SHAPES = ((65536, 512, 512), (16384, 1024, 1024), (4096, 4096, 4096))
STEP_SHAPES = (*SMALL_SHAPES, *LARGE_SHAPES, (1024, 1024, 1024), (65536, 64, 64), (8, 4096, 4096))
COMPILED_SHAPES = ((1, 64, 64), (128, 784, 256), (1024, 1024, 1024), (65536, 64, 64), (4096, 4096, 4096))
"""Where torch.compile takes part: it compiles for seconds a case, and all of them would take the time of the others. So does XLA in
float32, for whose products it tries out kernels: there JAX takes part in these and in LARGE_SHAPES."""
STEP_DTYPES = ("float32", "bfloat16", "float16")
CHECKED_UP_TO = 1024**3
"""N D M up to which results are compared with float64: beyond, the host would take seconds for each, and the code is the same."""
ROUNDS, TURN = 5, 0.015
"""Turns of each subject, and seconds of a turn, after one turn that does not count."""


def step_subjects() -> tuple[list[Any], dict[str, str]]:
    """Ours, and all others that can be on a GPU; and why one of ours cannot."""
    from rectilinear.measure.subjects import PEERS, backend_subjects

    ours, missing = backend_subjects()
    taking = [subject for subject in ours if subject.backend == "cupy"]
    taking += [peer for peer in PEERS if peer.name.endswith(("-cuda", "-cupy"))]
    return taking, {name: why for name, why in missing.items() if name.startswith("cupy")}


def steps(check: Any, rows: Any, subjects: Callable[[], tuple[list[Any], dict[str, str]]] = step_subjects) -> None:
    """Whole steps by libraries in processes of their own that take turns: medians of us a call in a loop that waits once at its end."""
    if _package() is None:
        raise Leave("array-api-compat is not installed")
    from rectilinear.measure.machine import available_cpus
    from rectilinear.measure.turns import started

    wanted, unusable = subjects()
    with started(wanted, available_cpus()) as (children, greetings, missing):
        about = {"versions": {name: said["versions"] for name, said in greetings.items()}, "missing": unusable | missing}
        rows.add("subjects", lambda: about)
        for case in _step_cases(check):
            rows.add(case.name, lambda case=case: _side_by_side(check, case, children))


def _step_cases(check: Any) -> Iterator[Any]:
    from rectilinear.measure.cases import Case

    for dtype in STEP_DTYPES[:1] if check.small else STEP_DTYPES:
        for shape in STEP_SHAPES[:2] if check.small else STEP_SHAPES:
            if dtype in check.dtypes:
                yield Case("step", shape, dtype)


def _side_by_side(check: Any, case: Any, children: dict[str, Any]) -> dict[str, Any]:
    from rectilinear.measure.turns import SubjectError

    taking = {name: child for name, child in children.items() if child.subject.covers(case) and _takes_part(name, case)}
    failed: dict[str, str] = {}

    def ask(name: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        try:
            return dict(taking[name].ask(do, **arguments))
        except SubjectError as error:
            failed[name] = str(error)
            return None

    def ask_all(do: str, **arguments: Any) -> dict[str, dict[str, Any]]:
        """All at once: what they do here is not timed. Who fails is out."""
        with ThreadPoolExecutor(max(1, len(taking))) as pool:
            answers = dict(zip(taking, pool.map(lambda name: ask(name, do, **arguments), list(taking)), strict=True))
        drop_failed()
        return {name: answer for name, answer in answers.items() if answer is not None}

    def drop_failed() -> None:
        for name in failed:
            if taking.pop(name, None) and children[name].process.poll() is not None:
                children.pop(name).close()

    ask_all("prepare", case=[case.kind, case.shape, case.dtype])
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in taking}
    for turn in range(1 + (2 if check.small else ROUNDS)):
        for name in list(taking):
            answer = ask(name, "measure", seconds=TURN / 10 if check.small else TURN)
            if answer and turn:
                turns[name].append(answer)
        drop_failed()
    checked = int(np.prod(case.shape)) <= CHECKED_UP_TO
    answers = ask_all("check" if checked else "drop")
    refused = {name: answer["wrong"] for name, answer in answers.items() if answer.get("wrong")}
    for name, why in (refused | failed).items():
        if name in children and children[name].subject.backend:
            check.wrong.append(f"{name}: {why}")
    times = {name: [1e6 * t["seconds"] for t in turns[name]] for name in answers if name not in refused}
    return {
        "us": {name: round(statistics.median(each), 2) for name, each in times.items()},
        "host us": {n: round(1e6 * statistics.median(t["launch"] for t in turns[n]), 2) for n in times if "launch" in turns[n][0]},
        "rounds": {name: [round(us, 2) for us in each] for name, each in times.items()},
        "checked against float64": checked,
        "refused": refused,
        "failed": failed,
    }


def _takes_part(name: str, case: Any) -> bool:
    if name.startswith("jax") and case.dtype == "float32":
        return case.shape in COMPILED_SHAPES + LARGE_SHAPES
    return "compile" not in name or case.shape in COMPILED_SHAPES


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------- the project's tests, on CuPy

TESTED = ("conformance", "errors", "nn", "nn_state", "nn_sgd", "nn_sequential", "documents")
NEEDED = ("pytest", "pytest_timeout", "pytest_benchmark", "hypothesis", "array_api_compat", "array_api_strict", "safetensors", "ml_dtypes")

_TEST = re.compile(r"(?P<name>\S+\.py::.*) (?P<state>PASSED|FAILED|ERROR|SKIPPED)\b")
"""A test's line of pytest -v."""


def project_tests(check: Any, rows: Any, arguments: tuple[str, ...] = ()) -> None:
    """The tests that take CuPy arrays, on real ones (tests/conftest.py has the switch)."""
    rows.add("pytest", lambda: _pytest(check, rows, arguments or tuple(f"tests/test_{name}.py" for name in TESTED)))


def _pytest(check: Any, rows: Any, arguments: tuple[str, ...]) -> dict[str, Any]:
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        raise Leave(f"not installed: {', '.join(absent)}; pip install -e '.[smoke]'")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "TESTS_ON_CUPY": "1", "PYTHONPATH": path}
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": [], "left out": [], "said": []}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            test = _TEST.match(line)
            if test and test["state"] == "PASSED":
                found["passed"] += 1
            elif test and test["state"] == "SKIPPED":
                found["skipped"].append(test["name"])
            elif test:
                found["failed"].append(test["name"])
                check.wrong.append(test["name"])
            elif line.startswith("left out on CuPy: "):
                found["left out"].append(line.strip().partition(": ")[2])
            else:
                found["said"] = [*found["said"][-59:], line.rstrip()]
            rows.so_far(found)
    check.expect(process.returncode in (0, 1), f"pytest ended with status {process.returncode}: {' '.join(found['said'][-3:])}"[:500])
    check.expect(process.returncode or found["passed"], "pytest: no test ran")
    if not check.wrong:
        del found["said"]
    return found
