"""`accelerate`: a model that is there already, on rectilinear's kernels.

A layer that is served gets another class, a subclass of its own, and nothing else changes: it is the same object in the same place, with
the same parameters, hooks and ``state_dict``. A ``Sequential`` gets one whose ``forward`` runs Linear layers that follow one another, and
the ReLU after each, as one call; called by itself, each of them does what it did.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as modules_of_torch

from rectilinear.torch import timing
from rectilinear.torch.functions import Layer, computed, needs_gradient, served, traceable, traced
from rectilinear.torch.operators import relu_of_torch
from rectilinear.torch.primitives import Tensor, backend_for

COMPILED_WORK = 1 << 20
"""Products n d m of a layer from which on its operator stands in a graph of torch.compile, where nothing can be measured: calling one takes
some 20 us, in which a core does a million multiplications and additions."""

_GLOBAL_HOOKS = tuple(
    vars(modules_of_torch)[f"_global_{name}"] for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
_compiling, _grad_enabled, _deterministic = torch.compiler.is_compiling, torch.is_grad_enabled, torch.are_deterministic_algorithms_enabled
_saving = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # None where no hooks look at what is saved
_SERVED_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Row:
    """What became of one module: its name in the model, its class there, and why it was left alone (None: it was not)."""

    name: str
    kind: str
    left_alone: str | None = None


class Handle:
    """What `accelerate` did, and the way back.

    Attributes
    ----------
    rows : tuple of Row
        Each module that was looked at: its name, its class, and why it was left alone, if it was.
    report : str
        The same to be read, and for each shape and batch seen so far the times measured and who serves it.
    """

    def __init__(self, rows: list[Row], changed: list[tuple[nn.Module, type]], together: timing.Together) -> None:
        self.rows = tuple(rows)
        self._changed = changed
        self._together = together

    @property
    def report(self) -> str:
        lines = [f"{row.name or 'the model'} ({row.kind}): {row.left_alone or 'accelerated'}" for row in self.rows]
        lines += [_sentence(asked, answer, self._together.take_kernels(asked)) for asked, answer in self._together.asked.items()]
        return "\n".join(lines)

    def undo(self) -> None:
        """Give every module back the class that it had; one that has been given another since (parametrizations do) keeps that.

        Parameters and buffers stay as they are now.
        """
        for module, kind in self._changed:
            if type(module) in _PLAIN:
                module.__class__ = kind
            _together.pop(module, None)
        self._changed.clear()

    def __repr__(self) -> str:
        return f"<{len(self._changed)} of {len(self.rows)} modules accelerated>"


def _sentence(asked: timing.Question, answer: timing.Answer, kernels: bool) -> str:
    what = "training" if any(asked.gradients) else "inference"
    layers = zip(itertools.pairwise(asked.extents), asked.relus, strict=True)
    names = ", ".join(f"{'Linear+ReLU' if relu else 'Linear'} {features}-{outputs}" for (features, outputs), relu in layers)
    who = "the kernels" if kernels else "PyTorch"
    times = f"{answer.kernels * 1e6:.0f} us with the kernels, {answer.pytorch * 1e6:.0f} with PyTorch"
    return f"{names}, batches up to {asked.batch}, {what}: {times}: {who}"


def accelerate(model: nn.Module, relu_at_zero: int = 1) -> Handle:
    """Run a model's ``nn.Linear`` layers, and the ``nn.ReLU`` right after them, on rectilinear's kernels.

    Layers are changed in place. Parameters stay the same objects, so that optimizers, hooks and ``state_dict`` go on as before. Calls go
    to the kernels only where they are faster here than PyTorch itself: the first call with certain shapes, dtype and batch, for
    inference and for training, measures both on its own operands, in some twenty calls' time, and the layers of a model go the way that is
    faster for all of them together. Under ``torch.use_deterministic_algorithms(True)`` nothing is measured and the kernels serve, so that
    results never depend on a measurement.

    Linear and ReLU become one kernel where they are neighbours in an ``nn.Sequential``, and such layers one call where they follow one
    another, as long as none of them has hooks.

    Parameters
    ----------
    model : nn.Module
        It may be a Linear itself.
    relu_at_zero : {1, 0}
        The gradient of a fused ReLU at 0: 1 is rectilinear's, 0 is PyTorch's. With 0 training computes the ReLU apart.

    Returns
    -------
    Handle
        With ``report``, ``rows`` and ``undo()``.

    Raises
    ------
    TypeError
        `model` is no ``nn.Module``.
    ValueError
        `relu_at_zero` is neither 0 nor 1.

    Notes
    -----
    Left alone are modules with hooks, parametrizations, another dtype than float32 or float64, on a device without a backend,
    quantized ones, and subclasses of ``nn.Linear`` and ``nn.Sequential``, which may do something else.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> handle = accelerate(model)
    >>> print(handle.report)
    the model (Sequential): accelerated
    0 (Linear): accelerated
    2 (Linear): accelerated
    >>> handle.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; it takes a torch.nn.Module")
    try:
        at_zero = operator.index(relu_at_zero)
    except TypeError:
        at_zero = -1
    if at_zero not in (0, 1):
        raise ValueError(f"accelerate: relu_at_zero is {relu_at_zero!r}; it takes 1 (rectilinear's gradient at 0) or 0 (PyTorch's)")
    rows, changed, together = [], [], timing.Together()
    for name, module, kind in list(_candidates(model)):
        reason = _why_not(module)
        rows.append(Row(name, kind.__name__, reason))
        if reason is None:
            module.__class__ = _ACCELERATED[kind, at_zero]
            _together[module] = together
            changed.append((module, kind))
    return Handle(rows, changed, together)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type]]:
    """Modules that may be meant, each once, with the class that they have without us."""
    for name, module in model.named_modules():
        kind = _PLAIN.get(type(module), type(module))
        if kind is nn.Sequential:
            if _has_chain(module):
                yield name, module, kind
        elif isinstance(module, nn.Linear) or kind.__name__.endswith("Linear"):
            yield name, module, kind


