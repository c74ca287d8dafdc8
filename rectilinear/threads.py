"""How many threads the library's own kernels may use, and where that number comes from.

Strongest first: the context (`num_threads`), the process (`set_num_threads`), the variable ``RECTILINEAR_NUM_THREADS``,
the cores that this process may use, of which the variables in `LIMITS` are upper limits. A core with two hardware threads counts once:
they share its multiply-add units. The results do not depend on it: their bits are the same for every number of threads.
"""

from __future__ import annotations

import ctypes
import operator
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from time import monotonic
from typing import SupportsIndex

from rectilinear.choice import Block, Choice

VARIABLE = "RECTILINEAR_NUM_THREADS"

LIMITS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
"""What the starters of many processes (joblib, loky, MPI) set in each, so that n of them do not run n times the threads."""

MAX_THREADS = 1024
"""The largest number that may be asked for; the pool keeps room for the handles of so many."""

RECOUNT_S = 1e-3
"""How old the count of the cores may be that a call goes by. Counting takes 0.6 us, a look at the clock 0.04."""

QUOTA_S = 1.0
"""The same for the control groups' share of processor time, which takes 0.2 ms to read."""


def get_num_threads() -> int:
    """The number of threads that a call made here and now may use.

    Returns
    -------
    int
        At least 1. Small problems run on fewer, and so does a call that finds the threads taken by another.

    Raises
    ------
    ValueError
        If ``RECTILINEAR_NUM_THREADS`` has to decide and is not a whole number from 1 to 1024.

    Examples
    --------
    >>> import rectilinear
    >>> with rectilinear.num_threads(2):
    ...     rectilinear.get_num_threads()
    2
    """
    return _choice.current() or _cores.count()


def call_threads() -> int:
    """`get_num_threads` for calls, which happen often: a count of the cores that is a millisecond old will do."""
    n = _choice.settled
    if n is None or _choice.ever_open:
        n = _choice.current()
    if n:
        return n
    return _cores.counted if monotonic() < _cores.too_old else _cores.count()


def chosen_threads() -> int:
    """The number that somebody has chosen for calls made here and now, 0 if nobody has."""
    return _choice.current()


def set_num_threads(n: SupportsIndex | None) -> None:
    """Choose the number of threads for the whole process, threads started later included.

    Parameters
    ----------
    n : int or None
        From 1 to 1024; more than there are cores is allowed. None drops the choice: the variables are read anew, and unless
        ``RECTILINEAR_NUM_THREADS`` says how many, the number is that of the cores which this process may use, as it changes.

    Raises
    ------
    TypeError, ValueError
        If `n` is not a whole number, or outside of that range.

    Examples
    --------
    >>> import rectilinear
    >>> rectilinear.set_num_threads(1)
    >>> rectilinear.get_num_threads()
    1
    >>> rectilinear.set_num_threads(None)
    """
    _choice.choose(None if n is None else _checked("set_num_threads", n))


class num_threads(Block[int]):
    """Choose the number of threads within a ``with`` block, for the running thread or task only.

    Tasks started inside inherit it, as ``asyncio.to_thread`` does; new threads start from the process's choice.

    Parameters
    ----------
    n : int
        From 1 to 1024.

    Raises
    ------
    TypeError, ValueError
        At once, if `n` is not a whole number, or outside of that range.

    Examples
    --------
    >>> import rectilinear
    >>> with rectilinear.num_threads(1):
    ...     rectilinear.get_num_threads()
    1
    """

    def __init__(self, n: SupportsIndex) -> None:
        super().__init__(_choice, _checked("num_threads", n))


def available_cores() -> int:
    """The cores that this process may use: those of its main thread's affinity mask, cut to its control group's share of processor time."""
    return max(1, min(_allowed_cores(), _cgroup_cores() or MAX_THREADS, MAX_THREADS))


def processors_apart() -> list[int]:
    """Of the processors that this process may use, the first of each core; none where the system does not say."""
    last_first = sorted(_allowed_processors(), reverse=True)
    return sorted({_core_of().get(cpu, cpu): cpu for cpu in last_first}.values())


def _allowed_cores() -> int:
    processors = _allowed_processors()
    return len(set(map(_core_of().get, processors, processors))) or os.cpu_count() or 1


def _allowed_processors() -> set[int]:
    try:
        return os.sched_getaffinity(os.getpid())  # not 0, the calling thread, which may have been pinned for reasons of its own
    except (AttributeError, OSError):  # not Linux
        return set()


