"""`rectilinear.profile`: which calls were made while a block was open, how long each took, and how near that is to the machine's limits.

Every call of a layer function asks `registry` for the backend that serves it. While a profile is open, and only then, the two functions
that it asks are replaced by ones that hand out the same backends with a clock around each primitive. So nothing is looked at while none is
open, functions imported by name are seen, and a call's checks (1 to 3 us) are not in its time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from math import prod
from time import perf_counter_ns
from typing import Any

import numpy as np

import rectilinear
from rectilinear import graphs
from rectilinear.backends import registry
from rectilinear.backends.contract import Array, Backend
from rectilinear.backends.cupy_scratch import is_recording
from rectilinear.dispatch import dtype_name, library_name
from rectilinear.extras import lacks
from rectilinear.threads import call_threads

_MOST_EVENTS = 1_000_000
"""Calls of one thread that a trace holds, 130 MB of them; the table counts all."""

_log = logging.getLogger(__name__)

_lock = threading.Lock()
_open: tuple[Profile, ...] = ()


def _renew_lock() -> None:
    # A lock held by another thread at the moment of a fork would stay locked in the child for ever.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def profile() -> Profile:
    """Note every call that the process makes while a ``with`` block is open, from whichever thread or task.

    What is timed is the backend's work; the checks before it take 1 to 3 us more. Profiles may be open inside of one another, and each
    sees all calls. Without an open one nothing is looked at.

    Returns
    -------
    Profile
        With ``rows()``, ``table()`` and ``save(path)``, which also work while it is open.

    Examples
    --------
    >>> import numpy as np
    >>> import rectilinear
    >>> with rectilinear.profile() as p:
    ...     for _ in range(3):
    ...         out, _ = rectilinear.affine_forward(np.ones((8, 4)), np.ones((4, 2)), None)
    >>> [(row.function, row.shape, row.calls) for row in p.rows()]
    [('affine_forward', (8, 4, 2), 3)]
    >>> print(p.table())  # doctest: +SKIP
    >>> p.save("trace.json")  # doctest: +SKIP
    """
    return Profile()


@dataclasses.dataclass(frozen=True)
class Row:
    """All calls of a function at a shape and dtype.

    Attributes
    ----------
    function : str
        With the gradients in brackets where not all were asked for: ``"affine_backward (dw, db)"``.
    shape : tuple of int
        (N, D, M) or (B, N, D, M) for affine layers, (N, M) or (B, N, M) for db alone, x's for ReLU, (N, C) for the loss, (number of
        elements,) for a step of SGD.
    dtype : str
        What was computed in: float32 for float16 and bfloat16 where the backend converts them.
    backend : str
    calls : int
    seconds : float
        Of all calls together, by the host's clock. The first call of a process compiles kernels or loads them.
    shortest : float
        Seconds of the shortest call.
    flops, bandwidth : float or None
        FLOP/s, and bytes/s of the least traffic; None where the host does not wait for the result (GPUs, lazy and traced arrays), so that
        its time says nothing of the work.
    share : float or None
        The least time that this machine needs by its ceilings, over the time taken; None where they are not known.
    bound : str or None
        What sets that limit: ``"FMA"`` or a level of memory.
    """

    function: str
    shape: tuple[int, ...]
    dtype: str
    backend: str
    calls: int
    seconds: float
    shortest: float
    flops: float | None = None
    bandwidth: float | None = None
    share: float | None = None
    bound: str | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call has to do at the least, in FLOPs and bytes as ``rectilinear.measure.cases`` counts them."""

    flops: int
    bytes_read: int
    bytes_written: int
    dtype: str


_Key = tuple[str, tuple[Any, ...], Any, str, bool]
"""Function, shape, dtype (or its name), backend, whether the host waits for the result."""


class _Thread:
    """What one thread has called; nobody else writes to it."""

    def __init__(self) -> None:
        self.number = threading.get_native_id()
        self.name = threading.current_thread().name
        self.totals: dict[_Key, list[int]] = {}
        """Calls, nanoseconds of all, and of the shortest."""
        self.events: list[tuple[_Key, int, int]] = []
        """With the first and the last nanosecond."""


