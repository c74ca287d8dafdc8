"""What a backend promises, a file a promise. Each holds tests that take a `rectilinear.testing.Lib`; `PROMISES` has the words.

A test asks for ``lib`` (arrays of any library), ``numpy_lib`` (NumPy arrays, for what only those have: byte order, subclasses, files),
``any_lib`` or ``plain_lib`` (the same without the read-only variant), or ``installed_lib`` (NumPy arrays under a backend that new processes
know). It states a property, and fails with what was met and wanted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rectilinear.testing.lib import Lib

STATM = "/proc/self/statm"
"""Where Linux says how much memory a process has."""


def _never(lib: Lib) -> str | None:
    return None


def _immutable(lib: Lib) -> str | None:
    return None if lib.writable else f"{lib.library} arrays cannot be written to"


def _no_out(lib: Lib) -> str | None:
    return None if lib.writable else f"{lib.library} arrays are immutable; that out is refused has been tested"


def _no_views(lib: Lib) -> str | None:
    return None if lib.views else f"{lib.library} arrays have no strides, and no views"


def _no_errstate(lib: Lib) -> str | None:
    return None if lib.heeds_errstate else f"{lib.library} arrays do not heed np.errstate"


def _no_mask(lib: Lib) -> str | None:
    return None if lib.on_numpy else f"only backends for NumPy and CuPy arrays make a KeepMask, none for {lib.library} arrays"


def _one_process(lib: Lib) -> str | None:
    if not lib.on_numpy:
        return f"{lib.library} arrays go by what {lib.library} says of processes"
    return None if lib.installed else "a new process does not know a backend that is only registered"


def _no_memory(lib: Lib) -> str | None:
    return None if os.path.exists(STATM) else f"memory is read from {STATM}, which is not to be had here"


@dataclass(frozen=True)
class Promise:
    """A line of the report.

    Attributes
    ----------
    name : str
        Of the module with its tests, too.
    title : str
        What is promised.
    absent : callable
        Lib -> why it cannot make this promise, or None.
    """

    name: str
    title: str
    absent: Callable[[Lib], str | None] = _never

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.py")


PROMISES = (
    Promise("values", "affine, ReLU and the fused layer compute what they should, forward and backward"),
    Promise("stacked", "the stacked form computes each group by itself"),
    Promise("softmax", "softmax loss and its gradient, stable for any finite scores"),
    Promise("accuracy", "errors stay within both bounds, and long sums keep their digits"),
    Promise("edges", "NaN, infinities and zeros of either sign; nothing passes where nothing was kept"),
    Promise("errstate", "underflow is no error, whatever np.errstate says", _no_errstate),
    Promise("sizes", "extents of 0 and 1 are ordinary"),
    Promise("strides", "operands of any layout", _no_views),
    Promise("dtypes", "one dtype a call, kept by every result; 16 bits computed in 32"),
    Promise("masks", "a KeepMask that another backend made is read", _no_mask),
    Promise("inputs", "arguments are never written to, nor kept", _immutable),
    Promise("results", "results share no memory with arguments or one another", _no_views),
    Promise("out", "out is filled, wholly, and returned", _no_out),
    Promise("needs", "what is not needed comes back None"),
    Promise("errors", "errors reach the caller, and leave nothing half-written"),
    Promise("arrays", "arrays come to the backend and back; the probe answers"),
    Promise("bits", "the same bits on every run"),
    Promise("threads", "calls from many threads at once"),
    Promise("processes", "a fork after use, new processes, an interrupt", _one_process),
    Promise("memory", "memory is flat over many calls", _no_memory),
)