def _has_chain(sequential: nn.Sequential) -> bool:
    """Whether a Linear comes right before another one or a ReLU."""
    return any(isinstance(a, nn.Linear) and (isinstance(b, nn.Linear) or type(b) is nn.ReLU) for a, b in itertools.pairwise(sequential))


def _why_not(module: nn.Module) -> str | None:
    """Why a module is left alone; None if it is not."""
    kind = _PLAIN.get(type(module), type(module))
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "left alone: its parameters are parametrized"
    if kind not in (nn.Linear, nn.Sequential):
        return f"left alone: {kind.__module__}.{kind.__qualname__} may do something else than nn.Linear"
    if "forward" in vars(module):
        return "left alone: its forward has been replaced"
    if _has_hooks(module):
        return "left alone: it has hooks"
    if isinstance(module, nn.Sequential):
        return None
    weight = module.weight
    if weight.dtype not in _SERVED_DTYPES:
        return f"left alone: {str(weight.dtype).removeprefix('torch.')}; the kernels take float32 and float64"
    if backend_for(weight) is None:
        return f"left alone: no backend serves tensors on {weight.device.type} here; python -m rectilinear info says why"
    return None


def _is_unobserved(module: nn.Module) -> bool:
    """Whether nobody has put anything around its forward."""
    return not (_has_hooks(module) or "forward" in module.__dict__)


def _has_hooks(module: nn.Module) -> bool:
    state = module.__dict__
    return bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"])


class AcceleratedLinear(nn.Linear):  # type: ignore[misc]  # torch is Any to mypy
    """What an accelerated ``nn.Linear`` is, under this name in pickles."""

    def forward(self, input: Tensor) -> Tensor:
        return _run([(self, False)], input, 1)


class AcceleratedSequential(nn.Sequential):  # type: ignore[misc]
    """What an accelerated ``nn.Sequential`` is: Linear layers that follow one another, with the ReLU after each, are one call, as long as
    nobody looks between them."""

    _relu_at_zero = 1

    def forward(self, input: Tensor) -> Tensor:
        if any(_GLOBAL_HOOKS):
            return super().forward(input)
        chain: list[tuple[nn.Linear, bool]] = []
        for child in self._modules.values():
            kind = type(child)
            if kind is AcceleratedLinear and _is_unobserved(child):
                chain.append((child, False))
            elif kind is nn.ReLU and chain and _is_unobserved(child):  # one after another changes nothing
                chain[-1] = (chain[-1][0], True)
            else:
                if chain:
                    input, chain = _run(chain, input, self._relu_at_zero), []
                input = child(input)
        return _run(chain, input, self._relu_at_zero) if chain else input


