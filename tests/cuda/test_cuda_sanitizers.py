"""(b) again: kernels and backend under the address and undefined-behaviour sanitizers, in a process that has them preloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import host_build
import pytest

pytestmark = pytest.mark.nightly  # building everything for them takes as long as a third of all other tests here

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# One shuffled schedule of every kernel, dtype and shape; of the backend what strides, buffers and extents can upset.
SELECTED = " or ".join(
    (
        "(test_numbers_and_bits and 12345)",
        "(test_affine_and_fused and True-3)",
        "test_any_strides",
        "test_out_is_filled",
        "test_softmax",
    )
)


def sanitized_environment() -> dict[str, str]:
    """LD_PRELOAD and options for a Python that loads sanitized libraries."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all("/" in library for library in libraries), f"g++ has no sanitizers: {libraries}"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": ":".join(libraries),
        # Python itself leaks at exit; its small-object allocator would hide overruns.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "RECTILINEAR_CUDA_SANITIZE": "1",
    }


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=sanitized_environment(), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_kernels_and_backend() -> None:
    files = [str(HERE / "test_cuda_kernels.py"), str(HERE / "test_cuda_backend.py")]
    done = run_sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", SELECTED)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("p[n] = 1;", "heap-buffer-overflow"),
        ("p[-1] = n;", "heap-buffer-overflow"),
        ("*(long long*)((char*)p + 4) = n;", "misaligned address"),
        ("int a[3]; a[n] = 1; p[0] = a[n - 1];", "out of bounds"),
    ],
)
def test_the_sanitizers_bite(tmp_path: Path, statement: str, words: str) -> None:
    source = f'extern "C" __global__ void __launch_bounds__(32) bad(int* p, int n) {{ {statement} }}\n'
    library = host_build.build(source, "float32", tmp_path, sanitize=True)
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import numpy as np, host_build; from standin import StandIn; from pathlib import Path\n"
        f"cp = StandIn(); module = host_build.HostModule(Path({str(library)!r}), 'float32', cp)\n"
        "module.get_function('bad')((1,), (32,), (cp.asarray(np.zeros(8, np.int32)), np.int32(8)))\n"
    )
    done = run_sanitized("-c", code)
    assert done.returncode != 0
    assert words in done.stderr
