"""(e) Planted bugs: each is put into a copy of the package, and the tests on the CPU have to find it, by numbers and not by stored bits.

``python -m tests.cuda.mutants`` runs them all and prints a table; arguments select by name. Ends non-zero if one survives.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests import planted
from tests.planted import Mutant

TESTS = ("test_cuda_kernels.py", "test_cuda_backend.py", "test_cuda_lt.py", "test_cuda_capture.py")
NEAREST = {  # asked first: the first failure ends it
    "cupy_lt.py": "test_cuda_lt.py",
    "cupy_backend.py": "test_cuda_backend.py",
    **dict.fromkeys(("graphs.py", "reach.py", "cupy_scratch.py", "sgd.py", "module.py"), "test_cuda_capture.py"),
}
SELECTED = "not float64 and not 12345 and not (numbers_and_bits and (-0] or -1])) and not the_example"  # which is not copied
SECONDS = 150  # a mutant that takes longer hangs


def outcome(mutant: Mutant | None) -> str:
    """What the tests say of a mutant: the first that fails, or how the process ended; empty if all pass."""
    with planted.checkout(mutant) as folder:
        nearest = NEAREST.get(mutant.file) if mutant else None
        files = [f"tests/cuda/{name}" for name in sorted(TESTS, key=lambda name: name != nearest)]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", SELECTED]
        env = {**os.environ, "PYTHONPATH": "", "RECTILINEAR_CUDA_MUTANT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "hangs"
    if "g++ refuses" in done.stdout:
        raise SystemExit(f"{mutant and mutant.name}: does not compile:\n{done.stdout[-2000:]}")
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    failed = re.search(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        crash = re.search(r'File "\S+", line \d+ in (test_\w+)', done.stderr)
        if crash is None:
            raise SystemExit(f"{mutant and mutant.name}: neither passed nor failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return f"crash in {crash[1]}"
    return failed[1] if failed else ""


def main(wanted: list[str]) -> int:
    chosen = [
        mutant
        for mutant in planted.read(Path(__file__).with_name("mutants.toml"))
        if not wanted or any(word in mutant.name for word in wanted)
    ]
    if not wanted and outcome(None):
        print("the tests fail without a planted bug; nothing to learn from the others")
        return 1
    survivors = 0
    for mutant in chosen:
        found = outcome(mutant)
        survivors += not found
        print(f"{mutant.name:<40} {mutant.file:<16} {found or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
