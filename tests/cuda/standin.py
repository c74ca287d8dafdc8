"""Tests only: the part of CuPy that the backend touches, on NumPy memory.

It refuses what CuPy refuses (implicit conversion to NumPy, mixing with NumPy arrays), refuses what on a GPU would wait for the
device without a word, fills fresh memory with 0xff (NaN), and counts products and copies. `test_standin` holds every name here
against the real CuPy. A green run on it says nothing about cuBLAS, streams or speed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
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
    """`cupy.cuda.MemoryPointer`, as far as it is read."""

    def __init__(self, ptr: int, owner: Any) -> None:
        self.ptr, self.owner = ptr, owner


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
            self._host = np.empty(shape, dtype, order)
            self._host.view(np.ndarray).T.reshape(-1).view(np.uint8).fill(0xFF) if order == "F" else _poison(self._host)
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
    data = property(lambda self: MemoryPointer(self._host.ctypes.data, self._host))
    T = property(lambda self: self._view(self._host.T))

    def _view(self, host: np.ndarray) -> ndarray:
        return self._of(host, self._device)

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        host = self._host.reshape(*shape, order=order)
        if not np.shares_memory(host, self._host) and self.size:
            self._counts["copies"] += 1
        return self._view(host)

    def swapaxes(self, axis1: int, axis2: int) -> ndarray:
        return self._view(self._host.swapaxes(axis1, axis2))

    def view(self, dtype: Any = None) -> ndarray:
        return self._view(self._host.view(dtype) if dtype is not None else self._host.view())

    def copy(self, order: str = "C") -> ndarray:
        self._counts["copies"] += 1
        return self._view(self._host.copy(order))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        self._counts["copies"] += 1
        return self._view(self._host.astype(dtype, order, copy=copy))

    def fill(self, value: Any) -> None:
        self._counts["fills"] += 1
        self._host.fill(value)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        return self._host.copy(order)

    def __len__(self) -> int:
        return len(self._host)

    def __imul__(self, factor: float) -> ndarray:
        self._host *= factor
        return self

    def __isub__(self, other: ndarray) -> ndarray:
        self._host -= other._host
        return self

    def __getitem__(self, key: Any) -> ndarray:
        return self._view(self._host[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._counts["copies"] += 1
        if isinstance(value, np.ndarray):
            raise TypeError("the stand-in copies no NumPy array into a device array; use asarray")
        self._host[key] = value._host if isinstance(value, ndarray) else value

    def __array__(self, dtype: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def _waits(self, *args: object) -> Any:
        raise RuntimeError("a hidden wait for the device: the value of an array was asked for")

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __iter__ = _waits
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __ne__ = _waits
    __hash__ = None  # type: ignore[assignment]
    tolist = item = _waits


def _poison(host: np.ndarray) -> None:
    if host.size:
        host.reshape(-1).view(np.uint8).fill(0xFF)


class Cublas:
    """`cupy.cuda.cublas`: one routine, on raw addresses and column-major matrices, as cuBLAS sees them."""

    HANDLE = 4711
    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70
    CUBLAS_GEMM_DEFAULT = -1

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def gemmStridedBatchedEx(  # noqa: N802 - CuPy's names
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int,
        A: int, Atype: int, lda: int, strideA: int, B: int, Btype: int, ldb: int, strideB: int, beta: int,
        C: int, Ctype: int, ldc: int, strideC: int, batchCount: int, computeType: int, algo: int,
    ) -> None:  # fmt: skip
        dtypes = {0: np.dtype("f4"), 1: np.dtype("f8"), 2: np.dtype("f2"), 14: _bfloat16()}
        total = dtypes[Ctype]
        if handle != self.HANDLE or Atype != Btype or (Atype != Ctype and Ctype != 0) or algo != self.CUBLAS_GEMM_DEFAULT:
            raise ValueError("CUBLAS_STATUS_NOT_SUPPORTED")
        if computeType != (self.CUBLAS_COMPUTE_64F if Ctype == 1 else self.CUBLAS_COMPUTE_32F):
            raise ValueError("CUBLAS_STATUS_NOT_SUPPORTED")
        if min(m, n, k, batchCount) < 1 or max(m, n, k, lda, ldb, ldc, batchCount) > 2**31 - 1:
            raise ValueError("CUBLAS_STATUS_INVALID_VALUE")
        scale, keep = (_matrices(address, total, 1, 1, 1, 0, 1)[0, 0, 0] for address in (alpha, beta))
        a = _matrices(A, dtypes[Atype], *((k, m) if transa else (m, k)), lda, strideA, batchCount)
        b = _matrices(B, dtypes[Btype], *((n, k) if transb else (k, n)), ldb, strideB, batchCount)
        c = _matrices(C, total, m, n, ldc, strideC, batchCount)
        a, b = (x.swapaxes(1, 2) if op else x for x, op in ((a, transa), (b, transb)))
        c[...] = scale * np.matmul(a.astype(total), b.astype(total)) + (keep * c if keep else 0)
        self._counts["products"] += 1

    def getVersion(self, handle: int) -> int:  # noqa: N802
        return 130100


def _matrices(address: int, dtype: np.dtype, rows: int, cols: int, lead: int, step: int, groups: int) -> np.ndarray:
    """Column-major matrices at an address, (groups, rows, cols)."""
    if lead < rows:
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE: a leading dimension below the rows")
    strides = tuple(stride * dtype.itemsize for stride in (step, 1, lead))
    return np.asarray(_Interface(MemoryPointer(address, None), (groups, rows, cols), dtype, strides)).view(dtype)


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


class CUDARuntimeError(RuntimeError):
    """`cupy.cuda.runtime.CUDARuntimeError`."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class Graph:
    """`cupy.cuda.Graph`: nothing, since the stand-in has worked already while it was captured."""

    def launch(self, stream: Any = None) -> None:
        pass


