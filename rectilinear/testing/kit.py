"""Runs the promises: a pytest plug-in that knows on which arrays, and counts what holds.

`conform` runs pytest in this process, by itself: no configuration, conftest or plug-in of the place where it is called has a say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.backends import registry
from rectilinear.testing.lib import Lib
from rectilinear.testing.promises import PROMISES, Promise

_ASSERTING = ("rectilinear.testing.cases", *(f"rectilinear.testing.promises.{promise.name}" for promise in PROMISES))
pytest.register_assert_rewrite(*(name for name in _ASSERTING if name not in sys.modules))  # pytest warns of what it comes too late for

HOLDS, BROKEN, ABSENT = "holds", "broken", "does not apply"

FIXTURES: dict[str, Callable[[Lib], bool]] = {
    "lib": lambda lib: True,
    "any_lib": lambda lib: not lib.readonly_inputs,
    "numpy_lib": lambda lib: lib.on_numpy,
    "plain_lib": lambda lib: lib.on_numpy and not lib.readonly_inputs,
    "installed_lib": lambda lib: lib.on_numpy and not lib.readonly_inputs and lib.installed,
}
"""What a test may ask for -> which of the variants it runs on."""

_MARKERS = ("smoke", "libraries", "nightly", "no_cupy(reason)")
_WORDS = 700
"""Characters of a failure that are shown."""


@dataclass(frozen=True)
class Failure:
    """One failing example: the test, and what was met and wanted."""

    test: str
    words: str


@dataclass(frozen=True)
class Outcome:
    """A line of the report.

    Attributes
    ----------
    promise : Promise
    state : str
        ``"holds"``, ``"broken"``, or ``"does not apply"``.
    tests : int
        How many ran.
    reason : str or None
        Why it does not apply, or why nothing was tested.
    failures : tuple of Failure
    """

    promise: Promise
    state: str
    tests: int
    reason: str | None = None
    failures: tuple[Failure, ...] = ()


@dataclass
class Kit:
    """The pytest plug-in: gives tests their `Lib`, and sorts the results by promise."""

    libs: Sequence[Lib]
    said: Callable[[Outcome], None]
    outcomes: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _path: Path | None = None
    _ran: set[str] = field(default_factory=set)
    _failures: list[Failure] = field(default_factory=list)

    # what tests are given

    @pytest.fixture
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(20260923)

    @pytest.fixture
    def lib(self, request: pytest.FixtureRequest) -> Iterator[Lib]:
        with rectilinear.use_backend(request.param.backend):
            yield request.param

    any_lib = numpy_lib = plain_lib = installed_lib = lib

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name, takes in FIXTURES.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [lib for lib in self.libs if takes(lib)], indirect=True, ids=str)

    # what becomes of them

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in _MARKERS:
            config.addinivalue_line("markers", f"{marker}: means something to rectilinear's own tests")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        out = [item for item in items if self._has_no_variant(item)]
        items[:] = [item for item in items if item not in set(out)]
        config.hook.pytest_deselected(items=out)

    def _has_no_variant(self, item: Any) -> bool:
        return any(name in item.fixturenames and not any(map(takes, self.libs)) for name, takes in FIXTURES.items())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            name = report.nodeid.rpartition("::")[2] + ("" if report.when == "call" else f" ({report.when})")
            self._failures.append(Failure(name, _brief(report)))
        elif report.when == "call" and report.passed:
            self._ran.add(report.nodeid)
        if report.failed:
            self._ran.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        self._path = item.path
        result = yield
        if nextitem is None or nextitem.path != item.path:
            self._finish()
        return result

    def _finish(self) -> None:
        promise = next(promise for promise in PROMISES if promise.path == self._path)
        self._path = None
        self._say(promise, len(self._ran), tuple(self._failures))
        self._ran.clear()
        self._failures.clear()

    def pytest_sessionfinish(self) -> None:
        if self._path is not None:  # at the first failure
            self._finish()

    def _say(self, promise: Promise, tests: int, failures: tuple[Failure, ...]) -> None:
        reasons = [promise.absent(lib) for lib in self.libs]
        absent = reasons[0] if all(reasons) else None
        if failures:
            outcome = Outcome(promise, BROKEN, tests, None, failures)
        elif absent:
            outcome = Outcome(promise, ABSENT, tests, absent)
        else:
            outcome = Outcome(promise, HOLDS if tests else BROKEN, tests, None if tests else "no test of it ran")
        self.outcomes.append(outcome)
        self.said(outcome)

    def the_rest(self, promises: Sequence[Promise]) -> None:
        """Those of which no test was collected."""
        for promise in promises:
            if promise not in [outcome.promise for outcome in self.outcomes]:
                self._say(promise, 0, ())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(str(report.longrepr))

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.errors.append(str(excrepr))


def _brief(report: pytest.TestReport) -> str:
    """What was met and wanted, in a few lines."""
    crash = getattr(report.longrepr, "reprcrash", None)
    words = crash.message if crash is not None else str(report.longrepr)
    lines = [line.rstrip() for line in str(words).splitlines() if line.strip()]
    text = "\n".join(lines[:12])
    return text if len(text) <= _WORDS else text[:_WORDS] + " ..."


def conform(
    libs: Sequence[Lib],
    promises: Sequence[str] | None = None,
    *,
    said: Callable[[Outcome], None] = lambda outcome: None,
    first_failure: bool = False,
) -> list[Outcome]:
    """Run the promises on these arrays and backends.

    Parameters
    ----------
    libs : sequence of Lib
        As `libs_for` gives them.
    promises : sequence of str, optional
        Names out of `PROMISES`. Default: all.
    said : callable, optional
        Called with each outcome as soon as it is known.
    first_failure : bool, default False
        Stop at the first test that fails; the promises after it have no outcome.

    Returns
    -------
    list of Outcome

    Raises
    ------
    ValueError
        A name is no promise's.
    RuntimeError
        The tests could not be run.

    Examples
    --------
    >>> from rectilinear.testing import conform, libs_for
    >>> [(outcome.promise.name, outcome.state) for outcome in conform(libs_for("numpy"), ["bits"])]
    [('bits', 'holds')]
    """
    known = {promise.name: promise for promise in PROMISES}
    if unknown := [name for name in promises or () if name not in known]:
        raise ValueError(f"conform: there is no promise {unknown[0]!r}; they are {', '.join(known)}")
    chosen = [promise for promise in PROMISES if promises is None or promise.name in promises]
    kit = Kit(libs, said)
    arguments = ["-c", os.devnull, "--rootdir", str(Path(__file__).parent), "--noconftest", "--import-mode=importlib"]
    arguments += ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:faulthandler", "-W", "error::RuntimeWarning"]
    arguments += ["-x"] if first_failure else []
    with _by_itself():
        status = pytest.main([*arguments, *(str(promise.path) for promise in chosen)], plugins=[kit])
    if kit.errors or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError("conform: the tests could not be run: " + ("\n".join(kit.errors) or f"pytest ended with status {status}"))
    if not first_failure:
        kit.the_rest(chosen)
    return kit.outcomes


@contextmanager
def _by_itself() -> Iterator[None]:
    """Without pytest's variables and plug-ins of the place, and without its choice of backend."""
    ours = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", registry.VARIABLE: "", "PYTEST_PLUGINS": ""}
    before = {name: os.environ.get(name) for name in ours}
    dont_write = sys.dont_write_bytecode
    os.environ.update(ours)
    sys.dont_write_bytecode = True  # the rewritten tests, into a folder that may not be ours
    try:
        yield
    finally:
        sys.dont_write_bytecode = dont_write
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
