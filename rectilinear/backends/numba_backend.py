"""The numba backend: fused kernels for NumPy arrays, compiled for the processor at hand.

What is here: results, scratch memory and the choice of kernel by layout. The kernels are in `rectilinear.kernels`; numba is
imported when the first one is needed, and kernels compile, or come from the cache on disk, as they are called.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.keepmask import KeepMask
from rectilinear.kernels.results import empty
from rectilinear.kernels.scratch import with_scratch
from rectilinear.threads import get_num_threads

_RELU = 2  # rectilinear.kernels.tile.RELU, whose module would import llvmlite
_NO_MASK, _BY_Z, _BY_BITS = 0, 1, 2


class NumbaBackend:
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives."""

    api_version = API_VERSION
    name = "numba"
    library = "numpy"
    half = False

    def probe(self) -> Probe:
        try:
            import numba
        except ImportError as error:
            return Probe(False, f"numba cannot be imported ({error}); install it, for example with pip install rectilinear[numba]")
        except Exception as error:  # numba checks NumPy's version, llvmlite its library, with errors of their own
            return Probe(False, f"numba is installed but broken ({error}); reinstall numba and llvmlite")
        if numba.config.DISABLE_JIT:
            return Probe(False, "NUMBA_DISABLE_JIT is set, and these kernels are compiled or nothing; unset it", numba.__version__)
        try:
            from rectilinear.kernels.library import describe_host

            simd = describe_host()
        except Exception as error:
            return Probe(False, f"numba cannot compile for this processor ({error}); reinstall numba and llvmlite", numba.__version__)
        return Probe(True, version=numba.__version__, device="cpu", threads=get_num_threads(), simd=simd)

    # Affine, with ReLU or without.

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        result = _result((*x.shape[:-1], w.shape[-1]), x.dtype, out)
        self._forward(x, w, b, id(result), 0, 0)
        return _delivered(result, out)

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        shape = (*x.shape[:-1], m := w.shape[-1])
        result = _result(shape, x.dtype, out)
        bits = np.empty((*shape[:-1], (m + 7) >> 3), np.uint8)
        self._forward(x, w, b, id(result), id(bits), _RELU)
        return result if out is None else _delivered(result, out), KeepMask(bits, shape)

    def _forward(self, x: Array, w: Array, b: Array | None, out: int, bits: int, relu: int) -> None:
        kernel = _passes().affine_forward(x.itemsize)
        # Small calls need no scratch memory, and save fetching it.
        answer = kernel(id(x), id(w), 0 if b is None else id(b), out, bits, relu, 0, 0, get_num_threads())
        if answer:
            b = None if b is None else np.ascontiguousarray(b)  # what the kernel asks for by an answer below 0
            _call(kernel, id(x), id(w), _id(b), out, bits, relu)

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
            kind, mask = _BY_BITS, keep.bits
            if mask.strides[-1] != 1:
                mask = np.ascontiguousarray(mask)
        elif keep is not None:
            kind, mask = _BY_Z, keep
        kernel, dtype = _passes().affine_backward(x.itemsize), x.dtype
        dx = _result(x.shape, dtype, out[0]) if wanted[0] else None
        dw = _result(w.shape, dtype, out[1]) if wanted[1] else None
        db = _result((*w.shape[:-2], w.shape[-1]), dtype, out[2]) if wanted[2] else None
        _call(kernel, id(dout), _id(mask), kind, id(x), id(w), _id(dx), _id(dw), _id(db))
        if out[0] is None and out[1] is None and out[2] is None:
            return dx, dw, db
        return _delivered(dx, out[0]), _delivered(dw, out[1]), _delivered(db, out[2])

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        result = np.empty((*dout.shape[:-2], dout.shape[-1]), dout.dtype) if out is None else out
        _call(_passes().bias_reduction(dout.itemsize), id(dout), id(result))
        return result

    # ReLU.

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        return self._relu(x, x, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        if not isinstance(keep, KeepMask):
            return self._relu(dout, keep, out)
        dout_rows = dout if _in_rows(dout) else np.ascontiguousarray(dout)
        result = _result(dout.shape, dout.dtype, out)
        bits = keep.bits if _in_rows(keep.bits) else np.ascontiguousarray(keep.bits)
        _, over_bits, _ = _passes().relu(dout.itemsize)
        for index in np.ndindex(dout.shape[:-2]):
            source, mask, target = dout_rows[index], bits[index], result[index]
            over_bits(id(source), id(mask), id(target), get_num_threads())
        return _delivered(result, out)

    def _relu(self, x: Array, keep: Array, out: Array | None) -> Array:
        in_c, in_f = x.flags.c_contiguous and keep.flags.c_contiguous, x.flags.f_contiguous and keep.flags.f_contiguous
        if out is None:
            out = empty(x.shape[::-1], x.dtype).T if in_f and not in_c else empty(x.shape, x.dtype)
        over_run, _, over_rows = _passes().relu(x.itemsize)
        if (in_c and out.flags.c_contiguous) or (in_f and out.flags.f_contiguous):
            over_run(x.size, id(x), id(keep), id(out), get_num_threads())
            return out
        two = (np.atleast_2d(x), np.atleast_2d(keep), np.atleast_2d(out))
        for index in np.ndindex(two[0].shape[:-2]):
            source, mask, target = (array[index] for array in two)
            over_rows(id(source), id(mask), id(target), get_num_threads())
        return out

    # Softmax.

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        dx = _result(x.shape, x.dtype, out)
        loss = np.full((), np.nan)
        if x.shape[0] > 0:
            labels = np.ascontiguousarray(y, np.int64)
            _call(_passes().softmax_loss(x.itemsize), id(x), id(labels), id(dx), id(loss))
        return x.dtype.type(loss), _delivered(dx, out)

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
        from rectilinear.kernels import passes

        _loaded_passes = passes
    return _loaded_passes


_loaded_passes: Any = None


def _call(kernel: Any, *arguments: int) -> None:
    with_scratch(kernel, arguments, get_num_threads())


def _id(array: Array | None) -> int:
    return 0 if array is None else id(array)


def _in_rows(array: Array) -> bool:
    """Whether elements of a row lie side by side, as the kernels store them."""
    return bool(array.strides[-1] == array.itemsize or array.shape[-1] <= 1)


def _result(shape: tuple[int, ...], dtype: Any, out: Array | None) -> Array:
    """Where a kernel puts a result: `out` itself if its rows allow, else a fresh array."""
    return empty(shape, dtype) if out is None or not _in_rows(out) else out


def _delivered(result: Array | None, out: Array | None) -> Array | None:
    if out is None or result is out:
        return result
    out[...] = result
    return out
