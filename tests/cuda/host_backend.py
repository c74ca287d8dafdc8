"""The cupy backend on the stand-in array module and the kernels built for the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host_build
from standin import StandIn

from rectilinear.backends.contract import Probe
from rectilinear.backends.cupy_backend import CupyBackend, Runtime


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
