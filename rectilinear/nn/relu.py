"""The layer without parameters."""

from __future__ import annotations

from rectilinear.layers import relu_backward, relu_forward
from rectilinear.nn.module import Layer
from rectilinear.nn.parameters import Array


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

    def forward(self, x: Array, *, training: bool = True) -> Array:
        """Any shape; x stays where it is."""
        out, cache = relu_forward(x)
        self._keep(cache, training)
        return out

    def backward(self, dout: Array, *, need_dx: bool = True, accumulate: bool = False) -> Array | None:
        """dout of x's shape to dx."""
        cache = self._cached()
        return relu_backward(dout, cache) if need_dx else None

    def __repr__(self) -> str:
        return "ReLU()"
