"""PyTorch as most people use it: eager, with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rectilinear.measure.cases import NET, Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run

LAYERS = len(NET) - 1


def affine(x: Any, w: Any, b: Any) -> Any:
    """addmm and baddbmm add the bias inside the product."""
    return torch.addmm(b, x, w) if w.ndim == 2 else torch.baddbmm(b[:, None, :], x, w)


def affine_relu(x: Any, w: Any, b: Any) -> Any:
    return torch.relu(affine(x, w, b))


def net(x: Any, params: list[Any]) -> Any:
    for i in range(LAYERS):
        x = (affine_relu if i < LAYERS - 1 else affine)(x, *params[2 * i : 2 * i + 2])
    return x


def tensors(data: dict[str, Any], wants_grad: tuple[str, ...] = ()) -> dict[str, Any]:
    return {name: torch.from_numpy(a).requires_grad_(name in wants_grad) for name, a in data.items()}


def results(value: Any) -> tuple[np.ndarray, ...]:
    return tuple(a.detach().numpy() for a in value)


def build(case: Case, data: dict[str, Any]) -> Run:
    return autograd(case, data, affine_relu, functional.cross_entropy, lambda x, y, params: functional.cross_entropy(net(x, params), y))


def autograd(case: Case, data: dict[str, Any], layer: Any, cross_entropy: Any, net_loss: Any) -> Run:
    """The passes by autograd; what is differentiated is given, so that torch.compile can be given the same."""
    grad = torch.autograd.grad
    if case.kind == "train":
        names = tuple(f"{k}{i}" for i in range(LAYERS) for k in ("w", "b"))
        t = tensors(data, names)
        params = [t[name] for name in names]
        sgd = torch.optim.SGD(params, lr=LEARNING_RATE)

        def train() -> Any:
            sgd.zero_grad(set_to_none=True)
            net_loss(t["x"], t["y"], params).backward()
            sgd.step()
            return params

        return Run(train, results)

    t = tensors(data, ("w", "b", "x") if case.kind in ("affine", "forward", "backward", "step", "step_fortran", "stacked") else ("x",))
    x, w, b, dout, y = (t.get(k) for k in ("x", "w", "b", "dout", "y"))
    made = layer(x, w, b) if case.kind == "backward" else torch.relu(x) if case.kind == "relu_backward" else None

    def step() -> Any:
        out = layer(x, w, b)
        return (out, *grad(out, (x, w, b), dout))

    def softmax() -> Any:
        loss = cross_entropy(x, y)
        return loss, *grad(loss, x)

    calls: dict[str, Callable[[], Any]] = {
        "affine": lambda: (affine(x, w, b),),
        "forward": lambda: (layer(x, w, b),),
        "backward": lambda: grad(made, (x, w, b), dout, retain_graph=True),
        "relu_forward": lambda: (torch.relu(x),),
        "relu_backward": lambda: grad(made, x, dout, retain_graph=True),
        "db": lambda: (torch.sum(dout, 0),),
        "softmax": softmax,
    }
    return Run(calls.get(case.kind, step), results)
