"""(c) The tests of all other backends, on this one: NumPy arrays taken to the stand-in device and back, through the public functions.

Collected here again are the tests that ask for `lib` or `numpy_lib`; the fixtures of that name in this file put the stand-in there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from host_backend import Host

import rectilinear
from rectilinear.backends import registry
from tests import test_accuracy, test_layers, test_out_needs
from tests.conftest import NUMPY_LIBS, Lib
from tests.test_out_needs import case  # noqa: F401 - a fixture of some

NAME = "cupy-standin"
ELSEWHERE = {"test_long_bias_reduction"}  # a million rows take the CPU long: once, in test_cuda_backend
FIXTURES = {"lib", "numpy_lib"}


def conformance_tests(module: ModuleType) -> dict[str, Any]:
    return {
        f"{name}_{module.__name__.rpartition('.test_')[2]}": test
        for name, test in vars(module).items()
        if name.startswith("test_") and name not in ELSEWHERE and FIXTURES & set(inspect.signature(test).parameters)
    }


for _module in (test_accuracy, test_layers, test_out_needs):
    globals().update(conformance_tests(_module))


@pytest.fixture(params=NUMPY_LIBS[:2], ids=["writable", "readonly"])
def lib(request: pytest.FixtureRequest, host: Host) -> Iterator[Lib]:
    given = request.param
    registry.register(NAME, lambda: host.backend)
    with rectilinear.use_backend(NAME):
        yield Lib(NAME, given.array, backend=NAME, readonly_inputs=given.readonly_inputs)
    registry.unregister(NAME)


@pytest.fixture
def numpy_lib(lib: Lib) -> Lib:
    return lib


def test_there_are_some() -> None:
    assert sum(name.startswith("test_") for name in globals()) > 30
