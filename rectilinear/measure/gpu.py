"""Timing on a GPU: a batch of calls that is waited for once, the host's share of a call, and the copies there and back, apart.

The libraries are handed in, not imported. A call on a GPU returns when its kernels are queued, so a clock on the host would time the
queueing. Nothing within a batch waits for the device. What is left as a program would find it: the L2 cache is not emptied between calls,
clocks are not locked, memory comes from the library's pool, which the warm-up has filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter
from typing import Any

WARM_UP = 3
"""The least number of calls before those that count: the first compile kernels, set up cuBLAS and fill the pool."""
LAUNCHED = 10
"""Calls over which the host's time is taken. CUDA makes a launch wait when about a thousand are queued, and a training step has some 40."""
COPIES = 3
"""Timed copies each way, after one that does not count: it makes the pinned memory through which CuPy copies."""


class Timer:
    """How a case's arrays get to a GPU (`put`) and back (`fetch`), and the clock of what is done there: `Events` or `Waits`."""

    put: Callable[[Any], Any]
    fetch: Callable[[Any], Any]

    @property
    def device(self) -> str:
        """The name of the current device."""
        raise NotImplementedError

    def wait(self, made: Any = None) -> None:
        """Until the device has computed `made`, what the last call returned, and all before it."""
        raise NotImplementedError

    def elapsed(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds from before the first of these calls to the end of the last, on the device.

        Where launching takes the host longer than the kernels take, the gaps in which the device has nothing to do are in it: a loop of
        such calls is no faster.
        """
        raise NotImplementedError

    def launch(self, call: Callable[[], Any]) -> float:
        """Seconds of the host's time per call: what it takes to check arguments and queue the kernels, on an idle device."""
        self.wait()
        made = None
        begin = perf_counter()
        for _ in repeat(None, LAUNCHED):
            made = call()
        seconds = perf_counter() - begin
        self.wait(made)
        return seconds / LAUNCHED

    def copies(self, inputs: Iterable[Any], results: Iterable[Any]) -> dict[str, Any]:
        """What copying these NumPy arrays to the device and these results back takes: bytes, and seconds of each try."""
        return {"to_device": self._copied(self.put, list(inputs)), "to_host": self._copied(self.fetch, list(results))}

    def _copied(self, copy: Callable[[Any], Any], arrays: list[Any]) -> dict[str, Any]:
        seconds = []
        for _ in range(1 + COPIES):
            self.wait()
            begin = perf_counter()
            made = [copy(a) for a in arrays]
            self.wait(made)
            seconds.append(perf_counter() - begin)
            del made  # before the next ones are made, so that they find this memory in the pool
        return {"bytes": sum(a.nbytes for a in arrays), "seconds": seconds[1:]}


@dataclass(frozen=True)
class Events(Timer):
    """By CUDA events on CuPy's current stream: one pair for the whole batch, so that the events themselves do not count.

    `cp` is CuPy: used of it are get_elapsed_time, Event, get_current_stream, Device and runtime.getDeviceProperties of ``cp.cuda``.
    """

    cp: Any
    put: Callable[[Any], Any]
    fetch: Callable[[Any], Any]

    @property
    def device(self) -> str:
        cuda = self.cp.cuda
        return str(cuda.runtime.getDeviceProperties(cuda.Device().id)["name"].decode())

    def wait(self, made: Any = None) -> None:
        self.cp.cuda.get_current_stream().synchronize()

    def elapsed(self, call: Callable[[], Any], calls: int) -> float:
        cuda = self.cp.cuda
        stream, start, end = cuda.get_current_stream(), cuda.Event(), cuda.Event()
        start.record(stream)
        for _ in repeat(None, calls):
            call()
        end.record(stream)
        end.synchronize()
        return float(cuda.get_elapsed_time(start, end)) * 1e-3


@dataclass(frozen=True)
class Waits(Timer):
    """By the host's clock, from an idle device until what the last call returned is there.

    For libraries that give no events for their streams (JAX), and the others that are compared with them. One wait takes some 10 us;
    a batch is a fifth of a turn, milliseconds.
    """

    name: str
    put: Callable[[Any], Any]
    fetch: Callable[[Any], Any]
    until: Callable[[Any], Any]
    """Waits for what it is given, and for all that was queued before it."""

    @property
    def device(self) -> str:
        return self.name

    def wait(self, made: Any = None) -> None:
        self.until(made)

    def elapsed(self, call: Callable[[], Any], calls: int) -> float:
        made = None
        self.wait()
        begin = perf_counter()
        for _ in repeat(None, calls):
            made = call()
        self.wait(made)
        return perf_counter() - begin
