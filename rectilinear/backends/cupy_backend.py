"""The cupy backend: cuBLAS products (``cupy.matmul``, `cupy_gemm`), the project's CUDA kernels around them, and small layers whole.

Here are launch geometry, argument order and buffers, and no import of CuPy: the array module and the kernels are handed in
(`cupy_loader` hands in the real ones, the tests stand-ins that run the same kernel source on the CPU). What the kernels do, and
the rules they keep, is said in ``kernels/cuda/layers.cu``.

Launches of one affine + ReLU step: three products and two kernels; of a small layer (`cupy_small`) two in all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends import cupy_small
from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.backends.cupy_counters import Counters
from rectilinear.backends.cupy_gemm import LARGEST, strided_gemm
from rectilinear.keepmask import KeepMask, unchecked

# As in layers.cu.
_BLOCK = 256  # threads
_TILE_ROWS = 4  # rows of a tile that one thread takes
_FLAT = 4  # pieces of a flat array that one thread takes
_WIDE_BYTES = 16

_LARGEST_X, _LARGEST_Y = 2**31 - 1, 65535  # of a grid

# Blocks of a column sum. Of the kernels that select three blocks fit on a multiprocessor, 396 on an H100's 132: a column tile
# has at most that many, all at once, so that its last block has few partial sums to add up; several tiles have four rounds of them
# together, so that a round that is not full costs little. A shape decides, not the device: the order of a sum is the shape's alone.
_BLOCKS_AT_ONCE = 3 * 132
_SUM_BLOCKS = 4 * _BLOCKS_AT_ONCE
_ROWS_PER_SUM = 8  # a thread that adds fewer rows is not worth its block

_SOFTMAX_BLOCKS = 1024
_WARP = 32

_BFLOAT16_SINCE = 80  # compute capability times ten

_NULL = np.uintp(0)


class Runtime(NamedTuple):
    """What the backend works with: `cp` is CuPy, `kernels` gives the compiled kernel file for a dtype's name.

    Used of ``cp``: ndarray, empty, asarray, ascontiguousarray, matmul, cuda.Device, and what `cupy_gemm` names. Used of a kernel
    file: get_function.
    """

    cp: Any
    kernels: Callable[[str], Any]


class CupyBackend:
    """See `rectilinear.backends.contract.Backend` for what each primitive is given and gives.

    Parameters
    ----------
    connect : callable
        Returns the `Runtime`; called once, at first use.
    examine : callable
        Given this backend, tells whether it can work here.
    """

    api_version = API_VERSION
    name = "cupy"
    library = "cupy"
    half = True

    def __init__(self, connect: Callable[[], Runtime], examine: Callable[[CupyBackend], Probe]) -> None:
        self._connect = connect
        self._examine = examine
        self._runtime: Runtime | None = None
        self._functions: dict[tuple[str, str], Any] = {}
        self.counters = Counters()

    def probe(self) -> Probe:
        return self._examine(self)

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            self._runtime = self._connect()
        return self._runtime

    # affine

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        with self._on_device_of(x):
            if blocks := _small_forward_blocks(x, w):
                return self._small_forward(x, w, b, None, out, blocks)
            y, z = self._forward_buffers(x, w, out)
            self._product(x, w, z)
            if b is not None or z is not y:
                self._bias("bias_add", z, b, y)
            return _deliver(y, out)

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        with self._on_device_of(x):
            shape = (*x.shape[:-1], w.shape[-1])
            mask = self._empty((*shape[:-1], _cdiv(shape[-1], 8)), np.uint8)
            if blocks := _small_forward_blocks(x, w):
                return self._small_forward(x, w, b, mask, out, blocks), unchecked(mask, shape)
            y, z = self._forward_buffers(x, w, out)
            self._product(x, w, z)
            self._bias("bias_relu_mask", z, b, y, mask)
            return _deliver(y, out), unchecked(mask, shape)

    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        want_dx, want_dw, want_db = wanted
        with self._on_device_of(dout):
            if want_dw and (blocks := _small_backward_blocks(x, w, want_dx)):
                return self._small_backward(dout, x, w, keep, wanted, out, blocks)
            db = None
            if want_db:
                dz, db = self._select_and_sum(dout, keep, want_dx or want_dw, out[2])
            else:
                dz = dout if keep is None else self._relu_backward(dout, keep, None)
            dx = self._gradient(dz, w.swapaxes(-1, -2), out[0]) if want_dx else None
            dw = self._gradient(x.swapaxes(-1, -2), dz, out[1]) if want_dw else None
            return dx, dw, db

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        with self._on_device_of(dout):
            return self._select_and_sum(dout, None, False, out)[1]

    def _forward_buffers(self, x: Array, w: Array, out: Array | None) -> tuple[Array, Array]:
        """y, and z: what the product is written to, which is y itself unless y is narrower than the sums."""
        y = self._result((*x.shape[:-1], w.shape[-1]), x.dtype, out)
        return y, y if _sum_dtype(x.dtype) == x.dtype else self._empty(y.shape, _sum_dtype(x.dtype))

    def _gradient(self, a: Array, b: Array, out: Array | None) -> Array:
        result, wide = self._forward_buffers(a, b, out)
        self._product(a, b, wide)
        if wide is not result:
            self._bias("bias_add", wide, None, result)
        return _deliver(result, out)

    def _product(self, a: Array, b: Array, out: Array) -> None:
        """out = a b, by cuBLAS."""
        if out.size == 0:
            return
        if a.shape[-1] == 0:
            out.fill(0)
            return
        if max(*out.shape, a.shape[-1]) > LARGEST:
            raise ValueError(f"cuBLAS takes extents up to {LARGEST}, not a product of {a.shape} and {b.shape}; split the samples")
        cp = self.runtime.cp
        a, b = _aligned(a, cp), _aligned(b, cp)
        if a.dtype.name == "bfloat16" and int(cp.cuda.Device().compute_capability) < _BFLOAT16_SINCE:
            a, b = a.astype(out.dtype), b.astype(out.dtype)
        if a.dtype == out.dtype and out.ndim == 2:
            cp.matmul(a, b, out=out)
        else:
            strided_gemm(cp, a, b, out)

    def _small_forward(self, x: Array, w: Array, b: Array | None, mask: Array | None, out: Array | None, blocks: int) -> Array:
        """y, and the mask where one is given: then y is relu'd."""
        y = self._result((*x.shape[:-1], w.shape[-1]), x.dtype, out)
        groups, n, m = _extents(y)
        row_bytes = 0 if mask is None else mask.shape[-1]
        x, w = self._contiguous(x), self._contiguous(w)
        pointers = (x, w, _NULL if b is None else self._contiguous(b), y, _NULL if mask is None else mask)
        self._launch("small_forward", 1, y.dtype, _grid(blocks, groups), (_BLOCK,), pointers, (groups, n, x.shape[-1], m, row_bytes))
        return _deliver(y, out)

    def _small_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
        blocks: int,
    ) -> tuple[Array | None, Array | None, Array | None]:
        """dw, and dx and db where they are wanted."""
        dout, x, w = self._contiguous(dout), self._contiguous(x), self._contiguous(w)
        groups, n, m = _extents(dout)
        kernel, selector, row_bytes = self._selector(keep)
        mask, preact = (selector, _NULL) if kernel == "mask_colsum" else (_NULL, selector)
        shapes = (x.shape, w.shape, (*dout.shape[:-2], m))
        results = [self._result(shape, dout.dtype, given) if want else None for shape, given, want in zip(shapes, out, wanted, strict=True)]
        pointers = (dout, mask, preact, x, w, *(_NULL if result is None else result for result in results))
        extents = (groups, n, x.shape[-1], m, row_bytes)
        self._launch("small_backward", 1, dout.dtype, _grid(blocks, groups), (_BLOCK,), pointers, extents)
        dx, dw, db = (result if result is None else _deliver(result, given) for result, given in zip(results, out, strict=True))
        return dx, dw, db

    def _bias(self, name: str, z: Array, b: Array | None, y: Array, mask: Array | None = None) -> None:
        """y = z + b by "bias_add", relu'd and with its mask by "bias_relu_mask". z is in the sums' dtype or, without b, y's; y may be z."""
        groups, rows, cols = _extents(y)
        if y.size == 0:
            return
        b = b if b is None else self._contiguous(b)
        width = _width(y.dtype, cols, z, y, *(() if b is None else (b,)))
        least = max(1, 8 // width) if mask is not None else 1  # threads along x whose bits fill a byte of the mask
        block = _block(cols, width, least)
        tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
        if mask is not None and b is None and z.dtype == y.dtype:
            name = "relu_mask"
        masked = () if mask is None else (mask,)
        row_bytes = () if mask is None else (mask.shape[-1],)
        pointers = (z, _NULL if b is None else b, y, *masked)
        self._launch(name, width, y.dtype, _grid(tiles, groups), block, pointers, (groups, rows, cols, *row_bytes))

    def _select_and_sum(self, dout: Array, keep: Keep | None, want_dz: bool, out: Array | None) -> tuple[Array | None, Array]:
        """dz (dout itself without keep, None if not wanted) and the sum of it over rows."""
        dout = self._contiguous(dout)
        groups, rows, cols = _extents(dout)
        db = self._result((*dout.shape[:-2], cols), dout.dtype, out)
        dz = dout if keep is None else self._empty(dout.shape, dout.dtype) if want_dz else None
        if dout.size == 0:
            db.fill(0)
            return dz, _deliver(db, out)
        name, selector, row_bytes = self._selector(keep)
        arrays = [array for array in (dout, dz) if array is not None]
        width = _width(dout.dtype, cols, *arrays, *(() if name != "preact_colsum" else (selector,)))
        block = _block(cols, width, 1)
        col_tiles = _cdiv(cols, block[0] * width)
        span = _rows_per_block(rows, block[1], groups * col_tiles)
        blocks = _cdiv(rows, span)
        parts = counters = _NULL  # one block writes what it has straight to db
        if blocks > 1:
            parts, counters = self._empty((groups, blocks, cols), _sum_dtype(dout.dtype)), self.counters.current(self.runtime.cp)
        pointers = (dout, selector, _NULL if keep is None or dz is None else dz, parts, counters, db)
        self._launch(name, width, dout.dtype, _grid(col_tiles * blocks, groups), block, pointers, (groups, rows, cols, row_bytes, span))
        return dz, _deliver(db, out)

    def _selector(self, keep: Keep | None) -> tuple[str, Any, int]:
        """Kernel, pointer and bytes per mask row for a kind of keep."""
        if keep is None:
            return "colsum", _NULL, 0
        if isinstance(keep, KeepMask):
            bits = self._contiguous(keep._bits)
            return "mask_colsum", bits, bits.shape[-1]
        return "preact_colsum", self._contiguous(keep), 0

    # ReLU

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        with self._on_device_of(x):
            y = self._result(x.shape, x.dtype, out)
            self._flat("relu", (self._contiguous(x), y))
            return _deliver(y, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        with self._on_device_of(dout):
            return self._relu_backward(dout, keep, out)

    def _relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        dx = self._result(dout.shape, dout.dtype, out)
        dout = self._contiguous(dout)
        if isinstance(keep, KeepMask):
            self._mask_backward(dout, self._contiguous(keep._bits), dx)
        else:
            self._flat("relu_backward", (dout, self._contiguous(keep), dx))
        return _deliver(dx, out)

    def _flat(self, name: str, arrays: tuple[Array, ...]) -> None:
        y = arrays[-1]
        if y.size:
            width = _width(y.dtype, 0, *arrays)
            blocks = min(_cdiv(_cdiv(y.size, width), _BLOCK * _FLAT), _LARGEST_X)
            self._launch(name, width, y.dtype, (blocks,), (_BLOCK,), arrays, (y.size,))

    def _mask_backward(self, dout: Array, bits: Array, dx: Array) -> None:
        cols = dx.shape[-1] if dx.ndim else 1
        if dx.size == 0:
            return
        rows = dx.size // cols
        width = _width(dx.dtype, cols, dout, dx)
        block = _block(cols, width, 1)
        tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
        self._launch("mask_backward", width, dx.dtype, _grid(tiles, 1), block, (dout, bits, dx), (rows, cols, bits.shape[-1]))

    # softmax

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        with self._on_device_of(x):
            n, c = x.shape
            loss = self._empty((), x.dtype)
            dx = self._result(x.shape, x.dtype, out)
            if n == 0:
                loss.fill(np.nan)
                return loss, _deliver(dx, out)
            labels = self._contiguous(y if y.dtype == np.int64 else y.astype(np.int64))
            warps = _BLOCK // _WARP
            blocks = min(_cdiv(n, warps), _SOFTMAX_BLOCKS)
            parts = self._empty((blocks * warps,), _sum_dtype(x.dtype))
            pointers = (self._contiguous(x), labels, dx, parts, self.counters.current(self.runtime.cp), loss)
            self._launch("softmax_loss", 1, x.dtype, (blocks,), (_WARP, warps), pointers, (n, c))
            return loss, _deliver(dx, out)

    # arrays

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        cp = self.runtime.cp
        if isinstance(x, KeepMask):
            return unchecked(cp.asarray(x._bits), x.shape)
        if not isinstance(x, cp.ndarray) and not hasattr(x, "__cuda_array_interface__"):
            x = np.asarray(x)  # CuPy takes no array of a CPU library but NumPy's
        return cp.asarray(x, dtype)

    def to_numpy(self, x: Array) -> Any:
        return unchecked(x._bits.get(), x.shape) if isinstance(x, KeepMask) else x.get()

    def synchronize(self) -> None:
        self.runtime.cp.cuda.Device().synchronize()

    # buffers and launches

    def _on_device_of(self, x: Array) -> AbstractContextManager[Any]:
        """Launches go to the current device and its current stream; the arrays decide which device that is."""
        device: AbstractContextManager[Any] = x.device
        return device

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.runtime.cp.empty(shape, dtype)

    def _result(self, shape: tuple[int, ...], dtype: Any, out: Array | None) -> Array:
        """Where the kernels write: `out` if they can, else an array of its own that `_deliver` copies from."""
        if out is not None and out.flags.c_contiguous and out.data.ptr % out.itemsize == 0:
            return out
        return self._empty(shape, dtype)

    def _contiguous(self, x: Array) -> Array:
        return self.runtime.cp.ascontiguousarray(_aligned(x, self.runtime.cp))

    def _launch(
        self,
        name: str,
        width: int,
        dtype: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        pointers: tuple[Any, ...],
        extents: tuple[int, ...],
    ) -> None:
        key = dtype.name, name if width == 1 else name + "_wide"
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self.runtime.kernels(key[0]).get_function(key[1])
        # CuPy passes what it is given: every extent must be a 64-bit integer here, as it is there.
        function(grid, block, (*pointers, *map(np.int64, extents)))


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or out is result:
        return result
    out[...] = result
    return out


def _aligned(x: Array, cp: Any) -> Array:
    """x, or a copy where its elements lie across their natural boundaries, which no GPU instruction can read."""
    if x.data.ptr % x.itemsize == 0 and all(stride % x.itemsize == 0 for stride in x.strides):
        return x
    as_bytes = cp.ndarray((*x.shape, x.itemsize), np.uint8, x.data, (*x.strides, 1))
    return as_bytes.copy().view(x.dtype).reshape(x.shape)


def _sum_dtype(dtype: Any) -> Any:
    """A of layers.cu."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _extents(y: Array) -> tuple[int, int, int]:
    groups, rows, cols = y.shape if y.ndim == 3 else (1, *y.shape)
    return groups, rows, cols


def _small_forward_blocks(x: Array, w: Array) -> int:
    """Blocks of a small layer's forward; 0 leaves it to cuBLAS, which also takes other strides."""
    if not (x.flags.c_contiguous and w.flags.c_contiguous):
        return 0
    groups, n, d = _extents(x)
    return cupy_small.forward_blocks(cupy_small.Layer(groups, n, d, w.shape[-1]), x.dtype.itemsize)


def _small_backward_blocks(x: Array, w: Array, want_dx: bool) -> int:
    """The same of a backward, for dw and, where wanted, dx."""
    if not (x.flags.c_contiguous and w.flags.c_contiguous):
        return 0
    groups, n, d = _extents(x)
    return cupy_small.backward_blocks(cupy_small.Layer(groups, n, d, w.shape[-1]), x.dtype.itemsize, want_dx)


def _width(dtype: Any, cols: int, *arrays: Array) -> int:
    """Elements that a thread moves at a time: 16 bytes of them, where rows and pointers allow."""
    width: int = _WIDE_BYTES // dtype.itemsize
    return width if cols % width == 0 and all(array.data.ptr % _WIDE_BYTES == 0 for array in arrays) else 1


def _block(cols: int, width: int, least: int) -> tuple[int, int]:
    """Threads along columns, a power of two from `least` to a warp, and along rows. Narrow rows share a warp."""
    x = max(least, min(_WARP, _power_of_2(_cdiv(cols, width))))
    return x, _BLOCK // x


def _rows_per_block(rows: int, threads: int, tiles: int) -> int:
    """Rows that one block of a column sum adds up; all of them where so many tiles, of all groups, fill a GPU."""
    blocks = min(_cdiv(rows, threads * _ROWS_PER_SUM), _BLOCKS_AT_ONCE, _SUM_BLOCKS // tiles)
    return _cdiv(rows, max(1, blocks))


def _grid(blocks: int, groups: int) -> tuple[int, int, int]:
    return min(blocks, _LARGEST_X), min(groups, _LARGEST_Y), _cdiv(groups, _LARGEST_Y)


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
