"""KeepMask: which elements a fused ReLU kept, one bit each, as the fused kernels write it.

The backends that fuse the ReLU into the product (numba, cupy) return it as the ReLU half of the cache in
place of the pre-activations z, which they never store. It carries what backward needs and no more.
"""

from __future__ import annotations

import operator
from typing import Any

import array_api_compat as compat
import numpy as np

from rectilinear.errors import DTypeError, ShapeError

_COMPARISONS: dict[Any, Any] = {
    np.equal: operator.eq,
    np.not_equal: operator.ne,
    np.less: operator.lt,
    np.less_equal: operator.le,
    np.greater: operator.gt,
    np.greater_equal: operator.ge,
}


_REFUSAL = (
    "KeepMask: {} cannot take a mask, which says where a fused ReLU kept z but does not hold z; "
    "pass relu_backward(dout, mask) for the gradient, mask > 0 for what was kept, or np.asarray(mask) for +1 and -1"
)

_ABOUT_SHAPES = ("shape", "ndim", "size")


class _MaskOfAnyImport(type):
    """A mask made before this module was loaded anew (importlib.reload, IPython's autoreload) is still a mask to `isinstance`.

    Python asks this only about objects that are not exactly of the class, so that it costs nothing where it matters.
    """

    def __instancecheck__(cls, x: object) -> bool:
        return type(type(x)).__qualname__ == "_MaskOfAnyImport"