class Profile:
    """What `profile` gives."""

    def __init__(self) -> None:
        self._threads: list[_Thread] = []
        self._here = threading.local()
        self._begin = 0

    def __enter__(self) -> Profile:
        global _open
        with _lock:
            if self in _open:
                raise RuntimeError("this profile is open; rectilinear.profile() makes another one")
            if not _open:
                _look()
            _open = (*_open, self)
        self._begin = self._begin or perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        global _open
        with _lock:
            _open = tuple(other for other in _open if other is not self)
            if not _open:
                _look_away()

    def _add(self, key: _Key, begin: int, end: int) -> None:
        try:
            mine = self._here.mine
        except AttributeError:
            mine = self._here.mine = _Thread()
            self._threads.append(mine)
        total = mine.totals.get(key)
        if total is None:
            mine.totals[key] = [1, end - begin, end - begin]
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s", _why(key))
        else:
            total[0] += 1
            total[1] += end - begin
            if end - begin < total[2]:
                total[2] = end - begin
        if len(mine.events) < _MOST_EVENTS:
            mine.events.append((key, begin, end))

    def rows(self) -> list[Row]:
        """A row for each function, shape, dtype and backend; what took longest comes first."""
        return self._rows(_ceilings())

    def _rows(self, ceilings: dict[str, Any] | None) -> list[Row]:
        totals: dict[_Key, list[int]] = {}
        for thread in list(self._threads):
            for key, (calls, spent, shortest) in list(thread.totals.items()):
                total = totals.setdefault(key, [0, 0, shortest])
                total[:] = total[0] + calls, total[1] + spent, min(total[2], shortest)
        rows = [_row(key, total, ceilings) for key, total in totals.items()]
        return sorted(rows, key=lambda row: -row.seconds)

    def table(self) -> str:
        """The rows as text, with what they add up to. Needs rich (extra ``bench``), and says so in an ImportError."""
        if missing := lacks("rich", "bench"):
            raise ImportError(f"profile.table: {missing}")
        from rich import box
        from rich.console import Console
        from rich.table import Table

        ceilings = _ceilings()
        rows = self._rows(ceilings)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
        table.add_column("function", "together")
        for name in ("shape", "dtype", "backend"):
            table.add_column(name)
        table.add_column("calls", f"{sum(row.calls for row in rows):,}", justify="right")
        table.add_column("seconds", f"{sum(row.seconds for row in rows):.6f}", justify="right")
        for name in ("us a call", "shortest", "GFLOP/s", "GB/s", "of the ceiling"):
            table.add_column(name, justify="right")
        for row in rows:
            size, each = "x".join(map(str, row.shape)), [f"{seconds * 1e6:.1f}" for seconds in (row.seconds / row.calls, row.shortest)]
            rates = ["" if rate is None else f"{rate * 1e-9:.1f}" for rate in (row.flops, row.bandwidth)]
            share = "" if row.share is None else f"{row.share:.0%} {row.bound}"
            cells = (row.function, size, row.dtype, row.backend, f"{row.calls:,}", f"{row.seconds:.6f}", *each, *rates, share)
            table.add_row(*cells)
        console = Console(width=160, color_system=None)
        with console.capture() as captured:
            console.print(table)
        notes = ["" if ceilings else "No ceilings are known of this machine: python -m rectilinear bench measures them.\n"]
        if any(row.flops is None and row.bandwidth is None for row in rows):
            notes.append("Without rates: the host does not wait for the result, and its own time is all that is known.\n")
        lines = captured.get().strip("\n").splitlines()
        return "\n".join(line[1:].rstrip() for line in lines) + "\n" + "".join(notes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calls as a trace that Perfetto (ui.perfetto.dev) and ``chrome://tracing`` show, a line for each thread."""
        events: list[dict[str, Any]] = []
        for thread in list(self._threads):
            place = {"pid": os.getpid(), "tid": thread.number}
            events.append({"name": "thread_name", "ph": "M", **place, "args": {"name": thread.name}})
            for (function, shape, dtype, backend, _), begin, end in list(thread.events):
                about = {"shape": "x".join(map(str, shape)), "dtype": dtype_name(dtype), "backend": backend}
                times = {"ts": (begin - self._begin) / 1000, "dur": (end - begin) / 1000}
                events.append({"name": function, "cat": "rectilinear", "ph": "X", **times, **place, "args": about})
        noted = sum(len(thread.events) for thread in self._threads)
        made = sum(calls for thread in self._threads for calls, *_ in thread.totals.values())
        other = {"rectilinear": rectilinear.__version__, "calls left out, since they were too many": made - noted}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}, file)


# ---------------------------------------------------------------- looking

