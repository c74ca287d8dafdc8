"""Tests only: the part of CuPy that the backend touches, on NumPy memory.

It refuses what CuPy refuses (implicit conversion to NumPy, mixing with NumPy arrays), refuses what on a GPU would wait for the
device without a word, fills fresh and freed memory with 0xff (NaN), and counts products and copies. `test_standin` holds every name
here against the real CuPy. A green run on it says nothing about cuBLAS, streams or speed.

What a device does goes through `device_work`: at once, or, where the current stream is captured, into a graph, as calls on bare
addresses that keep no array alive. Memory comes from pools and is never given back to the system, so that a graph which reads or
writes memory that is not its own any more does harm that a test can see.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np


class Device:
    """`cupy.cuda.Device`: the current one without a number."""

    _current = threading.local()

    def __init__(self, device: int | None = None) -> None:
        self.id = device if device is not None else getattr(self._current, "id", 0)
        self._outer: list[int] = []

    def __enter__(self) -> Device:
        self._outer.append(getattr(self._current, "id", 0))
        self._current.id = self.id
        return self

    def __exit__(self, *args: object) -> None:
        self._current.id = self._outer.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    compute_capability = "90"

    def use(self) -> None:
        self._current.id = self.id

    def synchronize(self) -> None:
        pass


class MemoryPointer:
    """`cupy.cuda.MemoryPointer`, as far as it is used."""

    def __init__(self, ptr: int, owner: Any, device_id: int = 0) -> None:
        self.ptr, self.owner, self.device_id = ptr, owner, device_id

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.ptr + offset, self.owner, self.device_id)

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Any = None) -> None:
        target, source = (_bytes_at(pointer.ptr, size) for pointer in (self, src))
        device_work(lambda: np.copyto(target, source))


# ---------------------------------------------------------------- memory

_BLOCK = 512  # bytes, as CuPy rounds
_GUARDED = hasattr(ctypes.CDLL(None), "__asan_init")  # the address sanitizer is in this process
_abandoned: dict[int, list[np.ndarray]] = {}
"""Memory of pools that are no more, by size: to be given out again, as the driver would."""


class Memory:
    """`cupy.cuda.Memory`: the driver's, which refuses as often as `_refused` says."""

    _refused: ClassVar[int] = 0

    def __init__(self, size: int) -> None:
        if Memory._refused:
            Memory._refused -= 1
            raise CUDARuntimeError(2)
        self.size = size
        self._host = _abandoned[size].pop() if _abandoned.get(size) else _system_memory(size)

    @property
    def ptr(self) -> int:
        return self._host.ctypes.data


class _Block:
    """Memory in use, given back when nothing refers to it any more."""

    def __init__(self, memory: np.ndarray, pool: MemoryPool) -> None:
        self.memory, self.pool = memory, weakref.ref(pool)
        memory.fill(0xFF)

    def __del__(self) -> None:
        self.memory.fill(0xFF)
        pool = self.pool()
        (pool._free if pool is not None else _abandoned).setdefault(self.memory.size, []).append(self.memory)
        if pool is not None:
            pool._used -= self.memory.size


