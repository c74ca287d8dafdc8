"""Which layers the cupy backend multiplies by kernels of its own, whole in one launch, and with how many blocks.

A small layer is bound by launches: a cuBLAS product takes the host 18 us and a kernel 7, on an H100 (docs/gpu.md), however little they do.
`small_forward` and `small_backward` of ``kernels/cuda/layers.cu`` are one launch each, and slower per multiplication than cuBLAS.
So they are taken where an estimate of what they take on the device stays well below what the launches saved take on the host. The
estimate has not been measured; `_SURELY` is there for that. An H100 decides for every GPU, so that a shape has one order of sums.
"""

from __future__ import annotations

from typing import NamedTuple

# As in layers.cu: a block makes a tile of 32 x 32, and takes 64 of the summed extent at a time.
_TILE, _SLAB = 32, 64

_MULTIPROCESSORS = 132  # of an H100
_PRODUCT_US = 18.0  # host time of one cuBLAS product there, launch and all; a kernel of ours, 7, is launched either way

# The shortest that a kernel takes, 2, and the last additions.
_START_US = 2.5
# 32 x 32 x 64 multiply-adds at 128 a clock are 512 clocks, 0.3 us at 1.7 GHz; the loads of the next slab, on the way meanwhile, take
# about 0.5 us to come. With one block on a multiprocessor that is the longer.
_SLAB_US = 0.5
# Of the host time saved, what the estimate may reach.
_SURELY = 0.5

# A thread's running sum is a quarter of the summed extent long. 512 terms keep the digits that a BLAS keeps, which sums stretches
# about as long. The estimate stops before that; the digits must not hang on it.
_DEEPEST = 2048


class Layer(NamedTuple):
    """x (groups, n, d) times w (groups, d, m)."""

    groups: int
    n: int
    d: int
    m: int


class _Product(NamedTuple):
    tiles: int
    depth: int


def forward_blocks(layer: Layer, itemsize: int) -> int:
    """Blocks for each group of `small_forward`; 0 where cuBLAS is to be taken."""
    y = _Product(_tiles(layer.n, layer.m), layer.d)
    return _blocks(layer, itemsize, (y,), saved=_PRODUCT_US)


def backward_blocks(layer: Layer, itemsize: int, want_dx: bool) -> int:
    """Blocks for each group of `small_backward`, which makes dw and, where wanted, dx and db; 0 where cuBLAS is to be taken."""
    dw, dx = _Product(_tiles(layer.d, layer.m), layer.n), _Product(_tiles(layer.n, layer.d), layer.m)
    return _blocks(layer, itemsize, (dw, dx) if want_dx else (dw,), saved=_PRODUCT_US * (1 + want_dx))


def estimated_us(groups: int, products: tuple[_Product, ...]) -> float:
    """Device time of a launch: its multiprocessors share the slabs of all tiles, and no tile is done before its own are."""
    slabs = [(groups * product.tiles, _cdiv(product.depth, _SLAB)) for product in products]
    shared = _cdiv(sum(tiles * deep for tiles, deep in slabs), _MULTIPROCESSORS)
    return _START_US + _SLAB_US * max(shared, *(deep for _, deep in slabs))


def _blocks(layer: Layer, itemsize: int, products: tuple[_Product, ...], saved: float) -> int:
    if itemsize == 8 or not all(layer) or max(product.depth for product in products) > _DEEPEST:
        return 0
    return sum(product.tiles for product in products) if estimated_us(layer.groups, products) <= _SURELY * saved else 0


def _tiles(rows: int, cols: int) -> int:
    return _cdiv(rows, _TILE) * _cdiv(cols, _TILE)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
