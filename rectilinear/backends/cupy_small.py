"""Which layers the cupy backend multiplies by kernels of its own, whole in one launch, and how their blocks share the work.

A small layer is bound by launches: a cuBLAS product takes the host 18 us and a kernel 7, on an H100, however little they do.
`small_forward` and `small_backward` of ``kernels/cuda/layers.cu`` are one launch each, and slower per multiplication than cuBLAS.
So they are taken where an estimate of their time on the device is not above one of what cuBLAS and the kernels around it would take
there: then a layer is quicker in a recorded graph too, where launches cost nothing. All times are fitted to what an H100 took
(docs/gpu.md), which decides for every GPU, so that a shape has one order of sums.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# As in layers.cu: a block makes a tile of 32 x 32, takes 64 of the summed extent at a time, and leaves so many numbers to the last one.
_TILE, _SLAB = 32, 64
_LEFT = _TILE * _TILE + _TILE

_MULTIPROCESSORS = 132  # of an H100

# Us on the device, fitted to 74 launches of 11 layers, from (1, 64, 64) to 512^3, that took 3 to 68 (docs/gpu.md).
# A launch of ours: its start and end; where blocks share tiles, what the last ones have left to do; each block that a multiprocessor
# takes after its first; each slab there, forward and backward. It is bound by shared memory: two blocks at a time are no quicker.
_START_US, _SHARING_US, _BLOCK_US = 1.9, 2.2, 0.6
_SLAB_US = (0.9, 1.1)
# cuBLAS and the kernels around it, forward and backward, by the size of an element: what they take at least; and multiply-adds a us.
_LEAST_US = {4: (8.5, 14.0), 2: (5.0, 9.0)}
_RATE = {4: (20e6, 14e6), 2: (200e6, 200e6)}

# A thread's running sum is a quarter of what its block takes of the summed extent. 512 terms keep the digits that a BLAS keeps, which
# sums stretches about as long. The estimate stops before that; the digits must not hang on it.
_DEEPEST = 2048

MOST_SHARED = 512
"""Tiles that are shared by blocks, each of which has a counter."""
_MOST_SHARES = 32  # blocks that share a tile: the last one reads what all have left


_MOST_ELEMENTS = 2**31  # of an array of one group; the estimate stops long before, and within a group the kernels count in ints


class Layer(NamedTuple):
    """x (groups, n, d) times w (groups, d, m)."""

    groups: int
    n: int
    d: int
    m: int


class Sharing(NamedTuple):
    """How the blocks of a launch share its products."""

    blocks: int
    """Of each group."""
    spans: tuple[int, ...]
    """For each product, what a block takes of the summed extent."""
    left: int
    """Numbers that blocks leave to the last of their tile, of all groups."""


class _Product(NamedTuple):
    tiles: int  # of all groups
    depth: int

    def blocks(self, slabs: int) -> int:
        """For each tile, if a block takes so many slabs of its depth."""
        return _cdiv(self.depth, slabs * _SLAB)


def share_forward(layer: Layer, itemsize: int) -> Sharing | None:
    """Of `small_forward`; None where cuBLAS is to be taken."""
    groups, n, d, m = layer
    return _shared(layer, itemsize, (_Product(groups * _tiles(n, m), d),), backward=False)


def share_backward(layer: Layer, itemsize: int, want_dx: bool) -> Sharing | None:
    """Of `small_backward`, which makes dw and, where wanted, dx and db: the spans of dw and dx; None where cuBLAS is to be taken."""
    groups, n, d, m = layer
    dw, dx = _Product(groups * _tiles(d, m), n), _Product(groups * _tiles(n, d), m)
    return _shared(layer, itemsize, (dw, dx) if want_dx else (dw,), backward=True)


def estimated_us(products: tuple[_Product, ...], slabs: int, backward: bool) -> float:
    """Device time of a launch whose blocks take at most so many slabs each."""
    blocks = sum(product.tiles * product.blocks(slabs) for product in products)
    work = sum(product.tiles * _cdiv(product.depth, _SLAB) for product in products)
    longest = max(min(slabs, _cdiv(product.depth, _SLAB)) for product in products)
    shared = any(product.blocks(slabs) > 1 for product in products)
    rounds = _cdiv(blocks, _MULTIPROCESSORS)
    in_turn = max(longest, rounds * work / blocks)
    return _START_US + shared * _SHARING_US + (rounds - 1) * _BLOCK_US + in_turn * _SLAB_US[backward]


def products_us(layer: Layer, itemsize: int, products: int, backward: bool) -> float:
    """Device time of so many products of a layer by cuBLAS, and of the kernels around them."""
    return _LEAST_US[itemsize][backward] + products * math.prod(layer) / _RATE[itemsize][backward]


def _shared(layer: Layer, itemsize: int, products: tuple[_Product, ...], backward: bool) -> Sharing | None:
    _, n, d, m = layer
    if itemsize == 8 or not all(layer) or max(n * d, d * m, n * m) >= _MOST_ELEMENTS:
        return None
    possible = [slabs for slabs in _candidates(products) if _possible(products, slabs)]
    slabs = min(possible, key=lambda slabs: estimated_us(products, slabs, backward), default=0)
    if not slabs or estimated_us(products, slabs, backward) > products_us(layer, itemsize, len(products), backward):
        return None
    blocks = [product.tiles * product.blocks(slabs) for product in products]
    left = sum(_LEFT * n for n, product in zip(blocks, products, strict=True) if product.blocks(slabs) > 1)
    return Sharing(sum(blocks) // layer.groups, (slabs * _SLAB,) * len(products), left)


def _candidates(products: tuple[_Product, ...]) -> range:
    """Slabs that a block may take, from all of them down."""
    return range(max(_cdiv(product.depth, _SLAB) for product in products), 0, -1)


def _possible(products: tuple[_Product, ...], slabs: int) -> bool:
    shared = [product for product in products if product.blocks(slabs) > 1]
    return (
        slabs * _SLAB <= _DEEPEST
        and sum(product.tiles for product in shared) <= MOST_SHARED
        and all(product.blocks(slabs) <= _MOST_SHARES for product in shared)
    )


def _tiles(rows: int, cols: int) -> int:
    return _cdiv(rows, _TILE) * _cdiv(cols, _TILE)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
