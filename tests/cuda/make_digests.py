"""Writes digests.json: what the kernel source computes on the CPU, bit for bit. Run it when a kernel is meant to give other bits."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import conftest  # noqa: F401 - the search path
import gpu_cases
import host_build
from host_backend import Host

from rectilinear.backends.cupy_loader import SOURCE


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = Host(host_build.build_all(SOURCE.read_text(), Path(folder)))
        found = {}
        for dtype in gpu_cases.DTYPES:
            for case in gpu_cases.cases(dtype):
                if case.kind != "softmax_loss":
                    found[case.name] = gpu_cases.digest(gpu_cases.run(host.backend, case, gpu_cases.inputs(case)))
    (Path(__file__).parent / "digests.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
