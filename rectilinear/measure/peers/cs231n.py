"""CS231n's layers as its students write them in NumPy, from the mathematics of the course's notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rectilinear.measure.cases import NET, Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run

_LAYERS = len(NET) - 1


def affine_forward(x: Any, w: Any, b: Any) -> tuple[Any, Any]:
    return x.reshape(len(x), -1) @ w + b, (x, w, b)


def affine_backward(dout: Any, cache: Any) -> tuple[Any, Any, Any]:
    x, w, _ = cache
    return (dout @ w.T).reshape(x.shape), x.reshape(len(x), -1).T @ dout, dout.sum(axis=0)


def relu_forward(x: Any) -> tuple[Any, Any]:
    return np.maximum(x, 0), x


def relu_backward(dout: Any, x: Any) -> Any:
    return dout * (x > 0)


def affine_relu_forward(x: Any, w: Any, b: Any) -> tuple[Any, Any]:
    z, fc_cache = affine_forward(x, w, b)
    out, relu_cache = relu_forward(z)
    return out, (fc_cache, relu_cache)


def affine_relu_backward(dout: Any, cache: Any) -> tuple[Any, Any, Any]:
    fc_cache, relu_cache = cache
    return affine_backward(relu_backward(dout, relu_cache), fc_cache)


def softmax_loss(x: Any, y: Any) -> tuple[Any, Any]:
    shifted = x - x.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(x))
    dx = np.exp(log_probs)
    dx[rows, y] -= 1
    return -log_probs[rows, y].mean(), dx / len(x)


def _stacked_step(x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    """The course has no stacked form; this is its NumPy, one axis further."""
    z = x @ w + b[:, None, :]
    dz = dout * (z > 0)
    return np.maximum(z, 0), dz @ w.swapaxes(1, 2), x.swapaxes(1, 2) @ dz, dz.sum(axis=1)


def _step(x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    out, cache = affine_relu_forward(x, w, b)
    return (out, *affine_relu_backward(dout, cache))


def _step_fortran(x: Any, w: Any, b: Any, dout: Any) -> tuple[Any, ...]:
    """dw by the transposed product, so that it has w's layout."""
    out, (_, z) = affine_relu_forward(x, w, b)
    dz = relu_backward(dout, z)
    return out, dz @ w.T, (dz.T @ x).T, dz.sum(axis=0)


def _net(x: Any, params: list[Any]) -> tuple[Any, list[Any]]:
    caches, h = [], x
    for i in range(_LAYERS):
        layer = affine_relu_forward if i < _LAYERS - 1 else affine_forward
        h, cache = layer(h, params[2 * i], params[2 * i + 1])
        caches.append(cache)
    return h, caches


def _train(x: Any, y: Any, params: list[Any]) -> list[Any]:
    h, caches = _net(x, params)
    _, dh = softmax_loss(h, y)
    for i in reversed(range(_LAYERS)):
        if i == 0:  # dx of the data is not needed
            dh = relu_backward(dh, caches[0][1])
            dw, db = x.T @ dh, dh.sum(axis=0)
        else:
            backward = affine_relu_backward if i < _LAYERS - 1 else affine_backward
            dh, dw, db = backward(dh, caches[i])
        params[2 * i] -= LEARNING_RATE * dw
        params[2 * i + 1] -= LEARNING_RATE * db
    return params


def build(case: Case, data: dict[str, Any]) -> Run:
    x, w, b, dout, y = (data.get(k) for k in ("x", "w", "b", "dout", "y"))
    params = [data[f"{k}{i}"] for i in range(_LAYERS) for k in ("w", "b")] if case.kind in ("infer", "train") else []
    cache = affine_relu_forward(x, w, b)[1] if case.kind == "backward" else None
    calls: dict[str, Callable[[], Any]] = {
        "affine": lambda: affine_forward(x, w, b)[:1],
        "forward": lambda: affine_relu_forward(x, w, b)[:1],
        "backward": lambda: affine_relu_backward(dout, cache),
        "step": lambda: _step(x, w, b, dout),
        "step_fortran": lambda: _step_fortran(x, w, b, dout),
        "stacked": lambda: _stacked_step(x, w, b, dout),
        "relu_forward": lambda: relu_forward(x)[:1],
        "relu_backward": lambda: (relu_backward(dout, x),),
        "db": lambda: (np.sum(dout, axis=0),),  # type: ignore[arg-type]
        "softmax": lambda: softmax_loss(x, y),
        "infer": lambda: (_net(x, params)[0],),
        "train": lambda: _train(x, y, params),
    }
    return Run(calls[case.kind], lambda value: tuple(np.asarray(a) for a in value))
