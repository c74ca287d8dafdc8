"""The parent: starts one process per subject and lets them take turns.

Subjects measure in turn, A B C A B C, one turn each per round. While one measures, the others block on their pipes; a turn begins
only when all threads of the one before are asleep, since a BLAS or OpenMP pool spins for milliseconds after its last call and would
be paid for by its successor. (Linux; elsewhere a pause stands in for the look.)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rectilinear.measure.cases import Case
from rectilinear.measure.isa import own_xla_flags, wide_within
from rectilinear.measure.machine import memory_available
from rectilinear.measure.subjects import Subject

KERNEL_OVERRIDES = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "BLIS_ARCH_TYPE",
    "NPY_DISABLE_CPU_FEATURES",
    "NPY_ENABLE_CPU_FEATURES",
    "TORCHINDUCTOR_CPP_MARCH",
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_DISABLE_JIT",
)
"""Variables that make a library use another kernel than the machine's best; no subject gets the user's."""
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RECTILINEAR_NUM_THREADS",
)
NOTHING: Mapping[str, str] = MappingProxyType({})
TICK = 0.01
"""Seconds; the longest unit in which Linux counts when it last saw registers of AVX-512."""
ASLEEP_WITHIN = 0.5
"""Seconds to wait for the threads of the last subject; OpenBLAS's spin for 2**26 cycles, some 25 ms."""
_ARRAYS_IN_MEMORY = 4
"""Arrays of the case's largest size that a subject holds while it is measured, roughly."""
_MEMORY_SHARE = 0.6


class SubjectError(Exception):
    """The subject's process ended or cannot run the case; the text says why."""


class Child:
    """A subject's process."""

    def __init__(self, subject: Subject, threads: int, hold: Mapping[str, str] = NOTHING) -> None:
        self.subject = subject
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        cpus = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_setaffinity") else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rectilinear.measure.worker", subject.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(subject, threads, hold),
            start_new_session=True,  # Ctrl-C is for the parent, which decides what is kept
        )
        if cpus:
            # XLA takes as many threads as there are processors to run on, and no variable for it.
            os.sched_setaffinity(self.process.pid, cpus)
        self.idle_seconds = self.idle_cpu_seconds = 0.0
        self.wide: list[bool | None] = []
        """Of each turn, what `isa.wide_within` found."""
        self._idle_since: tuple[float, float] | None = None

    def greet(self) -> dict[str, Any]:
        return self._answer()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self._end_of_idling()
        begun = time.perf_counter()
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            answer = self._answer()
        except BrokenPipeError:
            raise SubjectError(self._last_words()) from None
        finally:
            self._wait_until_asleep()
            self._idle_since = time.perf_counter(), self._cpu_seconds()
        if do == "measure":
            self.wide.append(wide_within(self.process.pid, time.perf_counter() - begun - TICK))
        if "error" in answer:
            raise SubjectError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process: it stops at the end of its input, or is killed if it is in the middle of something."""
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SubjectError(self._last_words())
        return dict(json.loads(line))

    def _last_words(self) -> str:
        status = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1][:300]}" if lines else "")

    def _wait_until_asleep(self) -> None:
        if not Path(f"/proc/{self.process.pid}").exists():
            time.sleep(0.05 if sys.platform != "linux" else 0)
            return
        deadline = time.perf_counter() + ASLEEP_WITHIN
        while _running_threads(self.process.pid) and time.perf_counter() < deadline:
            time.sleep(0.001)

    def _end_of_idling(self) -> None:
        if self._idle_since is not None:
            since, cpu = self._idle_since
            self.idle_seconds += time.perf_counter() - since
            self.idle_cpu_seconds += self._cpu_seconds() - cpu

    def _cpu_seconds(self) -> float:
        """Processor time used so far, to 10 ms; 0 where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def _running_threads(pid: int) -> int:
    running = 0
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            running += stat.read_text().rpartition(")")[2].split()[0] == "R"
    return running


