"""What `rectilinear.sklearn` uses of scikit-learn's private parts, in one place: versions 1.5 to 1.9 have them.

`strange` says what a version has in another way; None if nothing. Where it is not None, nothing of scikit-learn is replaced.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import sklearn

LOSSES: dict[str, Any] = {}
"""Name -> mean loss of (y, predicted), and of sample weights since 1.7."""

ACTIVATIONS: dict[str, Any] = {}
"""Name -> what applies it in place."""

ADAM: Any = None
SGD: Any = None

_REPLACED = {
    "_fit_stochastic": "self X y activations deltas coef_grads intercept_grads layer_units incremental",
    "_backprop": "self X y activations deltas coef_grads intercept_grads",
    "_forward_pass_fast": "self X check_input",
}
"""The methods that are replaced, and their parameters; two of them have taken ``sample_weight`` after y since 1.7."""

_STATE = {"AdamOptimizer": "learning_rate_init t ms vs beta_1 beta_2 epsilon", "SGDOptimizer": "learning_rate velocities momentum nesterov"}


def _look() -> str | None:
    global ADAM, SGD
    package = "sklearn.neural_network"
    try:
        base, perceptron, optimizers = (
            importlib.import_module(f"{package}.{name}") for name in ("_base", "_multilayer_perceptron", "_stochastic_optimizers")
        )
        LOSSES.update(base.LOSS_FUNCTIONS)
        ACTIVATIONS.update(base.ACTIVATIONS)
        ADAM, SGD = optimizers.AdamOptimizer, optimizers.SGDOptimizer
        methods = {name: getattr(perceptron.BaseMultilayerPerceptron, name) for name in _REPLACED}
    except (ImportError, AttributeError) as error:
        return str(error)
    for name, known in _REPLACED.items():
        met = [parameter for parameter in inspect.signature(methods[name]).parameters if parameter != "sample_weight"]
        if met != known.split():
            return f"{name} takes ({', '.join(met)})"
    for kind, names in _STATE.items():
        missing = [name for name in names.split() if name not in vars(getattr(optimizers, kind)([]))]
        if missing:
            return f"{kind} has no {', '.join(missing)}"
    return None


_found = _look()
strange = None if _found is None else f"scikit-learn {sklearn.__version__} is not as this version of rectilinear knows it: {_found}"