class KeepMask(np.lib.mixins.NDArrayOperatorsMixin, metaclass=_MaskOfAnyImport):  # type: ignore[metaclass]  # the mixin is no ABC, whatever the stubs say
    """The keep-set of a fused ReLU: bit j of row i is 1 where ``not (z[i, j] < 0)``.

    Parameters
    ----------
    bits : uint8 array of shape (..., N, R), R >= ceil(M / 8)
        Element j of a row is bit ``j % 8`` of byte ``j // 8``; what lies beyond M is zero. NumPy or CuPy, of any strides.
    shape : tuple of int
        (N, M), or (B, N, M) for the stacked form.

    Raises
    ------
    ShapeError
        `bits` does not hold a bit for each element of `shape`.
    DTypeError
        `bits` is of another dtype than uint8.
    TypeError
        `bits` is no array, or `shape` no tuple of ints; and for arithmetic on a mask.

    Notes
    -----
    ``np.asarray(mask)`` and comparisons see int8 values, +1 where kept and -1 where not (as bool: kept or not), so that code
    which tests ``z > 0`` or ``z >= 0`` selects the elements that the forward kept. ``np.where`` and ``np.array_equal`` see those values
    too. Nothing else can be computed with a mask: it is not z. Where the bits are on a GPU, comparisons answer there, in CuPy, and
    ``np.asarray`` refuses, as for CuPy's arrays.

    Examples
    --------
    >>> import numpy as np
    >>> mask = KeepMask(np.array([[0b101]], dtype=np.uint8), (1, 3))
    >>> np.asarray(mask)
    array([[ 1, -1,  1]], dtype=int8)
    >>> mask > 0
    array([[ True, False,  True]])
    """

    # No __slots__: IPython's autoreload gives the class that others have imported the attributes of the new one, and the slots of
    # one class do not fit instances of another.
    _bits: Any
    _shape: tuple[int, ...]

    def __init__(self, bits: Any, shape: tuple[int, ...]) -> None:
        self._shape = _checked_shape(shape)
        # A view, which nobody else can give another shape.
        self._bits = _checked_bits(bits, self._shape)[...]

    @property
    def bits(self) -> Any:
        """The bits, a view: giving it another shape or size leaves the mask as it is."""
        return self._bits[...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def nbytes(self) -> int:
        return int(self._bits.nbytes)

    def to_bool(self) -> Any:
        """The keep-set as a bool array of this mask's shape, in the library that holds the bits."""
        bits = self._bits
        if isinstance(bits, np.ndarray):
            return np.unpackbits(bits, axis=-1, count=self._shape[-1], bitorder="little").view(np.bool_)
        xp, width = compat.array_namespace(bits), 8 * bits.shape[-1]
        if compat.is_cupy_array(bits):
            with bits.device:  # where it makes the result
                spread = xp.unpackbits(bits, bitorder="little").view(np.bool_)  # it has neither axis nor count
        else:
            one = xp.ones_like(bits[..., None])
            spread = ((bits[..., None] >> xp.arange(8, dtype=xp.uint8, device=compat.device(bits))) & one) == 1
        return xp.reshape(spread, (*bits.shape[:-1], width))[..., : self._shape[-1]]

    def _signs(self) -> Any:
        """+1 and -1, in the library that holds the bits."""
        xp, kept = compat.array_namespace(self._bits), self.to_bool()
        return xp.astype(kept, xp.int8) * 2 - 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not isinstance(self._bits, np.ndarray):
            raise TypeError("this KeepMask lies on a GPU; rectilinear.to_numpy(mask) brings it to the host")
        if copy is False:
            raise ValueError("a KeepMask is stored as bits: it cannot become an array without a copy")
        if dtype is None:
            signs: np.ndarray = self._signs()
            return signs
        kept: np.ndarray = self.to_bool()
        return kept if np.dtype(dtype) == np.bool_ else self._signs().astype(dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Comparisons, which operators on either side come to as well; for everything else, an error that says what to do."""
        compare = _COMPARISONS.get(ufunc) if method == "__call__" else None
        if compare is None or any(isinstance(out, KeepMask) for out in kwargs.get("out", ())):
            raise TypeError(_REFUSAL.format(ufunc.__name__))
        operands = [x._signs() if isinstance(x, KeepMask) else x for x in inputs]
        if not isinstance(self._bits, np.ndarray):
            operands = [_number(x) for x in operands]
        return ufunc(*operands, **kwargs) if kwargs else compare(*operands)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """NumPy's functions that are no ufuncs: those about the shape, `array_equal` and `where`; for the others the same error."""
        name = getattr(function, "__name__", "")
        if name not in (*_ABOUT_SHAPES, "array_equal", "where"):
            raise TypeError(_REFUSAL.format(name))

        def stand_in(x: Any) -> Any:
            if not isinstance(x, KeepMask):
                return x
            return np.broadcast_to(np.False_, x.shape) if name in _ABOUT_SHAPES else x._signs()

        return function(*map(stand_in, args), **{key: stand_in(x) for key, x in kwargs.items()})

    def __repr__(self) -> str:
        return f"KeepMask(shape={self._shape}, nbytes={self.nbytes})"

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepMask, (self._bits, self._shape)

    def __setstate__(self, state: tuple[Any, tuple[int, ...]]) -> None:
        """Pickles of version 0.1.0 come here with bits and shape."""
        self.__init__(*state)  # type: ignore[misc]


_new = object.__new__  # one look-up less at every call


def unchecked(bits: Any, shape: tuple[int, ...]) -> KeepMask:
    """A mask of bits that a backend of ours has just made for this shape, and that nobody else holds."""
    mask: KeepMask = _new(KeepMask)
    mask._bits = bits
    mask._shape = shape
    return mask


def _number(x: Any) -> Any:
    """A scalar as a Python float, which CuPy takes on either side of an operator; +1 and -1 compare with it as with x."""
    if isinstance(x, np.ndarray) and x.ndim == 0:
        x = x[()]
    return float(x) if isinstance(x, int | float | np.generic) and not isinstance(x, np.complexfloating) else x


def _checked_shape(shape: Any) -> tuple[int, ...]:
    try:
        extents = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"KeepMask: shape is {shape!r}; it takes a tuple of ints, (N, M) or (B, N, M)") from None
    if not extents or min(extents) < 0:
        raise ShapeError(f"KeepMask: shape is {extents}; it takes (N, M) or (B, N, M), none of them negative")
    return extents


def _checked_bits(bits: Any, shape: tuple[int, ...]) -> Any:
    base_array = type(bits) is np.ndarray or not isinstance(bits, np.ndarray)
    if not base_array or not hasattr(bits, "dtype") or not hasattr(bits, "shape"):
        met = f"{type(bits).__module__}.{type(bits).__name__}".removeprefix("builtins.")
        raise TypeError(f"KeepMask: bits is a {met}; it takes a uint8 array of NumPy or CuPy")
    if str(bits.dtype).rpartition(".")[2] != "uint8":
        raise DTypeError(f"KeepMask: bits has dtype {bits.dtype}; it takes uint8, eight elements a byte")
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if len(bits.shape) != len(shape) or tuple(bits.shape[:-1]) != wanted[:-1] or bits.shape[-1] < wanted[-1]:
        raise ShapeError(f"KeepMask: bits has shape {tuple(bits.shape)} but a mask of shape {shape} takes {wanted}, or longer rows")
    return bits
