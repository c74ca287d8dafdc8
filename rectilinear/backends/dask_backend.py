"""The dask backend: arrays in chunks of rows, and the chosen backend's kernels on each chunk, where it lies.

A pass is one task a chunk: it runs a layer function on the chunk, under the backend that was chosen when the layer function was called
(where nobody has chosen, under what the worker's own process would take). Chunks of NumPy are so served by numba or numpy, chunks of CuPy
by cupy. w and b go to the workers whole, once. dw and db are added up in a tree whose order depends on the chunks alone, so that the
bits are the same for any number of workers.

Nothing is computed here: what goes in and comes out are dask arrays. Chunks along features or outputs are merged first; where extents
other than the number of rows are unknown, the generic backend's way serves, operation by operation.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isnan
from typing import Any

import numpy as np

from rectilinear import layers
from rectilinear.backends import registry
from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.backends.generic import GenericBackend
from rectilinear.extras import lacks
from rectilinear.keepmask import KeepMask
from rectilinear.threads import chosen_threads, num_threads

FAN_IN = 8
"""Partial sums that one task adds up. Fewer mean more tasks, more have to be in one worker's memory at once; docs/scaling.md."""


class DaskBackend(GenericBackend):
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives. `keep` is an int8 array of +1 and -1."""

    api_version = API_VERSION
    name = "dask"
    library = "dask"
    half = False
    numpy_operands = frozenset({"w", "b"})
    any_keep = True

    def probe(self) -> Probe:
        from importlib.metadata import version

        absent = lacks("dask", "dask")
        if absent:
            return Probe(False, absent)
        return Probe(True, version=version("dask"), device="the workers'")

    # affine

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        if not _by_rows(x, w, b):
            return super().affine_forward(x, _lazy(w), _lazy(b), out)
        g = "g" * (x.ndim - 2)
        return _blockwise(_affine, g + "nm", _whole(x, -1), g + "nd", *_parameters(w, b, g), like=x, backend=chosen())

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        if not _by_rows(x, w, b):
            z = self.affine_forward(x, w, b, None)
            return self.relu_forward(z, out), z
        g = "g" * (x.ndim - 2)
        both = _blockwise(_affine_relu, g + "n", _whole(x, -1), g + "nd", *_parameters(w, b, g), like=None, backend=chosen())
        m = {"m": w.shape[-1]}
        return _picked(both, 0, g + "n", g + "nm", m, x), _picked(both, 1, g + "n", g + "nm", m, x, np.int8)

    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        if not _by_rows(x, w, dout) or (keep is not None and not _by_rows(keep)):
            grads: tuple[Any, Any, Any] = super().affine_backward(dout, x, _lazy(w), keep, wanted, out)
            return grads
        g = "g" * (x.ndim - 2)
        keeps = (None, None) if keep is None else (_whole(keep, -1), g + "nm")
        operands = _whole(dout, -1), g + "nm", _whole(x, -1), g + "nd", _whole(_lazy(w), -1, -2), g + "dm", *keeps
        if wanted == (True, False, False):
            return _blockwise(_input_gradient, g + "nd", *operands, like=dout, backend=chosen()), None, None
        # With d and m among its axes, of one chunk each, dask sees that what makes keep can be part of the same task.
        parts = _blockwise(_gradients, g + "ndm", *operands, like=None, wanted=wanted, backend=chosen())
        total = _sum(parts, x.ndim - 2)
        d, m = {"d": w.shape[-2]}, {"m": w.shape[-1]}
        return (
            _picked(parts, 0, g + "ndm", g + "nd", {}, dout) if wanted[0] else None,
            _picked(total, 1, g, g + "dm", d | m, dout) if wanted[1] else None,
            _picked(total, 2, g, g + "m", m, dout) if wanted[2] else None,
        )

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        if not _by_rows(dout):
            return super().bias_backward(dout, out)
        g = "g" * (dout.ndim - 2)
        parts = _blockwise(_bias_gradient, g + "n", _whole(dout, -1), g + "nm", like=None, backend=chosen())
        return _picked(_sum(parts, dout.ndim - 2), 1, g, g + "m", {"m": dout.shape[-1]}, dout)

    # ReLU

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        index = tuple(range(x.ndim))
        return _blockwise(_relu, index, x, index, like=x, backend=chosen())

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        index = tuple(range(dout.ndim))
        return _blockwise(_relu_gradient, index, dout, index, keep, index, like=dout, backend=chosen())

    # softmax

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        n = x.shape[0]
        if isnan(n) or isnan(y.shape[0]) or not _by_rows(x):
            loss, dx = super().softmax_loss(x, y, out)
            return loss, dx
        both = _blockwise(_softmax, "n", _whole(x, -1), "nc", y, "n", like=None, n=n, backend=chosen())
        return _picked(_sum(both, 0), 1, "", "", {}, x), _picked(both, 0, "n", "nc", {"c": x.shape[1]}, x)

    # arrays

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        import dask.array as da

        return da.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return np.asarray(x)


# ---------------------------------------------------------------- the graph


def _by_rows(*arrays: Array | None) -> bool:
    """Whether all extents but the number of rows are known."""
    return not any(isnan(extent) for x in arrays if x is not None for i, extent in enumerate(x.shape) if i != x.ndim - 2 or x.ndim < 2)


def _lazy(x: Array | None) -> Array | None:
    """NumPy's w or b as a dask array of one chunk: a copy, for the caller may change it before anything is computed."""
    import dask.array as da

    return da.from_array(np.array(x), chunks=-1) if isinstance(x, np.ndarray) else x


