"""(e) Planted bugs: each is put into a copy of the package, and the tests on the CPU have to find it, by numbers and not by stored bits.

``python tests/cuda/mutants.py`` runs them all and prints a table; arguments select by name. Ends non-zero if one survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

TESTS = ("test_cuda_kernels.py", "test_cuda_backend.py")
SELECTED = "not float64 and not 12345 and not (numbers_and_bits and (-0] or -1]))"
SECONDS = 150  # a mutant that takes longer hangs


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


def planted() -> list[Mutant]:
    with (HERE / "mutants.toml").open("rb") as file:
        return [Mutant(**each) for each in tomllib.load(file)["mutant"]]


def outcome(mutant: Mutant | None) -> str:
    """What the tests say of a mutant: the first that fails, or how the process ended; empty if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        # A whole checkout of its own, so that nothing can find the package that is right.
        for name in ("rectilinear", "tests", "tools"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            file = Path(folder) / "rectilinear" / mutant.file
            text = file.read_text(encoding="utf-8")
            if mutant.old not in text:
                raise SystemExit(f"{mutant.name}: what it replaces is no longer in {mutant.file}")
            file.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
        files = [f"tests/cuda/{name}" for name in TESTS]
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
    chosen = [mutant for mutant in planted() if not wanted or any(word in mutant.name for word in wanted)]
    if not wanted and outcome(None):
        print("the tests fail without a planted bug; nothing to learn from the others")
        return 1
    survivors = 0
    for mutant in chosen:
        found = outcome(mutant)
        survivors += not found
        print(f"{mutant.name:<40} {Path(mutant.file).name:<16} {found or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
