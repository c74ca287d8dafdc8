"""Which is faster on this machine, PyTorch's own operations or the kernels, for a layer at a batch: measured where it is first asked for.

A threshold that was measured elsewhere would be a guess. So the first call of `accelerate`d layers with a shape, dtype and batch runs both
ways a few times on its own operands, and the answer is kept for the process, for all layers alike. Batches up to the next power of two
share it. The layers of one model then go one way together, by the sum of their times: see `Together`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch

from rectilinear.torch.primitives import Tensor

CLEARLY = 0.92
"""The kernels are taken where they need at most so much of PyTorch's time. A layer alone finds its operands in caches that a whole net
shares; a training step of batch 32 took up to a tenth longer where both ways took equally long alone (Zen 4)."""

BLOCKS = 3
"""Each way is timed in so many blocks of calls, in turn; the shortest call counts."""
BLOCK_S = 0.002
"""How long a block lasts: at least two calls, and at most `BLOCK_CALLS`. By its end threads of somebody else's are asleep."""
BLOCK_CALLS = 20


class Question(NamedTuple):
    """What is to be as fast as possible: a layer, with its ReLU or without, at batches of which `batch` is the largest.

    `gradients` says of x, weight and bias which will need one; none: inference.
    """

    features: int
    outputs: int
    dtype: Any
    device: str
    relu: bool
    gradients: tuple[bool, bool, bool]
    batch: int

    def goes_with(self, other: Question) -> bool:
        """Whether both are asked in the same pass through a model."""
        return (self.batch, self.dtype, self.device, any(self.gradients)) == (other.batch, other.dtype, other.device, any(other.gradients))


class Answer(NamedTuple):
    """Seconds of a call, forward and backward where gradients are needed."""

    kernels: float
    pytorch: float


MOST_CHOICES = 10_000


class Together:
    """Layers of one model, which go the same way at a batch, for inference or for training: what they gain together is more than chance."""

    def __init__(self) -> None:
        self.asked: dict[Question, Answer] = {}
        self.choices: dict[tuple[Any, ...], bool] = {}
        """What is known of calls: by what can be had of one in a microsecond, for one that PyTorch serves may take 10."""

    def add(self, asked: Question, answer: Answer) -> None:
        if asked not in self.asked:
            self.asked[asked] = answer
            self.choices.clear()  # what has been chosen without it

    def take_kernels(self, asked: Question) -> bool:
        like = [answer for other, answer in list(self.asked.items()) if other.goes_with(asked)]
        return sum(answer.kernels for answer in like) <= CLEARLY * sum(answer.pytorch for answer in like)

    def remember(self, key: tuple[Any, ...], choice: bool) -> None:
        if len(self.choices) >= MOST_CHOICES:  # batches of ever new lengths
            self.choices.clear()
        self.choices[key] = choice


_answers: dict[Question, Answer] = {}
_measuring = threading.Lock()

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def question(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Question:
    """What a call asks. The axes of x before the last one make a batch."""
    outputs, features = weight.shape
    rows = x.numel() // max(features, 1)
    gradients = (
        (x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad) if torch.is_grad_enabled() else (False,) * 3
    )
    return Question(features, outputs, x.dtype, x.device.type, relu, gradients, 1 << (rows - 1).bit_length() if rows else 0)


def kernels_are_faster(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, ours: Layer, theirs: Layer, together: Together
) -> bool | None:
    """Whether to take `ours` for this call: measured if nobody has asked before; None while another thread is measuring."""
    asked = question(x, weight, bias, relu)
    answer = _answers.get(asked)
    if answer is None:
        if not _measuring.acquire(blocking=False):
            return None
        try:
            answer = _answers[asked] = _measured(asked, x, weight, bias, ours, theirs)
        finally:
            _measuring.release()
    together.add(asked, answer)
    return together.take_kernels(asked)


def _measured(asked: Question, x: Tensor, weight: Tensor, bias: Tensor | None, ours: Layer, theirs: Layer) -> Answer:
    # Leaves of their own, on the same memory: the model's gradients, and hooks on its parameters, notice nothing.
    given = [None if t is None else t.detach().requires_grad_(needed) for t, needed in zip((x, weight, bias), asked.gradients, strict=True)]
    leaves = [t for t in given if t is not None and t.requires_grad]

    def run(layer: Layer) -> None:
        out = layer(*given)
        if leaves:
            torch.autograd.grad(out, leaves, out.detach())

    best = {True: float("inf"), False: float("inf")}
    with torch.set_grad_enabled(bool(leaves)):
        for layer in (ours, theirs):
            run(layer)  # compiles, and touches what has not been touched
        for _ in range(BLOCKS):
            for kernels, layer in ((False, theirs), (True, ours)):
                best[kernels] = min(best[kernels], _shortest(lambda layer=layer: run(layer)))  # type: ignore[misc]
    return Answer(best[True], best[False])


def _shortest(call: Callable[[], None]) -> float:
    shortest, begun = float("inf"), perf_counter()
    for done in range(BLOCK_CALLS):
        start = perf_counter()
        call()
        now = perf_counter()
        shortest = min(shortest, now - start)
        if done >= 1 and now - begun > BLOCK_S:
            break
    return shortest


def _after_fork_in_child() -> None:
    global _measuring
    _measuring = threading.Lock()  # a thread that is not here may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
