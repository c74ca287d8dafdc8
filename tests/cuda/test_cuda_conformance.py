"""(c) The conformance kit on this backend: NumPy arrays taken to the stand-in device and back, through the public functions.

The fixtures of this file put the stand-in where the kit's tests ask for a backend.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_backend import Host

import rectilinear
import rectilinear.testing
from rectilinear.backends import registry
from rectilinear.testing import Lib, numpy_libs

NAME = "cupy-standin"
ELSEWHERE = {
    "test_long_bias_reduction",  # a million rows take the CPU long: once, in test_cuda_backend
    "test_long_sums_of_one_sign_keep_their_digits",  # cuBLAS's sums, which the stand-in has of NumPy
    "errstate",  # the stand-in's cuBLAS is NumPy, which heeds what NumPy is told
    "memory",  # the stand-in's own
    "threads",  # the kernels built for the CPU know one thread's place in the grid at a time
    "arrays",  # its arrays are not CuPy's: on_standin.py
}
LIBS = numpy_libs(NAME, installed=False)

globals().update(rectilinear.testing.collect(without=ELSEWHERE, absent={"installed_lib"}))


@pytest.fixture(params=LIBS, ids=["writable", "readonly"])
def lib(request: pytest.FixtureRequest, host: Host) -> Iterator[Lib]:
    yield from chosen(request.param, host)


@pytest.fixture(params=LIBS[:1], ids=["writable"])
def plain_lib(request: pytest.FixtureRequest, host: Host) -> Iterator[Lib]:
    yield from chosen(request.param, host)


def chosen(given: Lib, host: Host) -> Iterator[Lib]:
    registry.register(NAME, lambda: host.backend)
    with rectilinear.use_backend(NAME):
        yield given
    registry.unregister(NAME)


@pytest.fixture
def any_lib(plain_lib: Lib) -> Lib:
    return plain_lib


@pytest.fixture
def numpy_lib(lib: Lib) -> Lib:
    return lib


def test_there_are_some() -> None:
    assert sum(name.startswith("test_") for name in globals()) > 50
