"""How many threads the library's own kernels may use, and where that number comes from.

Strongest first: the context (`num_threads`), the process (`set_num_threads`), the variable ``RECTILINEAR_NUM_THREADS``,
the cores that this process may use. The results do not depend on it: their bits are the same for every number of threads.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import SupportsIndex

VARIABLE = "RECTILINEAR_NUM_THREADS"

MAX_THREADS = 1024
"""The largest number that may be asked for; the pool keeps room for the handles of so many."""

_context: ContextVar[int | None] = ContextVar("rectilinear_num_threads", default=None)
_process: int | None = None


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
    global _process
    chosen = _context.get()
    if chosen is not None:
        return chosen
    if _process is None:
        _process = _from_variable() or available_cores()
    return _process


def set_num_threads(n: SupportsIndex | None) -> None:
    """Choose the number of threads for the whole process, threads started later included.

    Parameters
    ----------
    n : int or None
        From 1 to 1024; more than there are cores is allowed. None drops the choice: ``RECTILINEAR_NUM_THREADS`` is read
        anew, or else the cores that this process may use are counted anew.

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
    global _process
    _process = None if n is None else _checked("set_num_threads", n)


def num_threads(n: SupportsIndex) -> AbstractContextManager[None]:
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
    return _chosen_in_context(_checked("num_threads", n))


@contextmanager
def _chosen_in_context(n: int) -> Iterator[None]:
    token = _context.set(n)
    try:
        yield
    finally:
        _context.reset(token)


def available_cores() -> int:
    """The cores that this process may use: its affinity mask, cut to its control group's share of processor time."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, _cgroup_cores() or allowed, MAX_THREADS))


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


def _from_variable() -> int | None:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if text.isdecimal() and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    raise ValueError(
        f"{VARIABLE} is {text!r}, but it must be a whole number from 1 to {MAX_THREADS}; "
        f"unset it to use the {available_cores()} cores that this process may use"
    )


def _checked(function: str, n: SupportsIndex) -> int:
    try:
        if isinstance(n, bool):
            raise TypeError
        number = operator.index(n)
    except TypeError:
        raise TypeError(f"{function}: the number of threads must be an int, not {n!r} ({type(n).__name__})") from None
    if not 1 <= number <= MAX_THREADS:
        raise ValueError(f"{function}: the number of threads must be from 1 to {MAX_THREADS}, not {number}")
    return number
