"""The cupy backend on the stand-in array module and the kernels built for the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host_build
from standin import StandIn
from standin_lt import CublasLt

from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime
from rectilinear.backends.cupy_gemm import Gemm
from rectilinear.backends.cupy_lt import Plans


class Host:
    """A backend on the stand-in, and what the tests look at beside its results; its products are cuBLASLt's, or cuBLAS's by CuPy."""

    def __init__(self, libraries: dict[str, Path], plans: bool = True) -> None:
        self.cp = StandIn()
        self.lt = CublasLt(self.cp.counts)
        self.modules = {dtype: host_build.HostModule(library, dtype, self.cp) for dtype, library in libraries.items()}
        products = (lambda cp, scratches: Plans(cp, scratches, self.lt)) if plans else Gemm
        runtime = Runtime(self.cp, self.modules.__getitem__, products)
        self.backend = CupyBackend(lambda: runtime, lambda backend: Probe(True, version="stand-in"))

    def set(self, **how: Any) -> None:
        """schedule, flush or window of the coming launches; float64 is never flushed."""
        for module in self.modules.values():
            for name, value in how.items():
                setattr(module, name, value and module.dtype != "float64" if name == "flush" else value)

    @property
    def launched(self) -> list[str]:
        return [name for module in self.modules.values() for name in module.launched]
