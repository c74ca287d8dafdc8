"""A step of scikit-learn's optimizers in one pass over the parameters, their gradients and their moments.

`Update` stands in an optimizer's place while a fit runs. All state stays in the optimizer, in the arrays it has made, so that what is
left after the fit is scikit-learn's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rectilinear.kernels.runtime import forks
from rectilinear.sklearn import private
from rectilinear.threads import call_threads


def update_of(optimizer: Any, coefs: list[np.ndarray]) -> Update | None:
    """The `Update` for an optimizer; None where it is of another kind, or where nothing can be compiled."""
    if type(optimizer) not in (private.ADAM, private.SGD) or forks.frozen:
        return None
    with forks.loading():
        from rectilinear.sklearn import kernel

        return Update(optimizer, kernel, coefs)


class Update:
    """Takes gradients of the sum of a batch's losses, without the penalty: `decay` and `divisor` say what is missing in them."""

    def __init__(self, optimizer: Any, kernel: Any, coefs: list[np.ndarray]) -> None:
        self.optimizer = optimizer
        self.decay, self.divisor = 0.0, 1.0
        self._squares: float | None = None  # of all coefficients as the last step has left them
        self._step = kernel.step[coefs[0].itemsize]
        self._rates = np.zeros(len(kernel.RATES))
        self._address = self._rates.ctypes.data
        self._sum_alone = kernel.SUM_ALONE
        self._adam = type(optimizer) is private.ADAM
        self._flags = kernel.ADAM if self._adam else kernel.NESTEROV if optimizer.nesterov else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def squares(self, coefs: list[np.ndarray]) -> float:
        """The sum of the squares of all coefficients: what the last step has added up, or else of these."""
        if self._squares is None:
            w = tuple(coefs)
            if self._step(id(w), id(w), id(w), id(w), self._address, len(w), self._sum_alone, call_threads()):
                return squares(coefs)
            self._squares = float(self._rates[-1])
        return self._squares

    def update_params(self, params: list[np.ndarray], grads: list[np.ndarray]) -> None:
        """Move `params`, the coefficients and then as many intercepts."""
        own, decayed = self.optimizer, len(params) // 2
        rates: tuple[float, ...]
        if self._adam:
            m, v, t = tuple(own.ms), tuple(own.vs), own.t + 1
            rate = own.learning_rate_init * np.sqrt(1 - own.beta_2**t) / (1 - own.beta_1**t)
            rates = -rate, own.beta_1, 1 - own.beta_1, own.beta_2, 1 - own.beta_2, own.epsilon
        else:
            m, v = (), tuple(own.velocities)
            rates = -own.learning_rate, own.momentum
        self._rates[:2] = self.decay, 1 / self.divisor
        self._rates[2 : 2 + len(rates)] = rates
        w, dw = tuple(params), tuple(grads)
        if self._step(id(w), id(dw), id(m), id(v), self._address, decayed, self._flags, call_threads()):
            finish(grads, params[:decayed], self.decay, self.divisor)
            own.update_params(params, grads)
            self._squares = None
            return
        if self._adam:
            own.t, own.learning_rate = t, rate
        self._squares = float(self._rates[-1])


def finish(grads: list[np.ndarray], coefs: list[np.ndarray], decay: float, divisor: float) -> None:
    """Make gradients of the mean loss with its penalty of those of a sum of losses, in place; those of coefficients come first."""
    for grad, coef in zip(grads, coefs, strict=False):
        grad += decay * coef
    for grad in grads:
        grad /= divisor


def squares(coefs: list[np.ndarray]) -> float:
    """The sum of the squares of all coefficients."""
    return sum(float(np.vdot(coef, coef)) for coef in coefs)