def environment(subject: Subject, threads: int, hold: Mapping[str, str] = NOTHING) -> dict[str, str]:
    """The variables a subject's process gets: no kernel overrides but those of `hold`, the same number of threads for every library."""
    kept = {k: v for k, v in os.environ.items() if k not in (*KERNEL_OVERRIDES, "RECTILINEAR_BACKEND")}
    if "XLA_FLAGS" in kept:
        kept["XLA_FLAGS"] = " ".join(own_xla_flags(kept))
    # The package may be run from a checkout, where only the parent's path leads to it.
    path = os.pathsep.join(p for p in sys.path if p)
    return kept | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"PYTHONPATH": path} | subject.environment | dict(hold)


@contextlib.contextmanager
def started(
    subjects: list[Subject], threads: int, hold: Mapping[str, str] = NOTHING
) -> Iterator[tuple[dict[str, Child], dict[str, dict[str, Any]], dict[str, str]]]:
    """Children by name, what each said of itself, and why the missing ones are; all end with the block."""
    children: dict[str, Child] = {}
    greetings, missing = {}, {}
    try:
        for subject in subjects:
            children[subject.name] = Child(subject, threads, hold)
        for name, child in list(children.items()):
            try:
                greetings[name] = child.greet()
            except SubjectError as failure:
                greetings[name] = {"missing": str(failure)}
            if "missing" in greetings[name]:
                missing[name] = greetings.pop(name)["missing"]
                children.pop(name).close()
        yield children, greetings, missing
    finally:
        for child in children.values():
            child.close()


def take_turns(
    case: Case, children: dict[str, Child], rounds: int, seconds: float, on_turn: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, str], dict[str, dict[str, Any]]]:
    """Measure one case: seconds per call by subject, one figure per round; who was refused for wrong results; and who was left out.

    Last, for each subject on a GPU, what `record.Figure` says of it.

    `on_turn` is called with a subject's name before it does something. A subject whose process has ended is taken out of `children`.
    """
    times: dict[str, list[float]] = {}
    refused, left_out = {}, {}
    gpu: dict[str, dict[str, Any]] = {}
    taking_part = {name: child for name, child in children.items() if child.subject.covers(case)}
    short_of = _memory_needed(case, len(taking_part))
    if short_of:
        return {}, {}, dict.fromkeys(taking_part, short_of), {}

    def attempt(name: str, do: str, **arguments: Any) -> dict[str, Any] | None:
        on_turn(name)
        try:
            return taking_part[name].ask(do, **arguments)
        except SubjectError as failure:
            left_out[name] = str(failure)
            times.pop(name, None)
            del taking_part[name]
            if children[name].process.poll() is not None:
                children.pop(name).close()
            return None

    for name in list(taking_part):
        if attempt(name, "prepare", case=[case.kind, case.shape, case.dtype]):
            times[name] = []
    for _ in range(rounds):
        for name in list(taking_part):
            answer = attempt(name, "measure", seconds=seconds)
            if answer:
                times[name].append(answer["seconds"])
                if "launch" in answer:
                    gpu.setdefault(name, {"launch": []})["launch"].append(answer["launch"])
    for name in list(taking_part):
        answer = attempt(name, "check")
        if answer and answer["wrong"]:
            refused[name] = answer["wrong"]
            del times[name]
        elif answer and "gpu" in answer:
            gpu[name] |= answer["gpu"]
    return times, refused, left_out, {name: about for name, about in gpu.items() if name in times}


def _memory_needed(case: Case, subjects: int) -> str | None:
    """Why the case does not fit into memory with this many subjects, or None."""
    available = memory_available()
    needed = case.elements * case.itemsize * _ARRAYS_IN_MEMORY * subjects
    if available is None or needed <= _MEMORY_SHARE * available:
        return None
    return f"{subjects} subjects need some {needed / 2**30:.0f} GiB together; fewer would fit (--subjects)"
