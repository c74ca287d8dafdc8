"""Planted bugs: each is put into a copy of the package, and the test that is named for it has to fail.

``python -m tests.mutants`` runs them all and prints what each test said; arguments select by name. Ends non-zero if one survives. Some are
found only where two threads can run at once. What random calls find instead is in ``tests/fuzz/mutants.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rectilinear.measure import isa
from tests import planted
from tests.planted import Mutant

PATH = Path(__file__).with_name("mutants.toml")
SECONDS = 600
"""With the compilation of all kernels; what takes longer hangs."""


def outcome(mutant: Mutant, cache: str) -> str:
    """How the test failed; empty if it passed."""
    variables = isa.variables(mutant.isa, os.environ)
    held = {name: variables[name] for name in isa.BY["rectilinear"] if name in variables}
    environment = os.environ | held | {"RECTILINEAR_CACHE_DIR": cache, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    file, _, test = mutant.test.rpartition("::")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", test, f"tests/{file or 'test_kernels.py'}"]
    with planted.checkout(mutant) as folder:
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "hangs"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    if done.returncode == 0:
        return ""
    if failed := re.search(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE):
        return failed[1]
    raise SystemExit(f"{mutant.name}: neither passed nor failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main(wanted: list[str]) -> int:
    chosen = [mutant for mutant in planted.read(PATH) if not wanted or any(word in mutant.name for word in wanted)]
    survivors = 0
    with tempfile.TemporaryDirectory() as cache:
        for mutant in chosen:
            start = time.monotonic()
            found = outcome(mutant, cache)
            survivors += not found
            print(f"{mutant.name:<56} {mutant.file:<13} {time.monotonic() - start:4.0f} s  {found or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
