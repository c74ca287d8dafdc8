"""scikit-learn's multi-layer perceptrons, with rectilinear's forward and backward passes and one pass for the update.

`MLPClassifier` and `MLPRegressor` are scikit-learn's own, of which three private methods are replaced where they can be served: dense
input, ``activation="relu"``, ``solver="adam"`` or ``"sgd"``. Everything else is the parent's work, and the logger ``rectilinear.sklearn``
says at DEBUG why. Here is what the methods do, in `update` and `kernel` the update, in `private` what is used of scikit-learn.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from sklearn import neural_network

from rectilinear.backends import registry
from rectilinear.keepmask import unchecked
from rectilinear.layers import affine_backward, affine_forward, affine_relu_backward, affine_relu_forward
from rectilinear.sklearn import private
from rectilinear.sklearn.update import Update, finish, squares, update_of

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before 1.6 it was a method

    def validate_data(estimator: Any, x: Any, **options: Any) -> Any:
        return estimator._validate_data(x, **options)


__all__ = ["MLPClassifier", "MLPRegressor"]

_FEWEST_ROWS = 2
"""Where fewer are predicted, the parent predicts: the product of a vector and a matrix takes a BLAS 0.6 to 1.0 of our time (Zen 4, nets
of 4-10-3 to 1024-1024-1024-10). From two rows on it takes longer, and a fit takes longer at any size: there is more to it than products."""

_NATIVE = (np.dtype(np.float32), np.dtype(np.float64))

_log = logging.getLogger(__name__)
if private.strange:
    _log.warning("scikit-learn computes by itself: %s", private.strange)


class _Served:
    """What takes the place of the parent's methods. While a fit is served, and only then, there is an attribute ``_served``."""

    def _fit_stochastic(self, x: Any, y: Any, *rest: Any) -> None:
        parent: Any = super()
        if not _serves(_not_to_train(self, x)):
            parent._fit_stochastic(x, y, *rest)
            return
        self._served = True
        try:
            parent._fit_stochastic(x, y, *rest)
        finally:
            del self._served
            optimizer: Any = getattr(self, "_optimizer", None)
            if type(optimizer) is Update:
                self._optimizer = optimizer.optimizer

    def _backprop(self, x: Any, y: Any, *rest: Any) -> Any:
        net: Any = self
        if not hasattr(self, "_served"):
            return super()._backprop(x, y, *rest)  # type: ignore[misc]
        *weights, _, _, coef_grads, intercept_grads = rest
        weight = weights[0] if weights else None  # scikit-learn 1.7 and newer
        divisor = len(x) if weight is None else weight.sum()
        if type(net._optimizer) is not Update and registry.active().name == "numba":
            net._optimizer = update_of(net._optimizer, net.coefs_) or net._optimizer
        update = net._optimizer if type(net._optimizer) is Update else None

        out, caches = _forward(net, x)
        private.ACTIVATIONS[net.out_activation_](out)
        penalty = 0.5 * net.alpha * (update.squares if update else squares)(net.coefs_) / divisor
        loss = np.float64(_loss(net, y, out, weights) + penalty)  # NumPy's, as the parent's

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

    def _forward_pass_fast(self, x: Any, check_input: bool = True) -> Any:
        net: Any = self
        if check_input:
            x = validate_data(net, x, accept_sparse=["csr", "csc"], reset=False)
        if not _serves(_not_to_predict(net, x)):
            return super()._forward_pass_fast(x, check_input=False)  # type: ignore[misc]
        *hidden, last = zip(net.coefs_, net.intercepts_, strict=True)
        for coef, intercept in hidden:
            x, _ = affine_relu_forward(x, coef, intercept)
        out, _ = affine_forward(x, *last)
        private.ACTIVATIONS[net.out_activation_](out)
        return out


