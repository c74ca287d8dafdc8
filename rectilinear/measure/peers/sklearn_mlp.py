"""scikit-learn's MLPClassifier, one batch by `partial_fit`, with plain SGD and no penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from rectilinear.measure.cases import Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run


def build(case: Case, data: dict[str, Any]) -> Run:
    x, y = data["x"], data["y"]
    net = MLPClassifier(
        case.widths[1:-1],
        solver="sgd",
        alpha=0.0,
        momentum=0.0,
        learning_rate_init=LEARNING_RATE,
        batch_size=len(x),
        shuffle=False,
        random_state=0,
    )
    net.partial_fit(x, y, classes=np.arange(case.widths[-1]))  # creates the parameters, which are then ours
    for i, (w, b) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        w[...], b[...] = data[f"w{i}"], data[f"b{i}"]

    def call() -> Any:
        net.partial_fit(x, y)
        return [p for layer in zip(net.coefs_, net.intercepts_, strict=True) for p in layer]

    return Run(call, lambda value: tuple(value))
