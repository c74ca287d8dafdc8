"""The numba backend: fused kernels for NumPy arrays, compiled for the processor at hand.

What is here: results, scratch memory and the choice of kernel by layout. The kernels are in `rectilinear.kernels`; numba is
imported when the first one is needed, and kernels compile, or come from the cache on disk, as they are called.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.backends.generic import may_underflow
from rectilinear.backends.numpy_backend import NumpyBackend
from rectilinear.buffers import empty, with_scratch
from rectilinear.extras import how_to_install
from rectilinear.keepmask import KeepMask, unchecked
from rectilinear.kernels.runtime import forks, numba_private
from rectilinear.threads import call_threads, get_num_threads

_RELU = 2  # rectilinear.kernels.micro.tile.RELU, whose module would import llvmlite
_BYTE = np.dtype(np.uint8)  # made already, it saves np.empty 40 ns
_NATIVE = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
_NO_MASK, _BY_Z, _BY_BITS = 0, 1, 2


class NumbaBackend:
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives."""

    api_version = API_VERSION
    name = "numba"
    library = "numpy"
    half = False
    _has_pool = False

    def probe(self) -> Probe:
        if forks.frozen:
            return Probe(True, reason=f"{forks.WHY}: NumPy computes", device="cpu")
        with forks.loading():
            return self._probe()

    def _probe(self) -> Probe:
        try:
            import numba
        except ImportError as error:
            return Probe(False, f"numba cannot be imported ({error}); install it: {how_to_install('numba')}")
        except Exception as error:  # numba checks NumPy's version, llvmlite its library, with errors of their own
            return Probe(False, f"numba is installed but broken ({error}); reinstall numba and llvmlite")
        if numba.config.DISABLE_JIT:
            return Probe(False, "NUMBA_DISABLE_JIT is set, and these kernels are compiled or nothing; unset it", numba.__version__)
        try:
            unfit = numba_private.unfit()
            if unfit is not None:
                return Probe(False, unfit, numba.__version__)
            from rectilinear.kernels.micro.library import describe_host
            from rectilinear.kernels.runtime import symbols

            simd, no_pool = describe_host(), symbols.why_no_pool()
        except Exception as error:
            return Probe(False, f"numba cannot compile for this processor ({error}); reinstall numba and llvmlite", numba.__version__)
        self._has_pool = no_pool is None
        note = None if no_pool is None else f"runs on one thread: {no_pool}"
        return Probe(True, note, version=numba.__version__, device="cpu", simd=simd)

    def threads(self) -> int:
        chosen = get_num_threads()
        return chosen if self._has_pool else 1

    # Affine, with ReLU or without.

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        shape = (*x.shape[:-1], w.shape[-1])
        result = empty(shape, x.dtype) if out is None else _in_place(out)
        self._forward(x, w, b, id(result), 0, 0)
        return result if out is None or out is result else _delivered(result, out)

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        shape = (*x.shape[:-1], m := w.shape[-1])
        result = empty(shape, x.dtype) if out is None else _in_place(out)
        bits = np.empty((*shape[:-1], (m + 7) >> 3), _BYTE)
        self._forward(x, w, b, id(result), id(bits), _RELU)
        return result if out is None or out is result else _delivered(result, out), unchecked(bits, shape)

    def _forward(self, x: Array, w: Array, b: Array | None, out: int, bits: int, relu: int) -> None:
        kernel = _passes().affine_forward[x.itemsize]
        # Small calls need no scratch memory, and save fetching it.
        answer = kernel(id(x), id(w), 0 if b is None else id(b), out, bits, relu, 0, 0, call_threads())
        if answer:
            b = None if b is None else np.ascontiguousarray(b)  # one answer is SCATTERED, which asks for it
            _finished(with_scratch(kernel, id(x), id(w), 0 if b is None else id(b), out, bits, relu))

    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        kind, mask = _NO_MASK, None
        if isinstance(keep, KeepMask):
            kind, mask = _BY_BITS, keep._bits
            if mask.strides[-1] != 1:
                mask = np.ascontiguousarray(mask)
        elif keep is not None:
            kind, mask = _BY_Z, keep
        dtype, (want_dx, want_dw, want_db), (to_dx, to_dw, to_db) = x.dtype, wanted, out
        dx = dw = db = None
        if want_dx:
            dx = empty(x.shape, dtype) if to_dx is None else _in_place(to_dx)
        if want_dw:
            dw = empty(w.shape, dtype) if to_dw is None else to_dw if _in_columns(to_dw) else _in_place(to_dw)
        if want_db:
            db = empty((*w.shape[:-2], w.shape[-1]), dtype) if to_db is None else _in_place(to_db)
        answer = with_scratch(
            _passes().affine_backward[x.itemsize],
            id(dout),
            0 if mask is None else id(mask),
            kind,
            id(x),
            id(w),
            0 if dx is None else id(dx),
            0 if dw is None else id(dw),
            0 if db is None else id(db),
        )
        if answer:
            _finished(answer)
        return (
            dx if dx is to_dx or to_dx is None else _delivered(dx, to_dx),
            dw if dw is to_dw or to_dw is None else _delivered(dw, to_dw),
            db if db is to_db or to_db is None else _delivered(db, to_db),
        )

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        result = np.empty(dout.shape[:-2] + dout.shape[-1:], dout.dtype) if out is None else out
        _finished(with_scratch(_passes().bias_reduction[dout.itemsize], id(dout), id(result)))
        return result

    # ReLU.

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        return self._relu(x, x, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        if not isinstance(keep, KeepMask):
            return self._relu(dout, keep, out)
        dout_rows = dout if _in_rows(dout) else np.ascontiguousarray(dout)
        result = empty(dout.shape, dout.dtype) if out is None else _in_place(out)
        bits = keep._bits if _in_rows(keep._bits) else np.ascontiguousarray(keep._bits)
        _, over_bits, _ = _passes().relu[dout.itemsize]
        for index in np.ndindex(dout.shape[:-2]):
            source, mask, target = dout_rows[index], bits[index], result[index]
            _finished(over_bits(id(source), id(mask), id(target), call_threads()))
        return _delivered(result, out)

    def _relu(self, x: Array, keep: Array, out: Array | None) -> Array:
        flags, kept = x.flags, keep.flags
        in_c, in_f = flags.c_contiguous and kept.c_contiguous, flags.f_contiguous and kept.f_contiguous
        if out is None:
            out = empty(x.shape, x.dtype) if in_c or not in_f else empty(x.shape[::-1], x.dtype).T
        over_run, _, over_rows = _passes().relu[x.itemsize]
        flags = out.flags
        if (in_c and flags.c_contiguous) or (in_f and flags.f_contiguous):
            _finished(over_run(id(x), id(keep), id(out), call_threads()))
            return out
        two = (np.atleast_2d(x), np.atleast_2d(keep), np.atleast_2d(out))
        for index in np.ndindex(two[0].shape[:-2]):
            source, mask, target = (array[index] for array in two)
            _finished(over_rows(id(source), id(mask), id(target), call_threads()))
        return out

    # Softmax.

    @may_underflow
    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        dx = empty(x.shape, x.dtype) if out is None else _in_place(out)
        loss = np.full((), np.nan)
        if x.shape[0] > 0:
            labels = np.ascontiguousarray(y, np.int64)
            _finished(with_scratch(_passes().softmax_loss[x.itemsize], id(x), id(labels), id(dx), id(loss)))
        return x.dtype.type(loss), _delivered(dx, out)

    # Parameters.

    def sgd_step(
        self,
        w: tuple[Any, ...],
        dw: tuple[Any, ...],
        v: tuple[Any, ...],
        decayed: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> bool | None:
        """See `rectilinear.backends.contract.SGDStep`. Takes arrays whose elements lie side by side, w, dw and v in one same order."""
        first = w[0]
        if type(first) is not np.ndarray or first.dtype not in _NATIVE:
            return None
        try:
            kernel = _passes().sgd[first.itemsize]
            answer = kernel(id(w), id(dw), id(v), decayed, lr, momentum, weight_decay, call_threads())
        except forks.CannotCompileError:
            return None
        return None if answer < 0 else bool(answer)

    # Arrays.

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return x

    def synchronize(self) -> None:
        """Kernels have returned when their results are there."""


def _passes() -> Any:
    global _loaded_passes
    if _loaded_passes is None:
        if forks.frozen:
            raise forks.CannotCompileError
        with forks.loading():
            from rectilinear.kernels.loops import passes

            _loaded_passes = passes
    return _loaded_passes


_loaded_passes: Any = None


def _finished(answer: int) -> None:
    """Look at what a pass answered."""
    if answer:  # kernels.runtime.memory.CHANGED
        raise RuntimeError("an argument's shape was changed by another thread in the middle of the call; nothing was computed")


def _or_numpy(primitive: str) -> Any:
    """The primitive as it is, or NumPy's where it would have to compile."""
    compiled, plain = getattr(NumbaBackend, primitive), getattr(NumpyBackend(), primitive)

    def serve(self: NumbaBackend, *operands: Any) -> Any:
        try:
            return compiled(self, *operands)
        except forks.CannotCompileError:
            return plain(*operands)

    return serve


_compiles = True


def _after_fork_in_child() -> None:
    global _compiles
    if forks.frozen and _compiles:
        _compiles = False
        for primitive in (
            "affine_forward",
            "affine_relu_forward",
            "affine_backward",
            "bias_backward",
            "relu_forward",
            "relu_backward",
            "softmax_loss",
        ):
            setattr(NumbaBackend, primitive, _or_numpy(primitive))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _in_rows(array: Array) -> bool:
    """Whether elements of a row lie side by side, as the kernels store them."""
    return bool(array.strides[-1] == array.itemsize or array.shape[-1] <= 1)


def _in_columns(array: Array) -> bool:
    """Whether elements of a column lie side by side, as the kernels can store dw."""
    return bool(array.strides[-2] == array.itemsize and array.shape[-2] > 1)


def _in_place(out: Array) -> Array:
    """Where a kernel puts a result that is to go to `out`: there, if its rows allow, else a fresh array for `_delivered` to copy."""
    return out if out.flags.c_contiguous or _in_rows(out) else empty(out.shape, out.dtype)


def _delivered(result: Array | None, out: Array | None) -> Array | None:
    if out is None or result is out:
        return result
    out[...] = result
    return out
