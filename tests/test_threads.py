"""The pool: each task once, equal bits, many callers, processes, signals, exit; and how the number of threads is chosen."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rectilinear import threads

from . import pool_demo
from .subprocesses import finish, run, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# The pool


@pytest.mark.parametrize("nthreads", [1, 2, 3, 7])
@pytest.mark.parametrize("ntasks", [0, 1, 2, 3, 1000])
def test_every_task_runs_once(ntasks: int, nthreads: int) -> None:
    for _ in range(20):
        counts = np.zeros(1001, np.intp)
        took_part = pool_demo.count_runs(counts, ntasks, nthreads)
        assert counts.tolist() == [1] * ntasks + [0] * (1001 - ntasks)
        assert 1 <= took_part <= max(1, min(nthreads, ntasks))


@pytest.mark.smoke
def test_bits_are_equal_for_every_number_of_threads() -> None:
    x = np.random.default_rng(0).standard_normal(200_123)
    one = pool_demo.slab_sums(x, 1)
    assert np.isfinite(one).all()
    for nthreads in (2, 3, 8):
        for _ in range(20):
            assert pool_demo.slab_sums(x, nthreads).tobytes() == one.tobytes()


def test_helpers_round_as_the_caller_does() -> None:
    run(
        """
        import ctypes
        import numpy as np
        from tests.pool_demo import busy, slab_sums
        x = np.random.default_rng(0).standard_normal(200_123)
        usual = slab_sums(x, 1)
        busy(0.001, 4, 3)
        ctypes.CDLL("libm.so.6" if __import__("sys").platform == "linux" else None).fesetround(0x800)  # FE_UPWARD on x86
        upward = slab_sums(x, 1)
        for _ in range(200):
            assert slab_sums(x, 3).tobytes() == upward.tobytes()
        assert upward.tobytes() != usual.tobytes(), "the rounding mode had no effect: nothing was tested"
        """
    )


@pytest.mark.alone
def test_work_is_shared_and_a_slot_is_in_one_hand() -> None:
    for _ in range(3):
        pool_demo.check_shared(3)
        time.sleep(0.05)  # for the workers to fall asleep


@pytest.mark.alone
def test_helpers_are_at_hand_while_they_look_for_work_or_are_soon_asked_for() -> None:
    run(
        """
        import time
        from tests.pool_demo import at_hand_after_work, busy, times_at_hand
        assert times_at_hand(1) == 0, "nobody has been hired"
        assert times_at_hand(100) > 50, "asked again at once"
        busy(0.001, 4, 2)
        time.sleep(0.05)
        assert times_at_hand(1) == 0, "asleep, and asked for the first time in a while"
        awake = 0
        for _ in range(20):
            time.sleep(0.01)
            awake += at_hand_after_work(0.002)
        assert awake > 0, "a worker looks for more when its job is done"
        """
    )


@pytest.mark.alone
def test_a_helper_that_comes_too_late_stays_for_the_next_job() -> None:
    run(
        """
        import time
        from tests.pool_demo import awake_after_too_short_a_job, busy
        busy(0.001, 4, 2)
        seen = 0
        for _ in range(20):
            time.sleep(0.01)
            seen += awake_after_too_short_a_job(0.005)
        assert seen > 10, f"seen awake after {seen} of 20 jobs"
        """
    )


@linux
def test_a_worker_leaves_the_callers_processor() -> None:
    run(
        """
        import os, threading
        from pathlib import Path
        from tests.pool_demo import busy, check
        allowed = os.sched_getaffinity(0)
        here = min(allowed)
        others = set(Path("/proc/self/task").iterdir())
        busy(0.001, 4, 2)
        (worker,) = (int(task.name) for task in set(Path("/proc/self/task").iterdir()) - others)
        def call_from_here():
            os.sched_setaffinity(0, {here})
            os.sched_setaffinity(worker, {here})
            for _ in range(50):
                busy(0.01, 4, 2)
                seen.append(os.sched_getaffinity(worker))
                if seen[-1] == (allowed - {here} or {here}):
                    break
            assert os.sched_getaffinity(0) == {here}
            check()
        seen = []
        caller = threading.Thread(target=call_from_here)
        caller.start()
        caller.join()
        assert seen[-1] == (allowed - {here} or {here}), seen
        """
    )


@linux
def test_one_processor_is_enough() -> None:
    run(
        """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from tests.pool_demo import busy, check
        busy(0.01, 4, 3)
        check(3)
        """
    )


def test_a_job_inside_a_job() -> None:
    counts = np.zeros(500, np.intp)
    pool_demo.count_nested(counts, 3)
    assert (counts == 1).all()


@pytest.mark.smoke
def test_many_python_threads_at_once() -> None:
    def work(seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal(20_000)
        want = pool_demo.slab_sums(x, 1).tobytes()
        for _ in range(300):
            assert pool_demo.slab_sums(x, 3).tobytes() == want

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(work, range(8)))


@linux
def test_no_leftovers() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    counts = np.zeros(8, np.intp)
    pool_demo.count_many_jobs(counts, 3, 1000)
    before, tasks = resident(), len(os.listdir("/proc/self/task"))
    pool_demo.count_many_jobs(counts, 3, 100_000)
    assert (counts == 101_000).all()
    assert resident() - before < 1 << 20
    assert len(os.listdir("/proc/self/task")) == tasks


@linux
def test_nothing_spins_when_idle() -> None:
    pool_demo.busy(0.001, 8, 4)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.02


@linux
def test_workers_block_signals() -> None:
    out = run(
        """
        import signal, time
        from pathlib import Path
        from tests.pool_demo import busy
        own = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        others = set(Path("/proc/self/task").iterdir())
        busy(0.001, 8, 4)
        assert signal.pthread_sigmask(signal.SIG_SETMASK, own) == {signal.SIGUSR2}, "the caller's mask has changed"
        workers = set(Path("/proc/self/task").iterdir()) - others
        for worker in workers:
            for _ in range(500):
                status = dict(line.split(":", 1) for line in (worker / "status").read_text().splitlines())
                mask = status["SigBlk"].strip()
                if not int(mask, 16) >> (signal.SIGSEGV - 1) & 1:
                    break
                time.sleep(0.01)  # while a thread starts, libc has all signals blocked
            print(mask)
        """
    )
    masks = [int(word, 16) for word in out.split()]
    assert len(masks) == 3
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    for mask in masks:
        blocked = {s for s in signal.valid_signals() if mask >> (s - 1) & 1}
        assert blocked >= {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1, signal.SIGPROF}
        assert not blocked & faults


def test_an_interrupt_in_a_long_call_leaves_the_pool_usable() -> None:
    process = start(
        """
        import signal
        from tests.pool_demo import busy, check, check_shared
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it, and its children too
        check()
        print("ready", flush=True)
        try:
            while True:
                busy(0.2, 4, 2)
        except KeyboardInterrupt:
            print("interrupted")
        check_shared()
        check()
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in finish(process)


