"""Build a wheel, install it into an empty environment, and run the smoke tests on it from outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", place, CHECKOUT, stdout=subprocess.DEVNULL)
        (wheel,) = place.glob("*.whl")
        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        pip = (
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            CHECKOUT / "constraints.txt",
        )
        run(*pip, f"{wheel}[testing]")
        (place / "tests").mkdir()
        shutil.copy(CHECKOUT / "tests" / "test_smoke.py", place / "tests")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        where = "import rectilinear; print(rectilinear.__file__)"
        found = subprocess.run((python, "-c", where), cwd=place, env=environment, check=True, text=True, capture_output=True).stdout
        if "site-packages" not in found:
            sys.exit(f"rectilinear was imported from {found.strip()}, not from the installed wheel")
        print(f"{wheel.name}: imported from site-packages")
        run(
            python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=smoke", "tests/test_smoke.py", cwd=place, env=environment
        )
        run(python, "-m", "rectilinear", "conform", "numpy", "--only", "sizes", cwd=place, env=environment)


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
