"""The benchmarks' worker with the stand-in in CuPy's place: `build` and `build_out` are the cupy backend's subjects there.

`install` makes the whole package take the stand-in's arrays for CuPy's. It does so here on import, for the process of a subject, if
KERNELS names the folder of the kernels built for the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import array_api_compat
import host_build
from host_backend import Host

from rectilinear.backends import cupy_loader
from rectilinear.measure import ours


def install(host: Host, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    import array_api_compat.cupy as genuine

    class Namespace:
        """The stand-in's functions, and for all else, dtypes above all, the genuine namespace."""

        def __getattr__(self, name: str) -> Any:
            return getattr(host.cp if hasattr(host.cp, name) else genuine, name)

        def asarray(self, x: Any, dtype: Any = None, device: Any = None) -> Any:
            return host.cp.asarray(x, dtype)

    namespace, array = Namespace(), host.cp.ndarray
    array.__module__ = "cupy"
    array.__array_namespace__ = lambda self, api_version=None: namespace
    recognised = array_api_compat.is_cupy_array
    patch(array_api_compat, "is_cupy_array", lambda x: isinstance(x, array) or recognised(x))
    patch(cupy_loader, "connect", lambda: host.backend.runtime)


if "KERNELS" in os.environ:
    install(Host({dtype: Path(os.environ["KERNELS"], f"{dtype}.so") for dtype in host_build.DTYPES}))

build, build_out = ours.build, ours.build_out
