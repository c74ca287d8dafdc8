"""scikit-learn's perceptrons, and the same by `rectilinear.sklearn`: one program, an import apart.

Training is `MLPClassifier.partial_fit` of one batch, with plain SGD and no penalty. Inference is `MLPRegressor.predict`, which gives the
scores themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import neural_network

from rectilinear.measure.cases import Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run


def build(case: Case, data: dict[str, Any]) -> Run:
    return _run(case, data, neural_network)


def accelerated(case: Case, data: dict[str, Any]) -> Run:
    from rectilinear import sklearn

    return _run(case, data, sklearn)


def _run(case: Case, data: dict[str, Any], module: Any) -> Run:
    x, y = data["x"], data["y"]
    options = {
        "hidden_layer_sizes": case.widths[1:-1],
        "solver": "sgd",
        "alpha": 0.0,
        "momentum": 0.0,
        "learning_rate_init": LEARNING_RATE,
        "batch_size": len(x),
        "shuffle": False,
    }
    # The first partial_fit creates the parameters, which are then ours.
    if case.kind == "infer":
        net = module.MLPRegressor(**options)
        net.partial_fit(x, np.zeros((len(x), case.widths[-1]), x.dtype))
    else:
        net = module.MLPClassifier(**options)
        net.partial_fit(x, y, classes=np.arange(case.widths[-1]))
    for i, (w, b) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        w[...], b[...] = data[f"w{i}"], data[f"b{i}"]

    def train() -> Any:
        net.partial_fit(x, y)
        return [p for layer in zip(net.coefs_, net.intercepts_, strict=True) for p in layer]

    return Run((lambda: (net.predict(x),)) if case.kind == "infer" else train, lambda value: tuple(value))
