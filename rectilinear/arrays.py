"""Bringing arrays to the chosen backend and back, and waiting for them."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat
import numpy as np

from rectilinear.backends import registry
from rectilinear.backends.contract import Array, Backend
from rectilinear.dispatch import library_name, remedy, type_name
from rectilinear.errors import DTypeError
from rectilinear.keepmask import KeepMask

_NO_NUMBERS = {"O": "objects", "S": "bytes", "U": "strings"}  # by the kind of NumPy's dtype


def asarray(x: Any, dtype: Any = None) -> Array:
    """x as an array of the chosen backend's library, on its device. From there everything stays there.

    Parameters
    ----------
    x : array of any library, nested lists, or a scalar
    dtype : dtype or its name, optional
        Default: what x has.

    Returns
    -------
    array
        Without a copy where x is one already. NumPy for the numpy and numba backends, CuPy for cupy.

    Raises
    ------
    TypeError
        For masked arrays, whose mask would be lost, None, strings, and what NumPy makes arrays of objects of (sparse matrices, say).

    Examples
    --------
    >>> asarray([[1, 2], [3, 4]], dtype="float32")
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    backend = registry.active()
    if x is None:
        raise TypeError("asarray: x is None, not an array, nested lists or a scalar")
    if dtype == "bfloat16":
        try:
            import ml_dtypes  # whose import teaches NumPy the name
        except ImportError as error:
            raise DTypeError(f"asarray: NumPy has no bfloat16 without the package ml-dtypes ({error}); install ml-dtypes") from None
        dtype = ml_dtypes.bfloat16
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"asarray: x is a masked array, whose mask would be lost; pass {remedy('x', x)}")
    if not compat.is_array_api_obj(x) or isinstance(x, np.ndarray):
        met, way = type_name(x), remedy("x", x)
        x = np.asarray(x, dtype=dtype)
        if x.dtype.kind in _NO_NUMBERS:
            way = f"pass {way}" if "rectilinear" not in way else "pass numbers, or a dtype that these convert to"
            raise DTypeError(f"asarray: x ({met}) would become an array of {_NO_NUMBERS[x.dtype.kind]}, not of numbers; {way}")
    if compat.is_array_api_obj(x) and not isinstance(x, np.ndarray | np.generic) and library_name(x) != backend.library:
        x = to_numpy(x)
    return backend.asarray(x, dtype)


def to_numpy(x: Any) -> Any:
    """An array of any library, or a `KeepMask`, on the host. NumPy arrays are returned as they are.

    Parameters
    ----------
    x : array or KeepMask
        torch: outside autograd. Lazy arrays are computed.

    Returns
    -------
    numpy.ndarray, or KeepMask

    Examples
    --------
    >>> import array_api_strict
    >>> to_numpy(array_api_strict.asarray([1.0, 2.0]))
    array([1., 2.])
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("to_numpy: x is a masked array, whose mask would be lost; pass x.filled(0)")
    if isinstance(x, KeepMask):
        return x if isinstance(x._bits, np.ndarray) else KeepMask(to_numpy(x._bits), x.shape)
    if compat.is_cupy_array(x):
        return x.get()
    if compat.is_torch_array(x):
        x = x.detach().cpu().resolve_conj().resolve_neg()
        if str(x.dtype) == "torch.bfloat16":  # torch hands no bfloat16 to NumPy; the same bits under ml_dtypes' name
            import ml_dtypes

            return x.view(dtype=_torch_int16(x)).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if library_name(x) == "array_api_strict":
        import array_api_strict

        x = compat.to_device(x, array_api_strict.Device("CPU_DEVICE"))
    server = _server(x)
    return np.asarray(x) if server is None else server.to_numpy(x)


def _server(x: Any) -> Backend | None:
    """The backend that is made for arrays of x's library; None for NumPy's, what is no array, and libraries that the generic one serves."""
    if isinstance(x, np.ndarray | np.generic) or not compat.is_array_api_obj(x):
        return None
    library = library_name(x)
    backend = registry.serving(library)
    return backend if backend.library == library else None


def synchronize(*arrays: Array) -> None:
    """Wait until the work behind these arrays is done; without arguments, until all of the chosen backend's is.

    Examples
    --------
    >>> synchronize()
    """
    if not arrays:
        registry.active().synchronize()
    for x in arrays:
        if compat.is_jax_array(x):
            getattr(x, "block_until_ready", lambda: None)()  # a tracer has nothing to wait for
        elif compat.is_torch_array(x) and x.device.type == "cuda":
            import torch

            torch.cuda.synchronize(x.device)
        elif (server := _server(x)) is not None:
            server.synchronize()


def _torch_int16(x: Array) -> Any:
    return compat.array_namespace(x).int16
