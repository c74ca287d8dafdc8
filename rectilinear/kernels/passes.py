"""The passes of one dtype, ready to be called: what a backend asks for by name and itemsize, as in ``affine_forward[4]``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import types

from rectilinear.kernels import backward, elementwise, forward, library, product, reduction, softmax
from rectilinear.kernels.cache import Job, warms


@library.Once
def _prepare(itemsize: int) -> Any:
    """The zero that stands for the dtype, once the kernels that passes call by name are there."""
    zero = np.dtype(f"f{itemsize}").type(0)
    library.load[itemsize]
    addresses = product.addresses(zero)
    for name, address in zip(("product", "pack_panel", "copy_strided"), addresses(), strict=True):
        library.publish(f"rectilinear_{name}_f{8 * itemsize}", address, addresses)
    return zero


@library.Once
def affine_forward(itemsize: int) -> Any:
    return forward.entry(_prepare[itemsize])


@library.Once
def affine_backward(itemsize: int) -> Any:
    return backward.entry(_prepare[itemsize])


@library.Once
def bias_reduction(itemsize: int) -> Any:
    return reduction.entry(_prepare[itemsize])


@library.Once
def relu(itemsize: int) -> Any:
    return elementwise.entry(_prepare[itemsize])


@library.Once
def softmax_loss(itemsize: int) -> Any:
    return softmax.entry(_prepare[itemsize])


@warms
def _jobs(dtype: str) -> Iterator[Job]:
    """What `rectilinear.warmup` compiles for a dtype."""
    itemsize = np.dtype(dtype).itemsize
    yield f"tiles and packing, {dtype}", lambda: _prepare[itemsize]
    for name, kernels in (
        ("affine forward", affine_forward),
        ("affine backward", affine_backward),
        ("bias reduction", bias_reduction),
        ("ReLU", relu),
        ("softmax loss", softmax_loss),
    ):
        yield f"{name}, {dtype}", partial(_compile, kernels, itemsize)


def _compile(kernels: library.Once, itemsize: int) -> None:
    made = kernels[itemsize]
    for kernel in made if isinstance(made, tuple) else (made,):
        kernel.compile((types.intp,) * len(inspect.signature(kernel.py_func).parameters))
