"""What moves parameters along their gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from rectilinear.backends import registry
from rectilinear.backends.contract import SGDStep
from rectilinear.backends.cupy_scratch import Scratch, recorded
from rectilinear.dispatch import dtype_name, library_name
from rectilinear.errors import DTypeError, ShapeError
from rectilinear.nn.module import Module
from rectilinear.nn.parameters import (
    Array,
    Parameter,
    bring,
    copied,
    fitted,
    is_floating,
    is_real,
    outside_autograd,
    overwritten,
    parameters,
    put,
    turned,
)

_GOES_ON = ("warn", "ignore")


class Rates(NamedTuple):
    """The numbers that an `SGD` is set to."""

    lr: float
    momentum: float
    weight_decay: float

    @property
    def descent(self) -> float:
        return -self.lr

    def checked(self) -> Rates:
        """The same as Python floats, which change no array's dtype, whatever they came as."""
        try:
            rates = Rates(*map(float, self))
        except (TypeError, ValueError):
            raise TypeError(f"SGD: {self._text()}; wanted numbers") from None
        if not rates.lr > 0 or not 0 <= rates.momentum < 1 or not rates.weight_decay >= 0 or not all(map(math.isfinite, rates)):
            raise ValueError(f"SGD: {self._text()}; wanted lr > 0, 0 <= momentum < 1, weight_decay >= 0, all of them finite")
        return rates

    def _text(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items())


class RecordedRates:
    """The rates of an optimizer as a recorded step has them: numbers on the GPU, filled before a replay where they have been changed.

    A rate of 0 is 0 itself, and what it would have a part in is left out of the record: which has to be made anew when the rate is changed.
    """

    def __init__(self, optimizer: SGD, dtype: Any, scratch: Scratch) -> None:
        self.optimizer, self.dtype = optimizer, dtype
        rates = optimizer._rates
        self._filled: Rates | None = None
        self._pattern = _nonzero(rates)
        self.lr: Any = scratch.scalar(dtype)
        self.momentum: Any = scratch.scalar(dtype) if rates.momentum else 0.0
        self.weight_decay: Any = scratch.scalar(dtype) if rates.weight_decay else 0.0

    @property
    def descent(self) -> Any:
        return -self.lr

    def fits(self) -> bool:
        rates = self.optimizer._rates
        return rates is self._filled or _nonzero(rates) == self._pattern

    def refresh(self) -> None:
        rates = self.optimizer._rates
        if rates is self._filled:
            return
        self.lr.fill(rates.lr)
        for scalar, value in ((self.momentum, rates.momentum), (self.weight_decay, rates.weight_decay)):
            if value:
                scalar.fill(value)
        self._filled = rates


def _nonzero(rates: Rates) -> tuple[bool, bool]:
    return rates.momentum != 0, rates.weight_decay != 0


