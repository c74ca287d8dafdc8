"""The parameters of a model as a whole: which of them are one array, and how arrays are brought to them and put in their place.

What changes parameters (loading, a step of the optimiser) first works out every new value, where anything may fail, and then puts them
in place, where nothing can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj, is_dask_array, is_torch_array, is_writeable_array, to_device
from array_api_compat import device as device_of
from numpy.lib.array_utils import byte_bounds

from rectilinear.arrays import asarray, to_numpy
from rectilinear.backends.cupy_scratch import refuse_while_recording
from rectilinear.dispatch import common_namespace, dtype_name, library_name, memory_of
from rectilinear.errors import DTypeError, ShapeError
from rectilinear.plain import elements_apart

if TYPE_CHECKING:
    from rectilinear.nn.module import Layer, Module

Array = Any
"""An array of any library that the layer functions take."""

Axes = tuple[int, ...] | None
"""An order of axes; None for the order there is."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


# ---------------------------------------------------------------- parameters and their names


class Slot(NamedTuple):
    """One name of a parameter, and where it is kept under that name."""

    key: str
    """In the model: ``"0.w"``."""
    layer: Layer
    name: str
    """In the layer: ``"w"``."""
    axes: Axes
    """The axes of the array in this slot, in the order that they have in the parameter's first slot."""

    @property
    def array(self) -> Array:
        return self.layer.params[self.name]


class Parameter(NamedTuple):
    """One array to be trained. More than one slot where layers are tied, or where a layer is used twice."""

    slots: list[Slot]

    @property
    def key(self) -> str:
        return self.slots[0].key

    @property
    def array(self) -> Array:
        return self.slots[0].array


def parameters(model: Module) -> list[Parameter]:
    """The parameters of a model, tied ones once: those that are one object, or the same memory, transposed or not.

    Raises
    ------
    ValueError
        Parameters share memory in another way: which of them were written last would decide what they hold.
    """
    found, views = _grouped(model)
    if views:
        _refuse_overlap(found)
    return found


def _grouped(model: Module) -> tuple[list[Parameter], bool]:
    """The parameters, and whether there are views or other libraries' arrays among them."""
    found: dict[object, Parameter] = {}
    held = [(prefix, layer, name, array) for prefix, layer in model.leaves() for name, array in layer.params.items()]
    views = not all(type(array) is np.ndarray and array.flags.owndata for *_, array in held)  # nearly never, and quick to see
    for prefix, layer, name, array in held:
        if views and not is_array_api_obj(array):
            raise TypeError(f"{type(layer).__name__}: params[{name!r}] is of type {type(array).__name__}, not an array")
        where = _identity(array) if views else id(array)
        first = found.get(where)
        if first is None:
            found[where] = Parameter([Slot(prefix + name, layer, name, None)])
        else:
            first.slots.append(Slot(prefix + name, layer, name, _axes(array, first.array)))
    return list(found.values()), views


def _refuse_overlap(found: Sequence[Parameter]) -> None:
    memories = [(parameter.key, memory_of(parameter.array)) for parameter in found]
    spans = sorted((*byte_bounds(memory), place) for place, (_, memory) in enumerate(memories) if memory is not None and memory.size)
    open_spans: list[tuple[int, int]] = []  # (end, place) of those that reach beyond where the next one begins
    for start, end, place in spans:
        open_spans = [span for span in open_spans if span[0] > start]
        key, memory = memories[place]
        for _, other in open_spans:
            other_key, other_memory = memories[other]
            if _share(memory, other_memory):
                raise ValueError(
                    f"{key} shares memory with {other_key}, but is neither the same array nor its transpose; "
                    "give it an array of its own, such as a copy"
                )
        open_spans.append((end, place))


def _share(a: Any, b: Any) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=10_000))  # type: ignore[arg-type]  # the stubs know only 0 and -1
    except np.exceptions.TooHardError:  # a problem of number theory, where axes interleave
        return True


def _identity(x: Array) -> object:
    """What is equal for two arrays that are the same memory, be it with their axes in another order."""
    memory = memory_of(x)
    if memory is None or not memory.size or not elements_apart(memory):
        return id(x)
    address = memory.__array_interface__["data"][0]
    return address, str(x.dtype), memory.ndim, tuple(sorted(_long_axes(memory)))


