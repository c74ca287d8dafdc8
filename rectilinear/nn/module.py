"""What layers and chains of layers have in common: forward, backward, and their parameters by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rectilinear.backends.cupy_scratch import is_recording
from rectilinear.errors import ShapeError
from rectilinear.nn.parameters import Array, copied, fitted, parameters, put, retie, ties
from rectilinear.nn.uses import TAPE, WALK


class Module(ABC):
    """Something with a forward, a backward and layers in it.

    A module of your own may call `forward` and `backward` of others; within a `Sequential` all of it is one pass, in which a layer may
    be used more than once.

    Pickles and copies (`copy.deepcopy`) hold parameters, tied ones tied, and neither activations nor gradients.
    """

    _evaluated = False  # whether the latest forward was one with training=False

    @abstractmethod
    def forward(self, x: Array, *, training: bool = True) -> Array:
        """The output for x; what `backward` will need is kept in place of what was kept before.

        With ``training=False`` nothing is kept, and what was is dropped.
        """

    @abstractmethod
    def backward(self, dout: Array, *, need_dx: bool = True, accumulate: bool = False) -> Array | None:
        """The gradient for the input of the latest `forward`, None where not needed.

        Overwrites `grads`, or with ``accumulate=True`` adds to them. May be called again after the same forward.

        Raises
        ------
        RuntimeError
            There is no forward to go back from, or the latest one was called with ``training=False``.
        """

    @abstractmethod
    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """The layers in order, each with the prefix of its parameters' names. One that is used twice comes twice."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters as NumPy arrays under names such as ``"w"`` or, in a chain, ``"0.w"``.

        The arrays are copies, C-contiguous and of the machine's byte order. Tied parameters are there under each of their names.
        """
        return {prefix + name: copied(value) for prefix, layer in self.leaves() for name, value in layer.params.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take every parameter from `state`, each to the library, device and dtype of the one it replaces.

        Values are copied into the arrays that are there, so that what shares them goes on to do so; where an array cannot be written to,
        a new one takes its place under all its names. A parameter of integers takes the dtype of what is loaded, so that nothing is
        cut off.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` gives it; arrays of any library and layout.

        Raises
        ------
        ShapeError
            A shape differs. Missing and unknown names are in the same message.
        ValueError
            Names are missing or unknown, or tied parameters are given different values. Nothing has been changed then, as with every
            error here.
        DTypeError
            An array is not of real numbers.
        """
        for parameter, value in self._prepared(state):
            put(parameter, value)

    def _prepared(self, state: Mapping[str, Array]) -> list[tuple[Any, Array]]:
        """What `load_state_dict` is to put where; all that can fail has been done then."""
        found = parameters(self)
        missing = [slot.key for parameter in found for slot in parameter.slots if slot.key not in state]
        return fitted("load_state_dict", found, state, missing)

    def _no_forward(self) -> RuntimeError:
        why = (
            "the latest forward was called with training=False and kept nothing; call forward(x) first"
            if self._evaluated
            else "no forward to go back from; call forward first"
        )
        return RuntimeError(f"{type(self).__name__}.backward: {why}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_evaluated": False, "_ties": ties(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = state.pop("_ties")
        self.__dict__.update(state)
        retie(self, found)


class Layer(Module):
    """One layer: its parameters, the gradients that the latest `backward` left, and the cache between the two.

    A layer of your own hands what its backward needs to ``self._keep(cache, training)``, gets it back from ``self._cached()``, and hands
    its gradients to ``self._collect(grads, accumulate)``: so it may be used more than once in a net.

    Attributes
    ----------
    params, grads : dict of str to array
        ``"w"`` (D, M) and ``"b"`` (M,) for the affine layers (no ``"b"`` without bias), empty for ReLU.
        `grads` is empty before the first `backward`.
    """

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        self._cache: tuple[Any] | None = None  # of the latest use

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield prefix, self

    def _keep(self, cache: Any, training: bool) -> None:
        self._evaluated = not training
        self._cache = (cache,) if training else None
        tape = TAPE.get() or WALK.get()
        if training and tape is not None:
            tape.uses.append((self, cache))

    def _cached(self) -> Any:
        """The cache of the use of this layer that the backward under way has come to, else of the latest one."""
        walk = WALK.get()
        cache = (walk.take(self) if walk is not None else None) or self._cache
        if cache is None:
            raise self._no_forward()
        return cache[0]

    def _collect(self, grads: dict[str, Array], accumulate: bool) -> None:
        """Make these the gradients, or add them where they are to be added."""
        walk = WALK.get()
        earlier = walk.earlier_grads(self) if walk is not None else self.grads if accumulate else {}
        for name, grad in grads.items():
            if name in earlier and earlier[name].shape != grad.shape:
                raise ShapeError(
                    f"{type(self).__name__}.backward: the gradient of {name} has shape {tuple(grad.shape)}, "
                    f"but the earlier one, which it is to be added to, has {tuple(earlier[name].shape)}"
                )
        sums = {name: _sum(earlier[name], grad) if name in earlier else grad for name, grad in grads.items()}
        in_place = sums.keys() == earlier.keys() and all(earlier[name] is value for name, value in sums.items())
        self.grads = earlier if in_place else sums  # the very dictionary, so that `rectilinear.capture` sees when another is put there

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "grads": {}, "_cache": None}


def _sum(earlier: Array, grad: Array) -> Array:
    if is_recording() and earlier.dtype == grad.dtype:
        earlier += grad  # in place, since a replay adds to what is here, not to what an attribute would hold then
        return earlier
    return earlier + grad
