"""The subjects that are rectilinear itself, on the backend that RECTILINEAR_BACKEND names in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import rectilinear as rl
from rectilinear import nn
from rectilinear.backends import registry
from rectilinear.backends.cupy_backend import CupyBackend
from rectilinear.measure.cases import NET, Case
from rectilinear.measure.gpu import Events
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run

_LAYERS = len(NET) - 1


def build(case: Case, data: dict[str, Any]) -> Run:
    """As users call it: results are fresh arrays."""
    return _build(case, data, allocated=True)


def build_out(case: Case, data: dict[str, Any]) -> Run:
    """With ``out=``, as a training loop that keeps its arrays would."""
    return _build(case, data, allocated=False)


def _build(case: Case, data: dict[str, Any], allocated: bool) -> Run:
    arrays = {name: rl.asarray(a) for name, a in data.items()}
    make = {
        "train": _train,
        "infer": _infer,
        "softmax": _softmax,
        "db": _db,
        "relu_forward": _relu_forward,
        "relu_backward": _relu_backward,
    }.get(case.kind)
    return _ready(make(arrays, allocated) if make else _affine(case, arrays, allocated), list(arrays.values()))


def build_captured(case: Case, data: dict[str, Any]) -> Run:
    """A whole step, recorded by `rectilinear.capture` and replayed. All its arrays are arguments, so that the recording knows them."""

    def step(x: Any, w: Any, b: Any, dout: Any) -> Any:
        y, cache = rl.affine_relu_forward(x, w, b)
        return (y, *rl.affine_relu_backward(dout, cache))

    arrays = [rl.asarray(data[name]) for name in ("x", "w", "b", "dout")]
    captured = rl.capture(step)
    for _ in range(2):  # the first call runs as it is, the second records
        captured(*arrays)
    return _ready(lambda: captured(*arrays), arrays)


def _ready(call: Callable[[], Any], arrays: list[Any]) -> Run:
    """A pass over these arrays, on the backend that is active."""
    backend = registry.active()
    gpu = Events(backend.runtime.cp, rl.asarray, rl.to_numpy) if isinstance(backend, CupyBackend) else None
    needs_no_waiting = gpu or all(isinstance(a, np.ndarray) for a in arrays)

    def waiting() -> Any:
        value = call()
        rl.synchronize()
        return value

    return Run(call if needs_no_waiting else waiting, lambda value: tuple(np.asarray(rl.to_numpy(a)) for a in value), gpu)


def _like(a: Any, allocated: bool) -> Any:
    """An array to be given as out, touched, since untouched pages cost the first call that writes them."""
    return None if allocated else rl.asarray(np.ones(a.shape, a.dtype))


def _outs(arrays: dict[str, Any], names: str, allocated: bool) -> Any:
    return None if allocated else tuple(_like(arrays[name], allocated) for name in names.split())


def _affine(case: Case, arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    x, w, b, dout = (arrays[k] for k in ("x", "w", "b", "dout"))
    out, grads = _like(dout, allocated), _outs(arrays, "x w b", allocated)
    if case.kind == "step_fortran":  # a gradient has w's layout only where `out` gives it
        dx, _, db = grads or (None, None, None)
        grads = (dx, rl.asarray(np.ones(w.shape[::-1], w.dtype)).T, db)

    def step() -> Any:
        y, cache = rl.affine_relu_forward(x, w, b, out=out)
        return (y, *rl.affine_relu_backward(dout, cache, out=grads))

    cache = rl.affine_relu_forward(x, w, b)[1]
    calls: dict[str, Callable[[], Any]] = {
        "affine": lambda: rl.affine_forward(x, w, b, out=out)[:1],
        "forward": lambda: rl.affine_relu_forward(x, w, b, out=out)[:1],
        "backward": lambda: rl.affine_relu_backward(dout, cache, out=grads),
    }
    return calls.get(case.kind, step)


def _relu_forward(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    x, out = arrays["x"], _like(arrays["x"], allocated)
    return lambda: rl.relu_forward(x, out=out)[:1]


def _relu_backward(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    dout, cache, out = arrays["dout"], rl.relu_forward(arrays["x"])[1], _like(arrays["x"], allocated)
    return lambda: (rl.relu_backward(dout, cache, out=out),)


def _db(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    """The bias reduction is the backward pass of an affine layer of which db alone is wanted, here one without features."""
    dout = arrays["dout"]
    n, m = dout.shape
    empty = [rl.asarray(np.zeros(shape, dout.dtype)) for shape in ((n, 0), (0, m), (m,))]
    out = None if allocated else (None, None, _like(empty[2], allocated))
    return lambda: rl.affine_backward(dout, tuple(empty), needs=(False, False, True), out=out)[2:]


def _softmax(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    x, y, out = arrays["x"], arrays["y"], _like(arrays["x"], allocated)
    return lambda: rl.softmax_loss(x, y, out=out)


def _infer(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    x = arrays["x"]
    params = [(arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(_LAYERS)]
    outs = [_like(np.empty((len(x), len(b)), str(x.dtype)), allocated) for _, b in params]

    def infer() -> Any:
        h = x
        for i, (w, b) in enumerate(params):
            forward: Any = rl.affine_relu_forward if i < _LAYERS - 1 else rl.affine_forward
            h, _ = forward(h, w, b, out=outs[i])
        return (h,)

    return infer


def _train(arrays: dict[str, Any], allocated: bool) -> Callable[[], Any]:
    x, y = arrays["x"], arrays["y"]
    n, widths = len(x), [len(x[0]), *(len(arrays[f"b{i}"]) for i in range(_LAYERS))]
    layers = [_layer_of(arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(_LAYERS)]
    optimizer = nn.SGD(nn.Sequential(layers), lr=LEARNING_RATE)
    outs = [_like(np.empty((n, m), str(x.dtype)), allocated) for m in widths[1:]]
    dscores = _like(np.empty((n, widths[-1]), str(x.dtype)), allocated)
    grads_out = [
        None if allocated else (None if i == 0 else _like(np.empty((n, widths[i]), str(x.dtype)), False), _like(w, False), _like(b, False))
        for i, (w, b) in enumerate(layer.params.values() for layer in layers)
    ]

    def step() -> Any:
        caches: list[Any] = []
        h = x
        for i, layer in enumerate(layers):
            forward: Any = rl.affine_relu_forward if i < _LAYERS - 1 else rl.affine_forward
            h, cache = forward(h, layer.params["w"], layer.params["b"], out=outs[i])
            caches.append(cache)
        _, dh = rl.softmax_loss(h, y, out=dscores)
        for i in reversed(range(_LAYERS)):
            backward: Any = rl.affine_relu_backward if i < _LAYERS - 1 else rl.affine_backward
            dh, dw, db = backward(dh, caches[i], needs=(i > 0, True, True), out=grads_out[i])
            layers[i].grads = {"w": dw, "b": db}
        optimizer.step()
        return [p for layer in layers for p in (layer.params["w"], layer.params["b"])]

    return step


def _layer_of(w: Any, b: Any) -> nn.Affine:
    """The parameters as `nn.SGD` finds them."""
    layer = nn.Affine(*w.shape, rng=np.random.default_rng(0), dtype=str(w.dtype))
    layer.params.update(w=w, b=b)
    return layer
