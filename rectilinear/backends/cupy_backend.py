"""The cupy backend: cuBLAS products (plans of `cupy_lt`, or `cupy_gemm`), and the project's CUDA kernels around them.

Here are launch geometry, argument order and buffers, and no import of CuPy: the array module and the kernels are handed in
(`cupy_loader` hands in the real ones, the tests stand-ins that run the same kernel source on the CPU). What the kernels do, and
the rules they keep, is said in ``kernels/cuda/layers.cu``.

Launches of one affine + ReLU step: three products, one kernel forward, two backward (one where N is small).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.backends.cupy_gemm import Gemm, Operation, Products
from rectilinear.backends.cupy_gemm import aligned as _aligned
from rectilinear.backends.cupy_scratch import Scratches
from rectilinear.keepmask import KeepMask, unchecked

# As in layers.cu.
_BLOCK = 256  # threads
_TILE_ROWS = 4  # rows of a tile that one thread takes
_CHUNK = 32  # rows that one thread adds up into one sum
_WIDE_BYTES = 16

_LARGEST_X, _LARGEST_Y = 2**31 - 1, 65535  # of a grid

# Blocks of a column sum. Enough to fill a large GPU (an H100 holds about a thousand of 256 threads), few enough that the second
# stage, which reads one partial sum of each, stays short. Neither depends on the device: the order of a sum is the shape's alone.
_SUM_BLOCKS, _LEAST_SUM_BLOCKS = 1024, 256
_ROWS_PER_SUM = 8  # a thread that adds fewer rows is not worth its block

_SOFTMAX_BLOCKS = 1024
_WARP = 32

_NULL = np.uintp(0)
_BYTE, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)

_LAUNCHES = 1024  # kept of each family of kernels: a few for each layer shape of a program


class Runtime(NamedTuple):
    """What the backend works with: `cp` is CuPy, `kernels` gives the compiled kernel file for a dtype's name, `products` what multiplies.

    Used of ``cp``: ndarray, empty, asarray, ascontiguousarray, cuda.Device, cuda.runtime.getDevice, and what `cupy_gemm` and `cupy_lt`
    name. Used of a kernel file: get_function.
    """

    cp: Any
    kernels: Callable[[str], Any]
    products: Callable[[Any, Scratches], Products] = Gemm


class Launch(NamedTuple):
    """What a kernel is launched with besides its pointers: worked out once for a shape and an alignment, and kept."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    extents: tuple[np.int64, ...]