# Processes

FORK = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads; surviving it is the point
from tests.pool_demo import busy, check, check_shared

def fork_and_wait(fork=os.fork):
    child = fork()
    if child == 0:
        try:
            check()
            check_shared()  # a pool of its own
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check()
"""


@pytest.mark.smoke
def test_fork_after_use() -> None:
    run(FORK + "check()\nfor _ in range(5): fork_and_wait()")


def test_fork_before_use() -> None:
    run(FORK + "fork_and_wait()")


def test_fork_from_another_thread_while_the_pool_is_busy() -> None:
    run(
        FORK
        + """
check()
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        busy(0.003, 10, 3)
hold = [threading.Thread(target=keep_busy) for _ in range(2)]
for thread in hold: thread.start()
def fork_often():
    for _ in range(10): fork_and_wait()
forker = threading.Thread(target=fork_often)
forker.start(); forker.join()
fork_and_wait()
stop.set()
for thread in hold: thread.join()
"""
    )


@linux
def test_fork_that_python_does_not_see() -> None:
    run(FORK + "import ctypes\ncheck()\nfork_and_wait(ctypes.PyDLL(None).fork)")


def test_grandchildren() -> None:
    run(
        FORK
        + """
check()
child = os.fork()
if child == 0:
    check(3)
    fork_and_wait()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    )


