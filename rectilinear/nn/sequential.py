"""Layers one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

from rectilinear.nn.module import Layer, Module
from rectilinear.nn.parameters import Array
from rectilinear.nn.uses import TAPE, WALK, Tape, Walk


class Sequential(Module):
    """Layers one after another; parameters are named by place, ``"0.w"``, ``"0.b"``, ...

    Made of layers, or of one list of them. ``net[1]`` is a layer, ``net[1:]`` a chain of the same layers; `len` and iteration work as
    for a list. The same layer may be there more than once: its gradients are summed over its uses.

    `backward` stops at the first layer that has parameters, unless asked for the gradient of the input: for the
    first layer that gradient is a whole matrix product which training has no use for.

    Parameters
    ----------
    *layers : Module, or one iterable of Module
        Chains in chains are fine.

    Raises
    ------
    TypeError
        Something in it is no `Module`.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import Affine, AffineReLU, Sequential
    >>> rng = np.random.default_rng(0)
    >>> net = Sequential(AffineReLU(64, 32, rng=rng), Affine(32, 10, rng=rng))
    >>> net.forward(np.ones((5, 64))).shape
    (5, 10)
    >>> net.backward(np.ones((5, 10)))
    >>> {name: grad.shape for name, grad in net.grads.items()}
    {'0.w': (64, 32), '0.b': (32,), '1.w': (32, 10), '1.b': (10,)}
    >>> len(net), net[-1]
    (2, Affine(32, 10))
    """

    def __init__(self, *layers: Module | Iterable[Module]) -> None:
        if len(layers) == 1 and not isinstance(layers[0], Module | type) and isinstance(layers[0], Iterable):
            layers = tuple(layers[0])
        for place, layer in enumerate(layers):
            if not isinstance(layer, Module):
                met = f"the class {layer.__name__}, not a layer made of it" if isinstance(layer, type) else f"{layer!r:.200}"
                raise TypeError(f"Sequential: layer {place} is {met}; wanted Modules such as Affine(...), or one list of them")
        self.layers: tuple[Module, ...] = layers  # type: ignore[assignment]  # the loop has seen to it
        self._tape: Tape | None = None

    @property
    def params(self) -> dict[str, Array]:
        """Every parameter by name, in a new dictionary: to replace one, assign to its layer's `params`."""
        return {prefix + name: value for prefix, layer in self.leaves() for name, value in layer.params.items()}

    @property
    def grads(self) -> dict[str, Array]:
        """Every gradient by name, in a new dictionary. A layer used twice has one, the sum, under both its names."""
        return {prefix + name: value for prefix, layer in self.leaves() for name, value in layer.grads.items()}

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        for place, layer in enumerate(self.layers):
            yield from layer.leaves(f"{prefix}{place}.")

    def forward(self, x: Array, *, training: bool = True) -> Array:
        if self._tape is not None and self._tape.owner is self:
            self._tape.uses.clear()  # now: what it holds would lie beside what the new forward makes
        self._tape, self._evaluated = None, not training
        if not training:
            for layer in self.layers:
                x = layer.forward(x, training=False)
            return x
        tape = TAPE.get() or WALK.get() or Tape(self)
        token = TAPE.set(tape)
        try:
            for layer in self.layers:
                x = layer.forward(x)
        finally:
            TAPE.reset(token)
        self._tape = tape
        return x

    def backward(self, dout: Array, *, need_dx: bool = False, accumulate: bool = False) -> Array | None:
        if WALK.get() is not None:  # part of the backward of what is around it
            return self._walk(dout, need_dx)
        if self._tape is None:
            raise self._no_forward()
        walk = Walk(self._tape, accumulate)
        token = WALK.set(walk)
        try:
            return self._walk(dout, need_dx)
        except BaseException:
            walk.undo()
            raise
        finally:
            WALK.reset(token)
            walk.uses.clear()

    def _walk(self, dout: Array, need_dx: bool) -> Array | None:
        dx: Array | None = dout
        for place in reversed(range(len(self.layers))):
            wanted = need_dx or _has_parameters(self.layers[:place])
            dx = self.layers[place].backward(dx, need_dx=wanted)
            if not wanted:
                return None
        return dx

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.layers)

    @overload
    def __getitem__(self, place: int) -> Module: ...

    @overload
    def __getitem__(self, place: slice) -> Sequential: ...

    def __getitem__(self, place: int | slice) -> Module:
        return Sequential(*self.layers[place]) if isinstance(place, slice) else self.layers[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tape": None}

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


def _has_parameters(layers: tuple[Module, ...]) -> bool:
    return any(leaf.params for layer in layers for _, leaf in layer.leaves())
