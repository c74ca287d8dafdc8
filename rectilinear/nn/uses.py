"""Which cache belongs to which use of a layer.

A layer that a net holds twice is used twice in one forward. So the caches of a forward lie on a tape, which belongs to what `forward`
was called on; its `backward` takes them from the end, and adds up the gradients of a layer over its uses. A forward inside of another
one (a chain in a chain) writes to the tape of the outer one, which layers find in a context variable: like that, a module of one's own
needs to know nothing of tapes, and two nets that share layers do not disturb each other.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rectilinear.nn.module import Layer, Module


class Tape:
    """The caches of one forward, in order, each with the layer that it is of."""

    def __init__(self, owner: Module | None) -> None:
        self.owner = owner
        self.uses: list[tuple[Layer, Any]] = []


class Walk(Tape):
    """One backward along a tape: what is left of it, and the gradients as they were before, for when it fails.

    A module may go forward only now (to save memory): what that keeps is put on top, and is the next to be taken.
    """

    def __init__(self, tape: Tape, accumulate: bool) -> None:
        super().__init__(None)
        self.tape = tape  # stays as it is, for a second backward
        self.uses = list(tape.uses)
        self.accumulate = accumulate
        self.before: dict[int, tuple[Layer, dict[str, Any]]] = {}

    def take(self, layer: Layer) -> tuple[Any] | None:
        """The cache of the latest use of `layer` that has not been taken, in a tuple. None if this forward did not come by the layer."""
        for place in reversed(range(len(self.uses))):
            if self.uses[place][0] is layer:
                return (self.uses.pop(place)[1],)
        if any(each is layer for each, _ in self.tape.uses):
            raise RuntimeError(f"{type(layer).__name__}.backward: called more often in this backward than forward was in its forward")
        return None

    def earlier_grads(self, layer: Layer) -> dict[str, Any]:
        """What the gradients of this use are to be added to."""
        if id(layer) in self.before:
            return layer.grads
        self.before[id(layer)] = layer, layer.grads
        return layer.grads if self.accumulate else {}

    def undo(self) -> None:
        for layer, grads in self.before.values():
            layer.grads = grads


TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)
"""Of the forward under way."""

WALK: ContextVar[Walk | None] = ContextVar("walk", default=None)
"""The backward under way."""
