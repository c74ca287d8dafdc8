"""The backends and array libraries that the tests run on, as parametrised fixtures: `lib`, and those that take some of its variants.

A test that asks for `lib` runs once for every variant, `rectilinear.testing`'s above all (test_conformance.py). Those of large libraries
carry the marker ``libraries``. A backend that should work on this machine and does not is a failure, not a skip: nothing passes by being
absent.

``TESTS_ON_CUPY=1`` puts them on a GPU instead: `lib` is real CuPy arrays, and NumPy arrays under the chosen cupy backend. All other tests
are left out, and so is what makes no sense there, which carries the marker ``no_cupy`` with a reason; the end of the run counts both.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.backends import registry
from rectilinear.errors import BackendError
from rectilinear.testing import Lib, library_lib, numpy_libs
from rectilinear.testing.kit import FIXTURES

from .loopback import LoopbackBackend

ON_CUPY = "TESTS_ON_CUPY"
"""The variable: 1, or 0 (as if not set)."""


def on_cupy() -> bool:
    given = os.environ.get(ON_CUPY, "0")
    if given not in ("0", "1"):
        raise pytest.UsageError(f"{ON_CUPY} is {given!r}; it may be 0 or 1")
    return given == "1"


NUMPY_LIBS = [
    *numpy_libs("numpy"),
    numpy_libs("loopback", installed=False)[0],
    *numpy_libs("numba"),
]
LIBS = [
    *NUMPY_LIBS,
    library_lib("strict", "array_api_strict"),
    *(library_lib(name, name) for name in ("torch", "jax", "dask")),
]
if on_cupy():
    NUMPY_LIBS = list(numpy_libs("cupy", name="cupy-chosen"))
    LIBS = [*NUMPY_LIBS, library_lib("cupy", "cupy")]
LARGE = {"torch", "jax", "dask"}


def lib_params(libs: list[Lib]) -> list[Any]:
    return [pytest.param(lib, id=lib.name, marks=[pytest.mark.libraries] if lib.name in LARGE else []) for lib in libs]


def _fixture(name: str) -> Any:
    @pytest.fixture(name=name, params=lib_params([lib for lib in LIBS if FIXTURES[name](lib)]))
    def given(request: pytest.FixtureRequest) -> Iterator[Lib]:
        with rectilinear.use_backend(request.param.backend):
            yield request.param

    return given


lib, any_lib, numpy_lib, plain_lib, installed_lib = map(_fixture, FIXTURES)  # `rectilinear.testing` says what each is for


@pytest.fixture(autouse=True, scope="session")
def _loopback() -> Iterator[None]:
    registry.register("loopback", LoopbackBackend)
    yield
    registry.unregister("loopback")


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from the state after import, whatever the environment of the run."""
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    rectilinear.set_backend(None)
    yield
    rectilinear.set_backend(None)


def pytest_configure(config: pytest.Config) -> None:
    if on_cupy():
        try:
            registry.serving("cupy")
        except BackendError as error:
            raise pytest.UsageError(f"{ON_CUPY}=1 asks for the tests on a GPU, which is not to be had here: {error}") from None


LEFT_OUT: Counter[str] = Counter()
"""Reason -> tests that are left out under the switch."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the switch, only what takes CuPy arrays, or the cupy backend, and makes sense there."""
    if not on_cupy():
        return
    kept, out = [], []
    for item in items:
        reason = _why_not_on_cupy(item)
        LEFT_OUT.update([reason] if reason else [])
        (out if reason else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=out)


def _why_not_on_cupy(item: Any) -> str | None:
    marker = item.get_closest_marker("no_cupy")
    if marker:
        return str(marker.args[0])
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    takes_it = any(isinstance(value, Lib) or value == "cupy" for value in given if isinstance(value, Lib | str))
    return None if takes_it else "takes neither CuPy's arrays nor the cupy backend"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason, count in LEFT_OUT.most_common():
        terminalreporter.write_line(f"left out on CuPy: {count}: {reason}")


WITHOUT_CPU = "TESTS_WITHOUT_CPU"
"""A variable: instruction sets, by comma, that this host is taken not to have. Shows how the tests fare on a smaller one."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what is marked for an instruction set that this CPU lacks, in words that tools/check_skips.py knows."""
    for marker in item.iter_markers("cpu"):
        from . import widths  # loads llvmlite

        (name,) = marker.args
        known = {unit.name: unit for unit in widths.FEATURES}
        if name in os.environ.get(WITHOUT_CPU, "").split(",") or not widths.host_has(known[name]):
            item.user_properties.append(("left out for cpu", name))
            pytest.skip(f"this CPU does not execute {name}")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260923)


os.environ.setdefault("JAX_PLATFORMS", "cpu")
