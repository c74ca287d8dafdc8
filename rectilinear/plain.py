"""The fast look: whether the arguments of a call are operands as they are, and where ``out`` can be filled at once, as nearly always.

It takes base arrays of one library, one native dtype and one device, and looks at no more than that needs: exact types, dtypes by
identity, devices by number, memory by owner and bounds. For everything else, errors too, it answers no: `dispatch` then looks at
everything, and says what is wrong, if anything is. So what this file does not know costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rectilinear.backends import registry
from rectilinear.backends.contract import Array, Backend
from rectilinear.keepmask import KeepMask

_ndarray = np.ndarray  # one look-up less at every call


_NATIVE = frozenset({np.dtype(np.float32), np.dtype(np.float64)})  # not their byte-swapped kin: those are unequal


class _Dtypes(dict[type, frozenset[Any] | None]):
    """Exact type of an array on a device -> the dtypes that are operands as they are; None for what is left to the general look.

    CuPy is known by name, for only those who use it have it.
    """

    def __missing__(self, kind: type) -> frozenset[Any] | None:
        if kind.__module__ != "cupy" or kind.__qualname__ != "ndarray":
            return None  # and not kept: there may be any number of types
        dtypes = self[kind] = _NATIVE | _half_dtypes()
        return dtypes


def _half_dtypes() -> frozenset[Any]:
    try:
        from ml_dtypes import bfloat16
    except ImportError:  # without it there are no bfloat16 arrays
        return frozenset({np.dtype(np.float16)})
    return frozenset({np.dtype(np.float16), np.dtype(bfloat16)})


_device_dtypes = _Dtypes()


def plain_backend(first: Array, others: tuple[Array, ...] = (), b: Array | None = None, keep: Any = None) -> Backend | None:
    """The backend, if the arguments are operands as they are; None if the general look is to decide."""
    kind: Any = type(first)
    dtypes: Any = _NATIVE
    if kind is not _ndarray:
        dtypes = _device_dtypes[kind]
        if dtypes is None:
            return None
    dtype = first.dtype
    if dtype not in dtypes:
        return None
    for other in others:
        if type(other) is not kind or other.dtype is not dtype:
            return None
    if b is not None and (type(b) is not kind or b.dtype is not dtype):
        return None
    if keep is not None:
        if type(keep) is kind:
            if keep.dtype is not dtype:
                return None
        elif type(keep) is not KeepMask or type(keep._bits) is not kind:
            return None
    if kind is _ndarray:
        backend = registry.active()
        return backend if backend.library == "numpy" else None
    here = first.data.device_id
    for other in others:
        if other.data.device_id != here:
            return None
    if b is not None and b.data.device_id != here:
        return None
    if keep is not None and (keep._bits if type(keep) is KeepMask else keep).data.device_id != here:
        return None
    return registry.serving("cupy")


def labels_on_its_device(x: Array, y: Array) -> bool:
    """Whether y, an array of the same library as x other than NumPy, is where x is."""
    return _device_dtypes[type(x)] is not None and bool(x.data.device_id == y.data.device_id)


# ---------------------------------------------------------------- out


def fits_at_once(out: Array, shape: Any, dtype: Any, arguments: Sequence[Array | None]) -> bool:
    """Whether `out` can take a result of this shape and dtype, as nearly always; if not, `check_outs` says why not, if anything is.

    Arguments, the first of which is there, are what `plain_backend` let pass. NumPy arrays that own their memory share none of it with
    what another one owns: to see that all of them are of that kind takes a third of the time that comparing bounds does.
    """
    if type(arguments[0]) is not _ndarray:
        return _fit_by_bounds((out,), (shape,), dtype, arguments)
    owner = _owner_for(out, shape, dtype)
    if owner is None:
        return False
    if owner is not _UNKNOWN:
        for other in arguments:
            if other is not None and (other is owner or not other.flags.owndata):
                break
        else:
            return True
    return _lie_apart((out,), arguments)


def gradients_fit_at_once(outs: Sequence[Array | None], dout: Array, x: Array, w: Array, b: Array | None, keep: Array | None) -> bool:
    """`fits_at_once` for dx, dw and db, or those of them that have an out."""
    dtype = x.dtype
    if type(dout) is not _ndarray:
        return _fit_by_bounds(outs, (x.shape, w.shape, None if b is None else b.shape), dtype, (dout, x, w, b, keep))
    dx, dw, db = outs
    of_dx = _NOWHERE if dx is None else _owner_for(dx, x.shape, dtype)
    of_dw = _NOWHERE if dw is None else _owner_for(dw, w.shape, dtype)
    of_db = _NOWHERE if db is None else _owner_for(db, b.shape, dtype)  # type: ignore[union-attr]  # without b no db is asked for
    if of_dx is None or of_dw is None or of_db is None:
        return False
    known = of_dx is not _UNKNOWN and of_dw is not _UNKNOWN and of_db is not _UNKNOWN
    if known and (dx is None or (of_dx is not of_dw and of_dx is not of_db)) and (dw is None or of_dw is not of_db):
        for other in (dout, x, w, b, keep):
            if other is not None and (other is of_dx or other is of_dw or other is of_db or not other.flags.owndata):
                break
        else:
            return True
    return _lie_apart(outs, (dout, x, w, b, keep))


# NumPy's arrays

_NOWHERE, _UNKNOWN = object(), object()


def _owner_for(out: Array, shape: Any, dtype: Any) -> Any:
    """None if a result of this shape and dtype cannot go to `out`, or not at once; else the array that owns its memory, or _UNKNOWN."""
    if type(out) is not _ndarray or out.dtype is not dtype or out.shape != shape:
        return None
    flags = out.flags
    # Not flags.farray, which NumPy has true of any array that is writeable and not in C order.
    if not (flags.carray or (flags.f_contiguous and flags.behaved) or (flags.writeable and elements_apart(out))):
        return None
    owner = out if flags.owndata else _owner(out)
    return _UNKNOWN if owner is None else owner


def _lie_apart(outs: Sequence[Array | None], arguments: Sequence[Array | None]) -> bool:
    """Whether no out can share memory with another one or with an argument: base NumPy arrays, some of them views."""
    taken = [(array, _owner(array)) for array in arguments if array is not None]
    for out in outs:
        if out is not None:
            owner = _owner(out)
            for other, other_owner in taken:
                if (owner is other_owner or owner is None or other_owner is None) and np.may_share_memory(out, other):
                    return False
            taken.append((out, owner))
    return True


def _owner(array: np.ndarray) -> np.ndarray | None:
    """The array whose memory this one lies in, maybe itself; None where no array owns it (a file's, a buffer's, another library's)."""
    if array.flags.owndata:
        return array
    base = array.base
    return base if type(base) is np.ndarray and base.flags.owndata else None


def elements_apart(array: np.ndarray) -> bool:
    """Whether no two elements share a byte, as far as this can tell: each axis steps over all that those of shorter strides span.

    The exact question is hard. Layouts that pass are all those of slices and permuted axes; refused without need are only some whose
    strides interleave, such as elements 0, 2, 4 and 3, 5, 7 as one array. Memory is not read, so that `dispatch.memory_of` will do.
    """
    if not array.size:
        return True
    span = array.itemsize
    axes = [(abs(stride), extent) for stride, extent in zip(array.strides, array.shape, strict=True) if extent != 1]
    for stride, extent in sorted(axes):
        if stride < span:
            return False
        span += stride * (extent - 1)
    return True


# CuPy's arrays


def _fit_by_bounds(outs: Sequence[Any], shapes: Sequence[Any], dtype: Any, arguments: Sequence[Any]) -> bool:
    """`fits_at_once` for CuPy's arrays: C-contiguous outs, whose bounds are exact, and which no argument's reach into.

    Their flags are an object that is made anew each time; what it is made of is there as well.
    """
    first = arguments[0]
    kind, here = type(first), first.data.device_id
    taken: list[tuple[int, int]] = []
    for out, shape in zip(outs, shapes):  # noqa: B905 - strict costs as much as the loop
        if out is not None:
            if type(out) is not kind or out.dtype is not dtype or not out._c_contiguous or out.shape != shape:
                return False
            data = out.data
            if data.device_id != here:
                return False
            low = data.ptr
            high = low + out.nbytes
            for start, end in taken:
                if low < end and start < high:
                    return False
            taken.append((low, high))
    for x in arguments:
        if x is not None:
            if not (x._c_contiguous or x._f_contiguous):
                return False
            low = x.data.ptr
            high = low + x.nbytes
            for start, end in taken:
                if low < end and start < high:
                    return False
    return True