def _whole(x: Array, *axes: int) -> Array:
    """x with one chunk along these axes."""
    axes = tuple(axis % x.ndim for axis in axes)
    return x if all(x.numblocks[axis] == 1 for axis in axes) else x.rechunk(dict.fromkeys(axes, -1))


def _parameters(w: Array, b: Array | None, g: str) -> tuple[Any, ...]:
    return _whole(_lazy(w), -1, -2), g + "dm", *((None, None) if b is None else (_whole(_lazy(b), -1), g + "m"))


def _blockwise(function: Any, index: Any, *operands: Any, like: Array | None, **options: Any) -> Array:
    """`function` on each chunk; its result is an array of `like`'s kind and dtype, or a tuple of arrays."""
    import dask.array as da
    from dask.array.utils import meta_from_array

    meta = np.empty((0,) * len(index), object) if like is None else meta_from_array(like._meta, ndim=len(index), dtype=like.dtype)
    return da.blockwise(function, index, *operands, meta=meta, dtype=meta.dtype, **options)


def _picked(tuples: Array, i: int, index: str, wanted: str, extents: dict[str, Any], like: Array, dtype: Any = None) -> Array:
    """Element i of each tuple as an array of its own, whose axes that tuples have not got are `extents`."""
    import dask.array as da
    from dask.array.utils import meta_from_array

    meta = meta_from_array(like._meta, ndim=len(wanted), dtype=dtype or like.dtype)
    return da.blockwise(_pick, wanted, tuples, index, i, None, new_axes=extents, meta=meta, dtype=meta.dtype)


def _sum(tuples: Array, axis: int) -> Array:
    """The elementwise sum of tuples over an axis of chunks, the last that has many, by a tree of fixed order.

    First elements, a chunk's own, are left out.
    """
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    name = f"sum-{tokenize(tuples.name)}"
    graph: dict[Any, Any] = {}
    ones = (0,) * (tuples.ndim - axis - 1)
    for group in np.ndindex(tuples.numblocks[:axis]):
        level: list[Any] = [(tuples.name, *group, i, *ones) for i in range(tuples.numblocks[axis])]
        while True:
            parts = [level[i : i + FAN_IN] for i in range(0, len(level), FAN_IN)]
            if len(parts) == 1:
                graph[name, *group] = (_add, parts[0])
                break
            level = [(f"partial-{name}", len(level), *group, i) for i in range(len(parts))]
            graph.update((key, (_add, part)) for key, part in zip(level, parts, strict=True))
    meta = np.empty((0,) * axis, object)
    return da.Array(HighLevelGraph.from_collections(name, graph, dependencies=[tuples]), name, tuples.chunks[:axis], meta=meta)


def chosen() -> str | None:
    """Name of the backend that somebody has chosen here and now."""
    chosen = registry.choice()
    return None if chosen.chosen_by == "auto" else chosen.name


# ---------------------------------------------------------------- what runs where a chunk lies