class ColumnSum(NamedTuple):
    """Launches of a sum over rows, and the shape of the partial sums between them; without a second launch these are the sum."""

    first: Launch
    parts: tuple[int, ...]
    final: Launch | None


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
        self._functions: dict[tuple[Any, str], Any] = {}
        self.scratches = Scratches()

    def probe(self) -> Probe:
        return self._examine(self)

    @cached_property
    def runtime(self) -> Runtime:
        return self._connect()

    @cached_property
    def products(self) -> Products:
        """Chosen at the first product, since only a call tells whether cuBLASLt works here; asks the current device."""
        return self.runtime.products(self.runtime.cp, self.scratches)

    # affine

    # Launches go to the current device and its current stream, and the arrays decide which device that is. A context manager costs as
    # much as the rest of a call, so it is entered only where another device is current.

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        if self._elsewhere(x):
            with x.device:
                return self.affine_forward(x, w, b, out)
        y, z, b = self._affine(x, w, b, out)
        if b is not None or z is not y:
            self._bias("bias_add", z, b, y)
        return _deliver(y, out)

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        if self._elsewhere(x):
            with x.device:
                return self.affine_relu_forward(x, w, b, out)
        y, z, b = self._affine(x, w, b, out)
        shape = y.shape
        mask = self._empty((*shape[:-1], -(-shape[-1] // 8)), _BYTE)
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
        if self._elsewhere(dout):
            with dout.device:
                return self.affine_backward(dout, x, w, keep, wanted, out)
        want_dx, want_dw, want_db = wanted
        db = None
        if want_db:
            dz, db = self._select_and_sum(dout, keep, want_dx or want_dw, out[2])
        else:
            dz = dout if keep is None else self._relu_backward(dout, keep, None)
        dx = self._gradient("NT", dz, w, x.shape, out[0]) if want_dx else None
        dw = self._gradient("TN", x, dz, w.shape, out[1]) if want_dw else None
        return dx, dw, db

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        if self._elsewhere(dout):
            with dout.device:
                return self.bias_backward(dout, out)
        return self._select_and_sum(dout, None, False, out)[1]

    def _affine(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Array, Array | None]:
        """y, which is still to be filled; z = x w, in y itself unless y is narrower than the sums; the bias that is still to be added."""
        y = self._product_result((*x.shape[:-1], w.shape[-1]), x.dtype, out)
        if self._rounds(x, x.shape[-1]):
            self._product("NN", x, w, y, b)
            return y, y, None
        z = self._wide(y)
        self._product("NN", x, w, z)
        return y, z, b

    def _gradient(self, operation: Operation, a: Array, b: Array, shape: tuple[int, ...], out: Array | None) -> Array:
        result = self._product_result(shape, a.dtype, out)
        wide = result if self._rounds(a, a.shape[-2 if operation == "TN" else -1]) else self._wide(result)
        self._product(operation, a, b, wide)
        if wide is not result:
            self._bias("bias_add", wide, None, result)
        return _deliver(result, out)

    def _rounds(self, x: Array, summed: int) -> bool:
        """Whether products of x are written in its 16 bits, rounded once. An empty sum is no product: its bias is added by a kernel."""
        return x.itemsize == 2 and summed > 0 and self.products.rounds(x)

    def _wide(self, y: Array) -> Array:
        """What a product that is not rounded is written to."""
        return y if y.itemsize > 2 else self._empty(y.shape, _FLOAT32)

    def _product_result(self, shape: tuple[int, ...], dtype: Any, out: Array | None) -> Array:
        """As `_result`, on 16 bytes: no product has another algorithm for an `out` that lies elsewhere."""
        return self._result(shape, dtype, None if out is None or out.data.ptr % _WIDE_BYTES else out)

    def _product(self, operation: Operation, a: Array, b: Array, out: Array, bias: Array | None = None) -> None:
        """out = a b, as `operation` says, + bias where such products are rounded."""
        if out.size == 0:
            return
        if a.shape[-2 if operation == "TN" else -1] == 0:
            out.fill(0)
        else:
            self.products.product(operation, a, b, out, bias)

    def _bias(self, name: str, z: Array, b: Array | None, y: Array, mask: Array | None = None) -> None:
        """y = z + b, by "bias_add"; relu'd with its mask by "bias_relu_mask". z is in the sums' dtype, or without b in y's, and may be y."""
        if y.size == 0:
            return
        pointers: tuple[Any, ...]
        if b is None:
            pointers, aligned = (z, _NULL, y), _wide_aligned(z, y)
        else:
            b = self._contiguous(b)
            pointers, aligned = (z, b, y), _wide_aligned(z, y, b)
        if mask is not None:
            pointers += (mask,)
            name = "relu_mask" if b is None and z.itemsize == y.itemsize else name
        self._launch(_bias_launch(name, y.shape, y.itemsize, aligned), y.dtype, pointers)

    def _select_and_sum(self, dout: Array, keep: Keep | None, want_dz: bool, out: Array | None) -> tuple[Array | None, Array]:
        """dz (dout itself without keep, None if not wanted) and the sum of it over rows."""
        dout = self._contiguous(dout)
        shape, dtype = dout.shape, dout.dtype
        db = self._result((*shape[:-2], shape[-1]), dtype, out)
        dz = dout if keep is None else self._empty(shape, dtype) if want_dz else None
        if dout.size == 0:
            db.fill(0)
            return dz, _deliver(db, out)
        name, selector, row_bytes = self._selector(keep)
        aligned = _wide_aligned(dout) if dz is None else _wide_aligned(dout, dz)
        aligned = aligned and (name != "preact_colsum" or _wide_aligned(selector))
        sums = _sum_dtype(dtype)
        launches = _column_sum(name, shape, dtype.itemsize, aligned, row_bytes)
        parts = db if launches.final is None else self._empty(launches.parts, sums)
        self._launch(launches.first, dtype, (dout, selector, _NULL if keep is None or dz is None else dz, parts))
        if launches.final is not None:
            self._launch(launches.final, dtype, (parts, db))
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
        if self._elsewhere(x):
            with x.device:
                return self.relu_forward(x, out)
        y = self._result(x.shape, x.dtype, out)
        self._flat("relu", (self._contiguous(x), y))
        return _deliver(y, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        if self._elsewhere(dout):
            with dout.device:
                return self.relu_backward(dout, keep, out)
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
            self._launch(_flat_launch(name, y.size, y.itemsize, _wide_aligned(*arrays)), y.dtype, arrays)

    def _mask_backward(self, dout: Array, bits: Array, dx: Array) -> None:
        if dx.size:
            launch = _mask_backward_launch(dx.shape, dx.itemsize, _wide_aligned(dout, dx), bits.shape[-1])
            self._launch(launch, dx.dtype, (dout, bits, dx))

    # softmax

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        if self._elsewhere(x):
            with x.device:
                return self.softmax_loss(x, y, out)
        shape, dtype = x.shape, x.dtype
        loss = self._empty((), dtype)
        dx = self._result(shape, dtype, out)
        if shape[0] == 0:
            loss.fill(np.nan)
            return loss, _deliver(dx, out)
        labels = self._contiguous(y if y.dtype == np.int64 else y.astype(np.int64))
        launches = _softmax_launches(shape)
        parts = self._empty(launches.parts, _sum_dtype(dtype))
        self._launch(launches.first, dtype, (self._contiguous(x), labels, dx, parts))
        self._launch(launches.final, dtype, (parts, loss))
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

    def _elsewhere(self, x: Array) -> bool:
        """Whether another device than that of x is current."""
        return bool(x.data.device_id != self.runtime.cp.cuda.runtime.getDevice())

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self.runtime.cp.empty(shape, dtype)

    def _result(self, shape: tuple[int, ...], dtype: Any, out: Array | None) -> Array:
        """Where the kernels write: `out` if they can, else an array of its own that `_deliver` copies from."""
        return out if out is not None and _plain_layout(out) else self.runtime.cp.empty(shape, dtype)

    def _contiguous(self, x: Array) -> Array:
        return x if _plain_layout(x) else self.runtime.cp.ascontiguousarray(_aligned(x, self.runtime.cp))

    def _launch(self, launch: Launch, dtype: Any, pointers: tuple[Any, ...]) -> None:
        name, grid, block, extents = launch
        function = self._functions.get((dtype, name))
        if function is None:
            function = self._functions[dtype, name] = self.runtime.kernels(dtype.name).get_function(name)
        function(grid, block, pointers + extents)


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or out is result:
        return result
    out[...] = result
    return out


def _plain_layout(x: Array) -> bool:
    """Whether kernels can take x as it is. Its flags would say so too, but they are an object made anew each time, ten times as slow."""
    plain: bool = x._c_contiguous and x.data.ptr % x.itemsize == 0
    return plain


def _wide_aligned(*arrays: Array) -> bool:
    """Whether all begin where a thread may move 16 bytes at a time."""
    addresses = 0
    for array in arrays:
        addresses |= array.data.ptr
    return addresses % _WIDE_BYTES == 0


def _sum_dtype(dtype: Any) -> Any:
    """A of layers.cu."""
    return _FLOAT32 if dtype.itemsize == 2 else dtype


# ---------------------------------------------------------------- geometry


@lru_cache(_LAUNCHES)
def _bias_launch(name: str, shape: tuple[int, ...], itemsize: int, aligned: bool) -> Launch:
    groups, rows, cols = _extents(shape)
    width = _width(itemsize, cols, aligned)
    masked = "mask" in name
    block = _block(cols, width, max(1, 8 // width) if masked else 1)  # threads along x whose bits fill a byte of the mask
    tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
    row_bytes = (_cdiv(cols, 8),) if masked else ()
    return _named(name, width, _grid(tiles, groups), block, (groups, rows, cols, *row_bytes))


@lru_cache(_LAUNCHES)
def _column_sum(name: str, shape: tuple[int, ...], itemsize: int, aligned: bool, row_bytes: int) -> ColumnSum:
    groups, rows, cols = _extents(shape)
    width = _width(itemsize, cols, aligned)
    block = _block(cols, width, 1)
    col_tiles = _cdiv(cols, block[0] * width)
    span = _rows_per_block(rows, block[1], col_tiles)
    blocks = _cdiv(rows, span)
    first = _named(name, width, _grid(col_tiles * blocks, groups), block, (groups, rows, cols, row_bytes, span))
    direct = blocks == 1 and itemsize > 2  # one partial sum is the sum, but for its dtype
    return ColumnSum(first, (groups, blocks, cols), None if direct else _final_sum(groups, blocks, cols))


def _final_sum(groups: int, blocks: int, cols: int) -> Launch:
    # Eight columns a block are a 32-byte sector of a row of float32 partial sums, and leave 32 threads for the rows.
    x = min(8, _power_of_2(cols))
    return _named("colsum_final", 1, _grid(_cdiv(cols, x), groups), (x, _BLOCK // x), (groups, blocks, cols))


@lru_cache(_LAUNCHES)
def _flat_launch(name: str, size: int, itemsize: int, aligned: bool) -> Launch:
    width = _width(itemsize, 0, aligned)
    return _named(name, width, (min(_cdiv(_cdiv(size, width), _BLOCK), _LARGEST_X),), (_BLOCK,), (size,))


@lru_cache(_LAUNCHES)
def _mask_backward_launch(shape: tuple[int, ...], itemsize: int, aligned: bool, row_bytes: int) -> Launch:
    cols = shape[-1] if shape else 1
    rows = math.prod(shape) // cols
    width = _width(itemsize, cols, aligned)
    block = _block(cols, width, 1)
    tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
    return _named("mask_backward", width, _grid(tiles, 1), block, (rows, cols, row_bytes))


@lru_cache(_LAUNCHES)
def _softmax_launches(shape: tuple[int, int]) -> ColumnSum:
    warps = _BLOCK // _WARP
    blocks = min(_cdiv(shape[0], warps), _SOFTMAX_BLOCKS)
    first = _named("softmax_loss", 1, (blocks,), (_WARP, warps), shape)
    return ColumnSum(first, (blocks * warps,), _final_sum(1, blocks * warps, 1))


def _named(name: str, width: int, grid: tuple[int, ...], block: tuple[int, ...], extents: tuple[int, ...]) -> Launch:
    # CuPy passes what it is given: every extent must be a 64-bit integer here, as it is there.
    return Launch(name if width == 1 else name + "_wide", grid, block, tuple(map(np.int64, extents)))


def _extents(shape: tuple[int, ...]) -> tuple[int, int, int]:
    groups, rows, cols = shape if len(shape) == 3 else (1, *shape)
    return groups, rows, cols


def _width(itemsize: int, cols: int, aligned: bool) -> int:
    """Elements that a thread moves at a time: 16 bytes of them, where rows and pointers allow."""
    width = _WIDE_BYTES // itemsize
    return width if aligned and cols % width == 0 else 1


def _block(cols: int, width: int, least: int) -> tuple[int, int]:
    """Threads along columns, a power of two from `least` to a warp, and along rows. Narrow rows share a warp."""
    x = max(least, min(_WARP, _power_of_2(_cdiv(cols, width))))
    return x, _BLOCK // x


def _rows_per_block(rows: int, threads: int, col_tiles: int) -> int:
    """Rows that one block of a column sum adds up; all of them where a single chunk a thread does it, which saves the second stage."""
    if rows <= threads * _CHUNK:
        return rows
    blocks = min(_cdiv(rows, threads * _ROWS_PER_SUM), max(_LEAST_SUM_BLOCKS, _SUM_BLOCKS // col_tiles))
    return _cdiv(rows, blocks)


def _grid(blocks: int, groups: int) -> tuple[int, int, int]:
    return min(blocks, _LARGEST_X), min(groups, _LARGEST_Y), _cdiv(groups, _LARGEST_Y)


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
