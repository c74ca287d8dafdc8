"""The layers as operators of PyTorch, which torch.compile puts into its graphs as they are: ``torch.ops.rectilinear``.

Their samples have two axes, (n, d). What a ReLU kept goes from forward to backward as a tensor of bits. A gradient that is not needed is an
empty tensor, since an operator cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rectilinear.keepmask import KeepMask, unchecked
from rectilinear.torch import primitives
from rectilinear.torch.primitives import Gradients, Tensor

_library = torch.library.Library("rectilinear", "DEF")
_DEVICES = ("CPU", "CUDA")


def _operator(schema: str, run: Any, fake: Any) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in _DEVICES:
        _library.impl(name, run, device)
    torch.library.register_fake(f"rectilinear::{name}", fake, lib=_library)
    return getattr(torch.ops.rectilinear, name).default


def _differentiable(name: str, setup: Any, backward: Any) -> None:
    torch.library.register_autograd(f"rectilinear::{name}", backward, setup_context=setup, lib=_library)


# ---------------------------------------------------------------- what runs


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return primitives.forward(x, weight, bias, False)[0]


def _affine_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, keep = primitives.forward(x, weight, bias, True)
    return out, _bits(keep)


def _affine_backward(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    keep = None if bits is None else _keep(bits, dout.shape)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in primitives.backward(dout, x, weight, keep, needs))


def _bits(keep: Any) -> Tensor:
    """A KeepMask's bits, or those of a backend that keeps z."""
    bits = keep.bits if isinstance(keep, KeepMask) else np.packbits(~(keep < 0), axis=-1, bitorder="little")
    return torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.as_tensor(bits, device=f"cuda:{bits.device.id}")


def _keep(bits: Tensor, shape: Sequence[int]) -> KeepMask:
    if bits.is_cuda:
        import cupy as cp

        return unchecked(cp.asarray(bits), tuple(shape))
    return unchecked(bits.numpy(), tuple(shape))


def _fake_affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_affine_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake_affine(x, weight, bias), x.new_empty((x.shape[0], (weight.shape[0] + 7) // 8), dtype=torch.uint8)


def _fake_backward(dout: Tensor, x: Tensor, weight: Tensor, bits: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True))


affine = _operator("affine(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _affine, _fake_affine)
affine_relu = _operator("affine_relu(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)", _affine_relu, _fake_affine_relu)
affine_backward = _operator(
    "affine_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bits, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _affine_backward,
    _fake_backward,
)
relu = _operator("relu(Tensor x) -> Tensor", primitives.relu_forward, lambda x: torch.empty_like(x))
relu_backward = _operator("relu_backward(Tensor dout, Tensor x) -> Tensor", primitives.relu_backward, lambda dout, x: torch.empty_like(x))


# ---------------------------------------------------------------- gradients


def gradients(dout: Tensor, x: Tensor, weight: Tensor, kept: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """The gradients in PyTorch's own operations, which can be differentiated again; `kept` is a bool tensor, None without ReLU."""
    dz = dout if kept is None else torch.where(kept, dout, 0)
    return (
        dz @ weight if needs[0] else None,
        dz.transpose(-1, -2) @ x if needs[1] else None,
        dz.sum(0) if needs[2] else None,
    )


def _spread(bits: Tensor, columns: int) -> Tensor:
    """The bits (n, ceil(m / 8)) as a bool tensor (n, m)."""
    spread = bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (spread & 1).flatten(1)[:, :columns].bool()


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
    kept = _spread(bits[0], dout.shape[1]) if bits else None
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
