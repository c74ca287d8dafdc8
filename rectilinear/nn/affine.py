"""The layers with weights: affine, and affine with ReLU fused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from rectilinear.layers import affine_backward, affine_forward, affine_relu_backward, affine_relu_forward
from rectilinear.nn.module import Layer
from rectilinear.nn.parameters import Array, bring, place


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
        Of the parameters, and so of the gradients; inputs are cast to it. Where other parameters are put in place of these, theirs
        counts; integers are no dtype to cast to: x and w are then promoted as their library does it.
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
        for name, extent in (("n_in", n_in), ("n_out", n_out)):
            if not isinstance(extent, int | np.integer) or isinstance(extent, bool) or extent < 0:
                raise ValueError(f"{type(self).__name__}: {name} is {extent!r}, wanted a whole number, 0 or more")
        std = math.sqrt(2 / max(n_in, 1))
        self.params["w"] = place(std * rng.standard_normal((n_in, n_out)), dtype, xp, device)
        if bias:
            self.params["b"] = place(np.zeros(n_out), dtype, xp, device)

    def forward(self, x: Array, *, training: bool = True) -> Array:
        """x (N, d_1, ..., d_k), D = d_1 ... d_k, to (N, M)."""
        w = self.params["w"]
        out, cache = self._forward(bring(type(self).__name__, "x", x, w), w, self.params.get("b"))
        self._keep(cache, training)
        return out

    def backward(self, dout: Array, *, need_dx: bool = True, accumulate: bool = False) -> Array | None:
        """dout (N, M) to dx of x's shape; ``grads["w"]`` (D, M) and ``grads["b"]`` (M,) are overwritten, or added to."""
        cache, bias = self._cached(), "b" in self.params
        dx, dw, db = self._backward(bring(type(self).__name__, "dout", dout, self.params["w"]), cache, needs=(need_dx, True, bias))
        self._collect({"w": dw, "b": db} if bias else {"w": dw}, accumulate)
        return dx

    def __repr__(self) -> str:
        *groups, n_in, n_out = self.params["w"].shape
        stacked = f", stacked {groups[0]} times" if groups else ""
        return f"{type(self).__name__}({n_in}, {n_out}{'' if 'b' in self.params else ', bias=False'}{stacked})"


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
