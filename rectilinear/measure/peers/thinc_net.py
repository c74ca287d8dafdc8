"""thinc: Relu layers and a Softmax layer, trained by its SGD without clipping, penalty and averages."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from thinc.api import SGD, Relu, Softmax, chain

from rectilinear.measure.cases import Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run


def build(case: Case, data: dict[str, Any]) -> Run:
    x, y = data["x"], data["y"]
    sizes = list(itertools.pairwise(case.widths))
    layers: list[Any] = [Relu(nO=m, nI=d) for d, m in sizes[:-1]] + [Softmax(nO=sizes[-1][1], nI=sizes[-1][0])]
    model: Any = chain(*layers)
    model.initialize(X=x)
    for i, layer in enumerate(layers):
        layer.set_param("W", np.ascontiguousarray(data[f"w{i}"].T))
        layer.set_param("b", data[f"b{i}"].copy())
    optimizer: Any = SGD(LEARNING_RATE, L2=0.0, grad_clip=0.0, use_averages=False)
    rows = np.arange(len(x))

    def call() -> Any:
        probs, backprop = model.begin_update(x)
        probs[rows, y] -= 1
        probs /= len(x)
        backprop(probs)
        model.finish_update(optimizer)
        return layers

    def results(value: Any) -> tuple[np.ndarray, ...]:
        return tuple(a for layer in value for a in (layer.get_param("W").T, layer.get_param("b")))

    return Run(call, results)