class AcceleratedSequentialZero(AcceleratedSequential):
    """The same with PyTorch's gradient at 0."""

    _relu_at_zero = 0


_ACCELERATED = {
    (nn.Linear, 0): AcceleratedLinear,
    (nn.Linear, 1): AcceleratedLinear,
    (nn.Sequential, 0): AcceleratedSequentialZero,
    (nn.Sequential, 1): AcceleratedSequential,
}
"""By a module's class, and the gradient of a fused ReLU at 0: in the class, so that parts and copies have it too."""
_PLAIN = {accelerated: kind for (kind, _), accelerated in _ACCELERATED.items()}

_together: WeakKeyDictionary[nn.Module, timing.Together] = WeakKeyDictionary()
"""With whom a layer goes. Kept here and not in the layer, whose copies and pickles are to hold nothing of it."""
_COPIES = timing.Together()
"""Copies, and what comes out of pickles."""


def _run(chain: Sequence[tuple[nn.Linear, bool]], x: Tensor, at_zero: int) -> Tensor:
    """Linear layers, each with ReLU after it or not, whose gradient at 0 is `at_zero`."""
    layers = [(*_parameters(linear), relu) for linear, relu in chain]
    if _compiling():
        for layer in layers:
            x = _compiled(x, *layer, at_zero)
        return x
    if not isinstance(x, torch.Tensor):
        return _THEIRS[at_zero](x, layers)  # which says what is wrong
    if _saving is not None and _grad_enabled() and _saving(True) is not None and not _deterministic():
        # Hooks would see what is measured, and a checkpoint's want the same to be saved when it computes again, whatever is known by then.
        return _THEIRS[at_zero](x, layers)
    key = (
        (x.shape, x.dtype, at_zero, _grad_enabled(), x.requires_grad),
        *[(linear.out_features, linear.in_features, relu) for linear, relu in chain],
        *[t is not None and t.requires_grad for layer in layers for t in layer[:2]],
    )
    together = _together.get(chain[0][0], _COPIES)
    choice = True if _deterministic() else together.choices.get(key)
    if choice is False or not served(x, layers):
        return _THEIRS[at_zero](x, layers)
    if choice is None:
        choice = timing.kernels_are_faster(x, layers, _OURS[at_zero], _THEIRS[at_zero], together)
        if choice is not None:
            together.remember(key, choice)
    return (_OURS if choice else _THEIRS)[at_zero](x, layers)


def _parameters(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    try:
        parameters = linear._parameters  # found at once, where attributes are looked for in three places
        return parameters["weight"], parameters["bias"]
    except KeyError:  # a replica of DataParallel, pruning and the like have them elsewhere
        return linear.weight, linear.bias


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, at_zero: int) -> Tensor:
    if not traceable(x, weight, bias) or x.numel() * weight.shape[0] < COMPILED_WORK:
        return _THEIRS[at_zero](x, [(weight, bias, relu)])
    out = traced(x, weight, bias, relu and at_zero == 1)
    return torch.relu(out) if relu and at_zero == 0 else out


def _theirs(relu_of: Callable[[Tensor], Tensor], x: Tensor, layers: Sequence[Layer]) -> Tensor:
    for weight, bias, relu in layers:
        x = functional.linear(x, weight, bias)
        x = relu_of(x) if relu else x
    return x


def _ours_at_zero(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """With PyTorch's ReLU where a gradient is asked for."""
    if not needs_gradient(x, layers):
        return computed(x, layers)
    for weight, bias, relu in layers:
        x = computed(x, [(weight, bias, False)])
        x = torch.relu(x) if relu else x
    return x


_THEIRS: dict[int, timing.Run] = {0: partial(_theirs, torch.relu), 1: partial(_theirs, relu_of_torch)}
_OURS: dict[int, timing.Run] = {0: _ours_at_zero, 1: computed}
