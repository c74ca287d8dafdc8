"""What a call costs on the host: our own Python, on genuine CuPy arrays of float32, while launches, products and allocations do nothing.

``python tests/cuda/host_cost.py`` prints it in multiples of `np.maximum` of two (1, 64) float32 arrays, measured in the same turns.
No GPU is needed, nor used: what is left out here is CuPy's and the driver's share.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from genuine import genuine

import rectilinear
from rectilinear.backends import registry
from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import _COUNTERS, CupyBackend, Runtime, column_sum

SHAPES = {"small": (16, 64, 64), "large": (2048, 512, 512)}
"""N, D, M of the layers that are timed: one that a kernel of ours does whole, and one that takes products and shares its sums."""
TURNS, SECONDS = 300, 0.0005


def aligned(shape: tuple[int, ...], dtype: Any, boundary: int = 256) -> np.ndarray:
    """Zeros that begin at such a boundary, as all that CuPy allocates does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + size].view(dtype).reshape(shape)


class Idle:
    """A module like CuPy whose allocations hand out the same arrays again, and whose products and kernels do nothing."""

    def __init__(self) -> None:
        import cupy

        made: dict[tuple[int, ...], Any] = {}
        for n, d, m in SHAPES.values():
            made |= {shape: genuine(aligned(shape, np.float32)) for shape in ((n, d), (d, m), (n, m), (m,))}
            made[n, m // 8] = genuine(aligned((n, m // 8), np.uint8))
            left = column_sum(4, "mask_colsum", (n, m), True, m // 8).parts
            made[left,] = SimpleNamespace(size=left)
        made[(_COUNTERS,)] = SimpleNamespace(size=_COUNTERS, fill=lambda value: None)
        self.empty = made.get  # by shape, whatever the dtype is: nothing takes less time; None for partial sums
        self.ndarray = cupy.ndarray
        self.ascontiguousarray = cupy.ascontiguousarray
        stream = SimpleNamespace(ptr=0, is_capturing=lambda: False)
        self.cuda = SimpleNamespace(  # device 0 and the null stream, in no time
            Device=cupy.cuda.Device, runtime=SimpleNamespace(getDevice=int), get_current_stream=lambda: stream, alloc=lambda nbytes: 0
        )

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        pass


class _Kernels:
    def get_function(self, name: str) -> Callable[..., None]:
        return lambda grid, block, args: None


@contextmanager
def idle_backend(products: bool = False) -> Iterator[CupyBackend]:
    """CuPy arrays are served by a cupy backend that only goes through the motions, with those before `cupy.matmul` on demand."""
    runtime = Runtime(Idle(), lambda dtype: _Kernels())
    backend = CupyBackend(lambda: runtime, lambda backend: Probe(True))
    backend._array_at = lambda shape, dtype, memory: runtime.cp.empty(shape)
    if not products:
        backend._product = lambda operation, a, b, out, bias=None: None  # type: ignore[method-assign]
    before = registry._loaded.get("cupy")
    registry._loaded["cupy"] = registry._Loaded(backend, Probe(True))
    try:
        yield backend
    finally:
        del registry._loaded["cupy"]
        if before is not None:
            registry._loaded["cupy"] = before


CALLS = ("affine_relu_forward", "affine_relu_forward, out=", "affine_relu_backward", "affine_relu_backward, out=")


def calls(layer: str) -> dict[str, Callable[[], Any]]:
    """The calls that are measured, under `idle_backend`, by name."""
    n, d, m = SHAPES[layer]
    shapes = {"x": (n, d), "w": (d, m), "b": (m,), "dout": (n, m), "y": (n, m), "dx": (n, d), "dw": (d, m), "db": (m,)}
    on = {name: genuine(aligned(shape, np.float32)) for name, shape in shapes.items()}
    x, w, b, dout = (on[name] for name in ("x", "w", "b", "dout"))
    gradients = on["dx"], on["dw"], on["db"]
    cache = rectilinear.affine_relu_forward(x, w, b)[1]
    forward, backward = rectilinear.affine_relu_forward, rectilinear.affine_relu_backward
    timed = (
        lambda: forward(x, w, b),
        lambda: forward(x, w, b, out=on["y"]),
        lambda: backward(dout, cache),
        lambda: backward(dout, cache, out=gradients),
    )
    return dict(zip(CALLS, timed, strict=True))


def maximum() -> Callable[[], Any]:
    """The unit."""
    a, b = np.ones((1, 64), np.float32), np.ones((1, 64), np.float32)
    return lambda: np.maximum(a, b)


def multiples(layer: str, products: bool = False) -> tuple[float, dict[str, float]]:
    """Seconds of the unit, and how many of it each call takes: the least of turns that all of them take part in."""
    with idle_backend(products):
        timers = {"": timeit.Timer(maximum())} | {name: timeit.Timer(call) for name, call in calls(layer).items()}
        number = {name: max(1, round(SECONDS / (timer.timeit(100) / 100))) for name, timer in timers.items()}
        least = dict.fromkeys(timers, float("inf"))
        for _ in range(TURNS):
            for name, timer in timers.items():
                least[name] = min(least[name], timer.timeit(number[name]) / number[name])
    unit = least.pop("")
    return unit, {name: seconds / unit for name, seconds in least.items()}


if __name__ == "__main__":
    for layer, products in (("small", False), ("large", False), ("large", True)):
        unit, found = multiples(layer, products)
        print(f"a {layer} layer{', with our Python of the products' if products else ''}; np.maximum takes {unit * 1e6:.2f} us")
        for name, times in found.items():
            print(f"{name:28} {times:6.1f} times that, {times * unit * 1e6:6.2f} us")