def _axes(x: Array, like: Array) -> Axes:
    """The axes of x in the order in which `like` has them; both are the same memory."""
    if x is like:
        return None
    a: Any = memory_of(x)
    b: Any = memory_of(like)
    if a.shape == b.shape and a.strides == b.strides:
        return None
    long = {stride: axis for axis, (n, stride) in enumerate(zip(a.shape, a.strides, strict=True)) if n > 1}
    short = iter([axis for axis, n in enumerate(a.shape) if n == 1])
    return tuple(long[stride] if n > 1 else next(short) for n, stride in zip(b.shape, b.strides, strict=True))


def _long_axes(memory: np.ndarray) -> list[tuple[int, int]]:
    """(stride, extent) of every axis on which the stride means something."""
    return [(stride, n) for n, stride in zip(memory.shape, memory.strides, strict=True) if n > 1]


def turned(x: Array, axes: Axes) -> Array:
    return x if axes is None else array_namespace(x).permute_dims(x, axes)


def turned_back(x: Array, axes: Axes) -> Array:
    return x if axes is None else array_namespace(x).permute_dims(x, tuple(map(axes.index, range(len(axes)))))


def ties(model: Module) -> list[tuple[str, str, Axes]]:
    """First name, other name and axes of every pair of views of the same memory, which pickle would take for two arrays."""
    return [
        (parameter.key, slot.key, slot.axes)
        for parameter in _grouped(model)[0]
        for slot in parameter.slots
        if slot.array is not parameter.array
    ]


def retie(model: Module, found: Sequence[tuple[str, str, Axes]]) -> None:
    """Make the pairs that `ties` found the same memory again."""
    if found:
        slots = {prefix + name: (layer, name) for prefix, layer in model.leaves() for name in layer.params}
        for first_key, key, axes in found:
            (first, first_name), (layer, name) = slots[first_key], slots[key]
            if _identity(first.params[first_name]) != _identity(layer.params[name]):
                layer.params[name] = turned_back(first.params[first_name], axes)


# ---------------------------------------------------------------- putting values in place


def put(parameter: Parameter, value: Array) -> None:
    """Make `value` the parameter's: in the array that is there, or in place of it under all its names.

    value is fresh, of the array's library, device and shape; nothing here can fail.
    """
    if overwritten(parameter.array, value):
        return
    for slot in parameter.slots:
        slot.layer.params[slot.name] = turned_back(value, slot.axes)


def overwritten(x: Array, value: Array) -> bool:
    """Copy value into x, where x can be written to and is of value's kind; whether that is so."""
    if not _is_kin(x, value) or not _is_writable(x):
        return False
    outside_autograd(x)[...] = value
    return True


def _is_kin(x: Array, value: Array) -> bool:
    """Whether both are of one library, device, shape and dtype; the byte order may differ."""
    if type(x) is np.ndarray and type(value) is np.ndarray and x.dtype is value.dtype:  # nearly always, and quick to see
        return bool(x.shape == value.shape)
    if tuple(x.shape) != tuple(value.shape) or dtype_name(x.dtype) != dtype_name(value.dtype):
        return False
    if isinstance(x, np.ndarray):
        return isinstance(value, np.ndarray)
    return library_name(x) == library_name(value) and bool(device_of(x) == device_of(value))


def _is_writable(x: Array) -> bool:
    if type(x) is np.ndarray and x.flags.forc:
        return x.flags.writeable
    if not is_writeable_array(x) or is_dask_array(x) or isinstance(x, np.generic):
        return False  # writing to a dask array makes its graph longer by a step each time
    if is_torch_array(x) and x.is_inference():
        return False
    memory = memory_of(x)
    return memory is None or elements_apart(memory)


# ---------------------------------------------------------------- bringing arrays to parameters


def outside_autograd(x: Array) -> Array:
    return x.detach() if type(x) is not np.ndarray and is_torch_array(x) else x


def copied(x: Array) -> np.ndarray:
    """x on the host: a C-contiguous copy in the machine's byte order, which is what files and other libraries take."""
    host = to_numpy(x)
    return np.array(host, dtype=host.dtype.newbyteorder("="), order="C")


