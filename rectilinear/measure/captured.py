"""The subject that is rectilinear's cupy backend, each pass recorded by `rectilinear.capture` and replayed."""

from __future__ import annotations

from typing import Any

import rectilinear as rl
from rectilinear.measure import ours
from rectilinear.measure.cases import Case
from rectilinear.measure.subjects import Run

capture: Any = getattr(rl, "capture", None)
if capture is None:
    raise ImportError("this version of rectilinear has no capture()")


def step(x: Any, w: Any, b: Any, dout: Any) -> Any:
    """What is recorded: all its arrays are arguments, so that a signature says all."""
    y, cache = rl.affine_relu_forward(x, w, b)
    return (y, *rl.affine_relu_backward(dout, cache))


def build(case: Case, data: dict[str, Any]) -> Run:
    arrays = [rl.asarray(data[name]) for name in ("x", "w", "b", "dout")]
    captured = capture(step)
    for _ in range(2):  # the first call runs as it is, the second records
        captured(*arrays)
    return ours.ready(lambda: captured(*arrays), arrays)
