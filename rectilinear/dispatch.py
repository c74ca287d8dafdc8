"""From the arguments of one call to the backend that serves it: library, device, dtype, ``out``, all looked at once.

What nearly all calls are is seen by `plain` in less time; this is the look that takes everything, and knows what is wrong. `resolve`
gives a `Call`, which turns arguments into operands as `backends.contract` promises them and results into what the caller is to see.
What the extents have to be is the business of `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np

from rectilinear.backends import registry
from rectilinear.backends.contract import Array, Backend
from rectilinear.backends.generic import known
from rectilinear.errors import BackendError, DTypeError, ShapeError
from rectilinear.keepmask import KeepMask
from rectilinear.plain import elements_apart, fits_at_once, gradients_fit_at_once

_HALVES = frozenset({"float16", "bfloat16"})
_FLOATS = _HALVES | {"float32", "float64"}
_INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
_NUMBERS = _FLOATS | _INTEGERS | {"bool"}
_OPTIONAL = frozenset({"b", "relu cache"})
_MASKS = frozenset({"cache", "relu cache"})  # where a KeepMask may stand for an array

# Overlap of two interleaved views is a Diophantine problem; past this much work it is taken as given.
_OVERLAP_WORK = 10_000


class Call:
    """How one call is served.

    Attributes
    ----------
    function : str
        The public function, for messages.
    backend : Backend
    xp : module
        Namespace of the arguments' library.
    dtype : dtype
        T, the dtype of every result.
    compute : dtype
        What the backend is given: T, or float32 for a 16-bit T.
    plain : bool
        The arguments are operands as they are, by the fast look of `plain`.
    names, arrays : sequences
        The array arguments; None for one that was left out.
    """

    __slots__ = ("arrays", "backend", "compute", "dtype", "function", "names", "plain", "xp")

    def __init__(
        self,
        function: str,
        names: Sequence[str],
        arrays: Sequence[Array | None],
        backend: Backend,
        xp: Any,
        dtype: Any,
        compute: Any,
        plain: bool,
    ) -> None:
        self.function = function
        self.names = names
        self.arrays = arrays
        self.backend = backend
        self.xp = xp
        self.dtype = dtype
        self.compute = compute
        self.plain = plain

    @property
    def given(self) -> list[tuple[str, Array]]:
        return [(name, array) for name, array in zip(self.names, self.arrays, strict=True) if array is not None]

    @property
    def moves(self) -> bool:
        """NumPy arguments for a backend that computes elsewhere: taken there, and the results back."""
        return self.xp is np and self.backend.library != "numpy"

    def run(self, primitive: str, *operands: Any) -> Any:
        """Call the backend's primitive."""
        method = getattr(self.backend, primitive)
        if self.xp is np:
            return method(*operands)
        try:
            return method(*operands)
        except Exception as error:  # each lazy library refuses with an error of its own
            if not any(has_unknown_extent(array) for _, array in self.given):
                raise
            shapes = ", ".join(f"{name} {shape_text(array.shape)}" for name, array in self.given)
            raise ShapeError(
                f"{self.function}: the library cannot combine these while an extent is unknown: {shapes}; "
                "let it find out before (dask: x.compute_chunk_sizes())"
            ) from error

    def operand(self, x: Array | None) -> Array | None:
        """x as the backend takes it: base array of the compute dtype, outside autograd, on the backend's device."""
        if self.plain or x is None:
            return x
        if self.xp is np:
            x = np.asarray(x, dtype=self.compute)
            return self.backend.asarray(x) if self.moves else x
        if compat.is_torch_array(x):
            x = x.detach()
        return x if x.dtype == self.compute else self.xp.astype(x, self.compute)

    def keep_operand(self, keep: Array | KeepMask | None) -> Array | KeepMask | None:
        if not isinstance(keep, KeepMask):
            return keep if getattr(self.backend, "any_keep", False) else self.operand(keep)
        return self.backend.asarray(keep) if self.moves else keep

    def target(self, out: Array | None, shape: tuple[Any, ...]) -> Array | None:
        """`out` as the backend may fill it, seen in the operand's shape; None where it cannot be: `deliver` copies then."""
        if out is None or self.moves or self.compute != self.dtype:
            return None
        if type(out) is np.ndarray and out.shape == shape:
            return out
        if self.xp is not np:
            return out if compat.is_cupy_array(out) and out.shape == shape else None
        try:
            return np.reshape(out.view(np.ndarray), shape, copy=False)
        except ValueError:
            return None

    def deliver(
        self,
        result: Array | None,
        shape: tuple[Any, ...] | None = None,
        out: Array | None = None,
        target: Array | None = None,
    ) -> Any:
        """The backend's result as the caller gets it: in T, in `shape`, in the caller's library, in `out` if there is one."""
        if result is None or (out is not None and result is target):
            return out
        if self.moves:
            result = self.backend.to_numpy(result)
        if isinstance(result, KeepMask):
            return result
        if self.compute != self.dtype:
            with np.errstate(under="ignore"):  # a result too small for 16 bits is 0 in them
                result = self.xp.astype(result, self.dtype) if self.xp is not np else np.asarray(result).astype(self.dtype)
        if shape is not None and result.ndim != len(shape):
            result = self.xp.reshape(result, shape)
        if out is None:
            return result
        (out.detach() if compat.is_torch_array(out) else out)[...] = result
        return out


