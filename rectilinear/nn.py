"""The layers of `rectilinear.layers` as objects that keep their parameters, and what trains them.

No arithmetic of the layers lives here: every `forward` and `backward` is one call of the function of that name, and
its cache is kept in between. `params` and `grads` are plain dictionaries of arrays, so that code which knows
NumPy needs nothing else.

Parameters lie on the backend chosen when the layer is made, or in the array library given as ``xp=``. Inputs are
brought there: to that library and device, and to the layer's dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, to_device
from array_api_compat import device as device_of

from rectilinear.arrays import asarray, to_numpy
from rectilinear.dispatch import common_namespace, dtype_name
from rectilinear.errors import DTypeError, ShapeError
from rectilinear.layers import (
    affine_backward,
    affine_forward,
    affine_relu_backward,
    affine_relu_forward,
    relu_backward,
    relu_forward,
    softmax_loss,
)

__all__ = [
    "SGD",
    "Affine",
    "AffineReLU",
    "Layer",
    "Module",
    "ReLU",
    "Sequential",
    "SoftmaxCrossEntropy",
    "load",
    "save",
]

Array = Any
"""An array of any library that the layer functions take."""


class Module(ABC):
    """What layers and chains of layers have in common: forward, backward, and their state by name."""

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """The output for x; what `backward` will need is kept."""

    @abstractmethod
    def backward(self, dout: Array, *, need_dx: bool = True) -> Array | None:
        """The gradient for the input of the latest `forward`, None where not needed. Overwrites `grads`."""

    @abstractmethod
    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """The layers in order, each with the prefix of its parameters' names."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters as NumPy arrays, copied, under names such as ``"w"`` or, in a chain, ``"0.w"``."""
        return {prefix + name: np.array(to_numpy(value)) for prefix, layer in self.leaves() for name, value in layer.params.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take every parameter from `state`, each to the library, device and dtype of the one it replaces.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` gives it; arrays of any library.

        Raises
        ------
        ShapeError
            A shape differs. Missing and unknown names are in the same message.
        ValueError
            Names are missing or unknown. Nothing has been changed then, as with every error here.
        DTypeError
            An array is not of real numbers.
        """
        slots = {prefix + name: (layer, name) for prefix, layer in self.leaves() for name in layer.params}
        given = {key: np.array(to_numpy(value)) for key, value in state.items()}
        misshapen = [
            f"{key} has shape {given[key].shape}, wanted {tuple(layer.params[name].shape)}"
            for key, (layer, name) in slots.items()
            if key in given and given[key].shape != tuple(layer.params[name].shape)
        ]
        problems = [
            *_listing("missing", [key for key in slots if key not in given]),
            *_listing("not in this model", [key for key in given if key not in slots]),
            *misshapen,
        ]
        if problems:
            message = f"load_state_dict: {'; '.join(problems)}. Load into a model of the layers that the state is from."
            raise ShapeError(message) if misshapen else ValueError(message)
        for key, value in given.items():
            if not _is_real(value.dtype):
                raise DTypeError(f"load_state_dict: {key} has dtype {value.dtype}, wanted real numbers")
        for key, (layer, name) in slots.items():
            layer.params[name] = _bring(layer, key, given[key], layer.params[name])


class Layer(Module):
    """One layer: its parameters, the gradients that the latest `backward` left, and the cache between the two.

    Attributes
    ----------
    params, grads : dict of str to array
        ``"w"`` (D, M) and ``"b"`` (M,) for the affine layers (no ``"b"`` without bias), empty for ReLU.
        `grads` is empty before the first `backward`.
    """

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        self._cache: tuple[Any] | None = None

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield prefix, self

    def _cached(self) -> Any:
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.backward: no forward to go back from; call forward first")
        return self._cache[0]


class Affine(Layer):
    """y = x w + b.

    Parameters
    ----------
    n_in, n_out : int
        D and M.
    rng : numpy.random.Generator
        Where the weights are drawn from: normal with standard deviation sqrt(2 / D) (He et al. 2015,
        arXiv:1502.01852). Biases start at 0. The draw is made by NumPy in float64, so that equal seeds give equal
        weights on every backend and, up to rounding, in every dtype.
    bias : bool
        Without bias there is no ``params["b"]``.
    dtype : "float16", "float32" or "float64"
        Of the parameters, and so of the gradients; inputs are cast to it.
    xp : array API namespace, optional
        The library to keep the parameters in (``torch``, ``jax.numpy``, ``array_api_strict``, ...). Default: the
        chosen backend's.
    device : device of `xp`, optional
        Only together with `xp`.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import Affine
    >>> layer = Affine(3, 2, rng=np.random.default_rng(0), dtype="float64")
    >>> layer.forward(np.ones((5, 3))).shape
    (5, 2)
    >>> layer.backward(np.ones((5, 2))).shape
    (5, 3)
    >>> layer.grads["w"].shape, layer.grads["b"]
    ((3, 2), array([5., 5.]))
    """

    # The class attributes are what `AffineReLU` replaces; the rest is the same for both.
    _forward: ClassVar[Callable[..., Any]] = staticmethod(affine_forward)
    _backward: ClassVar[Callable[..., Any]] = staticmethod(affine_backward)

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        rng: np.random.Generator,
        bias: bool = True,
        dtype: Any = "float32",
        xp: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(rng, np.random.Generator):
            raise TypeError(
                f"{type(self).__name__}: rng is {rng!r}, wanted a numpy.random.Generator, as numpy.random.default_rng(0) makes one"
            )
        std = math.sqrt(2 / max(n_in, 1))
        self.params["w"] = _place(std * rng.standard_normal((n_in, n_out)), dtype, xp, device)
        if bias:
            self.params["b"] = _place(np.zeros(n_out), dtype, xp, device)

    def forward(self, x: Array) -> Array:
        """x (N, d_1, ..., d_k), D = d_1 ... d_k, to (N, M)."""
        w = self.params["w"]
        out, cache = self._forward(_bring(self, "x", x, w), w, self.params.get("b"))
        self._cache = (cache,)
        return out

    def backward(self, dout: Array, *, need_dx: bool = True) -> Array | None:
        """dout (N, M) to dx of x's shape; ``grads["w"]`` (D, M) and ``grads["b"]`` (M,) are overwritten."""
        cache, bias = self._cached(), "b" in self.params
        dx, dw, db = self._backward(_bring(self, "dout", dout, self.params["w"]), cache, needs=(need_dx, True, bias))
        self.grads = {"w": dw, "b": db} if bias else {"w": dw}
        return dx

    def __repr__(self) -> str:
        n_in, n_out = self.params["w"].shape
        return f"{type(self).__name__}({n_in}, {n_out}{'' if 'b' in self.params else ', bias=False'})"


class AffineReLU(Affine):
    """y = relu(x w + b), fused: the pre-activations need not be stored. Takes what `Affine` takes.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import AffineReLU
    >>> layer = AffineReLU(3, 2, rng=np.random.default_rng(0))
    >>> bool((layer.forward(np.ones((5, 3))) >= 0).all())
    True
    """

    _forward = staticmethod(affine_relu_forward)
    _backward = staticmethod(affine_relu_backward)


class ReLU(Layer):
    """y = x where x >= 0, else 0; the gradient passes at 0, as `rectilinear.layers.relu_forward` says.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import ReLU
    >>> layer = ReLU()
    >>> layer.forward(np.array([-1.0, 0.0, 2.0]))
    array([0., 0., 2.])
    >>> layer.backward(np.array([5.0, 5.0, 5.0]))
    array([0., 5., 5.])
    """

    def forward(self, x: Array) -> Array:
        """Any shape; x stays where it is."""
        out, cache = relu_forward(x)
        self._cache = (cache,)
        return out

    def backward(self, dout: Array, *, need_dx: bool = True) -> Array | None:
        """dout of x's shape to dx."""
        return relu_backward(dout, self._cached()) if need_dx else None

    def __repr__(self) -> str:
        return "ReLU()"


class SoftmaxCrossEntropy:
    """The mean of -log softmax(scores)[y] over the samples; no parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.nn import SoftmaxCrossEntropy
    >>> loss = SoftmaxCrossEntropy()
    >>> round(float(loss.forward(np.zeros((2, 4)), [0, 3])), 6)  # log 4
    1.386294
    >>> loss.backward()[0]
    array([-0.375,  0.125,  0.125,  0.125])
    """

    def __init__(self) -> None:
        self._dscores: Array | None = None

    def forward(self, scores: Array, y: Array) -> Array:
        """scores (N, C) and integer labels y (N,), brought to where the scores are, to a 0-d value of their dtype."""
        labels = y if isinstance(y, list | tuple) else _bring(self, "y", y, scores, cast=False)
        loss, self._dscores = softmax_loss(scores, labels)
        return loss

    def backward(self) -> Array:
        """The gradient for the scores (N, C) of the latest `forward`."""
        if self._dscores is None:
            raise RuntimeError("SoftmaxCrossEntropy.backward: no forward to go back from; call forward first")
        return self._dscores

    def __repr__(self) -> str:
        return "SoftmaxCrossEntropy()"


class Sequential(Module):
    """Layers one after another; parameters are named by place, ``"0.w"``, ``"0.b"``, ...

    `backward` stops at the first layer that has parameters, unless asked for the gradient of the input: for the
    first layer that gradient is a whole matrix product which training has no use for.

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
    """

    def __init__(self, *layers: Module) -> None:
        self.layers = layers

    @property
    def params(self) -> dict[str, Array]:
        """Every parameter by name, in a new dictionary: to replace one, assign to its layer's `params`."""
        return {prefix + name: value for prefix, layer in self.leaves() for name, value in layer.params.items()}

    @property
    def grads(self) -> dict[str, Array]:
        """Every gradient by name, in a new dictionary."""
        return {prefix + name: value for prefix, layer in self.leaves() for name, value in layer.grads.items()}

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        for place, layer in enumerate(self.layers):
            yield from layer.leaves(f"{prefix}{place}.")

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout: Array, *, need_dx: bool = False) -> Array | None:
        dx: Array | None = dout
        for place in reversed(range(len(self.layers))):
            wanted = need_dx or _has_parameters(self.layers[:place])
            dx = self.layers[place].backward(dx, need_dx=wanted)
            if not wanted:
                return None
        return dx

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"


class SGD:
    """Stochastic gradient descent with momentum, as CS231n writes it: v = momentum v - lr dw; w = w + v.

    Parameters
    ----------
    model : Module
        Whose layers' `params` are moved along their `grads`.
    lr : float
        Learning rate, positive. May be changed between steps.
    momentum : float
        0 for plain descent.
    weight_decay : float
        Added to dw is weight_decay w: the gradient of 0.5 weight_decay sum(w w). Weights only; biases are not decayed.

    Notes
    -----
    Where the library allows writing, parameters are updated in place; where it does not (JAX), they are replaced.
    `velocity` holds v by the parameters' names, for those that have moved.

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
        if not lr > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
            raise ValueError(
                f"SGD: lr={lr}, momentum={momentum}, weight_decay={weight_decay}; wanted lr > 0, 0 <= momentum < 1, weight_decay >= 0"
            )
        self.model, self.lr, self.momentum, self.weight_decay = model, lr, momentum, weight_decay
        self.velocity: dict[str, Array] = {}

    def step(self) -> None:
        """Move every parameter once. Every layer must have been through `backward`."""
        for prefix, layer in self.model.leaves():
            for name in layer.params:
                if name not in layer.grads:
                    raise RuntimeError(f"SGD.step: {prefix}{name} has no gradient; call the model's backward first")
                layer.params[name] += self._move(prefix + name, layer.params[name], layer.grads[name], name == "w")

    def _move(self, key: str, value: Array, grad: Array, decays: bool) -> Array:
        if decays and self.weight_decay:
            grad = grad + self.weight_decay * value
        move = -float(self.lr) * grad
        if self.momentum:
            if key in self.velocity:
                move += self.momentum * self.velocity[key]
            self.velocity[key] = move
        return move


def save(model: Module, path: str | PathLike[str]) -> None:
    """Write `model.state_dict()` to a safetensors file (https://huggingface.co/docs/safetensors)."""
    _safetensors("save").save_file(model.state_dict(), path)


def load(model: Module, path: str | PathLike[str]) -> None:
    """Fill `model` from a file that `save` wrote; the same errors as `Module.load_state_dict`."""
    model.load_state_dict(_safetensors("load").load_file(path))


def _safetensors(caller: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"nn.{caller}: the package safetensors is not installed; pip install safetensors") from None
    return safetensors.numpy


def _listing(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {', '.join(names)}"] if names else []


def _has_parameters(layers: tuple[Module, ...]) -> bool:
    return any(leaf.params for layer in layers for _, leaf in layer.leaves())


def _place(values: np.ndarray, dtype: Any, xp: Any, device: Any) -> Array:
    """Fresh float64 values as a parameter: in xp, or on the chosen backend."""
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in ("float16", "float32", "float64"):
        raise DTypeError(f"dtype is {dtype!r}, wanted 'float16', 'float32' or 'float64'")
    values = values.astype(name)
    if xp is None:
        return asarray(values)
    placed = xp.asarray(values) if device is None else xp.asarray(values, device=device)
    if dtype_name(placed.dtype) != name:  # JAX makes float32 of float64 without a word, unless told otherwise
        raise DTypeError(f"{xp.__name__} made {placed.dtype} of {name}; for JAX: jax.config.update('jax_enable_x64', True)")
    return placed


def _bring(owner: object, name: str, x: Array, like: Array, *, cast: bool = True) -> Array:
    """x in the library and on the device of `like`, and in its dtype; x itself where it is all that."""
    if type(x) is np.ndarray and type(like) is np.ndarray and (x.dtype == like.dtype or not cast):
        return x
    common_namespace(type(owner).__name__, [(name, x)])  # refuses what is no array, and says how to make one
    xp, cast = array_namespace(like), cast and _is_real(x.dtype)
    if array_namespace(x) is not xp:
        # Cast before it moves, since the other library may lack the dtype it has; and copied, since PyTorch warns of read-only memory.
        x = xp.asarray(np.array(to_numpy(x), dtype=dtype_name(like.dtype) if cast else None), device=device_of(like))
    elif device_of(x) != device_of(like):
        x = to_device(x, device_of(like))
    return xp.astype(x, like.dtype) if cast and x.dtype != like.dtype else x


def _is_real(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("bool", "int", "uint", "float", "bfloat"))