# Whole calls in spawned processes are a promise of every backend (rectilinear.testing).
@pytest.mark.parametrize("method", ["fork", *(pytest.param(method, marks=pytest.mark.nightly) for method in ("spawn", "forkserver"))])
def test_process_pools(method: str) -> None:
    run(
        f"""
        import multiprocessing, warnings
        from concurrent.futures import ProcessPoolExecutor
        warnings.simplefilter("ignore", DeprecationWarning)
        from tests.pool_demo import check, check_in_pool
        check()
        context = multiprocessing.get_context({method!r})
        with context.Pool(2) as pool:
            assert pool.map(check_in_pool, [1, 2, 3]) == [1, 2, 3]
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            assert list(executor.map(check_in_pool, [1, 2, 3])) == [1, 2, 3]
        check()
        """
    )


def test_exit_when_idle() -> None:
    run("from tests.pool_demo import check\ncheck(3)")
    run("from tests.pool_demo import busy\nbusy(0.001, 8, 4)")


@pytest.mark.parametrize("job", ["busy(0.002, 50, 3)", "busy(0.2, 3000, 3)"])
def test_exit_while_daemon_threads_are_inside(job: str) -> None:
    """Of many short jobs, or of one that outlasts the patience of exit."""
    run(
        f"""
        import threading, time
        from tests.pool_demo import busy, check
        check()
        def for_ever():
            while True:
                {job}
        for _ in range(2):
            threading.Thread(target=for_ever, daemon=True).start()
        time.sleep(0.1)
        """,
        limit_s=60,
    )


def test_calls_while_python_exits() -> None:
    """A handler that was registered before the pool's own runs after it, on one thread."""
    out = run(
        """
        import atexit
        @atexit.register
        def late():
            check(3)
            print("late and right")
        from tests.pool_demo import check
        check(3)
        """
    )
    assert out == "late and right\n"


@linux
def test_no_room_for_more_threads() -> None:
    run(
        """
        import resource
        from pathlib import Path
        from tests.pool_demo import busy, check, check_shared
        check(1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 26, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 22), resource.RLIM_INFINITY))
        done, _ = busy(0.01, 8, 4)
        assert done == [8, 0, 0, 0], done
        check(4)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        check_shared()
        """
    )


@pytest.mark.smoke
def test_without_pthreads() -> None:
    run(
        """
        import llvmlite.binding as llvm
        look_up = llvm.address_of_symbol
        llvm.address_of_symbol = lambda name: None if name == "pthread_create" else look_up(name)
        from tests.pool_demo import busy, check
        check(3)
        assert busy(0.01, 4, 2)[0] == [4, 0]
        """
    )


# Threads of somebody else's


WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
START = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)