# ---------------------------------------------------------------- who serves, and in which dtype


def resolve(function: str, names: Sequence[str], arrays: Sequence[Array | None], at_once: Backend | None = None) -> Call:
    """The `Call` for these arguments; None stands for one that was left out, and a `KeepMask` has no say.

    `at_once` is what `plain_backend` said of them.

    Raises
    ------
    TypeError
        An argument is no array, or not of the same library or device as the others.
    DTypeError
        There is no common dtype, or it is none that rectilinear computes in.
    """
    if at_once is not None:
        dtype = arrays[0].dtype  # type: ignore[union-attr]  # the first one is never left out
        xp = np if at_once.library == "numpy" else compat.array_namespace(arrays[0])
        return Call(function, names, arrays, at_once, xp, dtype, dtype, True)
    given = [(name, array) for name, array in zip(names, arrays, strict=True) if array is not None or name not in _OPTIONAL]
    for name, array in given:
        if isinstance(array, KeepMask) and name not in _MASKS:
            raise TypeError(f"{function}: {name} is a KeepMask, which stands for an array only as the cache of a ReLU")
    xp = common_namespace(function, given)
    backend = registry.active() if xp is np else registry.serving(library_name(given[0][1]))
    voting = [(name, array) for name, array in given if not isinstance(array, KeepMask)]
    dtype = _common_dtype(function, xp, voting)
    compute = xp.float32 if dtype_name(dtype) in _HALVES and not backend.half else dtype
    return Call(function, names, arrays, backend, xp, dtype, np.dtype(compute) if xp is np else compute, False)


def common_namespace(function: str, given: Sequence[tuple[str, Array]]) -> Any:
    """The array namespace of all these arguments (NumPy itself for NumPy's), or the TypeError that says which one is not of it."""
    first_name, first = given[0]
    xp = _namespace(function, first_name, first)
    place = None if xp is np else _device(first)
    for name, array in given[1:]:
        if _namespace(function, name, array, first) != xp:
            if xp is not np and isinstance(array, np.ndarray) and name in numpy_operands(first):
                continue
            how = f"rectilinear.to_numpy({name})" if xp is np else f"{_maker(first)}(rectilinear.to_numpy({name}))"
            raise TypeError(
                f"{function}: {first_name} is {a_or_an(library_name(first))} array but {name} is {a_or_an(library_name(array))} array; "
                f"bring both to one library, for example with {how}"
            )
        other = None if xp is np else _device(array)
        if place is not None and other is not None and other != place:
            raise TypeError(
                f"{function}: {first_name} is on device {place} but {name} is on device {other}; "
                f"move one of them, for example with array_api_compat.to_device({name}, array_api_compat.device({first_name}))"
            )
        place = other if place is None else place
    return xp


def numpy_operands(x: Array) -> frozenset[str]:
    """Names of the arguments that may be NumPy arrays beside this one of another library."""
    try:
        names: frozenset[str] = getattr(registry.serving(library_name(x)), "numpy_operands", frozenset())
    except BackendError:  # nobody serves x here; what is wrong with the call is to be said first
        return frozenset()
    return names


