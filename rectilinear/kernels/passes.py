"""The passes of one dtype, ready to be called: what a backend asks for by name and itemsize."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rectilinear.kernels import backward, elementwise, forward, library, product, reduction, softmax


@cache
def _prepare(itemsize: int) -> Any:
    """The zero that stands for the dtype, once the kernels that passes call by name are there."""
    zero = np.dtype(f"f{itemsize}").type(0)
    library.load(itemsize)
    addresses = product.addresses(zero)
    for name, address in zip(("product", "pack_panel", "copy_strided"), addresses(), strict=True):
        library.publish(f"rectilinear_{name}_f{8 * itemsize}", address, addresses)
    return zero


@cache
def affine_forward(itemsize: int) -> Any:
    return forward.entry(_prepare(itemsize))


@cache
def affine_backward(itemsize: int) -> Any:
    return backward.entry(_prepare(itemsize))


@cache
def bias_reduction(itemsize: int) -> Any:
    return reduction.entry(_prepare(itemsize))


@cache
def relu(itemsize: int) -> Any:
    return elementwise.entry(_prepare(itemsize))


@cache
def softmax_loss(itemsize: int) -> Any:
    return softmax.entry(_prepare(itemsize))
