"""Training over the workers of a Dask cluster. (The layer functions take dask arrays by themselves, as any other.)

`fit` is data-parallel gradient descent: each chunk of rows is worked on where it lies, gradients are added up in a tree, and the
optimiser's step is the caller's own, in the caller's process. What crosses the network in a step are the parameters, once to each worker
that has a part in it, and gradients of their size, once for each chunk; data and activations never come to the caller.
"""

from __future__ import annotations

import copy
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends.dask_backend import FAN_IN, add_up, as_told, chosen
from rectilinear.errors import ShapeError
from rectilinear.extras import lacks
from rectilinear.nn.files import load, metadata, save
from rectilinear.nn.module import Layer, Module
from rectilinear.nn.sgd import SGD

__all__ = ["Progress", "fit"]

SAVE_S = 60.0
"""Seconds between checkpoints within an epoch."""


class Progress(NamedTuple):
    """Where `fit` is, after a step."""

    epoch: int
    """From 1 on."""
    step: int
    """From 1 on, over all epochs."""
    steps: int
    """In all."""
    loss: float
    """Of the step's batch, before the step."""


def fit(
    net: Module,
    x: Any,
    y: Any,
    *,
    loss: Any,
    optimizer: SGD,
    epochs: int,
    batch_size: int,
    checkpoint: str | os.PathLike[str] | None = None,
    client: Any = None,
    progress: bool | Callable[[Progress], object] = True,
) -> list[float]:
    """Train `net` on dask arrays, each step's gradient worked out by all workers that hold rows of its batch.

    A batch is `batch_size` rows, in order; the last one of an epoch may be shorter. Rows come in the order that x has them in, so
    shuffle beforehand. A step is one task for each chunk that has rows in the batch, so chunks of ``batch_size / k`` rows let k workers
    work at a time. Chunks are loaded a step ahead and let go of after their step, so x may be larger than all workers' memory; what fits
    is best kept there (``x.persist()``), or each epoch loads it anew.

    Parameters
    ----------
    net : Module
        Trained in place. Its parameters may lie in NumPy or CuPy.
    x : dask array of shape (N, ...)
        Samples, in chunks of rows.
    y : dask or NumPy array of shape (N,) or (N, ...)
        Labels, or whatever `loss` takes.
    loss : object
        With ``forward(scores, y)``, the mean over rows, and ``backward()``, its gradient, such as `rectilinear.nn.SoftmaxCrossEntropy`.
    optimizer : SGD
        Of `net`.
    epochs, batch_size : int
    checkpoint : path, optional
        A safetensors file that is written after each epoch, once a minute, and when the caller interrupts. If it is there at the
        beginning, training goes on from it, to the same bits as if it had never stopped. `rectilinear.nn.load` reads it too.
    client : distributed.Client, optional
        Default: the current one.
    progress : bool or callable
        True: a bar, at a terminal. A callable is called with a `Progress` after each step; what it raises ends the training.

    Returns
    -------
    list of float
        The loss of each batch, before its step; of the steps made by this call.

    Raises
    ------
    ImportError
        dask or distributed is not installed.
    TypeError
        x is no dask array, or `loss`, `net` or `optimizer` is something else than asked for.
    ShapeError, ValueError
        x and y do not fit together, their number of rows is unknown, the optimiser is another net's, or the checkpoint is of a
        training with another batch size or number of rows.
    RuntimeError
        There is no client.

    Notes
    -----
    The chunks alone decide how gradients are added up, so the bits are the same for any number of workers of one kind. Each task
    runs under the backend that is chosen here, on one thread unless the worker's process has been told another number
    (``RECTILINEAR_NUM_THREADS``): Dask runs as many at a time as it gave the worker threads. When a worker dies, Dask has its
    tasks done again by others, and the result is the same.

    Examples
    --------
    >>> import numpy as np, dask.array as da
    >>> from dask.distributed import Client
    >>> from rectilinear import nn
    >>> from rectilinear.dask import fit
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.standard_normal((64, 4)), rng.integers(0, 3, 64)
    >>> net = nn.Sequential(nn.AffineReLU(4, 8, rng=rng), nn.Affine(8, 3, rng=rng))
    >>> with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0"):
    ...     losses = fit(net, da.from_array(x, chunks=(16, 4)), y, loss=nn.SoftmaxCrossEntropy(),
    ...                  optimizer=nn.SGD(net, lr=0.1), epochs=5, batch_size=32, progress=False)
    >>> len(losses), losses[-1] < losses[0]
    (10, True)
    """
    _check(net, x, y, loss, optimizer, epochs, batch_size)
    data = _Chunks(x, y, client or _current_client())
    per_epoch = -(-data.rows // batch_size)
    settings = {"rows": str(data.rows), "batch_size": str(batch_size)}
    first = _resume(net, optimizer, checkpoint, settings)
    losses: list[float] = []
    saved, saved_at = first, time.monotonic()

    def rows_of(step: int) -> range:
        start = step % per_epoch * batch_size
        return range(start, min(start + batch_size, data.rows))

    def keep(step: int) -> None:
        nonlocal saved, saved_at
        if checkpoint is not None and step != saved:
            save(net, checkpoint, optimizer, metadata=settings | {"step": str(step)})
            saved, saved_at = step, time.monotonic()

    run, backend = uuid.uuid4().hex[:8], chosen()
    with _teller(progress, first, epochs * per_epoch) as tell:
        for step in range(first, epochs * per_epoch):
            batch, ahead = rows_of(step), rows_of(step + 1) if step + 1 < epochs * per_epoch else range(0)
            try:
                value, grads = _gradient(net, loss, len(batch), data.parts(batch, ahead), f"{run}-{step}", backend)
            except BaseException:  # the caller's interrupt, or workers that died too often: net and optimiser are as after the last step
                keep(step)
                raise
            for prefix, layer in _layers(net):
                layer.grads = {key.removeprefix(prefix): grad for key, grad in grads.items() if key.startswith(prefix)}
            optimizer.step()
            losses.append(value)
            done = step + 1
            if done % per_epoch == 0 or time.monotonic() - saved_at > SAVE_S:
                keep(done)
            try:
                tell(Progress(step // per_epoch + 1, done, epochs * per_epoch, value))
            except BaseException:
                keep(done)
                raise
    return losses


# ---------------------------------------------------------------- arguments


def _check(net: Any, x: Any, y: Any, loss: Any, optimizer: Any, epochs: Any, batch_size: Any) -> None:
    for module in ("dask", "distributed"):
        if absent := lacks(module, "dask"):
            raise ImportError(f"fit: {absent}")
    import dask.array as da

    if not isinstance(net, Module):
        raise TypeError(f"fit: net is of type {type(net).__name__}; wanted a Module, such as Sequential(...)")
    if not isinstance(x, da.Array):
        raise TypeError(f"fit: x is of type {type(x).__name__}; wanted a dask array, such as dask.array.from_array(x, chunks=(rows, -1))")
    if not callable(getattr(loss, "forward", None)) or not callable(getattr(loss, "backward", None)):
        raise TypeError(f"fit: loss is {loss!r:.100}; wanted an object with forward and backward, such as SoftmaxCrossEntropy()")
    if not isinstance(optimizer, SGD):
        raise TypeError(f"fit: optimizer is of type {type(optimizer).__name__}; wanted an SGD")
    if optimizer.model is not net:
        raise ValueError("fit: optimizer moves another model than net; make it with SGD(net, ...)")
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(number, int | np.integer) or number < 1:
            raise ValueError(f"fit: {name} is {number!r}; wanted a whole number from 1 on")
    for name, array in (("x", x), ("y", y)):
        if not isinstance(array, da.Array | np.ndarray):
            raise TypeError(f"fit: {name} is of type {type(array).__name__}; wanted a dask or NumPy array")
        if any(map(isnan, array.shape)):
            raise ValueError(f"fit: {name} has an unknown extent (shape {array.shape}); let dask find out: {name}.compute_chunk_sizes()")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise ShapeError(f"fit: x has shape {x.shape} and y has {y.shape}; wanted as many rows in both, and one at least")


def _current_client() -> Any:
    from distributed import get_client

    try:
        return get_client()
    except ValueError:
        raise RuntimeError("fit: there is no client; make one, such as client = dask.distributed.Client(), or pass client=") from None


def _resume(net: Module, optimizer: SGD, checkpoint: Any, settings: dict[str, str]) -> int:
    """Take net and optimiser from the checkpoint, if there is one; the number of steps made by then."""
    if checkpoint is None or not os.path.exists(checkpoint):
        return 0
    found = metadata(checkpoint)
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"fit: the checkpoint {os.fspath(checkpoint)} is of a training with {name} {found.get(name, 'unknown')}, not {value}; "
                "go on with the same data and batch size, or name another file"
            )
    load(net, checkpoint, optimizer)
    return int(found["step"])


@contextmanager
def _teller(progress: Any, first: int, steps: int) -> Iterator[Callable[[Progress], object]]:
    if callable(progress):
        yield progress
    elif not progress or lacks("rich", "bench"):
        yield lambda state: None
    else:
        from rich.console import Console
        from rich.progress import Progress as Bar

        console = Console()
        with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("fit", total=steps, completed=first)
            yield lambda state: bar.update(task, completed=state.step, description=f"epoch {state.epoch}, loss {state.loss:.4f}")


# ---------------------------------------------------------------- one step


class _Chunks:
    """x and y in chunks of the same rows, of which the workers hold those that the step under way and the next one need."""

    def __init__(self, x: Any, y: Any, client: Any) -> None:
        import dask
        import dask.array as da

        x = x.rechunk(dict.fromkeys(range(1, x.ndim), -1))
        rows = {0: x.chunks[0], **dict.fromkeys(range(1, y.ndim), -1)}
        y = y.rechunk(rows) if isinstance(y, da.Array) else da.from_array(y, chunks=tuple(rows.values()))
        self.client = client
        self.rows: int = x.shape[0]
        self._ends = list(accumulate(x.chunks[0]))
        x, y = dask.optimize(x, y)  # together, so that what both are made of is made once
        self._lazy = list(zip(*(array.to_delayed(optimize_graph=False).ravel() for array in (x, y)), strict=True))
        self._held: dict[int, Any] = {}

    def parts(self, batch: range, ahead: range) -> list[tuple[Any, Any, slice]]:
        """(x, y, rows) for each chunk that has rows in the batch. Those of the batch after it, `ahead`, are sent for."""
        here = self._spans(batch)
        wanted = [*here, *(i for i in self._spans(ahead) if i not in here)]
        missing = [i for i in wanted if i not in self._held]
        if missing:
            futures = iter(self.client.compute([part for i in missing for part in self._lazy[i]]))
            self._held |= {i: (next(futures), next(futures)) for i in missing}
        self._held = {i: self._held[i] for i in wanted}
        return [(*self._held[i], rows) for i, rows in here.items()]

    def _spans(self, batch: range) -> dict[int, slice]:
        """Number of a chunk -> the rows of it that are in the batch."""
        start, spans = 0, {}
        for i, end in enumerate(self._ends):
            low, high = max(batch.start, start), min(batch.stop, end)
            if low < high:
                spans[i] = slice(low - start, high - start)
            start = end
        return spans


@dataclass(frozen=True)
class _Model:
    """What is sent to the workers in a step."""

    net: Module
    loss: Any
    name: str

    def __dask_tokenize__(self) -> str:
        return self.name  # else all parameters would be hashed

    def __sizeof__(self) -> int:
        return sum(array.nbytes for _, layer in _layers(self.net) for array in layer.params.values())  # for Dask to know what it moves


def _gradient(
    net: Module, loss: Any, rows: int, parts: list[tuple[Any, Any, slice]], name: str, backend: str | None
) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a batch, added up by the workers."""
    import dask

    # A graph by hand: for a step of eight chunks the caller took 29 ms by dask.delayed, 8 by this. The net is part of it, not scattered:
    # what is scattered is lost with the worker that holds it.
    model = f"net-{name}"
    graph: dict[str, Any] = {model: _Model(copy.deepcopy(net), loss, name)}
    level = []
    for i, (x, y, those) in enumerate(parts):
        level.append(f"gradient-{name}-{i}")
        graph[level[-1]] = _part, model, x, y, those, rows, backend
    while len(level) > 1:
        groups = [level[i : i + FAN_IN] for i in range(0, len(level), FAN_IN)]
        level = [f"sum-{name}-{len(level)}-{i}" for i in range(len(groups))]
        graph |= {key: (_total, group) for key, group in zip(level, groups, strict=True)}
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PiB"}):  # which is about data, where this is the net
        future = parts[0][0].client.get(graph, level[0], sync=False)
    total: tuple[float, dict[str, Any]] = future.result()
    return total


def _layers(net: Module) -> Iterator[tuple[str, Layer]]:
    """Each layer once, with its prefix, however often it is used."""
    seen: set[int] = set()
    for prefix, layer in net.leaves():
        if id(layer) not in seen:
            seen.add(id(layer))
            yield prefix, layer


def _part(model: _Model, x: Any, y: Any, rows: slice, of: int, backend: str | None) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of some rows, as their share in a batch of so many."""
    # Others may be at work on the same net; the arrays themselves are shared, for nobody writes to them.
    arrays = {id(array): array for _, layer in _layers(model.net) for array in layer.params.values()}
    net, loss = copy.deepcopy((model.net, model.loss), arrays)
    x, y = x[rows], y[rows]
    share = len(x) / of
    with as_told(backend):
        value = loss.forward(net.forward(x), y)
        dscores = loss.backward()
        net.backward(dscores * dscores.dtype.type(share))
    return float(value) * share, {prefix + name: grad for prefix, layer in _layers(net) for name, grad in layer.grads.items()}


def _total(parts: list[tuple[float, dict[str, Any]]]) -> tuple[float, dict[str, Any]]:
    return sum(value for value, _ in parts), {key: add_up([grads[key] for _, grads in parts]) for key in parts[0][1]}
