"""The pool of native threads that the kernels run on. docs/threads.md says why it is our own, and what was measured.

``parallel_for(function, arg, ntasks, nthreads)``, called from jitted code, runs ``function(index, arg, slot)`` once for
every index below `ntasks`, on up to `nthreads` threads, and returns when all are done. The caller is one of them; the
others are plain pthreads that run compiled code only and never touch Python, so that the GIL, signal handlers and
interpreter exit do not concern them.

How a job goes. The caller sets `busy`; if it cannot (another Python thread is inside, or this is a nested call), it
runs all tasks itself. It writes the job down and opens `gate`, which holds the number of helpers still welcome. A worker
joins by taking one from `gate`; everyone claims task indices, from `lower` or `upper`, until both have run out. The caller
then closes `gate` and waits for those who had joined (`left` counts them out), not for those still waking up, so a late worker
costs nothing. Job and counters cannot change under a worker, since a job ends only when all who joined have left.

Where `rectilinear.threads.team` names a function that starts threads, as PyTorch's OpenMP has one, the job runs on those instead: they
are awake already, and would keep the processors from our own.

What a task computes depends on its index alone, never on who runs it: that is what makes results equal for every
number of threads.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba import types

from rectilinear.kernels.runtime import symbols
from rectilinear.kernels.runtime.cache import jit, jit_inner
from rectilinear.kernels.runtime.memory import room, size_of
from rectilinear.kernels.runtime.native import (
    c_address,
    call_number,
    call_task,
    call_team,
    compare_exchange,
    exchange,
    external,
    fetch_add,
    let_go_of_gil,
    load,
    monotonic_ns,
    pause,
    store,
    symbol_address,
    take_gil_back,
)
from rectilinear.kernels.runtime.records import PAIR_BYTES, WORD_BYTES, Atomic, address_of, at, bytes_of, offsets_of, padded_record, record
from rectilinear.threads import MAX_THREADS, team

SPIN_NS, MOST_SPIN_NS = 30_000, 300_000
"""A worker without work looks for more before it sleeps, and the caller for the last helper to leave, for as long as the last job took,
within these bounds.

The least is about what putting a thread to sleep and waking it costs (20 to 27 us measured on a virtual machine), which makes the waiting
at most twice what the best choice in hindsight would have cost. More after longer jobs: where others use the machine too, waking takes
several times as long, and a layer of 400 us is followed by some 50 us of Python and of work for one thread. With the least alone helpers
overslept half of the next job: dw of (128, 784, 512) on AVX2 ran 1.15 times as fast with this, the step of (128, 784, 256) 1.13 times (two
threads, Zen 4 shared with others). So no job is followed by more spinning than it took, but for the least.
"""

_EXIT_PATIENCE_US = 2_000_000


@padded_record(PAIR_BYTES)
class Opaque:
    """A mutex, a condition, a signal set, a floating-point environment: at most 128 bytes on Linux and macOS."""

    first: int = 0


@padded_record(PAIR_BYTES)
class Job:
    """What the caller writes down before it opens the gate."""

    function: Atomic = Atomic()
    arg: Atomic = Atomic()
    ntasks: Atomic = Atomic()
    caller_cpu: Atomic = Atomic()
    begun: Atomic = Atomic()


@padded_record(PAIR_BYTES)
class Counter:
    """A word that everybody counts by."""

    count: Atomic = Atomic()


@padded_record(PAIR_BYTES)
class Leaving:
    """How many helpers have left the job, and whether the caller sleeps until the last one does."""

    left: Atomic = Atomic()
    caller_sleeps: Atomic = Atomic()


@padded_record(PAIR_BYTES)
class Sleeping:
    """How many workers sleep, and whether all are to end."""

    sleepers: Atomic = Atomic()
    stop: Atomic = Atomic()


@padded_record(PAIR_BYTES)
class Owner:
    """The process whose pool this is, whether a caller is inside, how many workers there are, and when helpers were last asked for."""

    process: Atomic = Atomic()
    busy: Atomic = Atomic()
    workers: Atomic = Atomic()
    last_asked: Atomic = Atomic()


@padded_record(MAX_THREADS * WORD_BYTES)
class Handles:
    """The handles of the workers, a word each."""

    first: Atomic = Atomic()


@record
class Pool:
    """The pool's memory."""

    owner: Owner = Owner()
    gate: Counter = Counter()
    job: Job = Job()
    float_env: Opaque = Opaque()
    lower: Counter = Counter()
    upper: Counter = Counter()
    leaving: Leaving = Leaving()
    sleeping: Sleeping = Sleeping()
    mutex: Opaque = Opaque()
    work_condition: Opaque = Opaque()
    done_condition: Opaque = Opaque()
    signals: Opaque = Opaque()
    old_signals: Opaque = Opaque()
    handles: Handles = Handles()


