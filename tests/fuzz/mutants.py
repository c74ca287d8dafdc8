"""Planted bugs: each is put into a copy of the package, and the fuzzing has to find it.

``python -m tests.fuzz.mutants`` runs them all, on the widest instruction set alone, and prints the seconds that each took; arguments
select by name. Ends non-zero if one survives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import planted, widths
from tests.planted import Mutant

SECONDS = 30
"""Of fuzzing, once kernels are compiled: half of what ``make fuzz`` has for several instruction sets."""


def outcome(mutant: Mutant | None, cache: str) -> tuple[float, str] | None:
    """After how many seconds the fuzzing found what; None if it found nothing."""
    width = next(iter(widths.executable())).name
    command = [sys.executable, "-m", "tests.fuzz", "--only", width, "--failures", "1", "--seconds", str(SECONDS), "--json"]
    environment = os.environ | {"RECTILINEAR_CACHE_DIR": cache, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    with planted.checkout(mutant) as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant and mutant.name}: the fuzzing does not run:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    said = json.loads(done.stdout)
    failures = said["failures"][width]
    return (said["seconds"], failures[0]["what"].splitlines()[0]) if failures else None


def main(wanted: list[str]) -> int:
    mutants = planted.read(Path(__file__).with_name("mutants.toml"))
    chosen = [mutant for mutant in mutants if not wanted or any(word in mutant.name for word in wanted)]
    survivors = 0
    with tempfile.TemporaryDirectory() as cache:
        if not wanted and (found := outcome(None, cache)):
            print(f"the fuzzing fails without a planted bug; nothing to learn from the others: {found[1]}")
            return 1
        for mutant in chosen:
            found = outcome(mutant, cache)
            survivors += found is None
            text = f"{found[0]:6.1f} s  {found[1][:90]}" if found else "SURVIVED"
            print(f"{mutant.name:<44} {mutant.file:<14} {text}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
