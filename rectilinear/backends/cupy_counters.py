"""Counters for the kernels whose last block adds up what the others left: 32-bit zeros, which that block sets back to zero.

Two launches that may run at the same time must not share them. Launches on one stream never do, so a stream has its own; a graph may
run beside the stream it was recorded on, and beside other graphs, so whoever records one hands in its own by `Counters.using`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rectilinear.backends.contract import Array

COUNTERS = 1024  # more than a launch ever takes; cupy_backend says how many that is

_PER_THREAD = 2  # the handle of the default stream of each thread, which is a stream for each (cudaStreamPerThread)
_STREAMS_KEPT = 64  # a program that makes streams without end must not keep 4 KB for each


class Counters:
    """Hands out the counters for a launch. Safe to use from many threads."""

    def __init__(self) -> None:
        self._of_streams: dict[tuple[int, int, int], Array] = {}
        self._thread = threading.local()

    def current(self, cp: Any) -> Array:
        """For a launch on the current stream of the current device: zeros, or on their way to it on that stream."""
        given: Array | None = getattr(self._thread, "given", None)
        if given is not None:
            return given
        stream: int = cp.cuda.get_current_stream().ptr
        key = cp.cuda.Device().id, stream, threading.get_ident() if stream == _PER_THREAD else 0
        found = self._of_streams.get(key)
        if found is None:
            # Where two threads come first at once, one's are taken by both: what is filled on a stream is filled before what follows.
            found = self._of_streams.setdefault(key, self.fresh(cp))
            if len(self._of_streams) > _STREAMS_KEPT:
                # CuPy gives memory that is dropped to the same stream again, behind what still uses it.
                self._of_streams.pop(next(iter(self._of_streams)), None)
        return found

    @staticmethod
    def fresh(cp: Any) -> Array:
        """New counters, filled with zeros on the current stream."""
        counters = cp.empty((COUNTERS,), np.uint32)
        counters.fill(0)
        return counters

    @contextmanager
    def using(self, counters: Array) -> Iterator[None]:
        """Until it ends, this thread's launches get these: those of a graph that it records, made by `fresh` before."""
        outer = getattr(self._thread, "given", None)
        self._thread.given = counters
        try:
            yield
        finally:
            self._thread.given = outer
