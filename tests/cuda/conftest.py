"""Fixtures of the CUDA tests: the kernel source built for the CPU, and the backend on the stand-in array module.

All tests here carry the marker `cuda`: they need g++ and, some, CuPy with NVRTC (the extra `cuda-ci`), and fail without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools")]

import host_build  # noqa: E402
from standin import StandIn  # noqa: E402

from rectilinear.backends.contract import Probe  # noqa: E402
from rectilinear.backends.cupy_backend import CupyBackend, Runtime  # noqa: E402

SOURCE = HERE.parents[1] / "rectilinear" / "kernels" / "cuda" / "layers.cu"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs g++, CuPy and NVRTC (extra cuda-ci), no GPU")
    config.addinivalue_line("markers", "cuda_mutants: plants bugs into the CUDA kernels, each of which the tests have to find")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("cuda_mutants"):
            item.add_marker("cuda")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """dtype -> the kernels built for the CPU, of the source file that RECTILINEAR_CUDA_SOURCE names (the planted bugs), else the real one."""
    source = Path(os.environ.get("RECTILINEAR_CUDA_SOURCE", SOURCE)).read_text(encoding="utf-8")
    sanitize = "RECTILINEAR_CUDA_SANITIZE" in os.environ
    return host_build.build_all(source, tmp_path_factory.mktemp("kernels"), sanitize=sanitize)


class Host:
    """A backend on the stand-in, and what the tests look at beside its results."""

    def __init__(self, libraries: dict[str, Path]) -> None:
        self.cp = StandIn()
        self.modules = {dtype: host_build.HostModule(library, dtype, self.cp) for dtype, library in libraries.items()}
        runtime = Runtime(self.cp, self.modules.__getitem__)
        self.backend = CupyBackend(lambda: runtime, lambda backend: Probe(True, version="stand-in"))

    def set(self, **how: Any) -> None:
        """schedule, flush or window of the coming launches; float64 is never flushed."""
        for module in self.modules.values():
            for name, value in how.items():
                setattr(module, name, value and module.dtype != "float64" if name == "flush" else value)

    @property
    def launched(self) -> list[str]:
        return [name for module in self.modules.values() for name in module.launched]


@pytest.fixture
def host(libraries: dict[str, Path]) -> Iterator[Host]:
    host = Host(libraries)
    yield host
    host.set(schedule=0, flush=True)
