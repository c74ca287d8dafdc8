"""scikit-learn's multi-layer perceptrons, with forward and backward passes of rectilinear.

`MLPClassifier` and `MLPRegressor` are scikit-learn's own, of which `_fit_stochastic`, `_backprop` and `_forward_pass_fast` are replaced
where they can be served: dense input, ``activation="relu"``, ``solver="adam"`` or ``"sgd"``. Everything else is the parent's work, and the
logger ``rectilinear.sklearn`` says at DEBUG why. Those three methods are private to scikit-learn. A version that has changed them
is found out when this module is imported, and then all is the parent's work.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn import neural_network
from sklearn.neural_network import _base

from rectilinear.backends import registry
from rectilinear.keepmask import unchecked
from rectilinear.layers import affine_backward, affine_forward, affine_relu_backward, affine_relu_forward
from rectilinear.sklearn.update import Update, finish, squares, update_of

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before 1.6 it was a method

    def validate_data(estimator: Any, x: Any, **options: Any) -> Any:
        return estimator._validate_data(x, **options)


__all__ = ["MLPClassifier", "MLPRegressor"]

_log = logging.getLogger(__name__)


class _Served:
    """What replaces the parent's methods. While a fit is served, and only then, there is an attribute ``_served``."""

    def _fit_stochastic(self, X: Any, y: Any, *rest: Any) -> None:
        parent: Any = super()
        if not _serves(self, X):
            parent._fit_stochastic(X, y, *rest)
            return
        self._served = True
        try:
            parent._fit_stochastic(X, y, *rest)
        finally:
            del self._served
            self._optimizer: Any = getattr(self, "_optimizer", None)
            if isinstance(self._optimizer, Update):
                self._optimizer = self._optimizer.optimizer

    def _backprop(self, X: Any, y: Any, *rest: Any) -> Any:
        net: Any = self
        if not hasattr(self, "_served"):
            return super()._backprop(X, y, *rest)  # type: ignore[misc]
        *weights, _, _, coef_grads, intercept_grads = rest
        weight = weights[0] if weights else None  # scikit-learn 1.7 and newer
        divisor = len(X) if weight is None else weight.sum()
        if type(net._optimizer) is not Update and registry.active().name == "numba":
            net._optimizer = update_of(net._optimizer, net.coefs_) or net._optimizer
        update = net._optimizer if type(net._optimizer) is Update else None

        out, caches = _forward(net, X)
        _base.ACTIVATIONS[net.out_activation_](out)
        penalty = 0.5 * net.alpha * (update.squares if update else squares)(net.coefs_) / divisor
        loss = _loss(net, y, out, weights) + penalty

        delta = np.subtract(out, y, out=out)
        if weight is not None:
            delta *= weight[:, None]
        for i in range(len(caches) - 1, -1, -1):
            backward: Any = affine_relu_backward if len(caches[i]) == 2 else affine_backward
            outs = None, coef_grads[i], intercept_grads[i]
            delta, _, _ = backward(delta, caches[i], needs=(i > 0, True, True), out=outs)
        if update:
            update.decay, update.divisor = net.alpha, divisor
        else:
            finish(coef_grads + intercept_grads, net.coefs_, net.alpha, divisor)
        return loss, coef_grads, intercept_grads

    def _forward_pass_fast(self, X: Any, check_input: bool = True) -> Any:
        net: Any = self
        if check_input:
            X = validate_data(net, X, accept_sparse=["csr", "csc"], reset=False)
        if not _serves(self, X):
            return super()._forward_pass_fast(X, check_input=False)  # type: ignore[misc]
        *hidden, last = zip(net.coefs_, net.intercepts_, strict=True)
        for coef, intercept in hidden:
            X, _ = affine_relu_forward(X, coef, intercept)
        X, _ = affine_forward(X, *last)
        _base.ACTIVATIONS[net.out_activation_](X)
        return X


def _forward(net: Any, x: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """The last layer's affine output and the caches of all layers, with scikit-learn's rule at 0."""
    caches: list[Any] = []
    *hidden, last = zip(net.coefs_, net.intercepts_, strict=True)
    for coef, intercept in hidden:
        x, (affine, _) = affine_relu_forward(x, coef, intercept)
        # Ours lets the gradient pass at z = 0; scikit-learn stops it where the output is 0, and lets it pass where that is NaN.
        caches.append((affine, unchecked(np.packbits(x != 0, axis=-1, bitorder="little"), x.shape)))
    out, cache = affine_forward(x, *last)
    return out, [*caches, cache]


def _loss(net: Any, y: np.ndarray, predicted: np.ndarray, weights: list[Any]) -> float:
    """The mean loss of a batch, without the penalty."""
    name = net.loss
    if name == "log_loss" and net.out_activation_ == "softmax" and (not weights or weights[0] is None) and y.dtype == bool:
        picked = predicted[y]
        if len(picked) == len(y):  # one class a sample: the other terms are 0
            eps = np.finfo(picked.dtype).eps
            return -float(np.log(picked.clip(eps, 1 - eps)).sum()) / len(y)
    if name == "log_loss" and net.out_activation_ == "logistic":
        name = "binary_log_loss"
    return float(_base.LOSS_FUNCTIONS[name](y, predicted, *weights))


class MLPClassifier(_Served, neural_network.MLPClassifier):  # type: ignore[misc]
    pass


class MLPRegressor(_Served, neural_network.MLPRegressor):  # type: ignore[misc]
    pass


def _serves(net: Any, x: Any) -> bool:
    """Whether the passes over x are ours; if not, the log says why not."""
    reason = _why_not(net, x)
    if reason:
        _log.debug("scikit-learn computes: %s", reason)
    return reason is None


def _why_not(net: Any, x: Any) -> str | None:
    if type(x) is not np.ndarray:
        return f"the input is a {type(x).__name__}, not a dense array"
    if net.activation != "relu":
        return f"activation is {net.activation!r}, not 'relu'"
    if registry.active().name == "numpy":
        return "the numpy backend is chosen, which does what scikit-learn does"
    return None
