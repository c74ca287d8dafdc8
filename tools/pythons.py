"""Run the smoke subset on every CPython that is found here and that pyproject.toml allows, each in an environment of its own.

Looked for: python3.X on the PATH, and the versions that pyenv has installed. Of one minor version the newest patch is taken.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
_ASKED = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["requires-python"]
LOWEST = tuple(map(int, _ASKED.removeprefix(">=").split(".")))
ASK = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:3], sys.version_info.releaselevel)"


def candidates() -> Iterator[Path]:
    yield Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder in [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), *sorted(pyenv.glob("versions/*/bin"))]:
        yield from (path for path in sorted(folder.glob("python3.*")) if re.fullmatch(r"python3\.\d+", path.name))


def version(python: Path) -> tuple[int, ...] | None:
    """The version of a released CPython; None of anything else, such as a shim that leads nowhere."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    words = done.stdout.split()
    if done.returncode or words[0] != "CPython" or words[-1] != "final":
        return None
    return tuple(map(int, words[1:4]))


def main() -> None:
    newest: dict[tuple[int, ...], tuple[tuple[int, ...], Path]] = {}
    for python in candidates():
        found = version(python)
        if found and found >= LOWEST:
            newest[found[:2]] = max(newest.get(found[:2], ((), python)), (found, python))
    pythons = [newest[minor] for minor in sorted(newest)]
    print("== found CPython", ", ".join(".".join(map(str, found)) for found, _ in pythons), flush=True)
    failed = [found for found, python in pythons if not passes(found, python)]
    if failed:
        sys.exit(f"the smoke subset fails under {', '.join('.'.join(map(str, found)) for found in failed)}")


def passes(found: tuple[int, ...], python: Path) -> bool:
    venv = f".venv-py{found[0]}.{found[1]}"
    command = ["make", "--no-print-directory", f"PYTHON={python}", f"VENV={venv}", "test-smoke"]
    return subprocess.run(command, cwd=CHECKOUT, check=False).returncode == 0


if __name__ == "__main__":
    main()
