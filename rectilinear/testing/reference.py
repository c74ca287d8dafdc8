"""The layers in plain float64 NumPy, a line a formula, for comparison. Knows nothing of the package."""

from __future__ import annotations

from typing import Any

import numpy as np


def affine_forward(x: Any, w: Any, b: Any) -> Any:
    x, w = flat(x, w), np.asarray(w, np.float64)
    z = x @ w
    return z if b is None else z + np.asarray(b, np.float64)[..., None, :]


def affine_backward(dout: Any, x: Any, w: Any) -> tuple[Any, Any, Any]:
    dout, w = np.asarray(dout, np.float64), np.asarray(w, np.float64)
    dx = dout @ np.swapaxes(w, -1, -2)
    dw = np.swapaxes(flat(x, w), -1, -2) @ dout
    return dx.reshape(np.shape(x)), dw, dout.sum(axis=-2)


def keep(x: Any) -> Any:
    return ~(np.asarray(x) < 0)


def relu(x: Any) -> Any:
    return np.where(keep(x), x, 0)


def flat(x: Any, w: Any) -> Any:
    lead = np.shape(x)[: np.ndim(w) - 1]
    return np.asarray(x, np.float64).reshape(*lead, np.shape(w)[-2])


def affine_bound(a: Any, b: Any, bias: Any, k: int, dtype: Any) -> Any:
    """SPEC 5's bound on |got - exact| for a sum of k products, elementwise; bias may be None."""
    info = np.finfo(dtype if np.dtype(dtype).itemsize > 2 else np.float32)
    size = np.abs(np.asarray(a, np.float64)) @ np.abs(np.asarray(b, np.float64))
    if bias is not None:
        size = size + np.abs(np.asarray(bias, np.float64))[..., None, :]
    return 2 * (k + 2) * float(info.eps) * size + k * float(info.smallest_subnormal)
