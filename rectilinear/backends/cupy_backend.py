"""The cupy backend: cuBLAS products (plans of `cupy_lt`, or `cupy_gemm`), the project's CUDA kernels around them, and small layers whole.

Here are launch geometry, argument order and buffers, and no import of CuPy: the array module and the kernels are handed in
(`cupy_loader` hands in the real ones, the tests stand-ins that run the same kernel source on the CPU). What the kernels do, and
the rules they keep, is said in ``kernels/cuda/layers.cu``.

Launches of one affine + ReLU step: three products and two kernels; of a small layer (`cupy_small`) two kernels in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends import cupy_small
from rectilinear.backends.contract import API_VERSION, Array, Keep, Probe, Wanted
from rectilinear.backends.cupy_gemm import Gemm, Operation, Products
from rectilinear.backends.cupy_gemm import aligned as _aligned
from rectilinear.backends.cupy_scratch import Scratches
from rectilinear.keepmask import KeepMask, unchecked

# As in layers.cu.
_BLOCK = 256  # threads
_TILE_ROWS = 4  # rows of a tile that one thread takes
_FLAT = 4  # pieces of a flat array that one thread takes
_STEP_PIECES = 2  # of each of a parameter's arrays
_WIDE_BYTES = 16

_LARGEST_X, _LARGEST_Y = 2**31 - 1, 65535  # of a grid

# Blocks of a column sum, in multiples of an H100's 132 multiprocessors, of which two fit on one, as they were quickest there
# (docs/gpu.md): of one column tile, whose last block adds up what all have left; and of all tiles, three rounds of them where the kernel
# writes too. A shape decides, not the device: the order of a sum is the shape's alone.
_TILE_BLOCKS = 3 * 132
_SUM_BLOCKS, _SELECT_BLOCKS = 2 * 132, 6 * 132
_ROWS_PER_SUM = 8  # a thread that adds fewer rows is not worth its block
_SUM_WIDTH = 16  # threads along columns, at most, that move 16 bytes each

_COUNTERS = max(_SELECT_BLOCKS // 2, cupy_small.MOST_SHARED)  # that a launch may need: one for each tile with more than one block

_SOFTMAX_BLOCKS = 1024
_WARP = 32

_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})

_BYTE, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)

_TOGETHER_BYTES = 4 << 20  # results of one call that share an allocation, which takes the host 1.4 us on an H100 where an array takes 4.5
_BOUNDARY = 512  # bytes; what CuPy's pool gives each array

_LAUNCHES = 1024  # kept of each family of kernels: a few for each layer shape of a program


class Runtime(NamedTuple):
    """What the backend works with: `cp` is CuPy, `kernels` gives the compiled kernel file for a dtype's name, `products` what multiplies.

    `number` makes an argument of a kernel of a 64-bit integer, and `null` is the address 0 for one. CuPy converts NumPy's numbers at
    every launch, half a microsecond each on the host of an H100.

    Used of ``cp``: ndarray, empty, asarray, ascontiguousarray, cuda.Device, cuda.alloc, cuda.get_current_stream, cuda.runtime.getDevice,
    and what `cupy_gemm`, `cupy_lt` and `cupy_scratch` name. Used of a kernel file: get_function.
    """

    cp: Any
    kernels: Callable[[str], Any]
    products: Callable[[Any, Scratches], Products] = Gemm
    number: Callable[[int], Any] = np.int64
    null: Any = np.uintp(0)


class Launch(NamedTuple):
    """What a kernel is launched with besides its pointers."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    extents: tuple[int, ...]


class Together(NamedTuple):
    """One allocation for arrays that belong together: its bytes, 0 where each is to have its own, and where each begins."""

    nbytes: int
    places: tuple[int, ...]


class Forward(NamedTuple):
    """Shapes of an output and of the bits of its mask, and how they lie in one allocation; where the layer is a small one, the launch that
    does all of it and the bytes that its blocks leave to one another."""

    shape: tuple[int, ...]
    mask_shape: tuple[int, ...]
    together: Together
    small: Launch | None
    left: int


class Backward(NamedTuple):
    """Shapes of dx, dw and db, None of what is not wanted; the rest as in `Forward`."""

    shapes: tuple[tuple[int, ...] | None, ...]
    together: Together
    small: Launch | None
    left: int


