"""The passes of one dtype, ready to be called: what a backend asks for by name and itemsize, as in ``affine_forward[4]``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import types

from rectilinear.kernels.loops import backward, elementwise, forward, matmul, pack, product, reduction, softmax, strips, update
from rectilinear.kernels.loops.host import publish_host
from rectilinear.kernels.micro import library
from rectilinear.kernels.runtime.cache import Job, jit, warms
from rectilinear.kernels.runtime.linking import Once, publish
from rectilinear.kernels.runtime.native import c_address


@Once
def prepare(itemsize: int) -> Any:
    """The zero that stands for the dtype, once the kernels that passes call by name are there."""
    zero = np.dtype(f"f{itemsize}").type(0)
    library.load[itemsize]
    publish_host(itemsize)
    for module in (pack, product, strips, matmul):  # those called before those that call
        for name, kernel in module.kernels(zero).items():
            _publish(f"rectilinear_{name}_f{8 * itemsize}", kernel)
    return zero


def _publish(name: str, kernel: Any) -> None:
    @jit()
    def address() -> int:
        return c_address(kernel)

    publish(name, address(), address)


@Once
def affine_forward(itemsize: int) -> Any:
    return forward.entry(prepare[itemsize])


@Once
def affine_backward(itemsize: int) -> Any:
    return backward.entry(prepare[itemsize])


@Once
def bias_reduction(itemsize: int) -> Any:
    return reduction.entry(prepare[itemsize])


@Once
def relu(itemsize: int) -> Any:
    return elementwise.entry(prepare[itemsize])


@Once
def softmax_loss(itemsize: int) -> Any:
    return softmax.entry(prepare[itemsize])


@Once
def sgd(itemsize: int) -> Any:
    return update.entry(prepare[itemsize])


@warms
def _jobs(dtype: str) -> Iterator[Job]:
    """What `rectilinear.warmup` compiles for a dtype."""
    itemsize = np.dtype(dtype).itemsize
    yield f"tiles and packing, {dtype}", lambda: prepare[itemsize]
    for name, kernels in (
        ("affine forward", affine_forward),
        ("affine backward", affine_backward),
        ("bias reduction", bias_reduction),
        ("ReLU", relu),
        ("softmax loss", softmax_loss),
        ("SGD", sgd),
    ):
        yield f"{name}, {dtype}", partial(_compile, kernels, itemsize)


_KINDS = {"int": types.intp, "float": types.float64}


def _compile(kernels: Once, itemsize: int) -> None:
    made = kernels[itemsize]
    for kernel in made if isinstance(made, tuple) else (made,):
        kernel.compile(tuple(_KINDS[given.annotation] for given in inspect.signature(kernel.py_func).parameters.values()))
