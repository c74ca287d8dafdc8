"""The parameters of a model as one job: their arrays in a row, cut into runs of elements, one run a task.

For kernels that take all parameters in one call. The arrays are looked at here and not in Python: that one call costs less than a look at
the flags of one array does there.
"""

from __future__ import annotations

from numba import types

from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.memory import count_of, data_of, dtype_of, flags_of, have_same_shape, type_of
from rectilinear.kernels.runtime.native import external
from rectilinear.kernels.runtime.records import at, bytes_of, record


@record
class Parameter:
    """One parameter, its gradient and what an optimiser keeps of it: `count` elements each, side by side. Those that are not there are 0.
    `first` is the number of its first task."""

    count: int = 0
    w: int = 0
    dw: int = 0
    m: int = 0
    v: int = 0
    flags: int = 0
    first: int = 0


@record
class Parameters:
    """`count` of them in memory of their own, from `data` on. A task takes `run` elements of one."""

    data: int = 0
    count: int = 0
    run: int = 0


_BYTES = bytes_of(Parameter)

_malloc, _free = external("malloc", 1, types.intp), external("free", 1, types.void)


@jit_inner
def make_room(parameters: Parameters) -> bool:
    """Memory for `count` of them, to be given back; whether there is some."""
    parameters.data = _malloc(parameters.count * _BYTES)
    return parameters.data != 0


@jit_inner
def give_back(parameters: Parameters) -> None:
    _free(parameters.data)


@jit_inner
def parameter(parameters: Parameters, index: int) -> int:
    """Where the record of one is."""
    return parameters.data + index * _BYTES


@jit_inner
def owner_of_task(parameters: Parameters, task: int) -> int:
    """Where the record of the one is that a task belongs to."""
    last = parameters.count - 1
    while at(Parameter, parameter(parameters, last)).first > task:
        last -= 1
    return parameter(parameters, last)


@jit_inner
def number_tasks(parameters: Parameters) -> int:
    """Number the tasks of all; how many they are."""
    tasks = 0
    for i in range(parameters.count):
        own = at(Parameter, parameter(parameters, i))
        own.first = tasks
        tasks += -(-own.count // parameters.run)
    return tasks


@jit_inner
def read(own: Parameter, array: int) -> None:
    """Write where w lies, and how many elements it has; of the others that they are not there."""
    own.count, own.w = count_of(array), data_of(array)
    own.dw = own.m = own.v = 0


@jit_inner
def fits(array: int, dtype_like: int, shape_like: int, flags: int) -> bool:
    """Whether a Python object is a base array of the dtype and the shape of others, with these flags."""
    return (
        type_of(array) == type_of(dtype_like)
        and dtype_of(array) == dtype_of(dtype_like)
        and have_same_shape(array, shape_like)
        and flags_of(array) & flags == flags
    )