class ColumnSum(NamedTuple):
    """A sum over rows: the shape of the result, and the bytes of the partial sums that the last block adds up, where there are several.

    Without a launch there is nothing to add.
    """

    shape: tuple[int, ...]
    launch: Launch | None = None
    parts: int = 0


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
        self._forward = self._kept(forward)
        self._backward = self._kept(backward)
        self._bias_launch = self._kept(bias_launch)
        self._column_sum = self._kept(column_sum)
        self._flat_launch = self._kept(flat_launch)
        self._mask_backward_launch = self._kept(mask_backward_launch)
        self._softmax = self._kept(softmax)
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

    @cached_property
    def _empty(self) -> Callable[[tuple[int, ...], Any], Array]:
        return self.runtime.cp.empty  # type: ignore[no-any-return]

    @cached_property
    def _array_at(self) -> Callable[[tuple[int, ...], Any, Any], Array]:
        """Of a shape and a dtype, in given memory."""
        return self.runtime.cp.ndarray  # type: ignore[no-any-return]

    @cached_property
    def _alloc(self) -> Callable[[int], Any]:
        return self.runtime.cp.cuda.alloc  # type: ignore[no-any-return]

    @cached_property
    def _null(self) -> Any:
        return self.runtime.null

    @cached_property
    def _current_stream(self) -> Callable[[], Any]:
        return self.runtime.cp.cuda.get_current_stream  # type: ignore[no-any-return]

    @cached_property
    def _current_device(self) -> Callable[[], int]:
        return self.runtime.cp.cuda.runtime.getDevice  # type: ignore[no-any-return]

    # affine

    # Launches go to the current device and its current stream, and the arrays decide which device that is. A context manager costs as
    # much as the rest of a call, so it is entered only where another device is current.

    def affine_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        if x.data.device_id != self._current_device():
            with x.device:
                return self.affine_forward(x, w, b, out)
        dtype = x.dtype
        shape, _, _, small, left = self._forward(dtype, x.shape, w.shape)
        if small is not None and x._c_contiguous and w._c_contiguous:
            y = self._empty(shape, dtype) if out is None else self._result(shape, dtype, out)
            self._small_forward(small, left, x, w, b, y, None)
            return y if out is None else _deliver(y, out)
        y = self._empty(shape, dtype) if out is None else self._product_result(shape, dtype, out)
        z = y
        if dtype.itemsize > 2:
            self._product("NN", x, w, z)
        else:
            z, b = self._half_affine(x, w, b, y)
        if b is not None or z is not y:
            self._bias("bias_add", z, b, y)
        return y if out is None else _deliver(y, out)

    def affine_relu_forward(self, x: Array, w: Array, b: Array | None, out: Array | None) -> tuple[Array, Keep]:
        if x.data.device_id != self._current_device():
            with x.device:
                return self.affine_relu_forward(x, w, b, out)
        dtype = x.dtype
        shape, mask_shape, (nbytes, places), small, left = self._forward(dtype, x.shape, w.shape)
        whole = small is not None and x._c_contiguous and w._c_contiguous
        if nbytes and out is None:
            memory = self._alloc(nbytes)
            y, mask = self._array_at(shape, dtype, memory), self._array_at(mask_shape, _BYTE, memory + places[1])
        else:
            writable = self._result if whole else self._product_result
            y = self._empty(shape, dtype) if out is None else writable(shape, dtype, out)
            mask = self._empty(mask_shape, _BYTE)
        if whole:
            self._small_forward(small, left, x, w, b, y, mask)
        else:
            z = y
            if dtype.itemsize > 2:
                self._product("NN", x, w, z)
            else:
                z, b = self._half_affine(x, w, b, y)
            self._bias("bias_relu_mask", z, b, y, mask)
        return y if out is None else _deliver(y, out), unchecked(mask, shape)

    def affine_backward(
        self,
        dout: Array,
        x: Array,
        w: Array,
        keep: Keep | None,
        wanted: Wanted,
        out: tuple[Array | None, Array | None, Array | None],
    ) -> tuple[Array | None, Array | None, Array | None]:
        if dout.data.device_id != self._current_device():
            with dout.device:
                return self.affine_backward(dout, x, w, keep, wanted, out)
        dtype = dout.dtype
        kept = "" if keep is None else "mask_" if isinstance(keep, KeepMask) else "preact_"
        row_bytes = keep._bits.shape[-1] if isinstance(keep, KeepMask) else 0
        shapes, (nbytes, places), small, left = self._backward(dtype, x.shape, w.shape, wanted, kept, row_bytes)
        to_dx, to_dw, to_db = out
        fresh = nbytes > 0 and to_dx is None and to_dw is None and to_db is None
        if fresh:
            memory, array = self._alloc(nbytes), self._array_at
            (of_dx, of_dw, of_db), (at_dx, at_dw, at_db) = shapes, places
            to_dx = None if of_dx is None else array(of_dx, dtype, memory + at_dx)
            to_dw = None if of_dw is None else array(of_dw, dtype, memory + at_dw)
            to_db = None if of_db is None else array(of_db, dtype, memory + at_db)
        if small is not None and x._c_contiguous and w._c_contiguous:
            if fresh:
                results = to_dx, to_dw, to_db
                self._small_backward(small, left, dout, x, w, keep, results)
                return results
            of_dx, of_dw, of_db = shapes
            dx, dw, db = self._result(of_dx, dtype, to_dx), self._result(of_dw, dtype, to_dw), self._result(of_db, dtype, to_db)
            self._small_backward(small, left, dout, x, w, keep, (dx, dw, db))
            return _deliver(dx, to_dx), _deliver(dw, to_dw), _deliver(db, to_db)
        want_dx, want_dw, want_db = wanted
        db = None
        if want_db:
            dz, db = self._select_and_sum(dout, keep, want_dx or want_dw, to_db)
        else:
            dz = dout if keep is None else self._relu_backward(dout, keep, None)
        dx = self._gradient("NT", dz, w, shapes[0], to_dx) if want_dx else None
        dw = self._gradient("TN", x, dz, shapes[1], to_dw) if want_dw else None
        return dx, dw, db

    def bias_backward(self, dout: Array, out: Array | None) -> Array:
        if dout.data.device_id != self._current_device():
            with dout.device:
                return self.bias_backward(dout, out)
        return self._select_and_sum(dout, None, False, out)[1]

    # Small layers: x and w are contiguous, since cuBLAS takes other strides as they are, and here they would be copied.

    def _small_forward(self, launch: Any, left: int, x: Array, w: Array, b: Array | None, y: Array, mask: Array | None) -> None:
        """Fill y; with a mask to fill, after ReLU."""
        start, extents = launch
        if (x.data.ptr | w.data.ptr) % x.itemsize:
            x, w = self._contiguous(x), self._contiguous(w)
        bias = self._null if b is None else self._contiguous(b)
        parts, counters = self._shared(x, left) if left else (self._null, self._null)
        start((x, w, bias, y, self._null if mask is None else mask, parts, counters, *extents))

    def _small_backward(
        self, launch: Any, left: int, dout: Array, x: Array, w: Array, keep: Keep | None, results: tuple[Array | None, Array, Array | None]
    ) -> None:
        """Fill dw, and dx and db where they are wanted."""
        (start, extents), (dx, dw, db) = launch, results
        if (x.data.ptr | w.data.ptr) % x.itemsize:
            x, w = self._contiguous(x), self._contiguous(w)
        selector = self._null if keep is None else self._contiguous(keep._bits if isinstance(keep, KeepMask) else keep)
        at_dx, at_db = self._null if dx is None else dx, self._null if db is None else db
        parts, counters = self._shared(dout, left) if left else (self._null, self._null)
        start((self._contiguous(dout), selector, x, w, at_dx, dw, at_db, parts, counters, *extents))

    # Other layers: products, and kernels around them.

    def _half_affine(self, x: Array, w: Array, b: Array | None, y: Array) -> tuple[Array, Array | None]:
        """Of 16-bit x and w: z = x w, in y itself where it can be rounded, and the bias that is still to be added."""
        if self._rounds(x, x.shape[-1]) and y.size and (b is None or self.products.adds(x, w, b)):
            self._product("NN", x, w, y, b)
            return y, None
        z = self._empty(y.shape, _FLOAT32)
        self._product("NN", x, w, z)
        return z, b

    def _gradient(self, operation: Operation, a: Array, b: Array, shape: tuple[int, ...], out: Array | None) -> Array:
        dtype = a.dtype
        result = self._empty(shape, dtype) if out is None else self._product_result(shape, dtype, out)
        narrow = dtype.itemsize == 2 and not self._rounds(a, a.shape[-2 if operation == "TN" else -1])
        sums = self._empty(shape, _FLOAT32) if narrow else result
        self._product(operation, a, b, sums)
        if sums is not result:
            self._bias("bias_add", sums, None, result)
        return result if out is None else _deliver(result, out)

    def _rounds(self, x: Array, summed: int) -> bool:
        """Whether products of x are written in its 16 bits, rounded once. An empty sum is no product: its bias is added by a kernel."""
        return summed > 0 and self.products.rounds(x)

    def _product_result(self, shape: tuple[int, ...], dtype: Any, out: Array | None) -> Array:
        """As `_result`, on 16 bytes: no product has another algorithm for an `out` that lies elsewhere."""
        lies_well = out is not None and out._c_contiguous and out.data.ptr % _WIDE_BYTES == 0
        return out if lies_well else self._empty(shape, dtype)

    def _product(self, operation: Operation, a: Array, b: Array, out: Array, bias: Array | None = None) -> None:
        """out = a b, as `operation` says, + bias where the product can add it."""
        if out.size == 0:
            return
        if a.shape[-2 if operation == "TN" else -1] == 0:
            out.fill(0)
        else:
            self.products.product(operation, a, b, out, bias)

    def _bias(self, name: str, z: Array, b: Array | None, y: Array, mask: Array | None = None) -> None:
        """y = z + b, by "bias_add"; then ReLU and mask, by "bias_relu_mask". z has the sums' dtype, or without b y's, and may be y."""
        shape, dtype = y.shape, y.dtype
        if 0 in shape:
            return
        addresses = y.data.ptr if z is y else z.data.ptr | y.data.ptr
        if b is not None:
            address = b.data.ptr
            if not b._c_contiguous or address % dtype.itemsize:
                b = self._contiguous(b)
                address = b.data.ptr
            addresses |= address
        elif mask is not None and z.itemsize == dtype.itemsize:
            name = "relu_mask"
        start, extents = self._bias_launch(dtype, name, shape, addresses % _WIDE_BYTES == 0)
        bias = self._null if b is None else b
        start(((z, bias, y) if mask is None else (z, bias, y, mask)) + extents)

    def _select_and_sum(self, dout: Array, keep: Keep | None, want_dz: bool, out: Array | None) -> tuple[Array | None, Array]:
        """dz (dout itself without keep, None if not wanted) and the sum of it over rows."""
        dout = self._contiguous(dout)
        shape, dtype, addresses = dout.shape, dout.dtype, dout.data.ptr
        dz: Any = None
        if keep is None:
            name, selector, row_bytes, dz = "colsum", self._null, 0, dout
        else:
            if isinstance(keep, KeepMask):
                selector = self._contiguous(keep._bits)
                name, row_bytes = "mask_colsum", selector.shape[-1]
            else:
                selector = self._contiguous(keep)
                name, row_bytes = "preact_colsum", 0
                addresses |= selector.data.ptr
            if want_dz:
                dz = self._empty(shape, dtype)
                addresses |= dz.data.ptr
        db_shape, launch, left = self._column_sum(dtype, name, shape, addresses % _WIDE_BYTES == 0, row_bytes)
        db = self._empty(db_shape, dtype) if out is None else self._result(db_shape, dtype, out)
        if launch is None:
            db.fill(0)
        else:
            parts, counters = self._shared(dout, left) if left else (self._null, self._null)
            start, extents = launch
            start((dout, selector, self._null if dz is None or dz is dout else dz, parts, counters, db, *extents))
        return dz, db if out is None else _deliver(db, out)

    def _shared(self, x: Array, left: int) -> tuple[Any, Any]:
        """What blocks leave to the last of them, so many bytes, and counters of them; for a launch on the current stream, of x's device.

        To be held until the launch, since another thread on this stream may ask for more.
        """
        scratch = self.scratches.current(self.runtime.cp, x.data.device_id, self._current_stream().ptr)
        counters = scratch.counters(_COUNTERS)
        return scratch.workspace(left), counters

    # ReLU

    def relu_forward(self, x: Array, out: Array | None) -> Array:
        if x.data.device_id != self._current_device():
            with x.device:
                return self.relu_forward(x, out)
        y = self._result(x.shape, x.dtype, out)
        self._flat("relu", (self._contiguous(x), y))
        return y if out is None else _deliver(y, out)

    def relu_backward(self, dout: Array, keep: Keep, out: Array | None) -> Array:
        if dout.data.device_id != self._current_device():
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
            start, extents = self._flat_launch(y.dtype, name, y.size, _wide_aligned(*arrays))
            start((*arrays, *extents))

    def _mask_backward(self, dout: Array, bits: Array, dx: Array) -> None:
        if dx.size:
            start, extents = self._mask_backward_launch(dx.dtype, dx.shape, _wide_aligned(dout, dx), bits.shape[-1])
            start((dout, bits, dx, *extents))

    # softmax

    def softmax_loss(self, x: Array, y: Array, out: Array | None) -> tuple[Array, Array]:
        if x.data.device_id != self._current_device():
            with x.device:
                return self.softmax_loss(x, y, out)
        shape, dtype = x.shape, x.dtype
        loss = self._empty((), dtype)
        dx = self._result(shape, dtype, out)
        if shape[0] == 0:
            loss.fill(np.nan)
            return loss, _deliver(dx, out)
        labels = self._contiguous(y if y.dtype == np.int64 else y.astype(np.int64))
        launch, left = self._softmax(dtype, shape)
        parts, counters = self._shared(x, left)
        start, extents = launch
        start((self._contiguous(x), labels, dx, parts, counters, loss, *extents))
        return loss, _deliver(dx, out)

    # SGD

    def sgd_step(
        self,
        w: tuple[Any, ...],
        dw: tuple[Any, ...],
        v: tuple[Any, ...],
        decayed: int,
        lr: Any,
        momentum: Any,
        weight_decay: Any,
    ) -> bool | None:
        """See `rectilinear.backends.contract.SGDStep`: a launch a parameter. Takes C-contiguous arrays of one dtype on one device."""
        first = w[0]
        if type(first) is not self.runtime.cp.ndarray:
            return None
        if first.data.device_id != self._current_device():
            with first.device:
                return self.sgd_step(w, dw, v, decayed, lr, momentum, weight_decay)
        if not _move_apart(w, dw, v):
            return None
        dtype = first.dtype
        number = _sum_dtype(dtype).type
        zero = number(0)
        # What is no float is a number on the GPU, of a step that is recorded.
        (lr_at, lr), (momentum_at, momentum), decay = (
            (self._null, number(rate)) if type(rate) is float else (rate, zero) for rate in (lr, momentum, weight_decay)
        )
        for i, (weight, gradient, velocity) in enumerate(zip(w, dw, v or (self._null,) * len(w), strict=True)):
            if weight.size:
                aligned = _wide_aligned(weight, gradient) and (velocity is self._null or _wide_aligned(velocity))
                start, extents = self._flat_launch(dtype, "sgd_step", weight.size, aligned)
                decay_at, own_decay = decay if i < decayed else (self._null, zero)
                start((gradient, weight, velocity, lr_at, momentum_at, decay_at, lr, momentum, own_decay, *extents))
        return False

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

    def _result(self, shape: tuple[int, ...] | None, dtype: Any, out: Array | None) -> Any:
        """Where the kernels write: `out` if there is one and they can, else fresh memory that `_deliver` copies from; None of no shape."""
        if shape is None or (out is not None and out._c_contiguous and out.data.ptr % out.itemsize == 0):
            return out
        return self._empty(shape, dtype)

    def _contiguous(self, x: Array) -> Array:
        # Flags would say so too, but they are an object made anew each time, ten times as slow.
        if x._c_contiguous and x.data.ptr % x.itemsize == 0:
            return x
        return self.runtime.cp.ascontiguousarray(_aligned(x, self.runtime.cp))

    def _kept(self, geometry: Callable[..., Any]) -> Callable[..., Any]:
        """What `geometry` says of an item size and other things, asked by dtype and remembered; its launches ready to start.

        A `Launch` becomes what takes all arguments of the kernel as a tuple and starts it, and the extents that are the last of them.
        """

        def ready(part: Any, dtype: Any) -> Any:
            if isinstance(part, Launch):
                function = self.runtime.kernels(dtype.name).get_function(part.name)
                return partial(function, part.grid, part.block), tuple(map(self.runtime.number, part.extents))
            return part

        def bound(dtype: Any, *of: Any) -> Any:
            made = geometry(dtype.itemsize, *of)
            return ready(made, dtype) if isinstance(made, Launch) else tuple(ready(part, dtype) for part in made)

        return lru_cache(_LAUNCHES)(bound)


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or out is result:
        return result
    out[...] = result
    return out


