"""Which is faster on this machine, PyTorch's own operations or the kernels, for a layer at a batch: measured where it is first asked for.

A threshold that was measured elsewhere would be a guess. So the first call of `accelerate`d layers with a shape, dtype and batch runs both
ways a few times on its own operands, and the answer is kept for the process, for all layers alike. Batches up to the next power of two
share it. The layers of one model then go one way together, by the sum of their times: see `Together`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from time import get_clock_info, perf_counter, thread_time
from typing import Any, NamedTuple

import torch

from rectilinear.torch.primitives import Tensor

IN_A_NET_S = 10e-6, 60e-6
"""Seconds that a layer by the kernels takes longer in a pass through a net than it does called again and again, for inference and for
training: more of it is Python, which the processor has forgotten by the next pass. In 784-512-256-10 it came to 8 us a layer in inference
of 1 row, 12 to 24 of 4 to 32 rows, and 40 to 70 in training of 4 to 32 (Zen 3, two threads). With about the least of that inference of 8
to 32 rows goes to the kernels, in 0.85 to 0.98 of PyTorch's time; training of 32 rows would take 1.07 of it, and does not."""
CLEARLY = 0.98
"""And they are taken where they then need at most so much of PyTorch's time, so that chance does not decide. In nets they gain as much of
a long pass as they do alone, or more: training of 1024 and 4096 rows took 0.96 and 0.94 of PyTorch's time alone, 0.92 to 0.97 and
0.94 in the net (Zen 3, two threads)."""

BLOCKS = 3
"""Each way is timed in so many blocks of calls, in turn; the shortest call counts."""
BLOCK_S = 0.002
"""How long a block lasts: at least two calls, and at most `BLOCK_CALLS`. By its end threads of somebody else's are asleep."""
BLOCK_CALLS = 20

RUNNING = 0.9
"""The share of a call's time that the calling thread has to run for the call to count. It runs, or spins at a barrier, all the time, unless
the system has put another thread on its core: two of OpenMP's began a process on one core, and for 40 to 100 ms each call of 0.1 ms took
two turns of the scheduler, 8 ms (Zen 3, Linux 6)."""
PATIENCE_S = 0.3
"""How long to go on for such calls. If there is none by then, threads may as well sleep where they wait: the shortest call counts."""


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
        longer = IN_A_NET_S[any(asked.gradients)]
        return sum(answer.kernels + longer for answer in like) <= CLEARLY * sum(answer.pytorch for answer in like)

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

    best = dict.fromkeys((ours, theirs), (True, float("inf")))
    with torch.set_grad_enabled(bool(leaves)):
        for layer in best:
            run(layer)  # compiles, and touches what has not been touched
        blocks, deadline = 0, perf_counter() + PATIENCE_S
        while blocks < BLOCKS or (any(disturbed for disturbed, _ in best.values()) and perf_counter() < deadline):
            for layer in (theirs, ours):
                best[layer] = min(best[layer], _shortest(partial(run, layer)))
            blocks += 1
    return Answer(best[ours][1], best[theirs][1])


_running = thread_time if get_clock_info("thread_time").resolution < 1e-6 else perf_counter  # where it is too coarse, no call is disturbed


def _shortest(call: Callable[[], None]) -> tuple[bool, float]:
    """Whether the thread was disturbed in all calls, and the seconds of the shortest of those in which it was not, if there are any."""
    shortest, begun = (True, float("inf")), perf_counter()
    for done in range(BLOCK_CALLS):
        start, ran = perf_counter(), _running()
        call()
        ran, now = _running() - ran, perf_counter()
        shortest = min(shortest, (ran < RUNNING * (now - start), now - start))
        if done >= 1 and now - begun > BLOCK_S:
            break
    return shortest


def _after_fork_in_child() -> None:
    global _measuring
    _measuring = threading.Lock()  # a thread that is not here may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