@record
class Team:
    """`rectilinear.threads.team`, as jitted code sees it."""

    start: int = 0
    number: int = 0
    at_most: int = 0


_REBUILDING = -1

_CPU_SET_WORDS, _FLOAT_ENV_WORDS = 16, 16
"""No system's floating-point environment is larger: see `Opaque`."""

_CPU_SET_BYTES = _CPU_SET_WORDS * WORD_BYTES


def _pool_function(name: str) -> Any:
    return external(name, symbols.POOL[name])


_pthread_create = _pool_function("pthread_create")
_pthread_join = _pool_function("pthread_join")
_pthread_sigmask = _pool_function("pthread_sigmask")
_mutex_init = _pool_function("pthread_mutex_init")
_lock = _pool_function("pthread_mutex_lock")
_unlock = _pool_function("pthread_mutex_unlock")
_cond_init = _pool_function("pthread_cond_init")
_cond_wait = _pool_function("pthread_cond_wait")
_cond_signal = _pool_function("pthread_cond_signal")
_cond_broadcast = _pool_function("pthread_cond_broadcast")
_sigfillset = _pool_function("sigfillset")
_sigdelset = _pool_function("sigdelset")
_fegetenv = _pool_function("fegetenv")
_fesetenv = _pool_function("fesetenv")
_getpid = _pool_function("getpid")
_usleep = _pool_function("usleep")

_sched_getcpu, _sched_getaffinity, _sched_setaffinity = itertools.starmap(external, symbols.AFFINITY.items())

_KNOWS_CPUS = not symbols.missing(symbols.AFFINITY)  # Linux

