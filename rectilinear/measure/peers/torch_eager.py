"""PyTorch as most people use it: eager, with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from rectilinear.measure.cases import NET, Case
from rectilinear.measure.reference import LEARNING_RATE, numpy_dtype
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


def tensor(a: np.ndarray, device: str = "cpu") -> Any:
    """NumPy's array on a device, in its layout. NumPy has no bfloat16 of PyTorch's: its bits go there as integers."""
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(a).to(device)


def array(t: Any) -> np.ndarray:
    """`tensor` the other way."""
    t = t.detach().cpu()
    if t.dtype == torch.bfloat16:
        return np.asarray(t.view(torch.int16).numpy().view(numpy_dtype("bfloat16")))
    return np.asarray(t.numpy())


def tensors(data: dict[str, Any], wants_grad: tuple[str, ...] = (), device: str = "cpu") -> dict[str, Any]:
    return {name: tensor(a, device).requires_grad_(name in wants_grad) for name, a in data.items()}


def results(value: Any) -> tuple[np.ndarray, ...]:
    return tuple(map(array, value))


def build(case: Case, data: dict[str, Any], device: str = "cpu") -> Run:
    return autograd(case, data, Differentiated(affine_relu, functional.cross_entropy, net_loss, net), device)


def net_loss(x: Any, y: Any, params: Any) -> Any:
    return functional.cross_entropy(net(x, params), y)


class Differentiated(NamedTuple):
    """The functions that the passes call and differentiate, which torch.compile may have been given first."""

    layer: Any
    loss: Any
    net_loss: Any
    net: Any


def autograd(case: Case, data: dict[str, Any], functions: Differentiated, device: str) -> Run:
    """The passes by autograd."""
    layer, cross_entropy, net_loss, whole = functions
    grad = torch.autograd.grad
    if case.kind == "train":
        names = tuple(f"{k}{i}" for i in range(LAYERS) for k in ("w", "b"))
        t = tensors(data, names, device)
        params = [t[name] for name in names]
        sgd = torch.optim.SGD(params, lr=LEARNING_RATE)

        def train() -> Any:
            sgd.zero_grad(set_to_none=True)
            net_loss(t["x"], t["y"], params).backward()
            sgd.step()
            return params

        return Run(train, results)

    if case.kind == "infer":
        t = tensors(data, device=device)
        params = [t[f"{k}{i}"] for i in range(LAYERS) for k in ("w", "b")]

        def infer() -> Any:
            with torch.no_grad():
                return (whole(t["x"], params),)

        return Run(infer, results)

    affine_kinds = ("affine", "forward", "backward", "step", "step_fortran", "stacked")
    t = tensors(data, ("w", "b", "x") if case.kind in affine_kinds else ("x",), device)
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
