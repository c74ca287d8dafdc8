"""Where the operands of a case lie: strides of every kind, against the start or the end of guarded memory."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from tests.guard import Memory, Region

MOST_BYTES = 1 << 22
"""Of one operand: layouts that would take more become plain ones."""

_POOL = np.random.default_rng(0).integers(-3, 4, 1 << 18).astype(np.int8)


class Operand:
    """An array in guarded memory."""

    def __init__(self, name: str, array: np.ndarray, region: Region, offset: int) -> None:
        self.name, self.array, self.region, self.offset = name, array, region, offset
        self.values: Any = None
        """What it holds, as an ordinary array of float64."""
        self.result = True
        """Whether the call is to write to it."""
        self.seal()

    def hold(self, values: np.ndarray, written: tuple[int, ...]) -> None:
        """Be an input that holds these; of `written`, the extents that they have in memory, the others are strides of 0."""
        self.array[tuple(slice(n) for n in written)] = values
        self.values = np.broadcast_to(values.astype(np.float64), self.array.shape)
        self.result = False
        self.seal()

    def seal(self) -> None:
        """Remember memory as it is now."""
        self.before = self.region.bytes.copy()

    def untouched(self) -> bool:
        """Whether memory is as it was, but for the elements of a result."""
        if self.result:
            shadow = np.ndarray(self.array.shape, self.array.dtype, self.before, self.offset, self.array.strides)
            shadow[...] = self.array
        return np.array_equal(self.before, self.region.bytes)

    def __str__(self) -> str:
        array, left = self.array, self.region.bytes.size
        where = f"byte {self.offset} of {left}"
        return f"{self.name}: {array.dtype} {array.shape} strides {array.strides} at {where}"


class Layouts:
    """Draws them. `plain` ones are C-contiguous and aligned."""

    def __init__(self, rng: random.Random, memory: Memory, plain: bool) -> None:
        self._random, self._memory, self._plain = rng, memory, plain

    def any_stride(self, size: int) -> int:
        """What an axis may have along which nobody ever steps."""
        some = (0, size, -size, 1, -1, 3, 4096, -4096, 1 << 20, -(1 << 20), 1 << 40, 1 << 62, -(1 << 62))
        return self._random.choice(some)

    def strides(self, shape: tuple[int, ...], size: int, *, written: bool) -> tuple[int, ...]:
        rng = self._random
        plain = self._plain or rng.random() < 0.3
        if 0 in shape:
            return tuple(self.any_stride(size) for _ in shape)
        order = list(reversed(range(len(shape))))
        roll = rng.random()
        if not plain and roll < 0.3:
            order.reverse()
        elif not plain and roll < 0.5:
            rng.shuffle(order)
        strides, step = [0] * len(shape), size
        for axis in order:
            n = shape[axis]
            if n == 1:
                strides[axis] = self.any_stride(size) if rng.random() < 0.7 else step
                continue
            backwards = False
            if not plain:
                if not written and rng.random() < 0.1:
                    continue
                backwards = rng.random() < 0.15
                roll = rng.random()
                if roll < 0.1:
                    step += size * rng.randint(1, 3)
                elif roll < 0.15:
                    step += rng.randrange(size)
                elif roll < 0.22:
                    step = -(-step // 2048) * 2048  # rows that meet in the caches, or lie on pages of their own
            strides[axis] = -step if backwards else step
            step *= n
        if step > MOST_BYTES:
            return tuple(int(math.prod(shape[axis + 1 :])) * size for axis in range(len(shape)))
        return tuple(strides)

    def place(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]) -> Operand:
        """One of these strides that touches a guard."""
        rng = self._random
        below = above = 0
        if 0 not in shape:
            reach = [stride * (n - 1) for n, stride in zip(shape, strides, strict=True)]
            below, above = -sum(step for step in reach if step < 0), sum(step for step in reach if step > 0) + dtype.itemsize
        region = self._memory.take(below + above + 8)
        shift = rng.randrange(dtype.itemsize) if not self._plain and rng.random() < 0.08 else 0
        at_end = rng.random() < 0.6
        offset = region.bytes.size - above - shift if at_end else below + shift
        return Operand(name, np.ndarray(shape, dtype, region.bytes, offset, strides), region, offset)

    def values(self, size: int) -> np.ndarray:
        start = self._random.randrange(_POOL.size)
        return _POOL[start : start + size] if start + size <= _POOL.size else np.resize(_POOL[start:], size)
