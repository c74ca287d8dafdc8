"""Small kernels on the pool, for the tests of threads and cache; imported by their subprocesses too."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.native import c_address, compare_exchange, fetch_add, intrinsic, load, monotonic_ns, store, symbol_address
from rectilinear.kernels.runtime.records import at
from rectilinear.kernels.runtime.threads import Pool, helpers_at_hand, parallel_for

SLAB = 1000


@intrinsic
def float_at(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.DoubleType().as_pointer()), typ=ir.DoubleType())

    return types.float64(types.intp), codegen


@intrinsic
def set_float(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.DoubleType().as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.float64), codegen


@jit_inner
def _sum_slab(index: int, arg: int) -> None:
    x, sums, n = load(arg), load(arg + 8), load(arg + 16)
    total = 0.0
    for i in range(index * SLAB, min(n, (index + 1) * SLAB)):
        total += float_at(x + 8 * i)
    set_float(sums + 8 * index, total)


@jit()
def _slab_sums(x: Any, sums: Any, nthreads: int) -> int:
    arg = np.array([x.ctypes.data, sums.ctypes.data, x.size], np.intp)
    return parallel_for(c_address(_sum_slab), arg.ctypes.data, sums.size, nthreads)


def slab_sums(x: np.ndarray, nthreads: int) -> np.ndarray:
    """Sums of slabs of x, one task each."""
    sums = np.full(-(-x.size // SLAB), np.nan)
    _slab_sums(x, sums, nthreads)
    return sums


def check(nthreads: int = 2, n: int = 30_001) -> None:
    """Raise unless a job comes out right."""
    x = np.linspace(0.0, 1.0, n)
    # One after the other, as the kernel adds: sum() compensates from Python 3.12 on.
    want = [reduce(operator.add, x[i : i + SLAB].tolist(), 0.0) for i in range(0, n, SLAB)]
    if slab_sums(x, nthreads).tolist() != want:
        raise AssertionError("wrong sums")


@jit_inner
def _count(index: int, arg: int) -> None:
    fetch_add(arg + 8 * index, 1)


@jit()
def count_runs(counts: Any, ntasks: int, nthreads: int) -> int:
    """Add 1 to counts[i] for every task i."""
    return parallel_for(c_address(_count), counts.ctypes.data, ntasks, nthreads)


@jit()
def count_many_jobs(counts: Any, nthreads: int, jobs: int) -> None:
    for _ in range(jobs):
        parallel_for(c_address(_count), counts.ctypes.data, counts.size, nthreads)


@jit_inner
def _count_nested(index: int, arg: int) -> None:
    parallel_for(c_address(_count), arg + 8 * 10 * index, 10, 4)


@jit()
def count_nested(counts: Any, nthreads: int) -> int:
    """Ten inner tasks in each of counts.size // 10 outer ones."""
    return parallel_for(c_address(_count_nested), counts.ctypes.data, counts.size // 10, nthreads)


@jit_inner
def _busy(index: int, arg: int, slot: int) -> None:
    # arg: nanoseconds, violations, then one word a slot: taken or not, then one word a slot: tasks done.
    taken = arg + 16 + 8 * slot
    if not compare_exchange(taken, 0, 1):
        fetch_add(arg + 8, 1)
    end = monotonic_ns() + load(arg)
    while monotonic_ns() < end:
        pass
    store(taken, 0)
    fetch_add(taken + 8 * 64, 1)


@jit()
def _busy_tasks(words: Any, ntasks: int, nthreads: int) -> int:
    return parallel_for(c_address(_busy), words.ctypes.data, ntasks, nthreads)


def busy(seconds: float, ntasks: int, nthreads: int) -> tuple[list[int], int]:
    """Tasks that take some time; returns how many each slot did, and how often a slot was in two hands at once."""
    words = np.zeros(2 + 2 * 64, np.intp)
    words[0] = int(seconds * 1e9)
    _busy_tasks(words, ntasks, nthreads)
    return words[2 + 64 : 2 + 64 + nthreads].tolist(), int(words[1])


def check_shared(nthreads: int = 2) -> None:
    """Raise unless more than one thread works on a job, sooner or later: the machine may have other things to do."""
    for _ in range(50):
        done, in_two_hands = busy(0.01, 8, nthreads)
        if sum(done) != 8 or in_two_hands:
            raise AssertionError(f"tasks done by slot: {done}; slots in two hands: {in_two_hands}")
        if sum(count > 0 for count in done) >= 2:
            return
    raise AssertionError("nobody helps the caller")


def check_in_pool(nthreads: int) -> int:
    """For process pools."""
    check(nthreads)
    return nthreads


@jit()
def times_at_hand(asked: int) -> int:
    """How many of so many questions in a row were told that helpers are at hand."""
    told = 0
    for _ in range(asked):
        told += helpers_at_hand()
    return told


@jit()
def _at_hand_after(words: Any, ntasks: int, nthreads: int) -> int:
    parallel_for(c_address(_busy), words.ctypes.data, ntasks, nthreads)
    return helpers_at_hand()


def at_hand_after_work(seconds: float) -> int:
    """What is said at the end of a job of two tasks, whose helper has only just left it."""
    words = np.zeros(2 + 2 * 64, np.intp)
    words[0] = int(seconds * 1e9)
    return _at_hand_after(words, 2, 2)


@jit()
def _awake_after_too_short_a_job(words: Any, for_ns: int) -> int:
    parallel_for(c_address(_busy), words.ctypes.data, 2, 2)
    end = monotonic_ns() + for_ns
    while monotonic_ns() < end:
        if load(at(Pool, symbol_address("rectilinear_pool")).sleeping.sleepers) == 0:
            return 1
    return 0


def awake_after_too_short_a_job(for_s: float) -> int:
    """Whether the one helper, asleep before, was seen awake after a job that was over before it could have come."""
    return _awake_after_too_short_a_job(np.zeros(2 + 2 * 64, np.intp), int(for_s * 1e9))
