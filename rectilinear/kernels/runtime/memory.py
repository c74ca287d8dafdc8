"""What the jitted kernels need to reach memory: elements by address, and the fields of an ndarray.

The jitted functions work on plain addresses and byte strides, so that one compiled version serves every layout,
alignment and number of dimensions. The dtype T travels as a value, `zero`: its type selects what is loaded and stored.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.linking import constant_of
from rectilinear.kernels.runtime.native import intrinsic
from rectilinear.kernels.runtime.operands import Stack, Word
from rectilinear.kernels.runtime.records import WORD_BYTES, at, record

_WORD = ir.IntType(64)


@record
class ArrayFields:
    """What an ndarray holds after what every object does, in the layout that NumPy's C API fixes. ndim and flags are C ints."""

    data: int = 0
    ndim: int = 0
    shape: int = 0
    strides: int = 0
    base: int = 0
    dtype: int = 0
    flags: int = 0


C_ORDER, F_ORDER, WRITEABLE = 0x1, 0x2, 0x400
"""Of an ndarray's flags."""

_FIELDS, _ITEMS = object.__basicsize__, tuple.__basicsize__
"""Where the fields of an object, a tuple's length among them, and the items of a tuple begin."""

_TYPE = _FIELDS - WORD_BYTES

_INT = 0xFFFFFFFF


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def get(typingctx, zero, address):  # type: ignore[no-untyped-def]
    """The element of zero's type at `address`, of any alignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_at(builder, args[1], args[0].type), align=1)

    return zero(zero, types.intp), codegen


@intrinsic
def put(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Write `value` to `address`, of any alignment."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0], args[1].type), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, value), codegen


@intrinsic
def rounded(typingctx, zero, value):  # type: ignore[no-untyped-def]
    """A float64 value in zero's type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[1] if args[0].type == args[1].type else builder.fptrunc(args[1], args[0].type)

    return zero(zero, types.float64), codegen


@intrinsic
def bits_of(typingctx, value):  # type: ignore[no-untyped-def]
    """The bits of a float64 as an integer, which is what records hold."""
    return types.intp(types.float64), lambda context, builder, signature, args: builder.bitcast(args[0], _WORD)


size_of = constant_of(lambda itemsize: itemsize)
"""Bytes per element of zero's type."""


@intrinsic
def room(typingctx, count):  # type: ignore[no-untyped-def]
    """The address of so many (a literal) words, not zeroed, that live as long as the calling function."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = ir.ArrayType(_WORD, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():  # not by `alloca_once`, which zeroes: 32 KiB of zeros are all of L1
            return builder.ptrtoint(builder.alloca(kind), _WORD)

    return types.intp(count), codegen


@jit_inner
def word(address: int) -> int:
    """The 64-bit integer at `address`."""
    return at(Word, address).value


# The fields of an ndarray, given its id(). Axes are counted from the end: -1 the columns, -2 the rows, -3 the groups.
#
# Another thread may assign to `shape` or resize an array as soon as it has the GIL, and NumPy then frees what shape and strides were
# read from. So a pass reads all of this first, while it holds the GIL, sees that the extents fit one another, and lets go after that.


@jit_inner
def data_of(array: int) -> int:
    return at(ArrayFields, array + _FIELDS).data


@jit_inner
def _ndim_of(array: int) -> int:
    return at(ArrayFields, array + _FIELDS).ndim & _INT


@jit_inner
def extent_of(array: int, axis: int) -> int:
    """Length of an axis; 1 for one that the array does not have."""
    place = _ndim_of(array) + axis
    return word(at(ArrayFields, array + _FIELDS).shape + place * WORD_BYTES) if place >= 0 else 1


@jit_inner
def stride_of(array: int, axis: int, itemsize: int) -> int:
    """Bytes from one index to the next along an axis; as in C order, where there is no next one.

    The stride of an axis of length 0 or 1 may be negative, 0 or huge (NumPy itself gives a lone row a stride of 0), and no kernel is to
    conclude from it where memory ends. It is read as what it is in C order: a lone column has unit stride, a lone row the length of its
    columns, a lone group 0.
    """
    if extent_of(array, axis) > 1:
        return word(at(ArrayFields, array + _FIELDS).strides + (_ndim_of(array) + axis) * WORD_BYTES)
    if axis == -1:
        return itemsize
    return extent_of(array, -1) * itemsize if axis == -2 else 0


@jit_inner
def count_of(array: int) -> int:
    """Number of elements."""
    count = 1
    for axis in range(1, _ndim_of(array) + 1):
        count *= extent_of(array, -axis)
    return count


@jit_inner
def have_same_shape(a: int, b: int) -> bool:
    ndim, axis = _ndim_of(a), 1
    if _ndim_of(b) != ndim:
        return False
    while axis <= ndim and extent_of(a, -axis) == extent_of(b, -axis):
        axis += 1
    return axis > ndim


@jit_inner
def dtype_of(array: int) -> int:
    """The id() of its dtype."""
    return at(ArrayFields, array + _FIELDS).dtype


@jit_inner
def flags_of(array: int) -> int:
    return at(ArrayFields, array + _FIELDS).flags & _INT


@jit_inner
def type_of(thing: int) -> int:
    """The id() of the type of the object with this id()."""
    return word(thing + _TYPE)


@jit_inner
def length_of(items: int) -> int:
    """The length of a tuple, given its id()."""
    return word(items + _FIELDS)


@jit_inner
def item_of(items: int, index: int) -> int:
    """The id() of what a tuple holds."""
    return word(items + _ITEMS + index * WORD_BYTES)


@jit_inner
def has_extents(array: int, groups: int, rows: int, columns: int) -> bool:
    return extent_of(array, -3) == groups and extent_of(array, -2) == rows and extent_of(array, -1) == columns


@jit_inner
def read_stack(stack: Stack, array: int, itemsize: int, groups: int, rows: int, columns: int) -> bool:
    """Write where the matrices of an array lie into `stack`; whether it has these extents. 0 is no array, and fits any."""
    if array == 0:
        return True
    stack.data = data_of(array)
    stack.group = stride_of(array, -3, itemsize)
    stack.row = stride_of(array, -2, itemsize)
    stack.column = stride_of(array, -1, itemsize)
    return has_extents(array, groups, rows, columns)


CHANGED = -2
"""What a pass answers where the extents of its arguments do not fit one another: somebody has changed one since they were checked."""
