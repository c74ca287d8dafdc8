"""Memory that products and kernels of the cupy backend write beside their results: workspaces, and counters of finished blocks.

It belongs to a stream, whose work is done in order, so that one buffer serves all of it; while `rectilinear.capture` records, to the
graph that is recorded, which holds the addresses. Like `cupy_backend`, this file is handed its array module.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from rectilinear.backends.contract import Array

_MOST_STREAMS = 64  # whose scratch is kept; a program has a handful, one that makes streams without end must not keep memory for each
PER_THREAD = 2  # cudaStreamPerThread: one address, a stream of its own in each thread


class Setting(Protocol):
    """Numbers that a graph reads from the GPU and that may be changed between its replays."""

    def fits(self) -> bool:
        """Whether the graph can do what it is to do now, given other numbers."""
        ...

    def refresh(self) -> None:
        """Put the numbers of now where the graph reads them."""
        ...


class Scratch:
    """The buffers of one stream, or of one graph. A buffer may be kept no longer than until what uses it has been launched."""

    def __init__(self, cp: Any) -> None:
        self._cp = cp
        self._workspace: Array | None = None
        self._counters: Array | None = None
        self._outgrown: list[Array] = []  # of a graph, whose earlier nodes go on to use them
        self.settings: list[Setting] = []  # of a graph
        self._apart: Any = None

    def prepare(self, like: Scratch) -> None:
        """Have as many counters as `like`, zero before a graph is recorded, which then need not set them at every replay."""
        if like._counters is not None:
            self.counters(like._counters.size)

    def scalar(self, dtype: Any) -> Array:
        """A number that a `Setting` fills before a replay: in a pool apart, for where the graph has had a temporary, it would write."""
        if self._apart is None:
            self._apart = self._cp.cuda.MemoryPool()
        with self._cp.cuda.using_allocator(self._apart.malloc):
            return self._cp.empty((), dtype)

    def workspace(self, nbytes: int) -> Array:
        """At least so many bytes that hold anything: uint8."""
        workspace = self._workspace  # looked at once: another thread on this stream may replace it meanwhile, by a smaller one
        if workspace is None or workspace.size < nbytes:
            self._replaced(workspace)
            workspace = self._workspace = self._cp.empty((nbytes,), np.uint8)
        return workspace

    def counters(self, n: int) -> Array:
        """At least n zeros, which whoever counts in them leaves zeros: uint32."""
        counters = self._counters
        if counters is None or counters.size < n:
            if _here.recording is None and self._cp.cuda.get_current_stream().is_capturing():
                raise RuntimeError(
                    "counters for a sum over rows would be set to zero by the graph alone, since a stream captures; call the function "
                    "once on this stream before the capture begins"
                )
            self._replaced(counters)
            counters = self._cp.empty((n,), np.uint32)
            counters.fill(0)
            self._counters = counters
        return counters

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
        key = device, stream, threading.get_ident() if stream == PER_THREAD else 0
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


def recorded() -> Scratch | None:
    """The scratch of what this thread records, if it does."""
    return _here.recording


def is_recording() -> bool:
    return _here.recording is not None


_SAME_AS_FIRST = "the first, ordinary call prepares what the second one records: let the function do the same at every call"


def refuse_while_recording(what: str, remedy: str = _SAME_AS_FIRST) -> None:
    """Raise where this thread records, for what can only be done before, such as "asks for a new plan"."""
    if _here.recording is not None:
        raise RuntimeError(f"rectilinear.capture: {what} while a graph is recorded; {remedy}")