class SGD:
    """Stochastic gradient descent with momentum, as CS231n writes it: v = momentum v - lr dw; w = w + v.

    Parameters
    ----------
    model : Module
        Whose layers' `params` are moved along their `grads`.
    lr : float
        Learning rate, positive. May be changed between steps, as the others may: each is checked, and made a Python float, when it is set.
    momentum : float
        0 for plain descent.
    weight_decay : float
        Added to dw is weight_decay w: the gradient of 0.5 weight_decay sum(w w). Weights only; biases are not decayed.

    Raises
    ------
    ValueError
        lr, momentum or weight_decay is out of its range.
    TypeError
        One of them is no number, or model is no `Module`.

    Notes
    -----
    Where the library allows writing, parameters and velocity are updated in place; where it does not (JAX), they are replaced.
    `velocity` holds v by the parameters' names, for those that have moved with momentum. Tied parameters have one v, under the first of
    their names, and move once, along the sum of their gradients. float16 and bfloat16 are moved in float32 and rounded once.

    With the numba backend a step over float32 or over float64 parameters is one pass of a kernel, to the same bits; on CuPy arrays it is
    one launch a parameter. That is in place from the start, so it serves only where an overflow is no more than a warning: not
    where ``numpy.errstate`` or a filter of `warnings` makes it an exception.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import SGD, Affine
    >>> layer = Affine(2, 1, rng=np.random.default_rng(0), bias=False, dtype="float64")
    >>> layer.params["w"] = np.array([[1.0], [2.0]])
    >>> optimizer = SGD(layer, lr=0.5)
    >>> layer.forward(np.array([[1.0, 1.0]]))
    array([[3.]])
    >>> layer.backward(np.array([[1.0]]), need_dx=False)
    >>> optimizer.step()
    >>> layer.params["w"].ravel()
    array([0.5, 1.5])
    """

    def __init__(self, model: Module, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"SGD: model is of type {type(model).__name__}; wanted a Module, such as Sequential(...)")
        self.model = model
        self.velocity: dict[str, Array] = {}
        self._rates = Rates(lr, momentum, weight_decay).checked()

    @property
    def lr(self) -> float:
        return self._rates.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._rates = self._rates._replace(lr=value).checked()

    @property
    def momentum(self) -> float:
        return self._rates.momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        self._rates = self._rates._replace(momentum=value).checked()

    @property
    def weight_decay(self) -> float:
        return self._rates.weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._rates = self._rates._replace(weight_decay=value).checked()

    def step(self) -> None:
        """Move every parameter once. Every layer must have been through `backward`.

        Raises
        ------
        RuntimeError
            A parameter has no gradient. No parameter has been moved then, as with every error here.
        ShapeError
            A gradient is not of its parameter's shape.
        DTypeError
            A parameter is not floating, or a gradient not of real numbers.
        ValueError
            A parameter is a read-only NumPy array.
        FloatingPointError, RuntimeWarning
            A value overflows, where NumPy has been told to raise that.
        """
        if self._step_in_one_pass():
            return
        moves = [(parameter, *self._moved(parameter)) for parameter in parameters(self.model)]
        for parameter, value, velocity in moves:
            put(parameter, value)
            for slot in parameter.slots:
                if slot.key != parameter.key or velocity is None:
                    self.velocity.pop(slot.key, None)
            if velocity is not None:
                self._put_velocity(parameter.key, velocity)

    def _step_in_one_pass(self) -> bool:
        """Have the backend move all parameters in place, if it can and nothing can fail on the way; whether it has.

        If not, nothing has been changed. Parameters may be tied, of several dtypes or without velocity yet, or something may be wrong,
        and the long way says what.
        """
        rates, velocity = self._rates, self.velocity
        if velocity and not rates.momentum:
            return False
        weights: list[tuple[Array, Array, Array]] = []
        others: list[tuple[Array, Array, Array]] = []
        for prefix, layer in self.model.leaves():
            grads = layer.grads
            for name, array in layer.params.items():
                move = array, grads.get(name), velocity.get(prefix + name) if velocity else None
                (weights if name == "w" else others).append(move)
        if not weights and not others:
            return False
        w, dw, v = zip(*weights, *others, strict=True)
        first = w[0]
        of_numpy = isinstance(first, np.ndarray)
        backend = registry.active() if of_numpy else registry.serving(library_name(first))
        sgd_step: SGDStep | None = getattr(backend, "sgd_step", None)
        if sgd_step is None or (of_numpy and _raises_on_overflow()):
            return False
        scratch = recorded()
        asked = rates if scratch is None else self._recorded_rates(_computed(first), scratch)
        overflowed = sgd_step(w, dw, v if rates.momentum else (), len(weights), asked.lr, asked.momentum, asked.weight_decay)
        if overflowed and np.geterr()["over"] == "warn":
            warnings.warn("overflow encountered in SGD.step", RuntimeWarning, stacklevel=3)
        return overflowed is not None

    def _moved(self, parameter: Parameter) -> tuple[Array, Array | None]:
        """The new value and the new velocity of a parameter; nothing is changed yet."""
        w = parameter.array
        if not is_floating(w.dtype):
            raise DTypeError(
                f"SGD.step: {parameter.key} has dtype {dtype_name(w.dtype)}, wanted float16, bfloat16, float32 or float64; "
                "convert it, as only those can take small steps"
            )
        if isinstance(w, np.ndarray) and not w.flags.writeable:
            raise ValueError(f"SGD.step: {parameter.key} is read-only; put a writable array into the layer's params, such as a copy of it")
        decays = any(slot.name == "w" for slot in parameter.slots)
        velocity = self._velocity_of(parameter) if self._rates.momentum else None
        gradient = self._gradient(parameter)
        scratch = recorded()
        rates = self._rates if scratch is None else self._recorded_rates(gradient.dtype, scratch)
        return moved(outside_autograd(w), gradient, velocity, rates, decays)

    def _recorded_rates(self, dtype: Any, scratch: Scratch) -> RecordedRates:
        for setting in scratch.settings:
            if isinstance(setting, RecordedRates) and setting.optimizer is self and setting.dtype == dtype:
                return setting
        scratch.settings.append(RecordedRates(self, dtype, scratch))
        return self._recorded_rates(dtype, scratch)

    def _gradient(self, parameter: Parameter) -> Array:
        """The sum over what is tied, each layer once, however often it is used."""
        total = None
        slots = parameter.slots
        for slot in slots if len(slots) == 1 else {(id(slot.layer), slot.name): slot for slot in slots}.values():
            grad = slot.layer.grads.get(slot.name)
            if grad is None:
                raise RuntimeError(f"SGD.step: {slot.key} has no gradient; call the model's backward first")
            grad = turned(self._fitting(slot.key, "gradient", grad, slot.array), slot.axes)
            total = grad if total is None else total + grad
        return total

    def _velocity_of(self, parameter: Parameter) -> Array | None:
        for slot in parameter.slots:
            if slot.key in self.velocity:
                return turned(self._fitting(slot.key, "velocity", self.velocity[slot.key], slot.array), slot.axes)
        return None

    def _fitting(self, key: str, what: str, x: Array, like: Array) -> Array:
        """x where its parameter is, and in its dtype, but 16 bits widened to the float32 that they are computed in."""
        if type(x) is np.ndarray and type(like) is np.ndarray and x.dtype is like.dtype and x.shape == like.shape:
            return _widened(x)
        x = outside_autograd(bring("SGD.step", f"the {what} of {key}", x, like))
        if tuple(x.shape) != tuple(like.shape):
            raise ShapeError(f"SGD.step: the {what} of {key} has shape {tuple(x.shape)}, wanted {tuple(like.shape)}")
        if not is_real(x.dtype):
            raise DTypeError(f"SGD.step: the {what} of {key} has dtype {dtype_name(x.dtype)}, wanted real numbers")
        return _widened(x)

    def _put_velocity(self, key: str, velocity: Array) -> None:
        held = self.velocity.get(key)
        if held is None or not overwritten(held, velocity):
            self.velocity[key] = velocity

    def state_dict(self) -> dict[str, Any]:
        """What a later run needs to go on: ``{"lr", "momentum", "weight_decay", "velocity": {name: NumPy array}}``, all of it copied."""
        return {**self._rates._asdict(), "velocity": {key: copied(value) for key, value in self.velocity.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take rates and velocity from `state`, each velocity to the library, device and dtype of its parameter.

        Parameters
        ----------
        state : mapping
            As `state_dict` gives it. A parameter without a velocity has not moved yet.

        Raises
        ------
        ValueError
            A rate is missing or out of range, a name is unknown, or tied parameters are given different velocities. Nothing has been
            changed then, as with every error here.
        ShapeError, DTypeError
            A velocity is not of its parameter's shape, or not of real numbers.
        """
        self._take(*self._prepared(state))

    def _prepared(self, state: Mapping[str, Any]) -> tuple[Rates, list[tuple[Parameter, Array]]]:
        names = (*Rates._fields, "velocity")
        missing, unknown = [name for name in names if name not in state], [str(key) for key in state if key not in names]
        if missing or unknown:
            raise ValueError(
                f"SGD.load_state_dict: missing: {', '.join(missing) or 'nothing'}; unknown: {', '.join(unknown) or 'nothing'}; "
                f"wanted {', '.join(names)}, as state_dict gives them"
            )
        rates = Rates(*(state[name] for name in Rates._fields)).checked()
        return rates, fitted("SGD.load_state_dict", parameters(self.model), state["velocity"], ())

    def _take(self, rates: Rates, velocities: list[tuple[Parameter, Array]]) -> None:
        self._rates = rates
        keys = {parameter.key for parameter, _ in velocities}
        self.velocity = {key: value for key, value in self.velocity.items() if key in keys}
        for parameter, velocity in velocities:
            self._put_velocity(parameter.key, velocity)


def _raises_on_overflow() -> bool:
    """Whether NumPy or Python may have been told to make an exception of an overflow, or more than a warning.

    What is moved in place is not to be had back, so then every new value has to be known before the first is put in its place.
    """
    told = np.geterr()
    over, invalid = told["over"], told["invalid"]
    if told["under"] != "ignore" or over not in _GOES_ON or invalid not in _GOES_ON:
        return True
    if over == "warn" or invalid == "warn":
        for entry in warnings.filters:  # not by `any`, which takes as long as a small parameter
            if entry[0] == "error":
                return True
    return False


def moved(w: Array, dw: Array, v: Array | None, rates: Rates | RecordedRates, decays: bool = True) -> tuple[Array, Array | None]:
    """One parameter's step: its new value and, with momentum, its new velocity, from w, dw and v, none of which is written to.

    dw and v are in the dtype that is computed in: w's, or float32 for one of 16 bits. Both results are fresh, and in w's dtype.
    """
    exact = _widened(w)
    if decays and not _is_zero(rates.weight_decay):
        move = rates.weight_decay * exact
        move += dw
        move *= rates.descent
    else:
        move = rates.descent * dw
    if not _is_zero(rates.momentum):
        if v is not None:
            move += rates.momentum * v
        value, velocity = exact + move, move
    else:
        move += exact  # one more fresh array costs a fifth of a large step
        value, velocity = move, None
    if exact is not w:
        xp = array_namespace(w)
        value, velocity = xp.astype(value, w.dtype), None if velocity is None else xp.astype(velocity, w.dtype)
    if isinstance(w, np.ndarray) and not w.ndim:  # NumPy makes scalars of arrays without axes
        value, velocity = np.asarray(value), None if velocity is None else np.asarray(velocity)
    return value, velocity


def _is_zero(rate: Any) -> bool:
    return type(rate) is float and not rate  # a number on the GPU is not to be read


def _widened(x: Array) -> Array:
    dtype = _computed(x)
    return x if dtype == x.dtype else array_namespace(x).astype(x, dtype)


def _computed(x: Array) -> Any:
    """The dtype that x is moved in."""
    return array_namespace(x).float32 if dtype_name(x.dtype) in ("float16", "bfloat16") else x.dtype
