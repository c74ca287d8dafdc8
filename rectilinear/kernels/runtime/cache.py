"""Compiled kernels on disk: `jit` is numba's ``njit`` with a cache of our own. docs/threads.md says why.

One file per function, signature and `fingerprint`, written beside its place and moved there whole, so that any number of
processes may read and write at once. An entry is used only if it belongs to this user and its checksum holds. Whatever goes
wrong (no home, nothing writable, a full disk, a damaged entry) costs time, never a result: the kernel is compiled. Whoever writes an
entry removes what has not been used for long.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import pickle
import re
import shlex
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import serialize
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.extending import register_jitable

from rectilinear.kernels.runtime import forks  # noqa: F401  # looks after forks from here on
from rectilinear.kernels.runtime.compiler import OPTIONS, InnerCompiler, OuterCompiler, forget_literals
from rectilinear.kernels.runtime.fingerprint import digest, environment, fingerprint
from rectilinear.kernels.runtime.numba_private import number_functions_apart

VARIABLE = "RECTILINEAR_CACHE_DIR"

KEPT_DAYS = 90
"""An entry that no process has loaded for so long is removed."""

KEPT_BYTES = 128 << 20
"""Beyond this, those go that have been unused the longest. All kernels for one machine and version take 4 MB."""

_DAY_S = 86_400.0

_MAGIC = b"rectilinear kernel 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size

_INNER = OPTIONS | {"no_cpython_wrapper": True, "pipeline_class": InnerCompiler}

_log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def jit(**options: Any) -> Callable[[_Function], _Function]:
    """Compile the decorated function on first use, or take it from the disk.

    Options are those of ``numba.njit``; kernels let go of the GIL unless told otherwise.
    Functions that only other jitted functions call need no entry of their own: `jit_inner`.
    """
    options = OPTIONS | {"nogil": True, "pipeline_class": OuterCompiler} | options

    def decorate(function: _Function) -> _Function:
        dispatcher: Any = numba.njit(**options)(function)
        if not numba.config.DISABLE_JIT:
            dispatcher._cache = DiskCache(dispatcher)
        jitted: _Function = dispatcher
        return jitted

    return decorate


def jit_inner(function: _Function) -> _Function:
    """Compile the decorated function into the jitted functions that call it."""
    dispatcher: Any = numba.njit(**_INNER)(function)
    if not numba.config.DISABLE_JIT:
        forget_literals(dispatcher)
    inner: _Function = dispatcher
    return inner


def jit_too(function: _Function) -> _Function:
    """Leave the decorated function one of plain Python that jitted functions can call, too."""
    callable_by_both: _Function = register_jitable(**_INNER)(function)
    return callable_by_both


class DiskCache(NullCache):  # type: ignore[misc]  # numba is untyped here
    """The cache of one jitted function, called by its dispatcher. It is never flushed: a changed function does not find its old entries."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            content = read(*self._place(sig, target_context.codegen()))
            return CompileResult._rebuild(target_context, *pickle.loads(content))
        except FileNotFoundError:
            pass
        except _UnsafeError as refusal:
            _log.debug("cannot load %s: %s", self._dispatcher.__qualname__, refusal)
            _tell(str(refusal))
        except Exception:
            _log.debug("cannot load %s", self._dispatcher.__qualname__, exc_info=True)
        announce()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            if data.lifted or data.library.has_dynamic_globals:
                raise ValueError("the code holds addresses of this process")
            write(*self._place(sig, data.codegen), serialize.dumps(data._reduce()))
        except Exception:
            _log.debug("cannot save %s", self._dispatcher.__qualname__, exc_info=True)

    def _place(self, sig: Any, codegen: Any) -> tuple[Path, bytes]:
        """The file of an overload, and the key that it must carry."""
        key = digest((environment(codegen), fingerprint(self._dispatcher), repr(sig)))
        name = re.sub(r"\W+", "_", self._dispatcher.__qualname__)[-60:]
        return directory() / f"{name}-{key[:32]}.kernel", bytes.fromhex(key)


