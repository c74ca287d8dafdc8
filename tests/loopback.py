"""A backend under another name: the generic reference on NumPy arrays, counting calls.

It keeps the dispatcher honest: a layer function that reached a result without it would leave no count.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np

from rectilinear.backends.contract import Probe
from rectilinear.backends.generic import GenericBackend

PRIMITIVES = (
    "affine_forward",
    "affine_relu_forward",
    "affine_backward",
    "bias_backward",
    "relu_forward",
    "relu_backward",
    "softmax_loss",
    "asarray",
    "to_numpy",
    "synchronize",
)


class Tagged(np.ndarray):
    """What the loopback returns from ``asarray``, so that a test can see who made it."""


class LoopbackBackend(GenericBackend):
    name = "loopback"
    library = "numpy"
    calls: ClassVar[Counter[str]] = Counter()

    def probe(self) -> Probe:
        return Probe(True, version="1", device="cpu", threads=1)

    def __getattribute__(self, name: str) -> Any:
        if name in PRIMITIVES:
            type(self).calls[name] += 1
        return super().__getattribute__(name)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return np.asarray(x, dtype=dtype).view(Tagged)

    def to_numpy(self, x: Any) -> Any:
        return np.asarray(x)
