"""One subject in its own process: ``python -m rectilinear.measure.worker module:function``.

Reads one JSON object a line from standard input and answers each with one: a greeting (or why the subject is missing), then

    {"do": "prepare", "case": [kind, shape, dtype]}   build the case and warm it     {"seconds": one call}
    {"do": "measure", "seconds": s}                   one turn of about s seconds    {"seconds": per call}
    {"do": "check"}                                   against float64, drop the case {"wrong": null or what}

or with ``{"error": text}``. Between turns it blocks on the pipe. A subject on a GPU is timed as `gpu` says, and adds "launch", the host's
seconds per call, to the second answer and "gpu", the device's name and what copies took, to the third.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from itertools import repeat
from statistics import median
from time import perf_counter
from typing import Any, TextIO

from rectilinear.measure import isa
from rectilinear.measure.cases import Case
from rectilinear.measure.gpu import WARM_UP, Timer
from rectilinear.measure.machine import library_versions, thread_pools
from rectilinear.measure.reference import check, inputs
from rectilinear.measure.subjects import Run

BATCHES = 5
"""A turn's figure is the median over this many batches of calls, so that one interruption does not count."""
LONG_CALL = 0.1
"""Seconds; a call this long needs no warm-up after a pause: waking threads and filling caches takes milliseconds."""
_WARM_UP = 0.1
"""The share of a turn that is spent warming up."""


def per_call(call: Callable[[], Any], seconds: float, expected: float, gpu: Timer | None = None) -> float:
    """Seconds per call, measured for about `seconds`, at least one call; `expected` is a first guess."""
    batch = gpu.elapsed if gpu else _batch
    if expected < LONG_CALL or gpu:
        batch(call, max(WARM_UP if gpu else 1, round(_WARM_UP * seconds / expected)))
    batches = max(1, min(BATCHES, round(seconds / expected)))
    calls = max(1, round(seconds / batches / expected))
    return median(batch(call, calls) / calls for _ in range(batches))


def _batch(call: Callable[[], Any], calls: int) -> float:
    start = perf_counter()
    for _ in repeat(None, calls):
        call()
    return perf_counter() - start


def _first_guess(call: Callable[[], Any], gpu: Timer | None = None) -> float:
    """Run until compiled and warm: at least twice, until 20 ms have gone or the calls get no faster."""
    call()
    batch = gpu.elapsed if gpu else _batch
    best, spent = float("inf"), 0.0
    while spent < 0.02:
        last = batch(call, 1)
        spent += last
        if last > LONG_CALL:
            return last
        best = min(best, last)
    return best


class _Worker:
    def __init__(self, build: Callable[[Case, dict[str, Any]], Run]) -> None:
        self.build = build

    def prepare(self, case: list[Any]) -> dict[str, Any]:
        self.case = Case(case[0], tuple(case[1]), case[2])
        self.run = self.build(self.case, inputs(self.case))
        self.guess = _first_guess(self.run.call, self.run.gpu)
        return {"seconds": self.guess}

    def measure(self, seconds: float) -> dict[str, Any]:
        call, gpu = self.run.call, self.run.gpu
        gc.disable()
        try:
            self.guess = per_call(call, seconds, self.guess, gpu)
            return {"seconds": self.guess} | ({"launch": gpu.launch(call)} if gpu else {})
        finally:
            gc.enable()

    def check(self) -> dict[str, Any]:
        """Check what one more call returns, after timing. A training step changes its parameters, so it starts anew."""
        data = inputs(self.case)
        run = self.build(self.case, inputs(self.case)) if self.case.kind == "train" else self.run
        value = run.call()
        answer: dict[str, Any] = {"wrong": check(self.case, data, run.results(value))}
        if run.gpu:
            answer["gpu"] = {"device": run.gpu.device, **run.gpu.copies(data.values(), value)}
        self.drop()
        return answer

    def drop(self) -> dict[str, Any]:
        self.__dict__.pop("run", None)
        gc.collect()
        return {}


def main(target: str, requests: TextIO, answers: TextIO) -> None:
    module, _, function = target.partition(":")
    try:
        worker = _Worker(getattr(importlib.import_module(module), function))
    except ImportError as error:
        return _say(answers, {"missing": str(error)})
    greeting = {"versions": library_versions(), "threads": thread_pools(), "runs_on": isa.said(), "pid": os.getpid()}
    _say(answers, greeting)
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # whatever a library raises is its answer for this case; the next one may work
            traceback.print_exc()
            worker.drop()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        _say(answers, answer)


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    # Libraries print to standard output when they like: the pipe to the parent gets a descriptor of its own.
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)
        main(sys.argv[1], sys.stdin, pipe)
