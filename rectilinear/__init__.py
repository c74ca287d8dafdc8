"""Affine and ReLU layers, forward and backward, as a drop-in for CS231n-style NumPy code, on any array library.

>>> import numpy as np
>>> from rectilinear import affine_relu_forward, affine_relu_backward
>>> x, w, b = np.ones((4, 3), "f4"), np.ones((3, 2), "f4"), np.zeros(2, "f4")
>>> out, cache = affine_relu_forward(x, w, b)
>>> dx, dw, db = affine_relu_backward(np.ones_like(out), cache)
>>> db
array([4., 4.], dtype=float32)
"""

from typing import TYPE_CHECKING, Any

from rectilinear.arrays import asarray, synchronize, to_numpy
from rectilinear.backends.registry import get_backend, list_backends, set_backend, use_backend
from rectilinear.buffers import held_memory, release_memory
from rectilinear.compilation import warmup
from rectilinear.errors import BackendError, DTypeError, ShapeError
from rectilinear.graphs import capture
from rectilinear.keepmask import KeepMask
from rectilinear.layers import (
    affine_backward,
    affine_forward,
    affine_relu_backward,
    affine_relu_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
)
from rectilinear.threads import get_num_threads, num_threads, set_num_threads

if TYPE_CHECKING:
    from rectilinear.profiling import profile

__version__ = "0.2.0"

__all__ = [
    "BackendError",
    "DTypeError",
    "KeepMask",
    "ShapeError",
    "affine_backward",
    "affine_forward",
    "affine_relu_backward",
    "affine_relu_forward",
    "asarray",
    "capture",
    "get_backend",
    "get_num_threads",
    "held_memory",
    "list_backends",
    "num_threads",
    "profile",
    "release_memory",
    "relu_backward",
    "relu_forward",
    "set_backend",
    "set_num_threads",
    "softmax_loss",
    "synchronize",
    "to_numpy",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "profile":  # not loaded by those who do not profile
        from rectilinear.profiling import profile

        return profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
