"""Genuine `cupy.ndarray` objects made without a device, over host memory, and a module that makes and multiplies them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from standin import MemoryPointer, _Interface


def genuine(host: np.ndarray, device: int = 0) -> Any:
    """A `cupy.ndarray` that says it is on `device` and whose memory is that of `host`."""
    import cupy

    memory = cupy.cuda.UnownedMemory(host.ctypes.data, max(host.nbytes, 1), host, device)
    return cupy.ndarray(host.shape, host.dtype, cupy.cuda.MemoryPointer(memory, 0), host.strides)


def on_host(array: Any) -> np.ndarray:
    """The memory of such an array."""
    interface = _Interface(MemoryPointer(array.data.ptr, array), array.shape, array.dtype, array.strides)
    return np.asarray(interface).view(array.dtype)


class Genuine:
    """A module that makes genuine arrays without a device and multiplies them with NumPy; refuses what would launch a copy."""

    def __init__(self) -> None:
        import cupy

        class Device(cupy.cuda.Device):
            compute_capability = "90"

        self.ndarray = cupy.ndarray
        types = {name: getattr(cupy.cuda.runtime, name) for name in ("CUDA_R_16F", "CUDA_R_16BF", "CUDA_R_32F", "CUDA_R_64F")}
        # The genuine ones ask the driver which device and stream are current, and what a device can do.
        self.cuda = SimpleNamespace(
            Device=lambda number=0: Device(number),
            get_current_stream=lambda: SimpleNamespace(ptr=0, is_capturing=lambda: False),
            runtime=SimpleNamespace(getDevice=lambda: 0, **types),
            alloc=lambda size: genuine(np.full(size, 255, np.uint8)).data,
        )

    def empty(self, shape: tuple[int, ...], dtype: Any = float) -> Any:
        return genuine(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 255, dtype))

    def ascontiguousarray(self, a: Any) -> Any:
        assert a.flags.c_contiguous, "a copy was asked for"
        return a

    def matmul(self, a: Any, b: Any, out: Any) -> Any:
        np.matmul(on_host(a), on_host(b), out=on_host(out))
        return out
