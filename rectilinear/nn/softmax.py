"""The loss."""

from __future__ import annotations

from typing import Any

from rectilinear.layers import softmax_loss
from rectilinear.nn.parameters import Array, bring


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
        labels = y if isinstance(y, list | tuple) else bring(type(self).__name__, "y", y, scores, cast=False)
        loss, self._dscores = softmax_loss(scores, labels)
        return loss

    def backward(self) -> Array:
        """The gradient for the scores (N, C) of the latest `forward`."""
        if self._dscores is None:
            raise RuntimeError("SoftmaxCrossEntropy.backward: no forward to go back from; call forward first")
        return self._dscores

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dscores": None}  # a gradient is nothing to pickle

    def __repr__(self) -> str:
        return "SoftmaxCrossEntropy()"
