"""Runs case after case in one environment. A case that crashes takes a forked child with it, and the next child goes on behind it.

``python -m tests.fuzz.worker BOARD BACKEND`` says "ready" once kernels are compiled, takes an `Order` from stdin, and reports each
failing case as a line of JSON. The board is a file of words: the case at work, the bad calls made, the calls of each function.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any, NamedTuple

import numpy as np

import rectilinear
from tests.fuzz.cases import FUNCTIONS, Case, Machine, machine
from tests.guard import Allocator, Memory

SEED, BAD, CALLS = 0, 1, 2
"""The words of the board; from CALLS on one for each function."""
BOARD_WORDS = CALLS + len(FUNCTIONS)

CASE_S = 30
"""A case that takes longer hangs."""


class Order(NamedTuple):
    first: int
    """The first seed; the others follow."""
    cases: int
    seconds: float
    failures: int
    """How many to stop at."""


def work(order: Order, board: np.ndarray, who: Machine) -> None:
    end = time.monotonic() + order.seconds
    seed, last, failures = order.first, order.first + order.cases, 0
    while seed < last and failures < order.failures and time.monotonic() < end:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _run(seed, last, end, board, who)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            ended = "hangs" if -code == signal.SIGALRM else f"dies of {signal.Signals(-code).name}"
            _report(int(board[SEED]), ended, str(Case(int(board[SEED]), who, Memory())))
        failures += code != 0
        seed = int(board[SEED]) + 1


def _run(seed: int, last: int, end: float, board: np.ndarray, who: Machine) -> None:
    """In the child: up to the first failure. What a wrong write has spoiled is gone with it."""
    memory, allocator = Memory(), Allocator()
    code = 0
    try:
        while seed < last and time.monotonic() < end and code == 0:
            board[SEED] = seed
            signal.alarm(CASE_S)  # kills, wherever the call is
            case = Case(seed, who, memory)
            try:
                case.run(allocator)
            except Exception as error:
                _report(seed, f"{type(error).__name__}: {error}", str(case))
                code = 1
            board[CALLS + FUNCTIONS.index(case.function)] += 1
            board[BAD] += case.error is not None
            seed += 1
        sys.stdout.flush()
    except BaseException:
        _report(seed, f"the fuzzing itself failed: {traceback.format_exc()}", "")
        code = 2
    finally:
        os._exit(code)


def _report(seed: int, what: str, case: str) -> None:
    print(json.dumps({"seed": seed, "what": what, "case": case}), flush=True)


def main(board_path: str, backend: str) -> None:
    warnings.simplefilter("error")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for who started it
    board: Any = np.memmap(board_path, np.int64, "r+", shape=(BOARD_WORDS,))
    rectilinear.set_backend(backend)
    if backend == "numba":
        rectilinear.warmup()
    who = machine(backend)
    print("ready", flush=True)
    work(Order(*json.loads(sys.stdin.readline())), board, who)


if __name__ == "__main__":
    main(*sys.argv[1:])
