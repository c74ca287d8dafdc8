"""Which is faster on this machine, PyTorch's own operations or the kernels, for layers at a batch: measured where it is first asked for.

A threshold that was measured elsewhere would be a guess. So the first call of `accelerate`d layers with a shape, dtype and batch runs both
ways a few times on its own operands, and the answer is kept for the process, for all layers alike. Batches up to the next power of two
share it. The layers of one model then go one way together, by the sum of their times: see `Together`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import get_clock_info, perf_counter, thread_time
from typing import Any, NamedTuple, TypeAlias

import torch

from rectilinear.torch.functions import Layer
from rectilinear.torch.primitives import Tensor

IN_A_NET_S = 10e-6, 30e-6
"""Seconds that a call of the kernels takes longer in a pass through a net than again and again, for inference and for training: more of it
is Python, which the processor has forgotten by the next pass. Three and four layers in one call: 3 to 22 us in inference of up to 32 rows,
and up to 40 in training (Zen 3, two threads)."""
ALONE = 2
"""So many times that for a layer that is called by itself, among operations of PyTorch: 18 to 26 us in inference of 4 to 32 rows, 40 to 70
in training (Zen 3, two threads)."""

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

Layers: TypeAlias = Sequence[Layer]
Run: TypeAlias = Callable[[Tensor, Layers], Tensor]


class Question(NamedTuple):
    """What is to be as fast as possible: layers that follow one another, at batches of which `batch` is the largest.

    `extents` are the features of x and the outputs of each layer, `relus` says after which of them ReLU follows, `gradients` which of x and
    each layer's weight and bias will need one; none: inference. `ours` is how the kernels would be called.
    """

    extents: tuple[int, ...]
    relus: tuple[bool, ...]
    dtype: Any
    device: str
    gradients: tuple[bool, ...]
    batch: int
    ours: Run

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
        like = [(other, answer) for other, answer in list(self.asked.items()) if other.goes_with(asked)]
        calls = sum(1 if len(other.relus) > 1 else ALONE for other, _ in like)
        longer = calls * IN_A_NET_S[any(asked.gradients)]
        return longer + sum(answer.kernels for _, answer in like) <= sum(answer.pytorch for _, answer in like)

    def remember(self, key: tuple[Any, ...], choice: bool) -> None:
        if len(self.choices) >= MOST_CHOICES:  # batches of ever new lengths
            self.choices.clear()
        self.choices[key] = choice


_answers: dict[Question, Answer] = {}
_measuring = threading.Lock()


def question(x: Tensor, layers: Layers, ours: Run) -> Question:
    """What a call asks. The axes of x before the last one make a batch."""
    features = layers[0][0].shape[1]
    rows = x.numel() // max(features, 1)
    gradients = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in _operands(x, layers))
    extents, relus = (features, *(weight.shape[0] for weight, _, _ in layers)), tuple(relu for _, _, relu in layers)
    return Question(extents, relus, x.dtype, x.device.type, gradients, 1 << (rows - 1).bit_length() if rows else 0, ours)


def _operands(x: Tensor, layers: Layers) -> list[Tensor | None]:
    return [x, *(t for layer in layers for t in layer[:2])]


def kernels_are_faster(x: Tensor, layers: Layers, ours: Run, theirs: Run, together: Together) -> bool | None:
    """Whether to take `ours` for this call: measured if nobody has asked before; None while another thread is measuring."""
    asked = question(x, layers, ours)
    answer = _answers.get(asked)
    if answer is None:
        if not _measuring.acquire(blocking=False):
            return None
        try:
            answer = _answers[asked] = _measured(asked, x, layers, ours, theirs)
        finally:
            _measuring.release()
    together.add(asked, answer)
    return together.take_kernels(asked)


def _measured(asked: Question, x: Tensor, layers: Layers, ours: Run, theirs: Run) -> Answer:
    # Leaves of their own, on the same memory: the model's gradients, and hooks on its parameters, notice nothing.
    pairs = zip(_operands(x, layers), asked.gradients, strict=True)
    given = [None if t is None else t.detach().requires_grad_(needed) for t, needed in pairs]
    leaves = [t for t in given if t is not None and t.requires_grad]
    samples, alike = given[0], list(zip(given[1::2], given[2::2], asked.relus, strict=True))

    def run(way: Run) -> None:
        out = way(samples, alike)
        if leaves:
            torch.autograd.grad(out, leaves, out.detach())

    best = dict.fromkeys((ours, theirs), (True, float("inf")))
    with torch.set_grad_enabled(bool(leaves)), torch.autograd.set_detect_anomaly(False):
        for way in best:
            run(way)  # compiles, and touches what has not been touched
        blocks, deadline = 0, perf_counter() + PATIENCE_S
        while blocks < BLOCKS or (any(disturbed for disturbed, _ in best.values()) and perf_counter() < deadline):
            for way in (theirs, ours):
                best[way] = min(best[way], _shortest(partial(run, way)))
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