class MemoryPool:
    """`cupy.cuda.MemoryPool`."""

    def __init__(self, allocator: Any = None) -> None:
        self._allocator = allocator or (lambda size: pointer_to(Memory(size), 0))
        self._free: dict[int, list[np.ndarray]] = {}
        self._used = self._total = 0

    def malloc(self, size: int) -> MemoryPointer:
        if _GUARDED:  # each array by itself and no larger than it is, so that the sanitizer sees where it ends
            memory = np.full(max(1, size), 0xFF, np.uint8)
            return MemoryPointer(memory.ctypes.data, memory, Device().id)
        size = max(1, -(-size // _BLOCK)) * _BLOCK
        free = self._free.get(size)
        if free:
            memory = free.pop()
        else:
            try:
                memory = self._allocator(size).owner._host
            except CUDARuntimeError:
                self.free_all_blocks()
                memory = self._allocator(size).owner._host
            self._total += size
        self._used += size
        return MemoryPointer(memory.ctypes.data, _Block(memory, self), Device().id)

    def free_all_blocks(self, stream: Any = None) -> None:
        for size, memories in self._free.items():
            self._total -= size * len(memories)
            _abandoned.setdefault(size, []).extend(memories)
        self._free.clear()

    def used_bytes(self) -> int:
        return self._used

    def total_bytes(self) -> int:
        return self._total

    def __del__(self) -> None:
        self.free_all_blocks()


def pointer_to(mem: Memory, offset: int) -> MemoryPointer:
    """`cupy.cuda.MemoryPointer` as one is made."""
    return MemoryPointer(mem.ptr + offset, mem, Device().id)


def _system_memory(size: int) -> np.ndarray:
    memory = np.empty(size + _BLOCK, np.uint8)
    return memory[-memory.ctypes.data % _BLOCK :][:size]


_default_pool = MemoryPool()
_allocators = threading.local()


@contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    outer = getattr(_allocators, "current", None)
    _allocators.current = allocator
    try:
        yield
    finally:
        _allocators.current = outer


def alloc(size: int) -> MemoryPointer:
    """Fresh memory, by the allocator of this thread."""
    allocator = getattr(_allocators, "current", None)
    if allocator is None:
        if get_current_stream().is_capturing():
            raise RuntimeError("memory outside of the graph's pool was asked for while a stream is captured")
        allocator = _default_pool.malloc
    return allocator(size)


def _allocate(shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None) -> np.ndarray:
    """Fresh memory as a NumPy array; in C order if no (positive) strides are given."""
    return np.asarray(_Interface(alloc(math.prod(shape) * dtype.itemsize), shape, dtype, strides)).view(dtype)


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.asarray(_Interface(MemoryPointer(address, None), (size,), np.dtype(np.uint8), None)).view(np.uint8)


def _bare(host: np.ndarray) -> np.ndarray:
    """The same memory, not kept alive."""
    pointer = MemoryPointer(host.ctypes.data, None)
    bare = np.asarray(_Interface(pointer, host.shape, host.dtype, host.strides)).view(host.dtype)
    bare.flags.writeable = host.flags.writeable
    return bare


def device_work(work: Callable[[], object]) -> None:
    """What a device does: now, or at every launch of the graph that the current stream is captured into."""
    nodes = get_current_stream()._nodes
    if nodes is None:
        work()
    else:
        nodes.append(work)


def refuse_under_capture(what: str) -> None:
    if get_current_stream().is_capturing():
        raise RuntimeError(f"the current stream is capturing, so {what} is disallowed")


class _Interface:
    """Memory at an address, for np.asarray; keeps its owner alive."""

    def __init__(self, pointer: MemoryPointer, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None) -> None:
        self.owner = pointer.owner
        # NumPy's interface has no name for bfloat16: bytes first, then a view.
        self.__array_interface__ = {
            "data": (pointer.ptr, False),
            "shape": shape,
            "typestr": f"|V{dtype.itemsize}",
            "strides": strides,
            "version": 3,
        }


def _operator(ufunc: np.ufunc) -> Any:
    """As CuPy has it: a foreign operand with a protocol of its own is asked by NumPy; a NumPy array, 0-d or not, is refused."""

    def operate(self: ndarray, other: Any) -> Any:
        return ufunc(self, other)

    return operate


class ndarray:
    """`cupy.ndarray` over a NumPy array."""

    _counts: ClassVar[Counter[str]] = Counter()

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any = float,
        memptr: MemoryPointer | None = None,
        strides: tuple[int, ...] | None = None,
        order: str = "C",
    ) -> None:
        dtype = np.dtype(dtype)
        if memptr is None:
            self._host = _allocate(*_layout(shape, dtype, order))
        else:
            self._host = np.asarray(_Interface(memptr, shape, dtype, strides)).view(dtype)
        self._device = Device()

    @classmethod
    def _of(cls, host: np.ndarray, device: Device | None = None) -> ndarray:
        array = cls.__new__(cls)
        array._host, array._device = host, device or Device()
        return array

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: self._device)
    data = property(lambda self: MemoryPointer(self._host.ctypes.data, self._host, self._device.id))
    _c_contiguous = property(lambda self: self._host.flags.c_contiguous)
    _f_contiguous = property(lambda self: self._host.flags.f_contiguous)
    T = property(lambda self: self._view(self._host.T))

    def _view(self, host: np.ndarray) -> ndarray:
        return self._of(host, self._device)

    def _fresh(self, layout: np.ndarray) -> ndarray:
        """Fresh memory of this shape, dtype and order of axes."""
        return self._view(_allocate(layout.shape, layout.dtype, layout.strides))

    def _computed(self, function: Callable[..., Any], *operands: Any) -> ndarray:
        """function of the operands, arrays and Python numbers, elementwise."""
        arrays = [each._host if isinstance(each, ndarray) else each for each in operands]
        if any(isinstance(each, np.ndarray) and not isinstance(original, ndarray) for each, original in zip(arrays, operands, strict=True)):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        dtype = np.asarray(function(*[np.ones((), x.dtype) if isinstance(x, np.ndarray) else x for x in arrays])).dtype
        shape = np.broadcast_shapes(*[x.shape for x in arrays if isinstance(x, np.ndarray)])
        result = self._view(_allocate(shape, dtype))
        target, sources = _bare(result._host), [_bare(x) if isinstance(x, np.ndarray) else x for x in arrays]
        device_work(lambda: np.copyto(target, function(*sources)))
        return result

    def _put(self, host: np.ndarray, value: Any) -> None:
        target, source = _bare(host), _bare(value._host) if isinstance(value, ndarray) else value
        if not target.flags.writeable:
            raise ValueError("assignment destination is read-only")
        if isinstance(source, np.ndarray):
            np.broadcast_shapes(target.shape, source.shape)
        device_work(lambda: np.copyto(target, source, casting="unsafe"))

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        host = self._host.reshape(*shape, order=order)
        if np.shares_memory(host, self._host) or not self.size:
            return self._view(host)
        whole = self.copy(order)
        return self._view(whole._host.reshape(*shape, order=order))

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return self._view(self._host.swapaxes(axis1, axis2))

    def view(self, dtype: Any = None) -> ndarray:
        return self._view(self._host.view(dtype) if dtype is not None else self._host.view())

    def copy(self, order: str = "C") -> ndarray:
        return self.astype(self.dtype, order)

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        dtype = np.dtype(dtype)
        if not copy and dtype == self.dtype:
            return self
        self._counts["copies"] += 1
        result = self._fresh(np.empty_like(self._host, dtype, order))
        self._put(result._host, self)
        return result

    def fill(self, value: Any) -> None:
        self._counts["fills"] += 1
        self._put(self._host, value)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        refuse_under_capture("reading an array")
        return self._host.copy(order)

    def __len__(self) -> int:
        return len(self._host)

    def __neg__(self) -> ndarray:
        return self._computed(np.negative, self)

    def __add__(self, other: Any) -> ndarray:
        return self._computed(np.add, self, other)

    def __sub__(self, other: Any) -> ndarray:
        return self._computed(np.subtract, self, other)

    def __mul__(self, other: Any) -> ndarray:
        return self._computed(np.multiply, self, other)

    __radd__, __rmul__ = __add__, __mul__

    def _updated(self, function: np.ufunc, other: Any) -> ndarray:
        target, source = _bare(self._host), _bare(other._host) if isinstance(other, ndarray) else other
        device_work(lambda: function(target, source, out=target))
        return self

    def __iadd__(self, other: Any) -> ndarray:
        return self._updated(np.add, other)

    def __isub__(self, other: Any) -> ndarray:
        return self._updated(np.subtract, other)

    def __imul__(self, other: Any) -> ndarray:
        return self._updated(np.multiply, other)

    def __getitem__(self, key: Any) -> ndarray:
        return self._view(self._host[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._counts["copies"] += 1
        if isinstance(value, np.ndarray):
            raise TypeError("the stand-in copies no NumPy array into a device array; use asarray")
        self._put(self._host[key] if isinstance(self._host[key], np.ndarray) else self._host[(*np.atleast_1d(key), None)], value)

    def __array__(self, dtype: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or any(hasattr(x, "__array_ufunc__") and not isinstance(x, ndarray | np.generic) for x in inputs):
            return NotImplemented
        if any(not isinstance(out, ndarray) for out in kwargs.get("out", ())):
            raise TypeError("CuPy writes to its own arrays only")
        into = {"out": tuple(out._host for out in kwargs["out"])} if "out" in kwargs else {}
        result = ufunc(*(x._host if isinstance(x, ndarray) else x for x in inputs), **into)
        return kwargs["out"][0] if into else self._view(result)

    __eq__ = _operator(np.equal)  # type: ignore[assignment]
    __ne__ = _operator(np.not_equal)  # type: ignore[assignment]
    __lt__, __le__, __gt__, __ge__ = map(_operator, (np.less, np.less_equal, np.greater, np.greater_equal))
    __hash__ = None  # type: ignore[assignment]

    def _waits(self, *args: object) -> Any:
        raise RuntimeError("a hidden wait for the device: the value of an array was asked for")

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __iter__ = _waits
    tolist = item = _waits


def _layout(shape: Any, dtype: np.dtype, order: str) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...] | None]:
    layout = np.empty(shape, dtype, order)  # never touched
    return layout.shape, dtype, layout.strides if order == "F" else None


_CUBLAS_UNDER_CAPTURE = "calling cuBLAS API during stream capture is currently unsupported"


class Cublas:
    """`cupy.cuda.cublas`: one routine, on raw addresses and column-major matrices, as cuBLAS sees them."""

    HANDLE = 4711
    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 70, 77
    CUBLAS_GEMM_DEFAULT = -1

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def gemmStridedBatchedEx(  # noqa: N802 - CuPy's names
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int,
        A: int, Atype: int, lda: int, strideA: int, B: int, Btype: int, ldb: int, strideB: int, beta: int,
        C: int, Ctype: int, ldc: int, strideC: int, batchCount: int, computeType: int, algo: int,
    ) -> None:  # fmt: skip
        if get_current_stream().is_capturing():
            raise NotImplementedError(_CUBLAS_UNDER_CAPTURE)
        dtypes = {0: np.dtype("f4"), 1: np.dtype("f8"), 2: np.dtype("f2"), 14: _bfloat16()}
        total = dtypes[Ctype]
        if handle != self.HANDLE or Atype != Btype or (Atype != Ctype and Ctype != 0) or algo != self.CUBLAS_GEMM_DEFAULT:
            raise ValueError("CUBLAS_STATUS_NOT_SUPPORTED")
        allowed = {0: {68, 77} if Atype == 0 else {68}, 1: {70}}
        if computeType not in allowed[Ctype]:
            raise ValueError("CUBLAS_STATUS_NOT_SUPPORTED")
        if min(m, n, k, batchCount) < 1 or max(m, n, k, lda, ldb, ldc, batchCount) > 2**31 - 1:
            raise ValueError("CUBLAS_STATUS_INVALID_VALUE")
        scale, keep = (_matrices(address, total, 1, 1, 1, 0, 1)[0, 0, 0] for address in (alpha, beta))
        a = _matrices(A, dtypes[Atype], *((k, m) if transa else (m, k)), lda, strideA, batchCount)
        b = _matrices(B, dtypes[Btype], *((n, k) if transb else (k, n)), ldb, strideB, batchCount)
        c = _matrices(C, total, m, n, ldc, strideC, batchCount)
        a, b = (x.swapaxes(1, 2) if op else x for x, op in ((a, transa), (b, transb)))
        a, b = (_tf32(x) if computeType == 77 else x.astype(total) for x in (a, b))
        c[...] = scale * np.matmul(a, b) + (keep * c if keep else 0)
        self._counts["products"] += 1

    def getVersion(self, handle: int) -> int:  # noqa: N802
        return 130100


def _matrices(address: int, dtype: np.dtype, rows: int, cols: int, lead: int, step: int, groups: int) -> np.ndarray:
    """Column-major matrices at an address, (groups, rows, cols)."""
    if lead < rows:
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension below the rows")
    strides = tuple(stride * dtype.itemsize for stride in (step, 1, lead))
    return np.asarray(_Interface(MemoryPointer(address, None), (groups, rows, cols), dtype, strides)).view(dtype)


def _tf32(x: np.ndarray) -> np.ndarray:
    """Float32 with ten bits behind the point."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


class CUDARuntimeError(RuntimeError):
    """`cupy.cuda.runtime.CUDARuntimeError`."""

    _names: ClassVar[dict[int, str]] = {900: "cudaErrorStreamCaptureUnsupported", 901: "cudaErrorStreamCaptureInvalidated"}

    def __init__(self, status: int) -> None:
        super().__init__(self._names.get(status, f"cudaError {status}"))
        self.status = status


class Graph:
    """`cupy.cuda.Graph`: calls on addresses, made at every launch."""

    _nodes: list[Callable[[], object]]

    @classmethod
    def _of(cls, nodes: list[Callable[[], object]]) -> Graph:
        graph = cls.__new__(cls)
        graph._nodes = nodes
        return graph

    def launch(self, stream: Any = None) -> None:
        for node in self._nodes:
            node()


class Stream:
    """`cupy.cuda.Stream`: everything here happens at once, but for what is captured. Then it refuses cuBLAS, as CuPy does."""

    null: Stream
    _here: ClassVar[threading.local] = threading.local()
    _pointers: ClassVar[Iterator[int]] = itertools.count(0x1000, 0x10)

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None) -> None:
        self.ptr = 0 if null else 2 if ptds else next(self._pointers)
        self._non_blocking = non_blocking
        self._nodes: list[Callable[[], object]] | None = None  # while it is captured
        self._invalid = False
        self._waited: list[Event] = []

    @classmethod
    def _entered(cls) -> list[Stream]:
        if not hasattr(cls._here, "entered"):
            cls._here.entered = []
        return cls._here.entered  # type: ignore[no-any-return]

    def __enter__(self) -> Stream:
        self._entered().append(self)
        return self

    def __exit__(self, *args: object) -> None:
        self._entered().pop()

    def synchronize(self) -> None:
        if self.is_capturing():
            self._invalid = True
            raise CUDARuntimeError(900)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self._waited.append(event)

    def is_capturing(self) -> bool:
        return self._nodes is not None

    def begin_capture(self, mode: Any = None) -> None:
        if not self.ptr:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if not self._non_blocking:
            raise RuntimeError("work on the null stream would be refused while a blocking stream is captured")
        self._nodes, self._invalid = [], False

    def end_capture(self) -> Graph:
        nodes, self._nodes = self._nodes, None
        if nodes is None or self._invalid:
            raise CUDARuntimeError(901)
        return Graph._of(nodes)


Stream.null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Stream:
    entered = Stream._entered()
    return entered[-1] if entered else Stream.null


class Event:
    """`cupy.cuda.Event` on the host's clock."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()
        self._stream = stream

    def synchronize(self) -> None:
        pass


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    return (end_event.time - start_event.time) * 1e3


class Runtime:
    """`cupy.cuda.runtime`."""

    CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
    CUDARuntimeError = CUDARuntimeError

    def driverGetVersion(self) -> int:  # noqa: N802
        return 13020

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13020

    def getDevice(self) -> int:  # noqa: N802
        return Device().id

    def getDeviceCount(self) -> int:  # noqa: N802
        return 2

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"a stand-in", "major": 9, "minor": 0, "multiProcessorCount": 1, "totalGlobalMem": 2**33}

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 2**32, 2**33


