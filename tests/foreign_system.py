"""A pytest plug-in (``-p tests.foreign_system``) that hides from the process what Windows and macOS have not got. To be loaded first."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import time
from typing import Any

import llvmlite.binding as llvm

ABSENT = {
    os: ("fork", "forkpty", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sched_getcpu", "geteuid"),
    signal: ("SIG_SETMASK", "SIGBUS", "SIGALRM", "pthread_sigmask", "pthread_kill", "valid_signals"),
    time: ("CLOCK_MONOTONIC", "clock_gettime"),
}
for module, names in ABSENT.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[name] = None  # type: ignore[assignment]

_address_of_symbol, _open = llvm.address_of_symbol, pathlib.Path.open


def _address(name: str) -> Any:
    return None if name.startswith(("pthread_", "sched_", "clock_", "sig", "fork", "usleep")) else _address_of_symbol(name)


def _read_text(self: pathlib.Path, *args: Any, **options: Any) -> str:
    if str(self).startswith(("/sys/", "/proc/")):
        raise FileNotFoundError(str(self))
    with self.open(*args, **options) as file:
        return str(file.read())


llvm.address_of_symbol = _address
pathlib.Path.read_text = _read_text  # type: ignore[method-assign]