_active, _serving, _replay = registry.active, registry.serving, graphs._Graph.replay
_watched: dict[Backend, Any] = {}


def _look() -> None:
    registry.active = lambda: _watched.get(backend := _active()) or _watch(backend)
    registry.serving = lambda library: _watched.get(backend := _serving(library)) or _watch(backend)
    graphs._Graph.replay = _timed_replay  # type: ignore[method-assign, assignment]


def _look_away() -> None:
    registry.active, registry.serving = _active, _serving
    graphs._Graph.replay = _replay  # type: ignore[method-assign]
    _watched.clear()


def _watch(backend: Backend) -> Any:
    watched = _watched[backend] = _Watched(backend)
    return watched


class _Watched:
    """A backend whose primitives are timed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.library, self.half = backend.name, backend.library, backend.half
        for primitive, describe in _PRIMITIVES.items():
            if hasattr(backend, primitive) and (primitive not in _TRANSFERS or backend.library != "numpy"):
                setattr(self, primitive, _timed(backend, primitive, describe))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _timed(backend: Backend, primitive: str, describe: Callable[..., tuple[str, Any, Any]]) -> Callable[..., Any]:
    def timed(*operands: Any) -> Any:
        if is_recording():  # for a graph: nothing is computed, and its replays are calls of their own
            return getattr(backend, primitive)(*operands)
        begin = perf_counter_ns()
        result = getattr(backend, primitive)(*operands)
        end = perf_counter_ns()
        if result is not None:  # else sgd_step has left it to its caller
            function, shape, x = describe(*operands)
            on_host = type(x) is np.ndarray
            key = (function, shape, x.dtype, backend.name, True) if on_host else _key_of_others(function, shape, x, backend)
            for each in _open:
                each._add(key, begin, end)
        return result

    return timed


def _timed_replay(graph: Any, copying: Any, copies: bool) -> Any:
    if graph.cp.cuda.runtime.getDevice() != graph.device:
        return _replay(graph, copying, copies)  # comes back on its device
    begin = perf_counter_ns()
    result = _replay(graph, copying, copies)
    end = perf_counter_ns()
    for each in _open:
        each._add(("replay of a capture", (), "", "cupy", False), begin, end)
    return result


def _key_of_others(function: str, shape: Iterable[Any], x: Any, backend: Backend) -> _Key:
    extents = tuple(extent if type(extent) is int else "?" for extent in shape)  # those of lazy and traced arrays may be anything
    library = library_name(x)
    name = backend.name if backend.library == library else f"{backend.name} ({library})"
    device = getattr(x, "device", None)
    waits = library == "array_api_strict" or (library == "torch" and getattr(device, "type", "") == "cpu")
    dtype = getattr(x, "dtype", None)
    return function, extents, "" if dtype is None else dtype_name(dtype), name, waits and "?" not in extents


# What a primitive was called for: the public function, the shape, and the array that tells library and dtype.

_GRADIENTS = ("dx", "dw", "db")
_BIAS_ALONE = "affine_backward (db)"  # has dout's shape


def _affine_backward(dout: Array, x: Array, w: Array, keep: Any, wanted: Any, _: Any) -> Any:
    function = "affine_backward" if keep is None else "affine_relu_backward"
    if wanted != (True, True, True):
        function += _NEEDS[wanted]
    return function, (*x.shape, w.shape[-1]), x


_NEEDS = {
    (dx, dw, db): f" ({', '.join(name for name, wanted in zip(_GRADIENTS, (dx, dw, db), strict=True) if wanted)})"
    for dx in (False, True)
    for dw in (False, True)
    for db in (False, True)
}
_PRIMITIVES: dict[str, Callable[..., tuple[str, Any, Any]]] = {
    "affine_forward": lambda x, w, b, out: ("affine_forward", (*x.shape, w.shape[-1]), x),
    "affine_relu_forward": lambda x, w, b, out: ("affine_relu_forward", (*x.shape, w.shape[-1]), x),
    "affine_backward": _affine_backward,
    "bias_backward": lambda dout, out: (_BIAS_ALONE, dout.shape, dout),
    "relu_forward": lambda x, out: ("relu_forward", x.shape, x),
    "relu_backward": lambda dout, keep, out: ("relu_backward", dout.shape, dout),
    "softmax_loss": lambda x, y, out: ("softmax_loss", x.shape, x),
    "sgd_step": lambda w, dw, v, *rates: ("sgd_step" if v else "sgd_step (no momentum)", (sum(each.size for each in w),), w[0]),
    "asarray": lambda x, dtype=None: ("asarray", getattr(x, "shape", ()), x),
    "to_numpy": lambda x: ("to_numpy", x.shape, x),
}
_TRANSFERS = ("asarray", "to_numpy")  # for NumPy's arrays there is nothing to do


# ---------------------------------------------------------------- saying


def _row(key: _Key, total: list[int], ceilings: dict[str, Any] | None) -> Row:
    function, shape, dtype, backend, waits = key
    calls, seconds, shortest = total[0], total[1] * 1e-9, total[2] * 1e-9
    row = Row(function, shape, dtype_name(dtype), backend, calls, seconds, shortest)
    work: Any = _work(function, shape, row.dtype) if waits else None
    if work is None or seconds == 0:
        return row
    rate = calls / seconds
    row = dataclasses.replace(row, flops=work.flops * rate if work.flops else None, bandwidth=(work.bytes_read + work.bytes_written) * rate)
    if ceilings is None or work.dtype not in ceilings["flops"]:
        return row
    from rectilinear.measure.figures import roof

    limit = roof(work, ceilings)
    return dataclasses.replace(row, share=limit.seconds * rate, bound=limit.bound)


def _work(function: str, shape: tuple[int, ...], dtype: str) -> Work | None:
    """Least work of a call; None for what computes nothing. ReLU's gradient is taken to read x, and that of a fused layer bits."""
    name, _, brackets = function.partition(" (")
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}.get(dtype)
    if size is None:
        return None
    flops, read, written = 0, 0, 0
    if name == "relu_forward":
        read = written = prod(shape)
    elif name == "relu_backward":
        read, written = 2 * prod(shape), prod(shape)
    elif name == "softmax_loss":
        flops, read, written = 4 * prod(shape), prod(shape) + 8 * shape[0] // size, prod(shape) + 1
    elif name == "sgd_step":
        (n,) = shape
        flops, read, written = (2, 2 * n, n) if brackets else (4, 3 * n, 2 * n)
        flops *= n
    elif function == _BIAS_ALONE:
        flops, read, written = prod(shape), prod(shape), prod(shape[:-2]) * shape[-1]
    elif name.startswith("affine"):
        g, n, d, m = (1, *shape)[-4:]
        x, w, b, out, product = g * n * d, g * d * m, g * m, g * n * m, 2 * g * n * d * m
        if name.endswith("forward"):
            flops, read, written = product, x + w + b, out
        else:
            dx, dw, db = (not brackets or gradient in brackets for gradient in _GRADIENTS)
            flops = product * (dx + dw) + out * db
            read, written = out + w * dx + x * dw, x * dx + w * dw + b * db
            bits = -(-out // 8) if "relu" in name else 0
            return Work(flops, read * size + bits, written * size, dtype)
    else:
        return None
    return Work(flops, read * size, written * size, dtype)


def _ceilings() -> dict[str, Any] | None:
    from rectilinear.measure import ceilings

    return ceilings.kept()


def _why(key: _Key) -> str:
    """Who serves such calls, by whose choice, and by what plan; for the log."""
    function, shape, dtype, backend, _ = key
    text = f"{function} {'x'.join(map(str, shape))} {dtype_name(dtype)}: {backend}"
    if backend not in ("numba", "numpy"):
        return f"{text}, by the library of the arrays"
    text += f", chosen by {registry._choice.current().chosen_by}"
    if backend != "numba" or not function.startswith("affine") or function == _BIAS_ALONE or 0 in shape:
        return text
    from rectilinear.kernels.loops import host, tuned
    from rectilinear.kernels.loops.plan import Backward, plan

    threads = call_threads()
    job = plan("forward" if function.endswith("forward") else "backward", shape, host.this_host(dtype.itemsize), threads=threads)
    jobs = {"": job} | ({"dx: ": job.to_dx, "dw: ": job.to_dw} if isinstance(job, Backward) else {})
    planned, tasks = (
        "; ".join(
            name + " ".join(f"{field}={value}" for field, value in dataclasses.asdict(getattr(of, part)).items() if value)
            for name, of in jobs.items()
        )
        for part in ("plan", "tasks")
    )
    by = "the model" if tuned.load(host.host_key()) is None else "what was tuned here"
    return f"{text}; plan by {by}, for C order: {planned}; tasks of {threads} threads: {tasks}"
