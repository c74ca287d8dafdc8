"""The C functions that the kernels' runtime calls, and whether this process has them. See `threads` and `allocator`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

POOL = {
    "pthread_create": 4,
    "pthread_join": 2,
    "pthread_sigmask": 3,
    "pthread_mutex_init": 2,
    "pthread_mutex_lock": 1,
    "pthread_mutex_unlock": 1,
    "pthread_cond_init": 2,
    "pthread_cond_wait": 2,
    "pthread_cond_signal": 1,
    "pthread_cond_broadcast": 1,
    "sigfillset": 1,
    "sigdelset": 2,
    "fegetenv": 1,
    "fesetenv": 1,
    "getpid": 0,
    "usleep": 1,
}
"""What the pool cannot do without, and the number of arguments."""

AFFINITY = {"sched_getcpu": 0, "sched_getaffinity": 3, "sched_setaffinity": 3}
"""Linux: what tells and changes where threads run."""

CLOCK = "clock_gettime"


def missing(names: Iterable[str]) -> list[str]:
    """Those of `names` that this process has no function of."""
    cpu_target.target_context.codegen()  # symbols can be looked up only once there is an engine
    return [name for name in names if not llvm.address_of_symbol(name)]


def why_no_pool() -> str | None:
    """What the pool lacks here, so that kernels run on the caller's thread alone; None if nothing."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return "pointers are not of 64 bits"
    if not hasattr(os, "register_at_fork"):
        return "there is no os.register_at_fork"
    lacking = missing([CLOCK, *POOL])
    return f"the system's libraries have no {', '.join(lacking)}" if lacking else None
