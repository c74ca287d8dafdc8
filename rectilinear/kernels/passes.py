"""The passes of one dtype, ready to be called: what a backend asks for by name and itemsize."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
from numba import types

from rectilinear.kernels import backward, elementwise, forward, library, product, reduction, softmax
from rectilinear.kernels.cache import Job, warms


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


@warms
def _jobs(dtype: str) -> Iterator[Job]:
    """What `rectilinear.warmup` compiles for a dtype."""
    itemsize = np.dtype(dtype).itemsize
    yield f"tiles and packing, {dtype}", lambda: _prepare(itemsize)
    for name, kernels in (
        ("affine forward", affine_forward),
        ("affine backward", affine_backward),
        ("bias reduction", bias_reduction),
        ("ReLU", relu),
        ("softmax loss", softmax_loss),
    ):
        yield f"{name}, {dtype}", partial(_compile, kernels, itemsize)


def _compile(kernels: Callable[[int], Any], itemsize: int) -> None:
    made = kernels(itemsize)
    for kernel in made if isinstance(made, tuple) else (made,):
        kernel.compile((types.intp,) * len(inspect.signature(kernel.py_func).parameters))
