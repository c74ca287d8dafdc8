"""Two small kernels for the tests of the cache on disk, quick to compile; imported by their subprocesses too."""

from __future__ import annotations

from rectilinear.kernels.runtime.cache import jit


@jit()
def double(x: int) -> int:
    return 2 * x


@jit()
def square(x: int) -> int:
    return x * x


def use() -> int:
    """How many of the two came from the disk."""
    if (double(7), square(7)) != (14, 49):
        raise AssertionError("wrong products")
    return sum(sum(kernel.stats.cache_hits.values()) for kernel in (double, square))  # type: ignore[attr-defined]
