"""`affine`, `relu` and `affine_relu` of tensors, and who computes them.

In eager mode the kernels are called at once, or by one autograd function where a gradient may be asked for: an operator takes 10 to 30 us
more a call than that. Code that torch.compile traces gets the operators. What the kernels do not take (16-bit types, other devices,
subclasses of Tensor, autocast, torch.func, modes, traces) PyTorch's own operations compute, with the same gradient at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from rectilinear.torch import operators, primitives
from rectilinear.torch.operators import relu_of_torch
from rectilinear.torch.primitives import Tensor

Layer: TypeAlias = tuple[Tensor, Tensor | None, bool]
"""A weight, a bias, and whether ReLU follows."""

_Tensor, _Parameter, _strided = torch.Tensor, torch.nn.Parameter, torch.strided
_NATIVE = (torch.float32, torch.float64)
_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.functional.jacobian(vectorize=True)
_tracing, _autocast = torch._C._get_tracing_state, torch.is_autocast_enabled
_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine layer, ``x weight.T + bias``: `torch.nn.functional.linear` on rectilinear's kernels.

    Parameters
    ----------
    x : Tensor of shape (..., D)
    weight : Tensor of shape (M, D)
    bias : Tensor of shape (M,), optional

    Returns
    -------
    Tensor of shape (..., M)
        With gradients of any order.

    Raises
    ------
    RuntimeError
        Shapes, dtypes or devices do not fit together: PyTorch's own error.

    Examples
    --------
    >>> import torch
    >>> affine(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.5, 0.0]))
    tensor([[1.5000, 2.0000]])
    """
    return _layer(x, weight, bias, False)


def affine_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Affine layer followed by ReLU, fused.

    Parameters
    ----------
    x, weight, bias
        As for `affine`.

    Returns
    -------
    Tensor of shape (..., M)
        Where x weight.T + bias is 0, ReLU's gradient is 1, as everywhere in rectilinear, where `torch.relu` has 0.

    Raises
    ------
    RuntimeError
        As for `affine`.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> affine_relu(x, torch.eye(2), torch.tensor([-1.0, -3.0])).sum().backward()
    >>> x.grad  # the first output is 0, and its gradient passes
    tensor([[1., 0.]])
    """
    return _layer(x, weight, bias, True)


def relu(x: Tensor) -> Tensor:
    """Rectified linear unit: x where ``not (x < 0)``, else 0. At 0 its gradient is 1, where `torch.relu` has 0.

    Parameters
    ----------
    x : Tensor of any shape

    Returns
    -------
    Tensor of x's shape

    Raises
    ------
    TypeError
        x is no Tensor.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> relu(x).sum().backward()
    >>> x.grad
    tensor([0., 1., 1.])
    """
    if _compiling():
        return operators.relu(x) if _has_operators(x) else relu_of_torch(x)
    if not isinstance(x, _Tensor):
        raise TypeError(f"relu: x is of type {type(x).__name__}; it takes a torch.Tensor")
    if not ordinary() or not _plain(x) or primitives.backend_for(x) is None:
        return relu_of_torch(x)
    return _ReLU.apply(x) if x.requires_grad and _grad_enabled() else primitives.relu_forward(x)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, with_relu: bool) -> Tensor:
    if _compiling():
        if traceable(x, weight, bias):
            return traced(x, weight, bias, with_relu)
    elif served(x, layers := ((weight, bias, with_relu),)):
        return computed(x, layers)
    z = functional.linear(x, weight, bias)
    return relu_of_torch(z) if with_relu else z


# ---------------------------------------------------------------- who computes


def ordinary() -> bool:
    """Whether a call is what it seems: no autocast, torch.func, forward-mode gradient, dispatch mode or trace looks on."""
    return not (
        _modes()
        or _transform() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
        or _autocast("cpu")
        or _autocast("cuda")
    )


def served(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether the kernels take x through these layers, here and now."""
    if not (ordinary() and _plain(x)) or x.ndim == 0:  # first, since extents are tensors while a trace is recorded
        return False
    dtype, on_cpu, features = x.dtype, x.is_cpu, x.shape[-1]
    for weight, bias, _ in layers:
        if not (
            _plain(weight)
            and weight.dtype is dtype
            and weight.is_cpu is on_cpu
            and weight.ndim == 2
            and features == weight.shape[1]
            and (bias is None or (_plain(bias) and bias.dtype is dtype and bias.is_cpu is on_cpu and bias.shape == weight.shape[:1]))
            and (on_cpu or (weight.device == x.device and (bias is None or bias.device == x.device)))
        ):
            return False
        features = weight.shape[0]
    return primitives.backend_for(x) is not None


def _plain(x: Tensor) -> bool:
    kind = type(x)
    return (kind is _Tensor or kind is _Parameter) and x.dtype in _NATIVE and x.layout is _strided and not x._is_zerotensor()


def needs_gradient(x: Tensor, layers: Sequence[Layer]) -> bool:
    return _grad_enabled() and (x.requires_grad or any(_is_learnt(layer) for layer in layers))


