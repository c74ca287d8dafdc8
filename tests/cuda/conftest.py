"""Fixtures of the CUDA tests: the kernel source built for the CPU, and the backend on the stand-in array module.

All tests here carry the marker `cuda`: they need g++ and, some, CuPy with NVRTC (the extra `cuda-ci`), and fail without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools")]

import host_build  # noqa: E402
from host_backend import Host  # noqa: E402

from rectilinear.backends import cupy_small  # noqa: E402
from rectilinear.backends.cupy_loader import SOURCE  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs g++, CuPy and NVRTC (extra cuda-ci), no GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that is filled once a run: by the first of pytest-xdist's processes that asks for it; the others wait."""
    import fcntl  # these tests are collected where there is none, too

    base = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):  # not by the variable: a test's own pytest inherits it, and all runs have that folder's parent
        base = base.parent

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        place = base / name
        place.mkdir(exist_ok=True)
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "filled").exists():
                fill(place)
                (place / "filled").touch()
        return place

    return folder


@pytest.fixture(scope="session")
def libraries(made_once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """dtype -> the kernels built for the CPU."""
    source, sanitize = SOURCE.read_text(encoding="utf-8"), "RECTILINEAR_CUDA_SANITIZE" in os.environ
    place = made_once("kernels", lambda place: host_build.build_all(source, place, sanitize=sanitize))
    return {dtype: host_build.library(place, dtype, sanitize) for dtype in host_build.DTYPES}


@pytest.fixture
def host(libraries: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Host]:
    """The parameter "gemm" has the products of a machine without nvmath-python."""
    host = Host(libraries, plans=getattr(request, "param", "plans") == "plans")
    yield host
    host.set(schedule=0, flush=True)


@pytest.fixture
def no_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product to cuBLAS, and so to the kernels around it."""
    monkeypatch.setattr(cupy_small, "share_forward", lambda *layer: None)
    monkeypatch.setattr(cupy_small, "share_backward", lambda *layer: None)


@pytest.fixture(params=["small", "cublas"])
def way(request: pytest.FixtureRequest) -> None:
    """Both ways through a layer: small ones whole, and all by cuBLAS."""
    if request.param == "cublas":
        request.getfixturevalue("no_small_layers")
