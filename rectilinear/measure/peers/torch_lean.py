"""PyTorch at its leanest: no autograd, backward written by hand, everything in place or into preallocated arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rectilinear.measure.cases import Case
from rectilinear.measure.peers.torch_eager import LAYERS, results, tensors
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run

_relu_grad = torch.ops.aten.threshold_backward.grad_input
"""ReLU's gradient by its own kernel; by the output, which is positive where the input is."""


class _Layer:
    """An affine layer with its arrays. `forward` with relu, `backward` by the output kept from it."""

    def __init__(self, x: Any, w: Any, b: Any) -> None:
        self.x, self.w, self.b = x, w, b
        stacked = w.ndim == 3
        self.product, self.biased = (torch.bmm, torch.baddbmm) if stacked else (torch.mm, torch.addmm)
        self.bias = b[:, None, :] if stacked else b
        self.out = x.new_zeros((*x.shape[:-1], w.shape[-1]))
        self.dz = torch.zeros_like(self.out)
        self.dx, self.dw, self.db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(b)
        self.wt, self.xt = w.transpose(-1, -2), x.transpose(-1, -2)

    def affine(self) -> Any:
        return self.biased(self.bias, self.x, self.w, out=self.out)

    def forward(self) -> Any:
        return self.affine().relu_()

    def gradients(self, dz: Any, dx: bool = True) -> tuple[Any, Any, Any]:
        if dx:
            self.product(dz, self.wt, out=self.dx)
        self.product(self.xt, dz, out=self.dw)
        torch.sum(dz, -2, out=self.db)
        return self.dx, self.dw, self.db

    def backward(self, dout: Any, dx: bool = True) -> tuple[Any, Any, Any]:
        return self.gradients(_relu_grad(dout, self.out, 0, grad_input=self.dz), dx)


class _Softmax:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y
        self.log_probs, self.dx = torch.zeros_like(x), torch.zeros_like(x)
        self.index, self.minus_one = y[:, None], x.new_full((len(x), 1), -1.0)

    def __call__(self) -> tuple[Any, Any]:
        torch.log_softmax(self.x, 1, out=self.log_probs)
        torch.exp(self.log_probs, out=self.dx).scatter_add_(1, self.index, self.minus_one).div_(len(self.x))
        return self.log_probs.gather(1, self.index).mean().neg_(), self.dx


def _infer(t: dict[str, Any]) -> Callable[[], Any]:
    layers = _layers(t)

    def infer() -> Any:
        for layer in layers[:-1]:
            layer.forward()
        return (layers[-1].affine(),)

    return infer


def _layers(t: dict[str, Any]) -> list[_Layer]:
    layers: list[_Layer] = []
    for i in range(LAYERS):
        layers.append(_Layer(layers[-1].out if i else t["x"], t[f"w{i}"], t[f"b{i}"]))
    return layers


def _train(t: dict[str, Any]) -> Callable[[], Any]:
    layers = _layers(t)
    loss = _Softmax(layers[-1].out, t["y"])
    params = [p for layer in layers for p in (layer.w, layer.b)]
    grads = [g for layer in layers for g in (layer.dw, layer.db)]

    def step() -> Any:
        for layer in layers[:-1]:
            layer.forward()
        layers[-1].affine()
        dh = layers[-1].gradients(loss()[1])[0]
        for i in reversed(range(LAYERS - 1)):
            dh = layers[i].backward(dh, dx=i > 0)[0]
        torch._foreach_add_(params, grads, alpha=-LEARNING_RATE)
        return params

    return step


def build(case: Case, data: dict[str, Any], device: str = "cpu") -> Run:
    with torch.inference_mode():
        t = tensors(data, device=device)
        call = _calls(case, t)

    def inference() -> Any:
        with torch.inference_mode():
            return call()

    return Run(inference, results)


def _calls(case: Case, t: dict[str, Any]) -> Callable[[], Any]:
    x, dout = t.get("x"), t.get("dout")
    if case.kind == "train":
        return _train(t)
    if case.kind == "infer":
        return _infer(t)
    if case.kind == "softmax":
        return _Softmax(x, t["y"])
    if case.kind == "db":
        db = dout.new_zeros(dout.shape[1])  # type: ignore[union-attr]
        return lambda: (torch.sum(dout, 0, out=db),)
    if case.kind == "relu_forward":
        out = torch.zeros_like(x)
        return lambda: (torch.clamp_min(x, 0, out=out),)
    if case.kind == "relu_backward":
        dx = torch.zeros_like(x)
        return lambda: (_relu_grad(dout, x, 0, grad_input=dx),)
    layer = _Layer(x, t["w"], t["b"])
    layer.forward()
    calls: dict[str, Callable[[], Any]] = {
        "affine": lambda: (layer.affine(),),
        "forward": lambda: (layer.forward(),),
        "backward": lambda: layer.backward(dout),
    }
    return calls.get(case.kind, lambda: (layer.forward(), *layer.backward(dout)))