def directory() -> Path:
    """Where entries are kept. FileNotFoundError where the system names no home for this user, or one that is no absolute path."""
    chosen = os.environ.get(VARIABLE, "").strip()
    try:
        base = _resolved(chosen) if chosen else _user_cache() / "rectilinear"
    except RuntimeError:
        base = Path()
    if not base.is_absolute():
        raise FileNotFoundError(f"there is no home directory to keep compiled kernels in; set {VARIABLE} to an absolute path")
    return base / "kernels"


@functools.cache
def _resolved(chosen: str) -> Path:
    """A chosen directory, from the working directory at first use: os.chdir does not make a second cache."""
    return Path(chosen).expanduser().absolute()


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return chosen if chosen.is_absolute() else Path.home() / ".cache"  # as XDG has it


def read(path: Path, key: bytes) -> bytes:
    """The content of an entry. OSError or ValueError unless all is in order."""
    _refuse_foreign(os.stat(path.parent), path.parent)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _refuse_foreign(status, path)
        data = file.read()
    if time.time() - status.st_mtime > _DAY_S:
        with contextlib.suppress(OSError):
            os.utime(path)  # for `_prune`: it is in use
    magic, key_met, checksum, content = _split(data)
    if magic != _MAGIC or key_met != key or checksum != hashlib.sha256(content).digest():
        raise ValueError(f"{path} is damaged")
    return content


def _split(data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    a, b, c = itertools.accumulate((len(_MAGIC), _DIGEST_BYTES, _DIGEST_BYTES))
    return data[:a], data[a:b], data[b:c], data[c:]


class _UnsafeError(PermissionError):
    """Loading runs what an entry says, so nobody else may have been able to write it."""


def _refuse_foreign(status: os.stat_result, path: Path) -> None:
    if not hasattr(os, "geteuid"):  # Windows
        return
    if status.st_uid != os.geteuid():
        trouble = f"{path} belongs to another user; set {VARIABLE} to a directory of your own"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        trouble = f"{path} can be written by other users; if no one has: chmod go-w {shlex.quote(str(path))}"
    else:
        return
    raise _UnsafeError(f"kernels compile at every start, since {trouble}")


def write(path: Path, key: bytes, content: bytes) -> None:
    """Write an entry beside its place and move it there whole. OSError where that cannot be."""
    _make(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix="new-")
    try:
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + key + hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):
        _prune(path.parent)


def _make(folder: Path) -> None:
    """Make a directory and its parents for this user alone, whatever the umask; those that are there stay as they are."""
    if not folder.is_dir():
        _make(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)


def _prune(folder: Path) -> None:
    """Remove what nobody has used for long. Another process may be reading it: what it has opened stays readable."""
    now, total = time.time(), 0
    found = sorted(((entry.stat(follow_symlinks=False), entry) for entry in os.scandir(folder)), key=lambda pair: -pair[0].st_mtime)
    for status, entry in found:
        unused = now - status.st_mtime
        if entry.name.endswith(".kernel"):
            total += status.st_size
            too_many = total > KEPT_BYTES and unused > 0
            remove = too_many or unused > KEPT_DAYS * _DAY_S
        else:
            remove = entry.name.startswith("new-") and unused > _DAY_S  # left by a process that was killed
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


_announced = False
_told: set[str] = set()


def announce(*, spoken: bool = True) -> None:
    """Tell a user who waits at a terminal, once, what for. ``spoken=False``: somebody else tells."""
    global _announced
    if not _announced and spoken:
        _tell("compiling kernels for this machine; rectilinear.warmup() compiles all of them at once")
    _announced = True


def _tell(what: str) -> None:
    """Say something to a user at a terminal, once for the process."""
    if what not in _told and sys.stderr is not None and sys.stderr.isatty():
        print(f"rectilinear: {what}", file=sys.stderr)
    _told.add(what)


Job = tuple[str, Callable[[], object]]
"""What to show while it runs, and what to run."""

warmers: list[Callable[[str], Iterable[Job]]] = []
"""What `rectilinear.warmup` goes through."""


def warms(function: Callable[[str], Iterable[Job]]) -> Callable[[str], Iterable[Job]]:
    """Register a function that for a dtype's name gives the jobs that compile its kernels."""
    warmers.append(function)
    return function


number_functions_apart()
if hasattr(os, "register_at_fork"):
    # The children of one parent would go on counting from the same number.
    os.register_at_fork(after_in_child=number_functions_apart)
