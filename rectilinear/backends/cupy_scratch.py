"""Memory that products and kernels of the cupy backend write beside their results: workspaces, and counters of finished blocks.

It belongs to a stream, whose work is done in order, so that one buffer serves all of it; while `rectilinear.capture` records, to the
graph that is recorded, which holds the addresses. Like `cupy_backend`, this file is handed its array module.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rectilinear.backends.contract import Array

_MOST_STREAMS = 64  # whose scratch is kept; a program has a handful, one that makes streams without end must not keep memory for each
_PER_THREAD = 2  # cudaStreamPerThread: one address, a stream of its own in each thread


class Scratch:
    """The buffers of one stream, or of one graph. A buffer may be kept no longer than until what uses it has been launched."""

    def __init__(self, cp: Any) -> None:
        self._cp = cp
        self._workspace: Array | None = None
        self._counters: Array | None = None
        self._outgrown: list[Array] = []  # of a graph, whose earlier nodes go on to use them

    def workspace(self, nbytes: int) -> Array:
        """At least so many bytes that hold anything: uint8."""
        if self._workspace is None or self._workspace.size < nbytes:
            self._replaced(self._workspace)
            self._workspace = self._cp.empty((nbytes,), np.uint8)
        return self._workspace

    def counters(self, n: int) -> Array:
        """At least n zeros, which whoever counts in them leaves zeros: uint32."""
        if self._counters is None or self._counters.size < n:
            self._replaced(self._counters)
            self._counters = self._cp.empty((n,), np.uint32)
            self._counters.fill(0)
        return self._counters

    def _replaced(self, buffer: Array | None) -> None:
        if buffer is not None and _here.recording is self:
            self._outgrown.append(buffer)


class _Here(threading.local):
    recording: Scratch | None = None


_here = _Here()


class Scratches:
    """The scratch of every stream; a backend has one of these."""

    def __init__(self) -> None:
        self._of: OrderedDict[tuple[int, int, int], Scratch] = OrderedDict()
        self._lock = threading.Lock()

    def current(self, cp: Any, device: int, stream: int) -> Scratch:
        """For what this thread launches now: of its recording, else of this stream (its address) of this device."""
        if _here.recording is not None:
            return _here.recording
        key = device, stream, threading.get_ident() if stream == _PER_THREAD else 0
        scratch = self._of.get(key)
        if scratch is None:
            with self._lock:
                scratch = self._of.setdefault(key, Scratch(cp))
                if len(self._of) > _MOST_STREAMS:
                    self._of.popitem(last=False)  # its memory goes back to CuPy's pool, which gives it to the same stream only
        return scratch


@contextmanager
def recording(scratch: Scratch) -> Iterator[None]:
    """What this thread launches meanwhile is recorded, and has this scratch."""
    _here.recording = scratch
    try:
        yield
    finally:
        _here.recording = None


def is_recording() -> bool:
    return _here.recording is not None


def refuse_while_recording(what: str) -> None:
    """Raise where this thread records: `what` can only be done before."""
    if _here.recording is not None:
        raise RuntimeError(
            f"rectilinear.capture: {what} while a graph is recorded; the first, ordinary call has to meet all that the second one does: "
            "let the function do the same at every call, and nothing that waits for the GPU"
        )