def _namespace(function: str, name: str, x: Any, first: Array = None) -> Any:
    """The namespace of x; `first` is an array before it, whose library the remedy is to lead to."""
    if isinstance(x, np.ndarray | np.generic):
        if isinstance(x, np.matrix | np.ma.MaskedArray):
            raise TypeError(
                f"{function}: {name} is {a_or_an(type_name(x))}, whose operators mean other things; pass {remedy(name, x, first)}"
            )
        return np
    if isinstance(x, KeepMask):
        return _namespace(function, name, x._bits)
    try:
        return compat.array_namespace(x)
    except TypeError:
        if x is None:
            hint = "; only b may be None" if function.startswith("affine") else ""
            raise TypeError(f"{function}: {name} is None, not an array{hint}") from None
        raise TypeError(f"{function}: {name} is {a_or_an(type_name(x))}, not an array; pass {remedy(name, x, first)}") from None


def remedy(name: str, x: Any, first: Array = None) -> str:
    """The expression that makes an array of x, which is none that we take, in the library of `first`; `name` is what x is called."""
    name = "..." if " " in name else name  # no expression
    if isinstance(x, np.ma.MaskedArray):
        made = f"{name}.filled(0)"  # or what the caller would have in the place of what is masked
    elif isinstance(x, np.matrix):
        made = f"np.asarray({name})"
    else:
        # SciPy's sparse arrays; the tables of pandas, Polars and Arrow.
        made = next((f"{name}.{method}()" for method in ("toarray", "to_numpy") if callable(getattr(x, method, None))), "")
    if first is None or isinstance(first, np.ndarray | np.generic):
        return made or (f"rectilinear.asarray({name})" if first is None else f"np.asarray({name})")
    return f"{_maker(first)}({made or name})"


def _maker(x: Array) -> str:
    """What makes an array of x's library of a NumPy array or of lists, as one writes it: ``jax.numpy.asarray``."""
    return f"{compat.array_namespace(x).__name__.removeprefix('array_api_compat.')}.asarray"


def _device(x: Array) -> Any:
    """The device of x, or None where the library does not name one (traced, lazy and sharded arrays): it then matches any."""
    try:
        place = compat.device(x._bits if isinstance(x, KeepMask) else x)
    except Exception:  # a tracer may answer with any error of its own
        return None
    return None if compat.is_jax_array(x) and not hasattr(place, "platform") else place


def _common_dtype(function: str, xp: Any, given: Sequence[tuple[str, Array]]) -> Any:
    dtypes = [array.dtype for _, array in given]
    odd = [name for name, array in given if dtype_name(array.dtype) not in _NUMBERS]
    if odd:
        raise DTypeError(
            f"{function}: cannot compute in these dtypes: {_dtypes_text(given)}; convert {odd[0]} to float32, float64, float16 or bfloat16"
        )
    floats = [dtype for dtype in dtypes if dtype_name(dtype) in _FLOATS]
    try:
        dtype = _promote(xp, dtypes)
    except Exception:  # each library refuses with an error of its own: then integers take the floats' dtype
        try:
            dtype = _promote(xp, floats or dtypes)
        except Exception as error:
            raise DTypeError(f"{function}: these dtypes have no common dtype: {_dtypes_text(given)}; convert one of them") from error
    if dtype_name(dtype) not in _FLOATS:
        dtype = floats[0] if floats else xp.zeros(()).dtype
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _dtypes_text(given: Sequence[tuple[str, Array]]) -> str:
    return ", ".join(f"{name} {dtype_name(array.dtype)}" for name, array in given)


def _promote(xp: Any, dtypes: Sequence[Any]) -> Any:
    first = dtypes[0]
    return first if all(dtype == first for dtype in dtypes) else xp.result_type(*dtypes)


def dtype_name(dtype: Any) -> str:
    """Name of a dtype of any library, as the standard spells it: ``float32``.

    Remembered: NumPy works it out anew each time, in 5 us, which is what a call on small arrays takes.
    """
    kind: Any = type(dtype)
    return _named(kind, dtype)


@lru_cache(maxsize=256)
def _named(kind: Any, dtype: Any) -> str:
    """kind comes first in the key, for array_api_strict warns when its dtypes are compared with NumPy's."""
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]


def library_name(x: Any) -> str:
    """Name of the library whose array x is, as one imports it."""
    module = type(x._bits if isinstance(x, KeepMask) else x).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(module, module)


def type_name(x: Any) -> str:
    module = type(x).__module__
    return type(x).__name__ if module == "builtins" else f"{module}.{type(x).__name__}"


def a_or_an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# ---------------------------------------------------------------- out