def _is_learnt(layer: Layer) -> bool:
    weight, bias, _ = layer
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def computed(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The layers one after the other by the kernels, of what is `served`."""
    if x.ndim != 2:
        return computed(_flat(x), layers).view(*x.shape[:-1], layers[-1][0].shape[0])
    with_gradient = _grad_enabled()
    for i, layer in enumerate(layers):
        if with_gradient and (x.requires_grad or _is_learnt(layer)):
            left = layers[i:]
            return _Layers.apply(x, [relu for _, _, relu in left], *[t for layer in left for t in layer[:2]])
        x, _ = primitives.forward(x, *layer)
    return x


def _flat(x: Tensor) -> Tensor:
    """All samples of x along one axis; reshape does not know how many there are of 0 features."""
    return x.flatten(0, -2) if x.ndim > 2 else x[None]


def traceable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operators are to stand in the graph that torch.compile makes; one that is exported is to run without rectilinear."""
    return (
        _has_operators(x)
        and weight.dtype == x.dtype
        and weight.ndim == 2
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
    )


def _has_operators(x: Tensor) -> bool:
    """As `ordinary`, while torch.compile traces: whether the operators, which know of no autocast, torch.func or forward-mode gradient,
    compute here what PyTorch's own operations would."""
    return bool(
        x.dtype in _NATIVE
        and (x.is_cpu or (x.is_cuda and _cupy_works()))
        and not _autocast(x.device.type)
        and forward_ad._current_level < 0
        and not _transformed()
        and not _exporting()
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo makes `peek_interpreter_stack() is None` False
def _transformed() -> bool:
    return _transform() is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cupy_works() -> bool:
    return primitives.backend_for(torch.empty(0, device="cuda")) is not None


def _exporting() -> bool:
    return torch.compiler.is_exporting() if hasattr(torch.compiler, "is_exporting") else False


def traced(x: Tensor, weight: Tensor, bias: Tensor | None, with_relu: bool) -> Tensor:
    """The layer by the operators."""
    flat = x if x.ndim == 2 else _flat(x)
    out = operators.affine_relu(flat, weight, bias)[0] if with_relu else operators.affine(flat, weight, bias)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------- eager gradients


class _Layers(torch.autograd.Function):  # type: ignore[misc]  # torch is Any to mypy
    """Layers one after the other: one function for all, since autograd and the Python around it take some 50 us for each. x or the first
    layer needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, relus: Sequence[bool], *parameters: Tensor | None) -> Tensor:
        weights: Sequence[Any] = parameters[::2]
        needs = ctx.needs_input_grad
        # Saved is what PyTorch's own operations save, and no more: that may not change in place until the backward pass, which frees it.
        samples: list[Tensor | None] = []
        keeps: list[Tensor | None] = []
        # For gradients of gradients of several layers, until then: what they were given, with versions.
        ctx.given = [(t, _version(t)) for t in (None if needs[2] else x, *parameters)] if len(weights) > 1 else []
        for i, (weight, bias, relu) in enumerate(zip(weights, parameters[1::2], relus, strict=True)):
            samples.append(x if needs[2 * i + 2] else None)
            x, keep = primitives.forward(x, weight, bias, relu)
            keeps.append(None if keep is None else primitives.as_tensor(keep))
        ctx.shapes = [weight.shape for weight in weights]
        # Only its shape is read, but a stand-in for it would take 10 us.
        ctx.first = weights[0] if weights[0].is_leaf and not needs[0] else None
        ctx.save_for_backward(*samples, *(w if i > 0 or needs[0] else None for i, w in enumerate(weights)), *keeps)
        return x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved, count = ctx.needs_input_grad, ctx.saved_tensors, len(ctx.shapes)
        samples, weights, keeps = saved[:count], saved[count : 2 * count], saved[2 * count :]
        by_kernels = _kernels_differentiate(dout)
        if _grad_enabled() and count > 1:
            samples = _once_more(samples[0], ctx.given, [keep is not None for keep in keeps])
        first = ctx.first
        if not _graph_is_kept():
            ctx.given, ctx.first = [], None
        of_parameters: list[Tensor | None] = [None] * (2 * count)
        for i in reversed(range(count)):
            wanted = i > 0 or needs[0], needs[2 * i + 2], needs[2 * i + 3]
            # What is not saved is not read, but for its shape.
            weight = first if weights[i] is None else weights[i]
            weight = _stand_in(dout, *ctx.shapes[i]) if weight is None else weight
            x = _stand_in(dout, len(dout), weight.shape[1]) if samples[i] is None else samples[i]
            if by_kernels:
                keep = None if keeps[i] is None else primitives.as_keep(keeps[i], dout.shape)
                found = primitives.backward(dout, x, weight, keep, wanted)
            else:
                kept = None if keeps[i] is None else primitives.kept(keeps[i], len(weight))
                found = operators.gradients(dout, x, weight, kept, wanted)
            dout, of_parameters[2 * i], of_parameters[2 * i + 1] = found
        return (dout, None, *of_parameters)


def _stand_in(like: Tensor, *shape: int) -> Tensor:
    return like.new_zeros(()).expand(shape)


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


def _once_more(saved: Tensor | None, given: Sequence[tuple[Tensor | None, int]], relus: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What each layer was given, for a gradient that is to be differentiated again: what has been saved does not say where it came from."""
    if any(_version(t) != version for t, version in given):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: to differentiate the gradient "
            "of accelerated layers again, x, weights and biases have to be what they were in the forward pass"
        )
    x, *parameters = (t for t, _ in given)
    before_last = zip(parameters[:-2:2], parameters[1:-2:2], relus[:-1], strict=True)
    return tuple(accumulate(before_last, lambda x, layer: _layer(x, *layer), initial=x if saved is None else saved))


class _ReLU(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return primitives.relu_forward(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return primitives.relu_backward(dout, x) if _kernels_differentiate(dout) else torch.where(x < 0, 0, dout)


def _kernels_differentiate(dout: Tensor) -> bool:
    """Whether a gradient is asked for as such: not one that is to be differentiated again, or a batch of them."""
    return not _grad_enabled() and _plain(dout) and not _batched(dout) and ordinary() and primitives.backend_for(dout) is not None