class Stream:
    """`cupy.cuda.Stream`: everything here happens at once. Under capture it refuses cuBLAS, as CuPy does."""

    capturing = False
    null: Stream
    _entered: ClassVar[list[Stream]] = []

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None) -> None:
        self.ptr = 0 if null else id(self)

    def __enter__(self) -> Stream:
        self._entered.append(self)
        return self

    def __exit__(self, *args: object) -> None:
        self._entered.pop()

    def synchronize(self) -> None:
        if Stream.capturing:
            raise CUDARuntimeError(900)

    def begin_capture(self, mode: Any = None) -> None:
        Stream.capturing = True

    def end_capture(self) -> Graph:
        Stream.capturing = False
        return Graph()


Stream.null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Stream:
    return Stream._entered[-1] if Stream._entered else Stream.null


class Event:
    """`cupy.cuda.Event` on the host's clock."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

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

    def getDeviceCount(self) -> int:  # noqa: N802
        return 2

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"a stand-in", "major": 9, "minor": 0, "multiProcessorCount": 1, "totalGlobalMem": 2**33}

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return 2**32, 2**33


class MemoryPool:
    """`cupy.cuda.MemoryPool`: NumPy keeps no count."""

    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return 0


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
        )

    def get_default_memory_pool(self) -> MemoryPool:
        return MemoryPool()

    def empty(self, shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
        return self.ndarray(shape, dtype, order=order)

    def asarray(self, a: Any, dtype: Any = None, order: Any = None, *, blocking: bool = False) -> ndarray:
        if isinstance(a, ndarray):
            return a if dtype is None or a.dtype == dtype else a.astype(dtype)
        return self.ndarray._of(np.array(a, dtype, order="C"))

    def asnumpy(self, a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
        return a.get(order=order)

    def ascontiguousarray(self, a: ndarray, dtype: Any = None) -> ndarray:
        if not isinstance(a, ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        return a if a.flags.c_contiguous else a.copy()

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
        if Stream.capturing:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        self.counts["products"] += 1
        np.matmul(x1._host, x2._host, out=out._host)
        return out