_SIG_SETMASK = int(getattr(signal, "SIG_SETMASK", 0))
_FAULTS = tuple(int(getattr(signal, name, 0)) for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"))


@jit_inner
def _deadline(pool: Pool) -> int:
    """Until when to look for what comes next, now that there is no more of the job to do."""
    now = monotonic_ns()
    return now + max(SPIN_NS, min(now - load(pool.job.begun), MOST_SPIN_NS))


@jit_inner
def _drain(pool: Pool, slot: int) -> None:
    """Claim and run tasks until none is left: of the lower half first where the slot is even, of the upper one where it is odd.

    So in job after job a thread comes to the same tasks again, and finds their operands in its own L2, where one count for all would deal
    them out anew. Two threads on AVX2, layers of 128 rows: 1.1 to 1.25 times as fast, 1024^3 and beyond alike (Zen 4 shared with others).
    """
    function, arg, ntasks = load(pool.job.function), load(pool.job.arg), load(pool.job.ntasks)
    half = ntasks - ntasks // 2
    for turn in range(2):
        if (slot + turn) % 2 == 0:
            claimed, first, end = address_of(pool.lower.count), 0, half
        else:
            claimed, first, end = address_of(pool.upper.count), half, ntasks
        index = first + fetch_add(claimed, 1)
        while index < end:
            call_task(function, index, arg, slot)
            index = first + fetch_add(claimed, 1)


@jit_inner
def _join_job(pool: Pool) -> int:
    """Take a place in the open job, if there is one; the place's number, or 0."""
    places = load(pool.gate.count)
    while places > 0:
        if compare_exchange(pool.gate.count, places, places - 1):
            return places
        places = load(pool.gate.count)
    return 0


@jit_inner
def _note_the_callers_cpu(pool: Pool) -> None:
    if _KNOWS_CPUS:
        store(pool.job.caller_cpu, _sched_getcpu())


@jit_inner
def _leave_the_callers_cpu(pool: Pool) -> None:
    """Move to another processor if the scheduler has put this worker on the caller's.

    Some do so when they wake a thread, and keep to it for milliseconds: the worker then runs instead of the caller, not
    beside it. Measured on a virtual machine: tasks of 10 us in a row, two threads, took 20 us each, and 11 us with this.
    """
    if _KNOWS_CPUS:
        cpu = _sched_getcpu()
        if cpu == load(pool.job.caller_cpu) and 0 <= cpu < 8 * _CPU_SET_BYTES:
            others = room(_CPU_SET_WORDS)
            # As they are now, not as they were: the host may have taken some away.
            if _sched_getaffinity(load(pool.owner.process), _CPU_SET_BYTES, others) >= 0:
                word = others + cpu // 64 * 8
                store(word, load(word) & ~(1 << (cpu % 64)))
                _sched_setaffinity(0, _CPU_SET_BYTES, others)  # refused if there is no other, which is right


@jit_inner
def _keep_to_the_process_cpus(pool: Pool) -> None:
    """Let this worker run where the process, that is its main thread, may run now; one less, left to a caller, is the same to it.

    A worker starts with the mask of whoever hired it, and the host may have changed the process's since.
    """
    if _KNOWS_CPUS:
        allowed, own = room(_CPU_SET_WORDS), room(_CPU_SET_WORDS)
        if _sched_getaffinity(load(pool.owner.process), _CPU_SET_BYTES, allowed) < 0 or _sched_getaffinity(0, _CPU_SET_BYTES, own) < 0:
            return
        left_out = 0
        for offset in range(0, _CPU_SET_BYTES, 8):
            may, does = load(allowed + offset), load(own + offset)
            if does & ~may != 0:
                left_out = 2  # it may even run where it must not
            rest = may & ~does
            while rest != 0:
                rest &= rest - 1
                left_out += 1
        if left_out > 1:
            _sched_setaffinity(0, _CPU_SET_BYTES, allowed)


@jit_inner
def _sleep_until_work(pool: Pool) -> None:
    _lock(pool.mutex)
    # Counted before the gate is read, as the caller opens it before it reads the count: one of them sees the other.
    fetch_add(pool.sleeping.sleepers, 1)
    if load(pool.gate.count) == 0 and load(pool.sleeping.stop) == 0:
        # Once, whatever it was woken for: when it comes too late for a short job, it is there for the next one.
        _cond_wait(pool.work_condition, pool.mutex)
    fetch_add(pool.sleeping.sleepers, -1)
    _unlock(pool.mutex)
    _keep_to_the_process_cpus(pool)


@jit_inner
def _work(address: int) -> int:
    """What a worker does all its life."""
    pool = at(Pool, address)
    _keep_to_the_process_cpus(pool)
    deadline = monotonic_ns() + SPIN_NS
    while load(pool.sleeping.stop) == 0:
        _leave_the_callers_cpu(pool)
        slot = _join_job(pool)
        if slot > 0:
            _fesetenv(pool.float_env)
            _drain(pool, slot)
            deadline = _deadline(pool)
            fetch_add(pool.leaving.left, 1)
            if load(pool.leaving.caller_sleeps) != 0:
                _lock(pool.mutex)
                _cond_signal(pool.done_condition)
                _unlock(pool.mutex)
        elif monotonic_ns() > deadline:
            _sleep_until_work(pool)
            deadline = monotonic_ns() + SPIN_NS
        else:
            pause()
    return 0


@jit_inner
def _handle(pool: Pool, worker: int) -> int:
    """Where the handle of a worker is."""
    return address_of(pool.handles) + worker * WORD_BYTES


@jit_inner
def _hire(pool: Pool, wanted: int) -> None:
    """Start workers until there are `wanted`, as far as the system allows. They block all signals but faults."""
    have = load(pool.owner.workers)
    if have >= wanted:
        return
    _sigfillset(pool.signals)
    # A fault is the faulting thread's own: blocked, it would kill the process without a word from faulthandler.
    for fault in _FAULTS:
        _sigdelset(pool.signals, fault)
    _pthread_sigmask(_SIG_SETMASK, pool.signals, pool.old_signals)
    while have < wanted and _pthread_create(_handle(pool, have), 0, c_address(_work), pool) == 0:
        have += 1
    _pthread_sigmask(_SIG_SETMASK, pool.old_signals, 0)
    store(pool.owner.workers, have)


@jit_inner
def _belongs_here(pool: Pool) -> bool:
    """Whether the pool is this process's own. The first call in a process, forked ones included, makes it so."""
    me, owner = _getpid(), load(pool.owner.process)
    if owner == me:
        return True
    if owner == _REBUILDING or not compare_exchange(pool.owner.process, owner, _REBUILDING):
        return False
    # After a fork the parent's workers are not here, and its locks and counters are as the fork caught them.
    store(pool.owner.busy, 0)
    store(pool.owner.workers, 0)
    store(pool.gate.count, 0)
    store(pool.leaving.caller_sleeps, 0)
    store(pool.sleeping.sleepers, 0)
    store(pool.sleeping.stop, 0)
    _mutex_init(pool.mutex, 0)
    _cond_init(pool.work_condition, 0)
    _cond_init(pool.done_condition, 0)
    store(pool.owner.process, me)
    return True


@jit_inner
def _wake(pool: Pool, helpers: int) -> None:
    asleep = load(pool.sleeping.sleepers)
    if asleep == 0:
        return
    # Taking the mutex makes sure that whoever has counted itself a sleeper is waiting by now. It is let go before the
    # signal, or the woken would run straight into it.
    _lock(pool.mutex)
    _unlock(pool.mutex)
    for _ in range(min(asleep, helpers)):
        _cond_signal(pool.work_condition)


@jit_inner
def _await_helpers(pool: Pool, joined: int) -> None:
    deadline = _deadline(pool)
    while load(pool.leaving.left) != joined:
        if monotonic_ns() > deadline:
            _lock(pool.mutex)
            store(pool.leaving.caller_sleeps, 1)
            while load(pool.leaving.left) != joined:
                _cond_wait(pool.done_condition, pool.mutex)
            store(pool.leaving.caller_sleeps, 0)
            _unlock(pool.mutex)
            return
        pause()


@jit_inner
def _write_down(pool: Pool, function: int, arg: int, ntasks: int) -> None:
    store(pool.job.function, function)
    store(pool.job.arg, arg)
    store(pool.job.ntasks, ntasks)
    store(pool.job.begun, monotonic_ns())
    # Rounding mode and flush-to-zero are per thread; helpers take the caller's, or bits could depend on who computes.
    _fegetenv(pool.float_env)
    store(pool.lower.count, 0)
    store(pool.upper.count, 0)
    store(pool.leaving.left, 0)


@jit_inner
def _run_together(pool: Pool, function: int, arg: int, ntasks: int, nthreads: int) -> int:
    helpers = min(nthreads, ntasks, MAX_THREADS) - 1
    _note_the_callers_cpu(pool)
    _hire(pool, helpers)
    helpers = min(helpers, load(pool.owner.workers))
    _write_down(pool, function, arg, ntasks)
    store(pool.gate.count, helpers)
    _wake(pool, helpers)
    _drain(pool, 0)
    joined = helpers - exchange(pool.gate.count, 0)
    _await_helpers(pool, joined)
    return 1 + joined


@jit_inner
def _take_part(address: int) -> None:
    """What each thread of a team does for a job. Its number in the team is its slot: it is the same one job after job."""
    pool, own = at(Pool, address), room(_FLOAT_ENV_WORDS)
    fetch_add(pool.leaving.left, 1)  # not the gate, by which workers of our own would join
    _fegetenv(own)
    _fesetenv(pool.float_env)
    _drain(pool, call_number(at(Team, symbol_address("rectilinear_team")).number))
    _fesetenv(own)


@jit_inner
def _run_in_team(pool: Pool, start: int, function: int, arg: int, ntasks: int, nthreads: int) -> int:
    _write_down(pool, function, arg, ntasks)
    call_team(start, c_address(_take_part), address_of(pool), min(nthreads, ntasks, MAX_THREADS), 0)
    return load(pool.leaving.left)


@jit_inner
def _run_alone(function: int, arg: int, ntasks: int) -> int:
    for index in range(ntasks):
        call_task(function, index, arg, 0)
    return 1


@jit_inner
def _run(function: int, arg: int, ntasks: int, nthreads: int) -> int:
    """parallel_for; returns how many threads took part."""
    pool, team = at(Pool, symbol_address("rectilinear_pool")), at(Team, symbol_address("rectilinear_team"))
    nthreads = min(nthreads, team.at_most) if team.at_most > 0 else nthreads
    if min(ntasks, nthreads) < 2 or not _belongs_here(pool) or load(pool.sleeping.stop) != 0:
        return _run_alone(function, arg, ntasks)
    if not compare_exchange(pool.owner.busy, 0, 1):
        return _run_alone(function, arg, ntasks)
    start = team.start
    if start != 0:
        took_part = _run_in_team(pool, start, function, arg, ntasks, nthreads)
    else:
        took_part = _run_together(pool, function, arg, ntasks, nthreads)
    store(pool.owner.busy, 0)
    return took_part


@jit_inner
def _run_without_pool(function: int, arg: int, ntasks: int, nthreads: int) -> int:
    return _run_alone(function, arg, ntasks)


@jit_inner
def _at_hand() -> int:
    """helpers_at_hand."""
    pool = at(Pool, symbol_address("rectilinear_pool"))
    now = monotonic_ns()
    since = now - exchange(pool.owner.last_asked, now)
    return 1 if since < SPIN_NS or load(pool.owner.workers) > load(pool.sleeping.sleepers) else 0


@jit_inner
def _nobody_at_hand() -> int:
    return 0


@jit_inner
def _stop(patience_us: int) -> int:
    """End the workers for good; calls that come later run on one thread. Returns how many workers were seen to end.

    A job under way (of a daemon thread, when Python exits) is finished by those who are at it. It is waited for no longer
    than `patience_us`.
    """
    pool = at(Pool, symbol_address("rectilinear_pool"))
    if load(pool.owner.process) != _getpid():
        return 0
    _lock(pool.mutex)
    store(pool.sleeping.stop, 1)
    _cond_broadcast(pool.work_condition)
    _unlock(pool.mutex)
    waited = 0
    while not compare_exchange(pool.owner.busy, 0, 1):
        if waited >= patience_us:
            return 0
        _usleep(1000)
        waited += 1000
    workers = load(pool.owner.workers)
    for i in range(workers):
        _pthread_join(load(_handle(pool, i)), 0)
    store(pool.owner.workers, 0)
    return workers


@jit()
def _entry_points() -> tuple[int, int, int]:
    return c_address(_run), c_address(_at_hand), c_address(_stop)


@jit()
def _entry_points_without_pool() -> tuple[int, int]:
    return c_address(_run_without_pool), c_address(_nobody_at_hand)


parallel_for = types.ExternalFunction("rectilinear_parallel_for", types.intp(*(types.intp,) * 4))
"""parallel_for(function, arg, ntasks, nthreads) -> how many threads took part; for jitted code.

`function` is the `c_address` of a jitted ``task(index, arg, slot)``, or ``task(index, arg)``, that returns nothing and
raises nothing. `slot` is below `nthreads` and belongs to one thread for the length of the call: a place for scratch
memory, never for what the result depends on. May be called from any thread, also from a task.
"""


def task_of(cls: type, zero: Any, run: Callable[[Any, int, Any, int], None]) -> Any:
    """A task for `parallel_for`: ``run(zero, index, job, slot)`` on the record of class `cls` that is handed out."""

    @jit_inner
    def task(index: int, address: int, slot: int) -> None:
        run(zero, index, at(cls, address), slot)

    return task


@jit_inner
def parallel_for_without_gil(really: bool, function: int, arg: int, ntasks: int, nthreads: int) -> None:
    """`parallel_for`, while other Python threads may run, if `really`: jobs of a microsecond are done sooner than the GIL is let go of."""
    others = let_go_of_gil(really)
    parallel_for(function, arg, ntasks, nthreads)
    take_gil_back(others)


helpers_at_hand = types.ExternalFunction("rectilinear_helpers_at_hand", types.intp())
"""helpers_at_hand() -> 1 if a helper is awake, or will stay so since this is asked again and again within SPIN_NS; else 0.

For jobs that are shorter than waking a helper takes: in a row of such jobs only the first has to wake one.
"""


SMALL_BYTES = 3 << 20
"""Multiply-adds, each counted as the bytes of an element, that one thread finishes before a helper would have woken up: 16 us at the peak
of a Zen 3, 30 in a narrow layer. With a third more (100, 784, 10) in a row stayed alone, 31 us apart, and took 1.35 times as long."""

TINY_WORK = 1 << 17
"""Multiply-adds that one thread finishes before a helper that is awake would have done its part."""


LEAST_ROWS, COLUMNS_AT_ONCE, LEAST_FEATURES = 8, 4, 2
"""Reading w, or writing dw, takes as long for fewer rows, reading x for fewer columns, writing out for fewer features; and columns are
computed several at once. On two threads the forward of (1, 724, 512) and (1, 1024, 512) ran 1.8 to 2.1 times as fast (Zen 4), the backward
of (1, 784, 256) 1.5, (1, 1024, 1024) 1.7, (1, 256, 256) 1.0 to 1.6, the forward of (1000, 1000, 1) 1.8, but (300, 2, 100) 0.6 (Zen 3)."""


@jit_inner
def layer_work(groups: int, n: int, d: int, m: int) -> int:
    """As many multiply-adds as a product takes the time of."""
    columns = -(-m // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
    return groups * max(n, LEAST_ROWS) * columns * max(d, LEAST_FEATURES)


@jit_inner
def threads_for(zero: Any, work: int, threads: int) -> int:
    """How many of `threads` to use for so many multiply-adds."""
    small = work * size_of(zero) <= SMALL_BYTES
    if work <= TINY_WORK or (small and threads > 1 and helpers_at_hand() == 0):
        return 1
    return threads


def _start() -> Any:
    """Publish `parallel_for` under the name that compiled kernels look for; returns the pool's memory, to be kept."""
    if symbols.why_no_pool() is not None:
        run, at_hand = _entry_points_without_pool()
        llvm.add_symbol("rectilinear_parallel_for", run)
        llvm.add_symbol("rectilinear_helpers_at_hand", at_hand)
        return None
    memory = ctypes.create_string_buffer(bytes_of(Pool) + PAIR_BYTES)
    pool = -(-ctypes.addressof(memory) // PAIR_BYTES) * PAIR_BYTES
    llvm.add_symbol("rectilinear_pool", pool)
    llvm.add_symbol("rectilinear_team", ctypes.addressof(team))
    run, at_hand, stop = _entry_points()
    llvm.add_symbol("rectilinear_parallel_for", run)
    llvm.add_symbol("rectilinear_helpers_at_hand", at_hand)
    atexit.register(ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_ssize_t)(stop), _EXIT_PATIENCE_US)
    # The pool notices by its process id that it was forked; the hook is for a child that got its parent's id, as in
    # a new pid namespace.
    os.register_at_fork(after_in_child=lambda: ctypes.memset(pool + offsets_of(Pool)["owner.process.value"], 0, WORD_BYTES))
    return memory


# Once for the process, also under importlib.reload: compiled code points at it.
_memory = globals()["_memory"] if "_memory" in globals() else _start()
