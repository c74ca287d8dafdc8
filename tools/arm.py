"""Run the kernel tests for NEON on an x86 machine: an arm64 Python in qemu's user emulation, on the sources of this checkout.

Usage: python tools/arm.py [pytest arguments]     (none: the tails, edges, layouts and threads of the kernels)

Needs Debian 12 or what is like it (apt-get, dpkg) and no rights of root: everything is unpacked, not installed, into .arm/, once. The
first run takes most of its time for compiling in emulation; compiled kernels stay in .arm/cache until their sources change.

Not seen here: SVE, which numba does not use; caches and cores, which are the host's. OpenBLAS's own arm64 kernels read past their
operands, so NumPy must not multiply arrays that have a guard page beside them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from requirements import requirements

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDER = CHECKOUT / ".arm"
PYTHON = "3.11"  # Debian 12's
USERLAND = f"""
    python{PYTHON}-minimal libpython{PYTHON}-minimal libpython{PYTHON}-stdlib libc6 zlib1g libexpat1 libssl3 libffi8 libstdc++6 libgcc-s1
    libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libncursesw6 libtinfo6 libreadline8 libdb5.3 libcrypt1 libgomp1 media-types
""".split()
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

INTERPRETER = """#!/bin/sh
# Whoever starts {folder}/python gets the emulator, whatever PYTHONPATH he sets.
PYTHONPATH="{folder}/site:{checkout}${{PYTHONPATH:+:$PYTHONPATH}}" exec {folder}/qemu/usr/bin/qemu-aarch64-static \\
    -L {folder}/root {folder}/root/usr/bin/python{version} "$@"
"""
# The kernel of the host cannot start an arm64 program by itself, so children are started by the same script.
SITE = "import sys\nsys.executable = sys._base_executable = {interpreter!r}\n"

CHOSEN = [
    "tests/test_kernels.py",
    "tests/test_threads.py",
    "-k",
    "test_kernels.py and not (2_31 or outside or too_large or long_bias) "
    "or every_task or bits_are_equal or work_is_shared or inside or at_once or fork_after or fork_before or grandchildren",
]


def main(arguments: list[str]) -> int:
    interpreter = FOLDER / "python"
    if not interpreter.exists():
        set_up(interpreter)
    environment = os.environ | {"RECTILINEAR_CACHE_DIR": str(FOLDER / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", *(arguments or CHOSEN)]
    return subprocess.run(command, env=environment, cwd=CHECKOUT, check=False).returncode


def set_up(interpreter: Path) -> None:
    print(f"== an arm64 userland, its emulator and wheels into {FOLDER}", flush=True)
    unpack("qemu", ["qemu-user-static"])
    unpack("root", USERLAND, "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", FOLDER / "site", "--upgrade"]
    pip += ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}", *(f"--platform={name}" for name in PLATFORMS)]
    subprocess.run([*pip, "-c", CHECKOUT / "constraints.txt", *requirements(["smoke"])], check=True)
    (FOLDER / "site" / "sitecustomize.py").write_text(SITE.format(interpreter=str(interpreter)))
    interpreter.write_text(INTERPRETER.format(folder=FOLDER, checkout=CHECKOUT, version=PYTHON))
    interpreter.chmod(0o755)  # last of all: it says that the rest is there


def unpack(name: str, packages: list[str], *options: str) -> None:
    """Debian packages into a folder, with lists and downloads beside it."""
    lists, archives = FOLDER / f"{name}-lists", FOLDER / f"{name}-archives"
    for folder in (lists / "partial", archives / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", *options, "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache::Archives={archives}"]
    apt += ["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=", "-o", "APT::Sandbox::User="]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *packages], check=True, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, FOLDER / name], check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
