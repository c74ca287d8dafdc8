"""What a forked child may still do with numba. Importing this file does not import numba.

A fork copies the memory of a process, and one of its threads. If another thread is just then loading numba or compiling with it, the
locks it holds stay taken in the child for ever, and what they guard may be half done, inside of LLVM too. Taking the locks around every
fork would be safe, and would hold up the host's forks for as long as a compilation takes. So a fork waits for the locks no longer than
`PATIENCE_S`, which loading a kernel from the disk takes. A child that was made without them has what is compiled and linked already,
which works, and compiles no more. Whoever needs more gets `CannotCompileError`, at once; the numba backend has NumPy do it
(`rectilinear.backends.numba_backend`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

PATIENCE_S = 0.1

WHY = "this process was forked while another thread was loading numba or compiling"

_log = logging.getLogger(__name__)

frozen = False
"""Whether this process can compile and load no more."""

_loading = threading.RLock()


class CannotCompileError(RuntimeError):
    """Raised by whatever would compile or load compiled code in a child that must not."""

    def __init__(self) -> None:
        super().__init__(f"{WHY}, so nothing can be compiled here; compile before the fork, for example by rectilinear.warmup()")


class _Refusal:
    """Stands for numba's compiler lock, which everything takes that compiles or loads."""

    def acquire(self, *_: Any, **__: Any) -> bool:
        raise CannotCompileError

    def release(self) -> None:
        """Nobody has acquired it."""


def loading() -> AbstractContextManager[object]:
    """The lock to hold while numba is imported or what compiled code needs is put in place: a child forked meanwhile does without."""
    return _loading


_held: dict[int, list[Any]] = {}
"""The locks that a thread has taken for the fork it is about to make; None for one it could not have."""


def _locks() -> list[Any]:
    """Ours, numba's and llvmlite's, in the order in which they are taken."""
    compiler = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    llvm = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_lock", None)
    return [lock for lock in (_loading, getattr(compiler, "_lock", None), getattr(llvm, "_lock", None)) if lock is not None]


def _before_fork() -> None:
    if not frozen:
        deadline = time.monotonic() + PATIENCE_S
        _held[threading.get_ident()] = [lock if lock.acquire(timeout=max(0.0, deadline - time.monotonic())) else None for lock in _locks()]


def _release() -> bool:
    """Let go of what was taken before the fork; returns whether that was all."""
    held = _held.pop(threading.get_ident(), [])
    for lock in reversed(held):
        if lock is not None:
            lock.release()
    return None not in held


def _after_fork_in_child() -> None:
    global frozen, _loading
    had_all = _release()
    _held.clear()  # of threads that were about to fork, too
    if had_all and not any(_being_imported(name) for name in ("numba", "llvmlite")):
        return
    frozen = True
    _loading = threading.RLock()
    compiler: Any = sys.modules.get("numba.core.compiler_lock")
    binding: Any = sys.modules.get("llvmlite.binding.ffi")
    if hasattr(compiler, "global_compiler_lock"):
        compiler.global_compiler_lock._lock = _Refusal()
    if hasattr(binding, "ObjectRef"):
        # The collector of garbage would go to LLVM, and may find it locked: let it lie.
        binding.ObjectRef.__del__ = lambda self: None
    _log.info("%s: what is not compiled yet is computed by NumPy", WHY)


def _being_imported(package: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(package), "__spec__", None), "_initializing", False))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_release, after_in_child=_after_fork_in_child)