@contextmanager
def as_told(backend: str | None) -> Iterator[None]:
    """Under the chosen backend, on one thread a task, for Dask runs as many tasks at once as it was given threads.

    Only where it runs none beside this one, in the main thread of a process that no pool started, are all cores the task's. Whoever set a
    number of threads in the worker's process is obeyed.
    """
    alone = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(registry.use_backend(backend))
        if not alone and not chosen_threads():
            stack.enter_context(num_threads(1))
        yield


def _block(x: Any, like: Any = None) -> Any:
    """The chunk, which comes in a list for each axis that the result has not got; where `like` lies."""
    while isinstance(x, list):
        (x,) = x
    if like is not None and isinstance(x, np.ndarray) and not isinstance(like, np.ndarray):
        x = registry.serving(type(like).__module__.partition(".")[0]).asarray(x)
    return x


def _pick(made: Any, i: int) -> Any:
    return _block(made)[i]


def _add(tuples: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return None, *(None if parts[0] is None else add_up(parts) for parts in list(zip(*tuples, strict=True))[1:])


def add_up(parts: Sequence[Any]) -> Any:
    """The sum of arrays, from the first to the last."""
    if len(parts) == 1:
        return parts[0]
    with np.errstate(under="ignore"):
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
    return total


def _affine(x: Any, w: Any, b: Any, *, backend: str | None) -> Any:
    x = _block(x)
    with as_told(backend):
        return layers.affine_forward(x, _block(w, x), _block(b, x))[0]


def _affine_relu(x: Any, w: Any, b: Any, *, backend: str | None) -> tuple[Any, Any]:
    x = _block(x)
    with as_told(backend):
        out, (_, keep) = layers.affine_relu_forward(x, _block(w, x), _block(b, x))
    return out, keep._signs() if isinstance(keep, KeepMask) else 1 - 2 * (keep < 0).astype(np.int8)


def _gradients(dout: Any, x: Any, w: Any, keep: Any, *, wanted: Wanted, backend: str | None) -> tuple[Any, ...]:
    dout, x, keep = _block(dout), _block(x), _block(keep)
    affine = x, _block(w, x), _any_bias(dout)
    with as_told(backend):
        if keep is None:
            return layers.affine_backward(dout, affine, needs=wanted)
        if type(keep) is np.ndarray:  # the kernels read bits with less waiting than bytes, and packing takes next to no time
            keep = KeepMask(np.packbits(~(keep < 0), axis=-1, bitorder="little"), keep.shape)
        return layers.affine_relu_backward(dout, (affine, keep), needs=wanted)


def _input_gradient(dout: Any, x: Any, w: Any, keep: Any, *, backend: str | None) -> Any:
    return _gradients(dout, x, w, keep, wanted=(True, False, False), backend=backend)[0]


def _bias_gradient(dout: Any, *, backend: str | None) -> tuple[Any, ...]:
    dout = _block(dout)
    b = _any_bias(dout)
    with as_told(backend):
        db = layers.affine_backward(dout, (dout[..., :0], b[..., None, :][..., :0, :], b), needs=(False, False, True))[2]
    return None, db


def _any_bias(dout: Any) -> Any:
    """Something of b's shape and kind, for the layer functions to know that there was one."""
    return dout[..., :1, :].sum(axis=-2, dtype=dout.dtype)


def _relu(x: Any, *, backend: str | None) -> Any:
    with as_told(backend):
        return layers.relu_forward(x)[0]


def _relu_gradient(dout: Any, keep: Any, *, backend: str | None) -> Any:
    with as_told(backend):
        return layers.relu_backward(dout, keep)


def _softmax(x: Any, y: Any, *, n: int, backend: str | None) -> tuple[Any, Any]:
    """(dx, this chunk's share of the loss)."""
    x = _block(x)
    y = _block(y, x)
    wrong = (y < 0) | (y >= x.shape[1])
    with as_told(backend):
        loss, dx = layers.softmax_loss(x, y * ~wrong)
    dx *= x.dtype.type(len(x) / n) if n else 1
    dx[wrong] = np.nan
    if n:
        loss = loss * x.dtype.type(len(x) / n) if len(x) else x.dtype.type(0)
    return dx, loss + x.dtype.type(np.nan) if wrong.any() else loss