def bring(owner: str, name: str, x: Array, like: Array, *, cast: bool = True) -> Array:
    """x in the library and on the device of `like`, and in its dtype where that is floating; x itself where it is all that.

    owner and name are for messages.
    """
    if type(x) is np.ndarray and type(like) is np.ndarray and (x.dtype is like.dtype or not cast):
        return x
    common_namespace(owner, [(name, x)])  # refuses what is no array, and says how to make one
    if not hasattr(like, "dtype"):
        raise TypeError(f"{owner}: a parameter is of type {type(like).__name__}, not an array; put an array into params")
    x = np.asarray(x) if isinstance(x, np.generic) else x
    wanted = dtype_name(like.dtype)
    xp, cast = array_namespace(like), cast and wanted in _FLOATS and is_real(x.dtype)
    if array_namespace(x) is not xp:
        refuse_while_recording(f"{owner}: {name} comes from {library_name(x)}", "make it an argument, of CuPy, of the captured function")
        # Cast before it moves, since the other library may lack the dtype it has (no other library takes NumPy's bfloat16), and copied,
        # since PyTorch warns of read-only memory.
        host = copied(x)
        if cast:
            host = host.astype("float32" if wanted == "bfloat16" else wanted, copy=False)
        x = xp.asarray(host, device=device_of(like))
    elif device_of(x) != device_of(like):
        x = to_device(x, device_of(like))
    if not cast or dtype_name(x.dtype) == wanted:
        return x
    return xp.astype(x, like.dtype.newbyteorder("=") if isinstance(like.dtype, np.dtype) else like.dtype)


def fitted(caller: str, wanted: Sequence[Parameter], state: Mapping[str, Array], missing: Sequence[str]) -> list[tuple[Parameter, Array]]:
    """A fresh array for each parameter that `state` has a value for, ready to be put in its place.

    `missing` are the names to complain of, together with those that are unknown or of another shape.
    """
    slots = {slot.key: slot for parameter in wanted for slot in parameter.slots}
    given = {key: copied(value) for key, value in state.items()}
    misshapen = [
        f"{key} has shape {given[key].shape}, wanted {tuple(slot.array.shape)}"
        for key, slot in slots.items()
        if key in given and given[key].shape != tuple(slot.array.shape)
    ]
    unknown = [str(key) for key in given if key not in slots]
    problems = [*_listing("missing", missing), *_listing("not in this model", unknown), *misshapen]
    if problems:
        message = f"{caller}: {'; '.join(problems)}. Load into a model of the layers that the state is from."
        raise ShapeError(message) if misshapen else ValueError(message)
    for key, value in given.items():
        if not is_real(value.dtype):
            raise DTypeError(f"{caller}: {key} has dtype {value.dtype}, wanted real numbers")
    return [(parameter, _agreed(caller, parameter, given)) for parameter in wanted if any(slot.key in given for slot in parameter.slots)]


def _agreed(caller: str, parameter: Parameter, given: Mapping[str, np.ndarray]) -> Array:
    """The value that `given` has for the parameter, under whichever of its names."""
    first, *others = [slot for slot in parameter.slots if slot.key in given]
    value = turned(bring(caller, first.key, given[first.key], parameter.array), first.axes)
    for slot in others:
        other = turned(bring(caller, slot.key, given[slot.key], parameter.array), slot.axes)
        if not _same_values(copied(value), copied(other)):
            raise ValueError(
                f"{caller}: {first.key} and {slot.key} are one array in this model, but are given different values; "
                f"give both the same, or untie them with an array of its own for {slot.key}"
            )
    return value


def _same_values(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all((a == b) | ((a != a) & (b != b))))  # NaN is NaN


def _listing(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {', '.join(names)}"] if names else []


def is_real(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("bool", "int", "uint", "float", "bfloat"))


def is_floating(dtype: Any) -> bool:
    return dtype_name(dtype) in _FLOATS


def place(values: np.ndarray, dtype: Any, xp: Any, device: Any) -> Array:
    """Fresh float64 values as a parameter: in xp, or on the chosen backend."""
    try:
        name = "" if dtype is None else np.dtype(dtype).name
    except TypeError:  # another library's
        name = dtype_name(dtype)
    if name not in ("float16", "float32", "float64"):
        raise DTypeError(f"dtype is {dtype!r}, wanted 'float16', 'float32' or 'float64'")
    values = values.astype(name)
    if xp is None and device is not None:
        raise ValueError(f"device is {device!r}, and xp is not given; pass the library that is to put parameters there, such as xp=torch")
    if xp is None:
        return asarray(values)
    placed = xp.asarray(values) if device is None else xp.asarray(values, device=device)
    if dtype_name(placed.dtype) != name:  # JAX makes float32 of float64 without a word, unless told otherwise
        raise DTypeError(f"{xp.__name__} made {placed.dtype} of {name}; for JAX: jax.config.update('jax_enable_x64', True)")
    return placed
