"""Random calls of every public function on guarded memory, on every instruction set of this host and on the numpy backend.

python -m tests.fuzz                              # 60 seconds
python -m tests.fuzz --seconds 600
python -m tests.fuzz --only AVX2 --seed 123456    # one case again
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests import widths
from tests.fuzz.cases import FUNCTIONS
from tests.fuzz.worker import BAD, BOARD_WORDS, CALLS, CASE_S, Order

ROOT = Path(__file__).parents[2]
NUMPY = "numpy"

SHOWN = 5
"""Failing cases of a worker that are shown in full."""

SEEDS_APART = 10**9
"""Each worker has seeds of its own."""

NICENESS = 8
"""Of the numpy backend, whose code is mostly NumPy's: about a fifth of what an instruction set gets, where all want to run."""

WARM_AT_ONCE = 2
"""Compiling takes a core and half a gigabyte each."""


class Worker:
    """A process that fuzzes one instruction set, or the numpy backend."""

    def __init__(self, name: str, variables: dict[str, str], folder: Path) -> None:
        self.name = name
        path = folder / name
        self.board = np.memmap(path, np.int64, "w+", shape=(BOARD_WORDS,))
        backend = NUMPY if name == NUMPY else "numba"
        # One case at a time is to use more than one thread; OpenBLAS's would only be in their way.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "", "RECTILINEAR_BACKEND": ""} | variables
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", path, backend],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            preexec_fn=(lambda: os.nice(NICENESS)) if backend == NUMPY else None,
        )  # fmt: skip

    def warm(self) -> None:
        """Wait until its kernels are compiled."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit(f"fuzz: {self.name} does not start")

    def start(self, order: Order) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def failures(self, limit_s: float) -> list[dict[str, Any]]:
        """Its failing cases, when it is done."""
        out, _ = self._process.communicate(timeout=limit_s)
        if self._process.returncode:
            raise SystemExit(f"fuzz: the worker of {self.name} ended with status {self._process.returncode}")
        return [json.loads(line) for line in out.splitlines()]

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of fuzzing, once all kernels are compiled (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=1 << 60, help="how many for each worker, at most")
    parser.add_argument("--first", type=int, help="seed of the first case (default: a new one each time)")
    parser.add_argument("--seed", type=int, help="run this one case")
    parser.add_argument("--only", action="append", help="an instruction set by name, or numpy (default: all of this host); may be repeated")
    parser.add_argument("--without", action="append", default=[], help="not this one of them; may be repeated")
    parser.add_argument("--failures", type=int, default=20, help="stop a worker after so many failing cases (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="say all of it as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    units = {unit.name: variables for unit, variables in widths.executable().items()}
    every = units | {NUMPY: {}}
    unknown = set(asked.only or ()) - set(every)
    if unknown:
        print(f"fuzz: this host has no {', '.join(sorted(unknown))}; it has {', '.join(every)}")
        return 2
    # Its BLAS reads past the end of operands on arm64.
    usual = units if widths.NEON in widths.executable() else every
    chosen = {name: every[name] for name in every if name in (asked.only or usual) and name not in asked.without}
    first = secrets.randbelow(10**9) if asked.first is None else asked.first
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            with ThreadPoolExecutor(WARM_AT_ONCE) as pool:
                list(pool.map(lambda name: _warm(workers, name, chosen[name], Path(folder)), chosen))
            workers.sort(key=lambda worker: list(chosen).index(worker.name))
            start = time.monotonic()
            for i, worker in enumerate(workers):
                worker.start(_order(asked, first + i * SEEDS_APART))
            found = {worker.name: worker.failures(asked.seconds + 4 * CASE_S) for worker in workers}
            took = time.monotonic() - start
        finally:
            for worker in workers:
                worker.end()
        calls = {worker.name: worker.board[CALLS:].copy() for worker in workers}
        bad = sum(int(worker.board[BAD]) for worker in workers)
    if asked.json:
        by_function = {name: dict(zip(FUNCTIONS, count.tolist(), strict=True)) for name, count in calls.items()}
        print(json.dumps({"seconds": took, "calls": by_function, "bad": bad, "failures": found}))
    else:
        _show_calls(calls, bad, took)
        for name, failures in found.items():
            _show_failures(name, failures)
    return 1 if any(found.values()) else 0


def _warm(workers: list[Worker], name: str, variables: dict[str, str], folder: Path) -> None:
    worker = Worker(name, variables, folder)
    workers.append(worker)
    worker.warm()


def _order(asked: argparse.Namespace, first: int) -> Order:
    if asked.seed is not None:
        return Order(asked.seed, 1, 2 * CASE_S, 1)
    return Order(first, asked.cases, asked.seconds, asked.failures)


def _show_calls(calls: dict[str, np.ndarray], bad: int, took: float) -> None:
    print(f"{'calls':<21}" + "".join(f"{name:>10}" for name in calls))
    for i, function in enumerate(FUNCTIONS):
        print(f"{function:<21}" + "".join(f"{count[i]:>10}" for count in calls.values()))
    print(f"{'all':<21}" + "".join(f"{count.sum():>10}" for count in calls.values()))
    print(f"{sum(map(sum, calls.values()))} calls in {took:.1f} s, {bad} of them to be refused")


def _show_failures(name: str, failures: list[dict[str, Any]]) -> None:
    for failure in failures[:SHOWN]:
        print(f"\n{failure['what']}\n  {failure['case']}\n  again: {again(name, failure['seed'])}")
    if len(failures) > SHOWN:
        print(f"\nmore of {name}, by seed: {', '.join(str(failure['seed']) for failure in failures[SHOWN:])}")


def again(name: str, seed: int) -> str:
    """The command that runs a case again."""
    return f"{os.path.relpath(sys.executable)} -m tests.fuzz --only {name} --seed {seed}"


if __name__ == "__main__":
    sys.exit(main())
