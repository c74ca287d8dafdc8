"""JAX: each pass one jitted function, gradients by `jax.vjp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rectilinear.measure.cases import NET, Case
from rectilinear.measure.reference import LEARNING_RATE
from rectilinear.measure.subjects import Run

_LAYERS = len(NET) - 1


def _affine(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b[..., None, :]


def _layer(x: Any, w: Any, b: Any) -> Any:
    return jax.nn.relu(_affine(x, w, b))


def _step(x: Any, w: Any, b: Any, dout: Any) -> Any:
    out, vjp = jax.vjp(_layer, x, w, b)
    return out, *vjp(dout)


def _step_fortran(x: Any, wt: Any, b: Any, dout: Any) -> Any:
    """JAX's arrays are in C order: what is kept and differentiated is w's transpose, as in PyTorch's Linear."""
    out, vjp = jax.vjp(lambda x, wt, b: _layer(x, wt.T, b), x, wt, b)
    return out, *vjp(dout)


def _loss(scores: Any, y: Any) -> Any:
    log_probs = jax.nn.log_softmax(scores)
    return -jnp.take_along_axis(log_probs, y[:, None], axis=1).mean()


def _net(params: Any, x: Any) -> Any:
    for w, b in params[:-1]:
        x = _layer(x, w, b)
    return _affine(x, *params[-1])


def _net_loss(params: Any, x: Any, y: Any) -> Any:
    return _loss(_net(params, x), y)


def _sgd(params: Any, x: Any, y: Any) -> Any:
    grads = jax.grad(_net_loss)(params, x, y)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)


def _params(data: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(jnp.array(data[f"w{i}"]), jnp.array(data[f"b{i}"])) for i in range(_LAYERS)]


def _train(data: dict[str, Any], done: Callable[[Any], Any]) -> Callable[[], Any]:
    sgd = jax.jit(_sgd, donate_argnums=0)
    state = [_params(data)]
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])

    def step() -> Any:
        state[0] = sgd(state[0], x, y)
        return done([p for layer in state[0] for p in layer])

    return step


def build(case: Case, data: dict[str, Any], done: Callable[[Any], Any] = jax.block_until_ready) -> Run:
    """`done` is what is made of a call's results: by default it waits for them."""
    results = lambda value: tuple(np.asarray(a) for a in value)  # noqa: E731
    if case.kind == "train":
        return Run(_train(data, done), results)
    if case.kind == "infer":
        net, params, x = jax.jit(_net), _params(data), jnp.asarray(data["x"])
        return Run(lambda: done((net(params, x),)), results)
    arrays = {name: jnp.asarray(a) for name, a in data.items()}
    if case.kind == "step_fortran":
        step = jax.jit(_step_fortran)
        given = arrays["x"], jnp.asarray(data["w"].T), arrays["b"], arrays["dout"]
        return Run(lambda: done(step(*given)), lambda value: tuple(np.asarray(a) for a in (*value[:2], value[2].T, value[3])))
    if case.kind in ("backward", "relu_backward"):  # vjp returns a pytree that holds what forward kept, so jit can be given it
        forward, names = (_layer, ("x", "w", "b")) if case.kind == "backward" else (jax.nn.relu, ("x",))
        vjp = jax.jit(lambda *a: jax.vjp(forward, *a)[1])(*(arrays[name] for name in names))
        function: Any = lambda vjp, dout: vjp(dout)  # noqa: E731
        arguments: tuple[Any, ...] = (vjp, arrays["dout"])
    else:
        function, names = {
            "affine": (lambda x, w, b: (_affine(x, w, b),), ("x", "w", "b")),
            "forward": (lambda x, w, b: (_layer(x, w, b),), ("x", "w", "b")),
            "relu_forward": (lambda x: (jax.nn.relu(x),), ("x",)),
            "db": (lambda dout: (dout.sum(axis=0),), ("dout",)),
            "softmax": (jax.value_and_grad(_loss), ("x", "y")),
        }.get(case.kind, (_step, ("x", "w", "b", "dout")))
        arguments = tuple(arrays[name] for name in names)
    compiled = jax.jit(function)
    return Run(lambda: done(compiled(*arguments)), results)
