"""The layers as operators of PyTorch, which torch.compile puts into its graphs as they are: ``torch.ops.rectilinear``.

Their samples have two axes, (n, d). What a ReLU kept goes from forward to backward as a tensor of bits. A gradient that is not needed is an
empty tensor, since an operator cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from rectilinear.torch import primitives
from rectilinear.torch.primitives import Gradients, Tensor

_library = torch.library.Library("rectilinear", "DEF")
_DEVICES = ("CPU", "CUDA")
_LARGEST_BELOW_ZERO = {torch.float32: -(2.0**-149), torch.float64: -5e-324, torch.float16: -(2.0**-24), torch.bfloat16: -(2.0**-133)}


def _operator(schema: str, run: Any, otherwise: Any, fake: Any, fit: Any) -> Any:
    """`run` is for the backend that is chosen when it runs, `otherwise` for where that does not take such tensors; operands that do not
    `fit` are a RuntimeError."""
    name = schema.partition("(")[0]

    def checked(function: Any) -> Any:
        def call(*operands: Any) -> Any:
            if not fit(*operands):
                met = ", ".join(f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else str(t) for t in operands)
                raise RuntimeError(f"rectilinear::{name}: operands do not fit together: {met}")
            return function(*operands)

        return call

    @checked
    def compute(*operands: Any) -> Any:
        return (otherwise if primitives.backend_for(operands[0]) is None else run)(*operands)

    _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, compute, device)
    torch.library.register_fake(f"rectilinear::{name}", checked(fake), lib=_library)
    return getattr(torch.ops.rectilinear, name).default


def _differentiable(name: str, setup: Any, backward: Any) -> None:
    torch.library.register_autograd(f"rectilinear::{name}", backward, setup_context=setup, lib=_library)


# ---------------------------------------------------------------- what runs


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return primitives.forward(x, weight, bias, False)[0]


def _affine_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, keep = primitives.forward(x, weight, bias, True)
    return out, primitives.as_tensor(keep)


def _affine_backward(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    keep = None if bits is None else primitives.as_keep(bits, dout.shape)
    return _all_tensors(primitives.backward(dout, x, weight, keep, needs), x)


def _all_tensors(found: Gradients, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


# What runs where the backend that is chosen by then does not take tensors of this device: PyTorch's own operations.


def _affine_relu_of_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    z = functional.linear(x, weight, bias)
    dropped: Any = z < 0
    columns = functional.pad(~dropped, (0, -z.shape[1] % 8)).unflatten(1, (-1, 8))
    return torch.where(dropped, 0, z), (columns << torch.arange(8, dtype=torch.uint8, device=z.device)).sum(2, dtype=torch.uint8)


def _affine_backward_of_torch(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    kept = None if bits is None else primitives.kept(bits, dout.shape[1])
    return _all_tensors(gradients(dout, x, weight, kept, needs), x)


def relu_of_torch(x: Tensor) -> Tensor:
    """ReLU in PyTorch's own operations, with gradient 1 at 0: what is above the largest number below 0 stays, NaN too."""
    below = _LARGEST_BELOW_ZERO.get(x.dtype)
    return torch.where(x < 0, 0, x) if below is None else torch.threshold(x, below, 0)


def _relu_backward_of_torch(dout: Tensor, x: Tensor) -> Tensor:
    return torch.where(x < 0, 0, dout)


# What they take, and what comes out.


def _layer_fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    alike = all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in (weight, bias))
    return bool(
        alike
        and x.dtype in (torch.float32, torch.float64)
        and x.ndim == 2
        and weight.ndim == 2
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _backward_fits(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> bool:
    n, m = x.shape[0], weight.shape[0]
    return bool(
        _layer_fits(x, weight, None)
        and (dout.dtype, dout.device, dout.shape) == (x.dtype, x.device, (n, m))
        and (bits is None or (bits.dtype == torch.uint8 and bits.device == x.device and bits.shape == (n, (m + 7) // 8)))
        and len(needs) == 3
    )


def _relu_fits(*operands: Tensor) -> bool:
    x = operands[-1]
    return x.dtype in (torch.float32, torch.float64) and all((t.dtype, t.device, t.shape) == (x.dtype, x.device, x.shape) for t in operands)


def _fake_affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_affine_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake_affine(x, weight, bias), x.new_empty((x.shape[0], (weight.shape[0] + 7) // 8), dtype=torch.uint8)


def _fake_backward(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


affine = _operator("affine(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _affine, functional.linear, _fake_affine, _layer_fits)
affine_relu = _operator(
    "affine_relu(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _affine_relu,
    _affine_relu_of_torch,
    _fake_affine_relu,
    _layer_fits,
)
affine_backward = _operator(
    "affine_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bits, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _affine_backward,
    _affine_backward_of_torch,
    _fake_backward,
    _backward_fits,
)
relu = _operator("relu(Tensor x) -> Tensor", primitives.relu_forward, relu_of_torch, torch.empty_like, _relu_fits)
relu_backward = _operator(
    "relu_backward(Tensor dout, Tensor x) -> Tensor",
    primitives.relu_backward,
    _relu_backward_of_torch,
    lambda dout, x: torch.empty_like(x),
    _relu_fits,
)


# ---------------------------------------------------------------- gradients


def gradients(dout: Tensor, x: Tensor, weight: Tensor, kept: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """The gradients in PyTorch's own operations, which can be differentiated again; `kept` is a bool tensor, None without ReLU."""
    dz = dout if kept is None else torch.where(kept, dout, 0)
    return (
        dz @ weight if needs[0] else None,
        dz.transpose(-1, -2) @ x if needs[1] else None,
        dz.sum(0) if needs[2] else None,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias = inputs
    bits = output[1] if isinstance(output, tuple) else None
    ctx.save_for_backward(x, weight, *(() if bits is None else (bits,)))
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dout: Tensor, _: Any = None) -> tuple[Tensor | None, ...]:
    x, weight, *bits = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    found = affine_backward(dout, x, weight, bits[0] if bits else None, needs)
    return tuple(gradient if needed else None for gradient, needed in zip(found, needs, strict=True))


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dout, x, weight, bits, ctx.needs = inputs
    ctx.save_for_backward(dout, x, weight, *(() if bits is None else (bits,)))


def _second(ctx: Any, ddx: Tensor, ddw: Tensor, ddb: Tensor) -> tuple[Any, ...]:
    """Gradients of the gradients: dx = dz weight, dw = dz^T x and db = sum of dz over rows are linear in dz, x and weight."""
    dout, x, weight, *bits = ctx.saved_tensors
    kept = primitives.kept(bits[0], dout.shape[1]) if bits else None
    dz = dout if kept is None else torch.where(kept, dout, 0)
    back, to_x, to_weight = torch.zeros_like(dout), None, None
    if ctx.needs[0]:
        back, to_weight = back + ddx @ weight.T, dz.T @ ddx
    if ctx.needs[1]:
        back, to_x = back + x @ ddw.T, dz @ ddw
    if ctx.needs[2]:
        back = back + ddb
    return back if kept is None else torch.where(kept, back, 0), to_x, to_weight, None, None


def _save_relu(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[-1:])


_differentiable("affine", _save, _backward)
_differentiable("affine_relu", _save, _backward)
_differentiable("affine_backward", _save_for_second, _second)
_differentiable("relu", _save_relu, lambda ctx, dout: relu_backward(dout, ctx.saved_tensors[0]))
_differentiable("relu_backward", _save_relu, lambda ctx, back: (torch.where(ctx.saved_tensors[0] < 0, 0, back), None))