def check_outs(
    call: Call, names: Sequence[str], outs: Sequence[Array | None], shapes: Sequence[Any], in_place: Array | None = None
) -> None:
    """Whether `outs` can take results of these shapes and T without touching an argument or one another; None for one not given.

    `in_place` is the one argument that an out may be.
    """
    if call.plain:
        arguments = [x._bits if type(x) is KeepMask else x for x in call.arrays]
        if gradients_fit_at_once(outs, *arguments) if len(outs) > 1 else fits_at_once(outs[0], shapes[0], call.dtype, arguments):
            return
    given = call.given
    for name, out, shape in zip(names, outs, shapes, strict=True):
        if out is not None:
            _check_out(call, name, out, shape, given, in_place)
            given.append((name, out))


def _check_out(
    call: Call, name: str, out: Array, shape: tuple[Any, ...], given: Sequence[tuple[str, Array]], in_place: Array | None
) -> None:
    function = call.function
    if isinstance(out, KeepMask):
        raise TypeError(f"{function}: {name} is a KeepMask; pass an array")
    if type(out) is not np.ndarray or call.xp is not np:
        common_namespace(function, (given[0], (name, out)))
    if not (out.flags.writeable if type(out) is np.ndarray else compat.is_writeable_array(out)):
        raise (
            ValueError(f"{function}: {name} is read-only; pass a writable array")
            if call.xp is np
            else TypeError(f"{function}: {name} is given, but {library_name(out)} arrays are immutable; call without out")
        )
    if out.shape != shape and not same_shape(out.shape, shape):
        raise ShapeError(f"{function}: {name} has shape {shape_text(out.shape)} but the result has {shape_text(shape)}")
    if out.dtype != call.dtype:
        order = ", in another byte order" if dtype_name(out.dtype) == dtype_name(call.dtype) else ""
        raise DTypeError(f"{function}: {name} has dtype {dtype_name(out.dtype)}{order} but the result has {dtype_name(call.dtype)}")
    memory = memory_of(out)
    if memory is not None and not elements_apart(memory):
        how = "a stride of 0" if 0 in memory.strides else f"shape {memory.shape}, strides {memory.strides}"
        raise ValueError(f"{function}: elements of {name} share memory with one another ({how}); pass another array")
    for other_name, other in given:
        if not (out is other and other is in_place) and _overlap(out, other):
            raise ValueError(f"{function}: {name} shares memory with {other_name}, which is still needed; pass another array")


def _overlap(a: Array, b: Array | KeepMask) -> bool:
    first, second = memory_of(a), memory_of(b._bits if isinstance(b, KeepMask) else b)
    if first is None or second is None:
        return a is b
    if not np.may_share_memory(first, second):
        return False
    try:
        return np.shares_memory(first, second, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]  # the stubs know only 0 and -1
    except np.exceptions.TooHardError:
        return True


class _Layout:
    """What an array says of its memory, for NumPy to reason about addresses; the memory itself may be a GPU's and is not touched."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
        self.address = address
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
        }


def memory_of(x: Array) -> np.ndarray | None:
    """Addresses and strides of x as a NumPy array that must not be read; None where the library does not tell."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    try:
        if compat.is_torch_array(x):
            size = x.element_size()
            layout = _Layout(x.data_ptr(), tuple(x.shape), tuple(size * stride for stride in x.stride()), size)
        elif compat.is_cupy_array(x):
            layout = _Layout(x.data.ptr, x.shape, x.strides, x.itemsize)
        else:
            return x._array if library_name(x) == "array_api_strict" else None
    except Exception:  # traced, fake and lazy tensors have no memory to speak of
        return None
    return np.asarray(layout) if layout.address else None


def readable(x: Array) -> np.ndarray | None:
    """The values of x where they can be had without waiting (NumPy, strict, torch CPU), else None."""
    if isinstance(x, np.ndarray):
        return x
    try:
        if compat.is_torch_array(x):
            return x.detach().numpy() if x.device.type == "cpu" else None
        return np.asarray(x) if library_name(x) == "array_api_strict" else None
    except Exception:  # torch under vmap, strict on a device that NumPy cannot reach
        return None


# ---------------------------------------------------------------- extents


def same(a: Any, b: Any) -> bool:
    """Whether two extents can be equal; an unknown one can be any."""
    return bool(a == b) or not known(a) or not known(b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def has_unknown_extent(x: Array) -> bool:
    return not all(map(known, x.shape))


def product(extents: Sequence[Any]) -> Any:
    """Product of extents, None if one is unknown."""
    return math.prod(extents) if all(map(known, extents)) else None


def shape_text(shape: Sequence[Any]) -> str:
    return str(tuple(extent if known(extent) else "?" for extent in shape)).replace("'", "")
