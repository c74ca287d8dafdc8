"""PyTorch's own modules, as they are, compiled, and given to `rectilinear.torch.accelerate`: one program, a line apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rectilinear.measure.cases import Case
from rectilinear.measure.peers.torch_eager import LAYERS, results, tensor
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run


def eager(case: Case, data: dict[str, Any]) -> Run:
    return _run(case, data, lambda model: model)


def compiled(case: Case, data: dict[str, Any]) -> Run:
    torch._dynamo.reset()  # each shape is compiled for itself, as a program that has one shape would
    return _run(case, data, lambda model: torch.compile(model, dynamic=False))


def accelerated(case: Case, data: dict[str, Any]) -> Run:
    from rectilinear.torch import accelerate

    def made(model: Any) -> Any:
        accelerate(model)
        return model

    return _run(case, data, made)


def _run(case: Case, data: dict[str, Any], made: Any) -> Run:
    x, y = tensor(data["x"]), tensor(data["y"])
    layers = [_linear(data[f"w{i}"], data[f"b{i}"]) for i in range(LAYERS)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))[:-1]
    net = made(model)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def infer() -> Any:
        with torch.inference_mode():
            return (net(x),)

    def train() -> Any:
        sgd.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        sgd.step()
        return [p for layer in layers for p in (layer.weight.T, layer.bias)]

    if case.kind == "infer":
        model.eval()
    return Run(infer if case.kind == "infer" else train, results)


def _linear(w: Any, b: Any) -> nn.Linear:
    layer = nn.Linear(*w.shape, dtype=tensor(w).dtype)
    with torch.no_grad():
        layer.weight.copy_(tensor(w).T)
        layer.bias.copy_(tensor(b))
    return layer