def _move_apart(w: tuple[Array, ...], dw: tuple[Any, ...], v: tuple[Any, ...]) -> bool:
    """Whether a kernel can move all of w, and v, in place: arrays of one kind, dtype and device, C-contiguous, none on another's memory."""
    kind, dtype, device = type(w[0]), w[0].dtype, w[0].data.device_id
    if dtype.name not in _DTYPES:
        return False
    arrays = (*w, *dw, *v)
    for i, array in enumerate(arrays):
        if (
            type(array) is not kind
            or array.dtype is not dtype
            or array.data.device_id != device
            or array.shape != w[i % len(w)].shape
            or not array._c_contiguous
            or array.data.ptr % dtype.itemsize
        ):
            return False
    places = sorted((array.data.ptr, array.data.ptr + array.nbytes) for array in arrays if array.size)
    return all(end <= start for (_, end), (start, _) in pairwise(places))


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


def forward(itemsize: int, x: tuple[int, ...], w: tuple[int, ...]) -> Forward:
    shape, row_bytes = (*x[:-1], w[-1]), _cdiv(w[-1], 8)
    layer = _layer(x, w)
    sharing = cupy_small.share_forward(layer, itemsize)
    mask_shape = (*shape[:-1], row_bytes)
    together = _together(math.prod(shape) * itemsize, math.prod(mask_shape))
    return Forward(shape, mask_shape, together, *_small("small_forward", sharing, layer, row_bytes, 1))


