"""tools/gpu_check.py with the stand-in in CuPy's place: what its test runs, and as a script what one part of that run is."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tools"), str(HERE.parents[1])]

import gpu_check  # noqa: E402
import gpu_measure  # noqa: E402
import host_build  # noqa: E402

from rectilinear.backends import cupy_loader  # noqa: E402
from rectilinear.backends.cupy_backend import CupyBackend  # noqa: E402
from rectilinear.measure.subjects import BASELINE, PEERS, Subject  # noqa: E402

TESTS = ("-p", "on_standin", "tests/test_conformance.py", "-k", "test_without_bias or test_relu_at_the_edges")


def pretend(patch: Callable[..., None] = setattr) -> None:
    """The kernels take what the compiler said."""
    stored = json.loads((gpu_check.STORED / "resources.json").read_text())["kernels"]

    def of(kernel: host_build.HostKernel, which: int) -> int:
        return int(stored[f"{kernel.module.dtype} {kernel.name}"]["90"][which])

    patch(host_build.HostKernel, "num_regs", property(lambda self: of(self, 0)))
    patch(host_build.HostKernel, "shared_size_bytes", property(lambda self: of(self, 1)))
    patch(host_build.HostKernel, "local_size_bytes", 0)


def subjects() -> tuple[list[Subject], dict[str, str]]:
    """The backend on the stand-in, one that is not to be had, and a peer, which runs on the CPU."""
    environment = {"RECTILINEAR_BACKEND": "cupy", "KERNELS": os.environ["KERNELS"]}
    ours = [
        Subject(name, f"bench_standin:{f}", backend="cupy", environment=environment)
        for name, f in (("cupy", "build"), ("cupy-out", "build_out"))
    ]
    others = [Subject("absent", "no_such_library:build"), next(peer for peer in PEERS if peer.name == BASELINE)]
    return [*ours, *others], {"never": "not usable"}


def setup(make: Callable[[], CupyBackend], **parts: Any) -> gpu_check.Setup:
    changed = {
        "tests": gpu_check.PARTS["tests"]._replace(work=functools.partial(gpu_measure.project_tests, arguments=TESTS)),
        "steps": gpu_check.PARTS["steps"]._replace(work=functools.partial(gpu_measure.steps, subjects=subjects)),
    }
    command = (sys.executable, str(Path(__file__).resolve()))
    return gpu_check.Setup(make, small=True, command=command, parts={**gpu_check.PARTS, **changed, **parts})


if __name__ == "__main__":
    import bench_standin  # noqa: F401 - puts the stand-in in CuPy's place

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
    pretend()
    sys.exit(gpu_check.main(sys.argv[1:], setup(lambda: CupyBackend(cupy_loader.connect, cupy_loader.examine))))
