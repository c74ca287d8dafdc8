"""The conformance kit: what every backend promises, as tests that run on any of them.

``python -m rectilinear conform NAME`` runs it and prints a line a promise. `conform` is the same in Python, and `collect` puts the tests
into a test module of one's own. It needs pytest and Hypothesis: ``pip install 'rectilinear[testing]'``, or ``'.[testing]'`` in a checkout.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from rectilinear.testing.lib import Lib, library_lib, libs_for, numpy_libs
from rectilinear.testing.promises import PROMISES, Promise

if TYPE_CHECKING:
    from rectilinear.testing.kit import Failure, Outcome, conform

__all__ = ["PROMISES", "Failure", "Lib", "Outcome", "Promise", "collect", "conform", "library_lib", "libs_for", "numpy_libs"]

NEEDED = ("pytest", "hypothesis", "ml_dtypes")


def __getattr__(name: str) -> Any:
    """What imports pytest comes when it is asked for, so that `rectilinear.testing` can say what is missing."""
    if name in ("conform", "Outcome", "Failure"):
        return getattr(importlib.import_module("rectilinear.testing.kit"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def collect(*, without: Collection[str] = (), absent: Collection[str] = ()) -> dict[str, Any]:
    """The kit's tests by name, for ``globals().update(rectilinear.testing.collect())`` in a test module.

    The fixtures that they ask for are the test suite's: ``lib``, ``any_lib``, ``numpy_lib``, ``plain_lib`` and ``installed_lib``, each a
    `Lib` under its chosen backend, and ``rng``, a `numpy.random.Generator`.

    Parameters
    ----------
    without : collection of str
        Tests to be left out, or promises.
    absent : collection of str
        Fixtures that are not there: the tests which ask for them are left out.

    Returns
    -------
    dict of str to function

    Examples
    --------
    >>> "test_the_same_bits_on_every_run" in collect()
    True
    """
    importlib.import_module("rectilinear.testing.kit")  # so that their assertions say what they met
    found: dict[str, Any] = {}
    for promise in PROMISES:
        if promise.name in without:
            continue
        module = importlib.import_module(f"rectilinear.testing.promises.{promise.name}")
        for name, test in vars(module).items():
            if name.startswith("test_") and name not in without and not _asked(test) & set(absent):
                assert name not in found, name
                found[name] = test
    return found


def _asked(test: Any) -> set[str]:
    return set(inspect.signature(test).parameters)
