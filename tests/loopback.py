"""A backend under another name: the generic reference on NumPy arrays, counting calls and remembering results.

It keeps the dispatcher honest: a layer function that reached a result without it would leave no count, and return another object.
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


class LoopbackBackend(GenericBackend):
    name = "loopback"
    library = "numpy"
    calls: ClassVar[Counter[str]] = Counter()
    made: ClassVar[tuple[Any, ...]] = ()
    """What the latest primitive returned: a caller's result is one of these, or it came another way."""

    def probe(self) -> Probe:
        return Probe(True, version="1", device="cpu", threads=1)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in PRIMITIVES:
            return found

        def counted(*arguments: Any) -> Any:
            result = found(*arguments)
            cls = type(self)
            cls.calls[name] += 1
            cls.made = result if isinstance(result, tuple) else (result,)
            return result

        return counted

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return np.asarray(x, dtype=dtype)

    def to_numpy(self, x: Any) -> Any:
        return np.asarray(x)
