"""`warmup`: compile everything now, with a progress bar, instead of a little at every first call."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import numpy as np

from rectilinear.errors import BackendError, DTypeError
from rectilinear.extras import how_to_install
from rectilinear.kernels.runtime import forks

KERNEL_MODULES = ("rectilinear.kernels.loops.passes", "rectilinear.kernels.runtime.allocator")
"""The modules that hold kernels. Importing one registers its jobs (`rectilinear.kernels.runtime.cache.warms`)."""

_DTYPES = ("float32", "float64")


def warmup(dtypes: Sequence[Any] = _DTYPES) -> None:
    """Compile all kernels of the numba backend for the given dtypes, or load them where they are on disk already.

    Kernels are otherwise compiled at the first call that needs them, and kept on disk for later processes. Shows a progress
    bar on stderr if that is a terminal and rich is installed (extra ``bench``).

    Parameters
    ----------
    dtypes : sequence of dtype-like, optional
        Any of float32 and float64; the 16-bit types compute in float32.

    Raises
    ------
    DTypeError
        If a dtype is another one.
    BackendError
        If numba cannot be imported, or this process was forked while another thread compiled.

    Examples
    --------
    >>> import rectilinear
    >>> rectilinear.warmup(["float32"])
    """
    names = list(dict.fromkeys(_checked(dtype) for dtype in dtypes))
    if forks.frozen:
        raise BackendError(f"warmup: {forks.CannotCompileError()}")
    try:
        from rectilinear.kernels.runtime import cache
    except ImportError as error:
        raise BackendError(
            f"warmup: it compiles the kernels of the numba backend, but numba cannot be imported ({error}); "
            f"install it: {how_to_install('numba')}"
        ) from error

    bar = find_spec("rich") is not None and sys.stderr is not None and sys.stderr.isatty()
    if bar:
        cache.announce(spoken=False)
    with _progress() if bar else nullcontext(lambda label, done, total: None) as watch:
        watch("loading", 0, None)
        for module in KERNEL_MODULES:
            importlib.import_module(module)
        jobs = [job for name in names for warmer in cache.warmers for job in warmer(name)]
        for done, (label, compile_it) in enumerate(jobs):
            watch(label, done, len(jobs))
            compile_it()
            watch(label, done + 1, len(jobs))


Watch = Callable[[str, int, int | None], object]
"""Told what is compiled now, how many kernels are done, and of how many (None: not known yet)."""


@contextmanager
def _progress() -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        shown = progress.add_task("", total=None)
        yield lambda label, done, total: progress.update(shown, description=label, completed=done, total=total)


def _checked(dtype: Any) -> str:
    try:
        name: str = np.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in _DTYPES:
        raise DTypeError(f"warmup: kernels are compiled for {' and '.join(_DTYPES)}, not for {dtype!r}")
    return name