class StandIn:
    """What `import cupy` would give. `counts` has products and copies."""

    __version__ = "0.stand-in"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        # A class of its own, so that two stand-ins count apart.
        self.ndarray = type("ndarray", (ndarray,), {"_counts": self.counts})
        self.cuda = SimpleNamespace(
            Device=Device,
            cublas=Cublas(self.counts),
            device=SimpleNamespace(get_cublas_handle=lambda: Cublas.HANDLE),
            runtime=Runtime(),
            Stream=Stream,
            Event=Event,
            get_elapsed_time=get_elapsed_time,
            get_current_stream=get_current_stream,
            MemoryPool=MemoryPool,
            Memory=Memory,
            MemoryPointer=pointer_to,
            using_allocator=using_allocator,
            alloc=alloc,
        )

    def get_default_memory_pool(self) -> MemoryPool:
        return _default_pool

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
        return self.ndarray(shape, dtype, order=order)

    def asarray(self, a: Any, dtype: Any = None, order: Any = None, *, blocking: bool = False) -> ndarray:
        if isinstance(a, ndarray):
            return a if dtype is None or a.dtype == dtype else a.astype(dtype)
        refuse_under_capture("copying an array from the host")
        host = np.asarray(a, dtype)
        array = self.ndarray(host.shape, host.dtype)
        np.copyto(array._host, host)
        return array

    def asnumpy(self, a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
        return a.get(order=order)

    def ascontiguousarray(self, a: ndarray, dtype: Any = None) -> ndarray:
        if not isinstance(a, ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        return a if a.flags.c_contiguous else a.copy()

    def reshape(self, a: ndarray, newshape: tuple[int, ...], order: str = "C") -> ndarray:
        return a.reshape(newshape, order=order)

    def unpackbits(self, a: ndarray, axis: int | None = None, bitorder: str = "big") -> ndarray:
        if axis is not None:
            raise NotImplementedError("axis option is not supported yet")
        return self.ndarray._of(np.unpackbits(a._host, bitorder=bitorder))

    def matmul(self, x1: ndarray, x2: ndarray, /, out: ndarray | None = None) -> ndarray:
        for operand in (x1, x2):
            if not isinstance(operand, ndarray):
                raise TypeError(f"Unsupported type {type(operand)}")
        if out is None:
            out = self.empty((*np.broadcast_shapes(x1.shape[:-2], x2.shape[:-2]), x1.shape[-2], x2.shape[-1]), x1.dtype)
        if x1.dtype != x2.dtype or out.dtype != x1.dtype or x1.dtype.itemsize == 2:
            raise ValueError(f"the backend is to give cuBLAS one dtype of at least 32 bits, not {x1.dtype}, {x2.dtype} -> {out.dtype}")
        if not out.flags.c_contiguous or np.shares_memory(out._host, x1._host) or np.shares_memory(out._host, x2._host):
            raise ValueError("cuBLAS writes to C-contiguous memory that no operand shares; CuPy would copy here")
        if not x1.device == x2.device == out.device == Device():
            raise ValueError(f"Array device must be same as the current device: {x1.device.id} while current = {Device().id}")
        if get_current_stream().is_capturing():
            raise NotImplementedError(_CUBLAS_UNDER_CAPTURE)
        self.counts["products"] += 1
        np.matmul(x1._host, x2._host, out=out._host)
        return out