@cache
def _core_of(root: Path = Path("/sys/devices/system/cpu")) -> dict[int, int]:
    """Of each processor, the first one on the same core; empty where every core has one, and where the system does not say.

    Two threads of a core share its multiply-add units and its caches, and one thread's tiles keep the units busy for 85 to 95 % of the time
    (Zen 4). So a second one can gain little, as PyTorch and MKL have it, too. Not measured: no host so far had such cores.
    """
    if _read(root / "smt/active").strip() == "0":
        return {}
    found = {}
    for folder in root.glob("cpu[0-9]*"):
        siblings = _read(folder / "topology/core_cpus_list") or _read(folder / "topology/thread_siblings_list")
        first = re.match(r"\d+", siblings)
        if first:
            found[int(folder.name[3:])] = int(first[0])
    return found if any(cpu != first for cpu, first in found.items()) else {}


def _cgroup_cores() -> int | None:
    """Processor time that the control groups allow, in cores rounded up; None where they set no limit."""
    limits = [quota / period for quota, period in _cgroup_quotas() if quota > 0 and period > 0]
    return -int(-min(limits) // 1) if limits else None


def _cgroup_quotas(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """(quota, period) of this process's control group and of every group around it, version 2 and version 1."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, files = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            base, files = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container the path is often the host's, while the group itself is mounted at the base.
        group = base / path.lstrip("/")
        for folder in {base, group, *(parent for parent in group.parents if parent.is_relative_to(base))}:
            words = " ".join(_read(folder / file) for file in files).split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():  # "max" and -1 stand for no limit
                yield int(words[0]), int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class _Cores:
    """The number of threads where nobody has chosen one. The host may change its mind about it at any time."""

    def __init__(self) -> None:
        self.counted = 1
        self.too_old = 0.0  # from this moment on, by `monotonic`
        self._limit = MAX_THREADS
        self._limit_too_old = 0.0
        self._by_others = MAX_THREADS

    def read_limits(self) -> None:
        """What others' variables say; the control groups anew at the next count."""
        self._by_others = min([MAX_THREADS, *filter(None, map(_first_number, LIMITS))])
        self._limit_too_old = 0.0

    def count(self) -> int:
        now = monotonic()
        if now >= self._limit_too_old:
            self._limit = min(self._by_others, _cgroup_cores() or MAX_THREADS)
            self._limit_too_old = now + QUOTA_S
        self.counted = max(1, min(_allowed_cores(), self._limit))
        self.too_old = now + RECOUNT_S
        return self.counted


_BY_CORES = 0
"""What the choice says where nobody has chosen."""


def _by_variable() -> int:
    text = os.environ.get(VARIABLE, "").strip()
    if text:
        if text.isdecimal() and 1 <= int(text) <= MAX_THREADS:
            return int(text)
        raise ValueError(f"{_out_of_range(VARIABLE, repr(text))}; unset it for as many as this process may use: {available_cores()}")
    _cores.read_limits()
    _cores.count()
    return _BY_CORES


def _first_number(variable: str) -> int:
    """The first number of ``4,2`` (which is by nesting depth); 0 where there is none: others' variables are not ours to find fault with."""
    first = os.environ.get(variable, "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _checked(function: str, n: SupportsIndex) -> int:
    try:
        if isinstance(n, bool):
            raise TypeError
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{function}: the number of threads must be an int, not {n!r} ({type(n).__name__})") from None
    if not 1 <= number <= MAX_THREADS:
        raise ValueError(_out_of_range(function, number))
    return number


def _out_of_range(asker: str, met: object) -> str:
    return f"{asker}: the number of threads must be from 1 to {MAX_THREADS}, not {met}"


class _Team(ctypes.Structure):
    """`start` is the address of a function that starts a team of threads as OpenMP's ``GOMP_parallel`` does; 0: the kernels' own pool.
    `number` is that of one that says which of its team the calling thread is, as ``omp_get_thread_num``. `at_most` is how many threads may
    take part, or 0: as many as a call may use."""

    _fields_ = (("start", ctypes.c_ssize_t), ("number", ctypes.c_ssize_t), ("at_most", ctypes.c_ssize_t))


# importlib.reload, and IPython's autoreload, keep what was chosen.
team: _Team = globals().get("team") or _Team()
"""Whose threads the kernels run on. Who sets it sets it back; a call of another thread meanwhile may use such a team as well, and computes
the same."""
_cores: _Cores = globals().get("_cores") or _Cores()
_choice: Choice[int] = globals().get("_choice") or Choice("num_threads", _by_variable)