def backward(itemsize: int, x: tuple[int, ...], w: tuple[int, ...], wanted: Wanted, kept: str, row_bytes: int) -> Backward:
    layer = _layer(x, w)
    want_dx, want_dw, _ = wanted
    sharing = cupy_small.share_backward(layer, itemsize, want_dx) if want_dw else None
    shapes = x, w, (*w[:-2], w[-1])
    wanted_shapes = tuple(shape if want else None for shape, want in zip(shapes, wanted, strict=True))
    together = _together(*(want * math.prod(shape) * itemsize for shape, want in zip(shapes, wanted, strict=True)))
    return Backward(wanted_shapes, together, *_small(kept + "small_backward", sharing, layer, row_bytes, 2))


def _together(*nbytes: int) -> Together:
    """Arrays of so many bytes in one allocation, which lives as long as any of them: only small ones."""
    places, end = [], 0
    for each in nbytes:
        places.append(end)
        end += _cdiv(each, _BOUNDARY) * _BOUNDARY
    return Together(end if end <= _TOGETHER_BYTES else 0, tuple(places))


def _small(
    name: str, sharing: cupy_small.Sharing | None, layer: cupy_small.Layer, row_bytes: int, products: int
) -> tuple[Launch | None, int]:
    """The launch of a small layer's kernel for so many products, and the bytes that its blocks leave; no launch where it is none."""
    if sharing is None:
        return None, 0
    spans = (*sharing.spans, *(layer.m,) * (products - len(sharing.spans)))
    launch = _named(name, 1, _grid(sharing.blocks, layer.groups), (_BLOCK,), (*layer, row_bytes, *spans))
    return launch, sharing.left * 4


