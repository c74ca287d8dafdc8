"""The passes of one dtype, ready to be called: what a backend asks for by name and itemsize, as in ``affine_forward[4]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import types

from rectilinear.kernels.loops import backward, elementwise, forward, reduction, softmax, update
from rectilinear.kernels.loops.host import publish_host
from rectilinear.kernels.micro import library
from rectilinear.kernels.runtime.cache import Job, jit, jit_inner, warms
from rectilinear.kernels.runtime.linking import Once, called, publish
from rectilinear.kernels.runtime.native import c_address
from rectilinear.kernels.runtime.records import at


@Once
def prepare(itemsize: int) -> Any:
    """The zero that stands for the dtype, once the kernels that passes call by name are there."""
    zero = np.dtype(f"f{itemsize}").type(0)
    library.load[itemsize]
    publish_host(itemsize)
    for name, body, operands in called:
        _publish(f"{name}_f{8 * itemsize}", body, operands, zero)
    return zero


def _publish(name: str, body: Any, operands: type, zero: Any) -> None:
    @jit_inner
    def kernel(address: int) -> None:
        body(zero, at(operands, address))

    @jit()
    def address() -> int:
        return c_address(kernel)

    publish(name, address(), address)


def _made_by(entry: Callable[[Any], Any]) -> Once:
    return Once(lambda itemsize: entry(prepare[itemsize]))


_PASSES = {
    "affine forward": _made_by(forward.entry),
    "affine backward": _made_by(backward.entry),
    "bias reduction": _made_by(reduction.entry),
    "ReLU": _made_by(elementwise.entry),
    "softmax loss": _made_by(softmax.entry),
    "SGD": _made_by(update.entry),
}
affine_forward, affine_backward, bias_reduction, relu, softmax_loss, sgd = _PASSES.values()


@warms
def _jobs(dtype: str) -> Iterator[Job]:
    """What `rectilinear.warmup` compiles for a dtype."""
    itemsize = np.dtype(dtype).itemsize
    yield f"tiles and packing, {dtype}", lambda: prepare[itemsize]
    for name, kernels in _PASSES.items():
        yield f"{name}, {dtype}", partial(_compile, kernels, itemsize)


_KINDS = {"int": types.intp, "float": types.float64}


def _compile(kernels: Once, itemsize: int) -> None:
    made = kernels[itemsize]
    for kernel in made if isinstance(made, tuple) else (made,):
        kernel.compile(tuple(_KINDS[given.annotation] for given in inspect.signature(kernel.py_func).parameters.values()))
