"""KeepMask: which elements a fused ReLU kept, one bit each, as the fused kernels write it.

The backends that fuse the ReLU into the product (numba, cupy) return it as the ReLU half of the cache in
place of the pre-activations z, which they never store. It carries what backward needs and no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device


class KeepMask:
    """The keep-set of a fused ReLU: bit j of row i is 1 where ``not (z[i, j] < 0)``.

    Parameters
    ----------
    bits : uint8 array of shape (..., N, R), R >= ceil(M / 8)
        Element j of a row is bit ``j % 8`` of byte ``j // 8``; what lies beyond M is zero. NumPy or CuPy.
    shape : tuple of int
        (N, M), or (B, N, M) for the stacked form.

    Notes
    -----
    ``np.asarray(mask)`` and comparisons see int8 values, +1 where kept and -1 where not (as bool: kept or not), so that code
    which tests ``z > 0`` or ``z >= 0`` selects the elements that the forward kept.

    Examples
    --------
    >>> import numpy as np
    >>> mask = KeepMask(np.array([[0b101]], dtype=np.uint8), (1, 3))
    >>> np.asarray(mask)
    array([[ 1, -1,  1]], dtype=int8)
    >>> mask > 0
    array([[ True, False,  True]])
    """

    __slots__ = ("bits", "shape")
    __hash__ = None  # type: ignore[assignment]  # compares elementwise, as arrays do
    __array_priority__ = 1000.0

    def __init__(self, bits: Any, shape: tuple[int, ...]) -> None:
        self.bits = bits
        self.shape = shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(self.bits.nbytes)

    def to_bool(self) -> Any:
        """The keep-set as a bool array of this mask's shape, in the library that holds the bits."""
        if isinstance(self.bits, np.ndarray):
            return np.unpackbits(self.bits, axis=-1, count=self.shape[-1], bitorder="little").view(np.bool_)
        # CuPy's unpackbits has neither axis nor count.
        xp = array_namespace(self.bits)
        one = xp.ones_like(self.bits[..., None])
        spread = (self.bits[..., None] >> xp.arange(8, dtype=xp.uint8, device=device(self.bits))) & one
        return xp.reshape(spread, (*self.bits.shape[:-1], -1))[..., : self.shape[-1]] == 1

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not isinstance(self.bits, np.ndarray):
            raise TypeError("this KeepMask lies on a GPU; rectilinear.to_numpy(mask) brings it to the host")
        if copy is False:
            raise ValueError("a KeepMask is stored as bits: it cannot become an array without a copy")
        signs: np.ndarray = self.to_bool().view(np.int8) * np.int8(2) - np.int8(1)
        return signs if dtype is None else self.to_bool() if np.dtype(dtype) == np.bool_ else signs.astype(dtype)

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == other

    def __ne__(self, other: object) -> Any:
        return np.asarray(self) != other

    def __gt__(self, other: Any) -> Any:
        return np.asarray(self) > other

    def __ge__(self, other: Any) -> Any:
        return np.asarray(self) >= other

    def __lt__(self, other: Any) -> Any:
        return np.asarray(self) < other

    def __le__(self, other: Any) -> Any:
        return np.asarray(self) <= other

    def __repr__(self) -> str:
        return f"KeepMask(shape={self.shape}, nbytes={self.nbytes})"

    def __getstate__(self) -> tuple[Any, tuple[int, ...]]:
        return self.bits, self.shape

    def __setstate__(self, state: tuple[Any, tuple[int, ...]]) -> None:
        self.bits, self.shape = state