class MLPClassifier(_Served, neural_network.MLPClassifier):  # type: ignore[misc]
    """scikit-learn's `MLPClassifier`, faster: the same parameters, methods, attributes and results.

    Parameters
    ----------
    hidden_layer_sizes, activation, solver, ...
        Those of `sklearn.neural_network.MLPClassifier`. Dense X, ``activation="relu"`` and ``solver="adam"`` or ``"sgd"`` are served by
        the backend that is chosen for NumPy arrays, unless that is ``numpy``; everything else is done by scikit-learn.

    Notes
    -----
    With the same ``random_state`` coefficients and losses differ from scikit-learn's by the rounding of sums alone. As there, the gradient
    of ReLU is 0 at 0. Overflow gives no NumPy warning; the ValueError of scikit-learn for weights that are not finite comes as ever.
    Errors are scikit-learn's, and `rectilinear.BackendError` where the choice of backend cannot work.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.sklearn import MLPClassifier
    >>> x = np.random.default_rng(0).standard_normal((200, 8))  # (n_samples, n_features)
    >>> y = x[:, 0] > 0
    >>> net = MLPClassifier(hidden_layer_sizes=(16,), learning_rate_init=0.01, early_stopping=True, random_state=0).fit(x, y)
    >>> net.predict_proba(x).shape
    (200, 2)
    """


class MLPRegressor(_Served, neural_network.MLPRegressor):  # type: ignore[misc]
    """scikit-learn's `MLPRegressor`, faster: the same parameters, methods, attributes and results.

    Parameters
    ----------
    loss, hidden_layer_sizes, activation, solver, ...
        Those of `sklearn.neural_network.MLPRegressor`. What is served, and what differs: as for `MLPClassifier`.

    Examples
    --------
    >>> import numpy as np
    >>> from rectilinear.sklearn import MLPRegressor
    >>> x = np.random.default_rng(0).standard_normal((200, 8))  # (n_samples, n_features)
    >>> net = MLPRegressor(hidden_layer_sizes=(16,), learning_rate_init=0.01, early_stopping=True, random_state=0).fit(x, x[:, 0])
    >>> net.predict(x).shape
    (200,)
    """


# ---------------------------------------------------------------- the passes


def _forward(net: Any, x: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """The last layer's affine output, and the caches of all layers with scikit-learn's rule at 0."""
    caches: list[Any] = []
    *hidden, last = zip(net.coefs_, net.intercepts_, strict=True)
    for coef, intercept in hidden:
        x, (affine, _) = affine_relu_forward(x, coef, intercept)
        # Our own mask lets the gradient pass at z = 0. scikit-learn stops it where the output is 0, and lets it pass where that is NaN.
        caches.append((affine, unchecked(np.packbits(x != 0, axis=-1, bitorder="little"), x.shape)))
    out, cache = affine_forward(x, *last)
    return out, [*caches, cache]


def _loss(net: Any, y: np.ndarray, predicted: np.ndarray, weights: list[Any]) -> float:
    """The mean loss of a batch, without the penalty."""
    name = net.loss
    if name == "log_loss" and net.out_activation_ == "softmax" and (not weights or weights[0] is None) and y.dtype == bool:
        picked = predicted[y]
        if len(picked) == len(y):  # one class a sample: scikit-learn's other terms are 0
            eps = np.finfo(picked.dtype).eps
            return -float(np.log(picked.clip(eps, 1 - eps)).sum()) / len(y)
    if name == "log_loss" and net.out_activation_ == "logistic":
        name = "binary_log_loss"
    return float(private.LOSSES[name](y, predicted, *weights))


# ---------------------------------------------------------------- what is served


def _serves(reason: str | None) -> bool:
    if reason is not None:
        _log.debug("scikit-learn computes: %s", reason)
    return reason is None


def _not_to_train(net: Any, x: Any) -> str | None:
    """Why a fit on x is the parent's; None if it is ours. L-BFGS does not ask: its passes are the parent's."""
    for array in (*net.coefs_, *net.intercepts_):
        if array.dtype != x.dtype:
            return f"x is {x.dtype}, but coefficients are {array.dtype}"
    return _not_served(net, x)


def _not_to_predict(net: Any, x: Any) -> str | None:
    if x.shape[0] < _FEWEST_ROWS:
        return "there is one row, which takes it no longer"
    if x.dtype not in _NATIVE and x.dtype.kind not in "iu":
        return f"x is {x.dtype}"
    return _not_served(net, x)


def _not_served(net: Any, x: Any) -> str | None:
    if private.strange:
        return private.strange
    if not isinstance(x, np.ndarray):
        return f"x is a {type(x).__name__}, not a dense array"
    if net.activation != "relu":
        return f"activation is {net.activation!r}, not 'relu'"
    if registry.active().name == "numpy":
        return "the numpy backend is chosen, which does what scikit-learn does"
    return None