class Team:
    """Starts Python's threads as ``GOMP_parallel`` starts OpenMP's: as many as are asked for, the caller among them, or `at_most`."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.at_most = 1000
        self.around: list[tuple[int, int]] = []
        libm = ctypes.CDLL("libm.so.6" if sys.platform == "linux" else None)
        self.get_round, self.set_round = libm.fegetround, libm.fesetround
        self.start = START(self._start)
        self.numbers = range(1, 1000)
        """Of its threads but the caller, whose number is 0."""
        self.own = threading.local()
        self.number = NUMBER(lambda: getattr(self.own, "number", 0))

    def _start(self, function: int, data: int, nthreads: int, flags: int) -> None:
        def help_out(number: int) -> None:
            self.own.number = number
            self.set_round(0)  # FE_TONEAREST everywhere; a thread begins as the one that starts it
            before = self.get_round()
            WORK(function)(data)
            self.around.append((before, self.get_round()))

        self.asked.append(nthreads)
        helpers = [threading.Thread(target=help_out, args=[number]) for number in self.numbers[: min(nthreads, self.at_most) - 1]]
        for helper in helpers:
            helper.start()
        WORK(function)(data)
        for helper in helpers:
            helper.join()


@pytest.fixture
def team() -> Iterator[Team]:
    given, number = Team(), threads.team.number
    threads.team.start, threads.team.number = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (given.start, given.number))
    yield given
    threads.team.start = threads.team.at_most = 0
    threads.team.number = number


@pytest.mark.parametrize("at_most", [1, 2, 1000])
def test_a_team_runs_every_task_once(team: Team, at_most: int) -> None:
    team.at_most = at_most
    for ntasks, nthreads in ((2, 2), (3, 7), (1000, 3)):
        counts = np.zeros(1001, np.intp)
        assert pool_demo.count_runs(counts, ntasks, nthreads) == min(nthreads, ntasks, at_most)
        assert counts.tolist() == [1] * ntasks + [0] * (1001 - ntasks)
    assert team.asked == [2, 3, 3]
    assert pool_demo.count_runs(np.zeros(1001, np.intp), 5, 1) == 1
    assert len(team.asked) == 3, "nobody is needed for one thread"


def test_the_place_of_a_teams_thread_is_its_number(team: Team) -> None:
    """So that it comes to the same tasks again in job after job."""
    team.numbers = range(3, 8, 2)
    done, in_two_hands = pool_demo.busy(0.01, 16, 8)
    assert in_two_hands == 0
    assert sum(done) == 16
    assert [slot for slot, count in enumerate(done) if count > 0] == [0, 3, 5, 7]


def test_no_more_threads_than_somebody_else_allows(team: Team) -> None:
    for whose in (threads.team.start, 0):
        threads.team.start = whose
        for at_most in (1, 2):
            threads.team.at_most = at_most
            assert 1 <= pool_demo.count_runs(np.zeros(1001, np.intp), 1000, 3) <= at_most
    assert team.asked == [2]


def test_workers_of_our_own_stay_out_of_a_teams_job(team: Team) -> None:
    theirs = threads.team.start
    x = np.random.default_rng(0).standard_normal(200_123)
    one = pool_demo.slab_sums(x, 1)
    for _ in range(100):
        threads.team.start = 0
        assert pool_demo.slab_sums(x, 3).tobytes() == one.tobytes()  # its workers look for more for a while
        threads.team.start = theirs
        counts = np.zeros(1001, np.intp)
        assert pool_demo.count_runs(counts, 1000, 3) == 3
        assert counts[:1000].tolist() == [1] * 1000
        assert pool_demo.slab_sums(x, 3).tobytes() == one.tobytes()
    assert len(team.asked) == 200


def test_a_team_rounds_as_the_caller_does_and_then_as_before(team: Team) -> None:
    x = np.random.default_rng(0).standard_normal(200_123)
    usual = pool_demo.slab_sums(x, 1)
    upward = 0x800 if team.set_round(0x800) == 0 else 0x400000  # FE_UPWARD on x86, on ARM
    try:
        team.set_round(upward)
        one = pool_demo.slab_sums(x, 1)
        assert one.tobytes() != usual.tobytes(), "the rounding mode had no effect: nothing was tested"
        threads_ = [pool_demo.slab_sums(x, 3).tobytes() for _ in range(20)]
    finally:
        team.set_round(0)
    assert threads_ == [one.tobytes()] * 20
    assert team.around == [(0, 0)] * 40


# The number of threads


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (threads.VARIABLE, *threads.LIMITS):
        monkeypatch.delenv(name, raising=False)
    threads.set_num_threads(None)
    yield
    threads.set_num_threads(None)


def test_the_default_is_the_cores_this_process_may_use() -> None:
    assert threads.get_num_threads() == threads.available_cores()
    if hasattr(os, "sched_setaffinity"):
        run(
            """
            import os
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            from rectilinear.threads import get_num_threads
            assert get_num_threads() == 1
            """
        )


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "900000 100000"}, 1),
        ("0::/not/here", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("3:cpu,cpuacct:/x\n1:name=systemd:/", {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], cores: int | None) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    quotas = threads._cgroup_quotas
    monkeypatch.setattr(threads, "_cgroup_quotas", lambda: quotas(tmp_path, tmp_path / "membership"))
    assert threads._cgroup_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say which processors a process may use")
@pytest.mark.parametrize(
    ("active", "siblings", "allowed", "apart"),
    [
        ("1", {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}, {0, 1, 4, 5}, [0, 1]),
        ("1", {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {1, 2, 3}, [1, 2]),
        ("1", {0: "0-1", 1: "0-1", 2: "2", 3: "3"}, {0, 1, 2, 3}, [0, 2, 3]),  # cores of two kinds
        ("1", {0: "0-1"}, {0, 1}, [0, 1]),  # one that came later, of which nothing is known
        ("0", {0: "0", 1: "1"}, {0, 1}, [0, 1]),
        (None, {}, {3, 5}, [3, 5]),
    ],
)
@pytest.mark.parametrize("file", ["core_cpus_list", "thread_siblings_list"])
def test_hardware_threads_of_one_core_count_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    active: str | None,
    siblings: dict[int, str],
    allowed: set[int],
    apart: list[int],
) -> None:
    (tmp_path / "smt").mkdir()
    if active is not None:
        (tmp_path / "smt/active").write_text(f"{active}\n")
    for cpu, text in siblings.items():
        topology = tmp_path / f"cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / file).write_text(f"{text}\n")
    core_of = threads._core_of(tmp_path)
    monkeypatch.setattr(threads, "_core_of", lambda: core_of)
    monkeypatch.setattr(threads, "_cgroup_cores", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed)
    assert threads.processors_apart() == apart
    assert threads.available_cores() == len(apart)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, " 5 ")
    assert threads.get_num_threads() == 5
    monkeypatch.setenv(threads.VARIABLE, "6")
    assert threads.get_num_threads() == 5  # read once
    threads.set_num_threads(None)
    assert threads.get_num_threads() == 6
    monkeypatch.setenv(threads.VARIABLE, "")
    threads.set_num_threads(None)
    assert threads.get_num_threads() == threads.available_cores()


@pytest.mark.parametrize("text", ["0", "-1", "two", "2.0", "1025", "1e1", "٣x"])
def test_a_bad_variable_raises_only_where_it_decides(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(threads.VARIABLE, text)
    with pytest.raises(ValueError, match=r"RECTILINEAR_NUM_THREADS: the number of threads must be from 1 to 1024, not '.*'; unset it"):
        threads.get_num_threads()
    with threads.num_threads(2):
        assert threads.get_num_threads() == 2
    threads.set_num_threads(3)
    assert threads.get_num_threads() == 3


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_out_of_range(n: int) -> None:
    with pytest.raises(ValueError, match=f"set_num_threads: the number of threads must be from 1 to 1024, not {n}"):
        threads.set_num_threads(n)
    with pytest.raises(ValueError, match=f"num_threads: the number of threads must be from 1 to 1024, not {n}"):
        threads.num_threads(n)


@pytest.mark.parametrize("n", [2.0, "2", True])
def test_not_a_whole_number(n: object) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        threads.set_num_threads(n)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an int"):
        threads.num_threads(n)  # type: ignore[arg-type]


def test_a_context_is_seen_by_its_own_thread_and_tasks_only() -> None:
    def in_new_thread() -> int:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(threads.get_num_threads()))
        thread.start()
        thread.join()
        return seen[0]

    async def in_task() -> int:
        return await asyncio.to_thread(threads.get_num_threads)

    threads.set_num_threads(4)
    assert in_new_thread() == 4
    with threads.num_threads(np.int64(2)):
        assert threads.get_num_threads() == 2
        assert asyncio.run(in_task()) == 2
        assert in_new_thread() == 4
        with threads.num_threads(3):
            assert threads.get_num_threads() == 3
        assert threads.get_num_threads() == 2
        threads.set_num_threads(5)
        assert threads.get_num_threads() == 2
    assert threads.get_num_threads() == 5


def test_a_context_ends_with_an_error_too() -> None:
    def fail() -> None:
        with threads.num_threads(2):
            raise RuntimeError

    threads.set_num_threads(4)
    with pytest.raises(RuntimeError):
        fail()
    assert threads.get_num_threads() == 4
