"""The backends and array libraries that the tests run on, as one parametrised fixture, `lib`.

A test that asks for `lib` runs once for every variant. Those of large libraries carry the marker ``libraries``. A backend
that should work on this machine and does not is a failure, not a skip: nothing passes by being absent.

``TESTS_ON_CUPY=1`` puts them on a GPU instead: `lib` is real CuPy arrays, and NumPy arrays under the chosen cupy backend. All other tests
are left out, and so is what makes no sense there, which carries the marker ``no_cupy`` with a reason; the end of the run counts both.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import rectilinear
from rectilinear.backends import registry
from rectilinear.errors import BackendError

from .loopback import LoopbackBackend


@dataclass(frozen=True)
class Lib:
    """One way to run the layers: which arrays, under which chosen backend."""

    name: str
    array: Callable[[Any], Any]
    """A NumPy array as this library's (a copy)."""
    backend: str = "numpy"
    writable: bool = True
    """Whether the library's arrays can be written to at all, so that ``out`` makes sense."""
    readonly_inputs: bool = False
    ours: bool = False
    """Whether the kernels are ours, so that SPEC's promises about bits hold."""

    def __str__(self) -> str:
        return self.name

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(rectilinear.to_numpy(x))

    def owns(self, x: Any) -> bool:
        """Whether x is an array of this library."""
        return type(x).__module__.partition(".")[0] == type(self.array(np.zeros(1))).__module__.partition(".")[0]

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A writable array full of a value no test expects."""
        made = self.array(np.full(shape, 77, dtype))
        if self.readonly_inputs:
            made.setflags(write=True)
        return made


def _copy(x: Any) -> np.ndarray:
    return np.array(x)


def _readonly(x: Any) -> np.ndarray:
    """Catches whoever writes into an argument."""
    made = np.array(x)
    made.setflags(write=False)
    return made


def _strict(x: Any) -> Any:
    import array_api_strict

    return array_api_strict.asarray(np.array(x))


def _torch(x: Any) -> Any:
    import torch

    return torch.asarray(np.array(x))


def _jax(x: Any) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax.numpy.asarray(np.array(x))


def _dask(x: Any) -> Any:
    import dask.array

    dask.config.set(scheduler="synchronous")
    return dask.array.from_array(np.array(x), chunks=-1)


ON_CUPY = "TESTS_ON_CUPY"
"""The variable: 1, or 0 (as if not set)."""


def on_cupy() -> bool:
    given = os.environ.get(ON_CUPY, "0")
    if given not in ("0", "1"):
        raise pytest.UsageError(f"{ON_CUPY} is {given!r}; it may be 0 or 1")
    return given == "1"


def _cupy(x: Any) -> Any:
    with rectilinear.use_backend("cupy"):
        return rectilinear.asarray(np.array(x))


NUMPY_LIBS = [
    Lib("numpy", _copy),
    Lib("numpy-readonly", _readonly, readonly_inputs=True),
    Lib("loopback", _copy, backend="loopback"),
    Lib("numba", _copy, backend="numba", ours=True),
    Lib("numba-readonly", _readonly, backend="numba", readonly_inputs=True, ours=True),
]
LIBS = [
    *NUMPY_LIBS,
    Lib("strict", _strict),
    Lib("torch", _torch),
    Lib("jax", _jax, writable=False),
    Lib("dask", _dask),
]
if on_cupy():
    NUMPY_LIBS = [
        Lib("cupy-chosen", _copy, backend="cupy"),
        Lib("cupy-chosen-readonly", _readonly, backend="cupy", readonly_inputs=True),
    ]
    LIBS = [*NUMPY_LIBS, Lib("cupy", _cupy)]
LARGE = {"torch", "jax", "dask"}


def lib_params(libs: list[Lib]) -> list[Any]:
    return [pytest.param(lib, id=lib.name, marks=[pytest.mark.libraries] if lib.name in LARGE else []) for lib in libs]


@pytest.fixture(params=lib_params(LIBS))
def lib(request: pytest.FixtureRequest) -> Iterator[Lib]:
    with rectilinear.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(params=lib_params(NUMPY_LIBS))
def numpy_lib(request: pytest.FixtureRequest) -> Iterator[Lib]:
    """The variants on NumPy arrays, for what only NumPy has: strides, byte order, memory."""
    with rectilinear.use_backend(request.param.backend):
        yield request.param


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
