"""``python -m rectilinear conform cupy --library numpy --json``, with the stand-in in CuPy's place; what tools/conformance.py runs.

Arguments are promises, all by default. Calls from threads are left out: the kernels built for the CPU know one thread's place in the grid
at a time. So is np.errstate, since the stand-in's cuBLAS is NumPy. A new process would not have the stand-in, so nothing is asked of one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import host_build  # noqa: E402

from rectilinear.backends.cupy_loader import SOURCE  # noqa: E402
from rectilinear.testing import PROMISES, conform, numpy_libs  # noqa: E402
from rectilinear.testing.cli import record  # noqa: E402

LEFT_OUT = ("threads", "errstate")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        host_build.build_all(SOURCE.read_text(encoding="utf-8"), Path(folder))
        os.environ["KERNELS"] = folder
        import on_standin  # noqa: F401 - puts it there

        libs = numpy_libs("cupy", installed=False)[:1]  # read-only ones: test_cuda_conformance.py
        promises = sys.argv[1:] or [promise.name for promise in PROMISES if promise.name not in LEFT_OUT]
        print(json.dumps(record("cupy", libs, conform(libs, promises))))


if __name__ == "__main__":
    main()
