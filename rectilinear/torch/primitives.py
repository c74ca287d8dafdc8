"""From tensors to a backend's primitives and back, without a copy. Nothing here knows of autograd, and nothing is checked.

Operands are ``x`` (n, d), ``weight`` (m, d) and ``bias`` (m,) or None, of one native dtype and device. The kernels take w = weight.T, which
is in Fortran order, as it lies there, and write dw in that layout. Tensors of a CPU go to the backend that is chosen for NumPy
arrays; those of a GPU to the cupy backend, on PyTorch's current stream.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch

from rectilinear.backends import registry
from rectilinear.backends.contract import Backend, Keep, Wanted
from rectilinear.buffers import empty
from rectilinear.errors import BackendError
from rectilinear.keepmask import KeepMask, unchecked
from rectilinear.threads import team

Tensor: TypeAlias = Any
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]

_tensor = torch.from_numpy


def backend_for(x: Tensor) -> Backend | None:
    """The backend that serves tensors of x's device; None where PyTorch has to."""
    if x.is_cpu:
        backend = registry.active()
        return backend if backend.library == "numpy" else None
    if x.is_cuda:
        try:
            return registry.serving("cupy")
        except BackendError:
            return None
    return None


def _openmp() -> tuple[int, int]:
    """The addresses of what starts a team of PyTorch's OpenMP threads, and of what tells each its number; 0 where PyTorch has none, or none
    that is started so."""
    for library in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        with suppress(OSError, AttributeError):
            # Looked up in what PyTorch itself is linked to: a process may have loaded OpenMP more than once.
            pytorchs = ctypes.CDLL(str(library))
            start, number = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (pytorchs.GOMP_parallel, pytorchs.omp_get_thread_num))
            return start, number
    return 0, 0


_start, team.number = _openmp()


def _forget_threads() -> None:
    """OpenMP's threads are not there in a forked process, and GNU's would be waited for without end; the kernels' own pool starts anew."""
    global _start
    _start = team.start = team.at_most = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _on_pytorchs_threads(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run the kernels on the threads that PyTorch's operations use, and on no more of them. Those spin for milliseconds after each, and
    would keep the processors from threads of our own."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        team.start, team.at_most = _start, torch.get_num_threads()
        try:
            return function(*args, **kwargs)
        finally:
            team.start = team.at_most = 0

    return call


@_on_pytorchs_threads
def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Keep | None]:
    """``x weight.T + bias``, with ReLU if asked for, and then what backward has to know of it."""
    if x.is_cuda:
        return _forward_on_device(x, weight, bias, relu)
    backend = registry.active()
    samples, w, b = x.numpy(force=True), weight.numpy(force=True).T, None if bias is None else bias.numpy(force=True)
    if relu:
        out, keep = backend.affine_relu_forward(samples, w, b, None)
        return _tensor(out), keep
    return _tensor(backend.affine_forward(samples, w, b, None)), None


@_on_pytorchs_threads
def backward(dout: Tensor, x: Tensor, weight: Tensor, keep: Keep | None, needs: Sequence[bool]) -> Gradients:
    """The gradients of x, weight and bias that are needed."""
    want_dx, want_dw, want_db = needs
    if x.is_cuda:
        return _backward_on_device(dout, x, weight, keep, (want_dx, want_dw, want_db))
    samples, w = x.numpy(force=True), weight.numpy(force=True).T
    d_weight = empty(w.shape[::-1], samples.dtype) if want_dw else None
    dx, _, db = registry.active().affine_backward(
        dout.numpy(force=True),
        samples,
        w,
        keep,
        (want_dx, want_dw, want_db),
        (None, None if d_weight is None else d_weight.T, None),
    )
    return (
        None if dx is None else _tensor(dx),
        None if d_weight is None else _tensor(d_weight),
        None if db is None else _tensor(db),
    )


@_on_pytorchs_threads
def relu_forward(x: Tensor) -> Tensor:
    out = _laid_out_like(x)
    if x.is_cuda:
        with _device(x) as (backend, view):
            backend.relu_forward(view(x), view(out))
        return out
    result = registry.active().relu_forward(x.numpy(force=True), None if out is None else out.numpy())
    return _tensor(_base(result)) if out is None else out


@_on_pytorchs_threads
def relu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = _laid_out_like(x)
    if x.is_cuda:
        with _device(x) as (backend, view):
            backend.relu_backward(view(dout), view(x), view(dx))
        return dx
    result = registry.active().relu_backward(dout.numpy(force=True), x.numpy(force=True), None if dx is None else dx.numpy())
    return _tensor(_base(result)) if dx is None else dx


def _laid_out_like(x: Tensor) -> Tensor | None:
    """For a result with x's strides, as PyTorch's own elementwise operations have; None where a backend makes one by itself."""
    return torch.empty_like(x, requires_grad=False) if x.is_cuda or not x.is_contiguous() or x.numel() == 0 else None


def _base(result: Any) -> np.ndarray:
    """A backend's result as an array; NumPy's ufuncs make scalars of what has no axes."""
    return np.asarray(result)


def as_tensor(keep: Any) -> Tensor:
    """The bits of what a ReLU kept, for autograd to save: the same whatever a backend keeps, which may be z."""
    bits = keep.bits if isinstance(keep, KeepMask) else np.packbits(~(keep < 0), axis=-1, bitorder="little")
    return _tensor(bits) if isinstance(bits, np.ndarray) else torch.as_tensor(bits, device=f"cuda:{bits.device.id}")


def as_keep(bits: Tensor, shape: Sequence[int]) -> KeepMask:
    """Those bits, of a result of this shape, as backends take them."""
    if bits.is_cuda:
        import cupy as cp

        return unchecked(cp.asarray(bits), tuple(shape))
    return unchecked(bits.numpy(), tuple(shape))


def kept(bits: Tensor, columns: int) -> Tensor:
    """Those bits (n, ceil(m / 8)) as a bool tensor (n, m), in PyTorch's own operations."""
    spread = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (spread & 1).flatten(1)[:, :columns].bool()


# On a GPU. Results are PyTorch's memory, so that its allocator knows which stream uses them.


@contextmanager
def _device(x: Tensor) -> Iterator[tuple[Backend, Any]]:
    """The cupy backend on PyTorch's current stream, and what makes a CuPy array of a tensor's memory."""
    import cupy as cp

    with cp.cuda.Device(x.device.index), cp.cuda.ExternalStream(torch.cuda.current_stream(x.device).cuda_stream):
        yield registry.serving("cupy"), lambda t: None if t is None else cp.asarray(t.detach())


def _forward_on_device(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Keep | None]:
    out = x.new_empty((x.shape[0], weight.shape[0]))
    with _device(x) as (backend, view):
        if relu:
            return out, backend.affine_relu_forward(view(x), view(weight.T), view(bias), view(out))[1]
        backend.affine_forward(view(x), view(weight.T), view(bias), view(out))
    return out, None


def _backward_on_device(dout: Tensor, x: Tensor, weight: Tensor, keep: Keep | None, wanted: Wanted) -> Gradients:
    shapes = x.shape, weight.shape, weight.shape[:1]
    dx, dw, db = (x.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True))
    with _device(x) as (backend, view):
        outs = view(dx), None if dw is None else view(dw.T), view(db)
        backend.affine_backward(view(dout), view(x), view(weight.T), keep, wanted, outs)
    return dx, dw, db