def _layer(x: tuple[int, ...], w: tuple[int, ...]) -> cupy_small.Layer:
    return cupy_small.Layer(*_extents(x), w[-1])


def bias_launch(itemsize: int, name: str, shape: tuple[int, ...], aligned: bool) -> Launch:
    groups, rows, cols = _extents(shape)
    width = _width(itemsize, cols, aligned)
    masked = "mask" in name
    least = max(1, 8 // width) if masked else 1  # threads along x whose bits fill a byte of the mask
    # A wide block writes whole sectors of the mask, 32 bytes, in float32 too: 2 % quicker on an H100.
    block = _block(cols, width, least, _BLOCK if width > 1 else _WARP)
    tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
    row_bytes = (_cdiv(cols, 8),) if masked else ()
    return _named(name, width, _grid(tiles, groups), block, (groups, rows, cols, *row_bytes))


def column_sum(itemsize: int, name: str, shape: tuple[int, ...], aligned: bool, row_bytes: int) -> ColumnSum:
    groups, rows, cols = _extents(shape)
    sums = (*shape[:-2], cols)
    if groups * rows * cols == 0:
        return ColumnSum(sums)
    width = _width(itemsize, cols, aligned)
    block = _block(cols, width, 1, _SUM_WIDTH if width > 1 else _WARP)
    col_tiles = _cdiv(cols, block[0] * width)
    blocks = _blocks_of_sum(rows, block[1], groups * col_tiles, _SUM_BLOCKS if name == "colsum" else _SELECT_BLOCKS)
    launch = _named(name, width, _grid(col_tiles * blocks, groups), block, (groups, rows, cols, row_bytes, blocks))
    return ColumnSum(sums, launch, groups * blocks * cols * max(itemsize, 4) if blocks > 1 else 0)


def flat_launch(itemsize: int, name: str, size: int, aligned: bool) -> Launch:
    width, pieces = _width(itemsize, 0, aligned), _STEP_PIECES if name == "sgd_step" else _FLAT
    return _named(name, width, (min(_cdiv(_cdiv(size, width), _BLOCK * pieces), _LARGEST_X),), (_BLOCK,), (size,))


def mask_backward_launch(itemsize: int, shape: tuple[int, ...], aligned: bool, row_bytes: int) -> Launch:
    cols = shape[-1]
    rows = math.prod(shape) // cols
    width = _width(itemsize, cols, aligned)
    block = _block(cols, width, 1)
    tiles = _cdiv(cols, block[0] * width) * _cdiv(rows, block[1] * _TILE_ROWS)
    return _named("mask_backward", width, _grid(tiles, 1), block, (rows, cols, row_bytes))


def softmax(itemsize: int, shape: tuple[int, int]) -> tuple[Launch, int]:
    """The launch, and the bytes of the partial losses that its last block adds up."""
    warps = _BLOCK // _WARP
    blocks = min(_cdiv(shape[0], warps), _SOFTMAX_BLOCKS)
    return _named("softmax_loss", 1, (blocks,), (_WARP, warps), shape), blocks * warps * max(itemsize, 4)


def _named(name: str, width: int, grid: tuple[int, ...], block: tuple[int, ...], extents: tuple[int, ...]) -> Launch:
    return Launch(name if width == 1 else name + "_wide", grid, block, extents)


def _extents(shape: tuple[int, ...]) -> tuple[int, int, int]:
    groups, rows, cols = shape if len(shape) == 3 else (1, *shape)
    return groups, rows, cols


def _width(itemsize: int, cols: int, aligned: bool) -> int:
    """Elements that a thread moves at a time: 16 bytes of them, where rows and pointers allow."""
    width = _WIDE_BYTES // itemsize
    return width if aligned and cols % width == 0 else 1


def _block(cols: int, width: int, least: int, most: int = _WARP) -> tuple[int, int]:
    """Threads along columns, a power of two from `least` to `most`, and along rows. Narrow rows share a warp.

    Beyond a warp, no more than leave none without a column.
    """
    pieces = _cdiv(cols, width)
    x = max(least, min(most, _power_of_2(pieces)))
    while x > _WARP and pieces % x:
        x //= 2
    return x, _BLOCK // x


def _blocks_of_sum(rows: int, threads: int, tiles: int, together: int) -> int:
    """Blocks that add up a column tile; one where so many tiles, of all groups, fill a GPU."""
    return max(1, min(_cdiv(rows, threads * _ROWS_PER_SUM), _TILE_BLOCKS, together // tiles))


def _grid(blocks: int, groups: int) -> tuple[int, int, int]:
    return min(blocks, _LARGEST_X), min(groups, _LARGEST_Y), _cdiv(groups, _LARGEST_Y)


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
