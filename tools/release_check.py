"""Build the sdist and the wheel into dist/, look at what is in them, and run the smoke subset on each as a user has it.

Both are installed into empty environments of every CPython that is found here and that pyproject.toml allows: first with what they require
and no more, for tests/test_smoke.py, then with the extra ``smoke``, for the whole subset. The tests come out of the sdist and lie where no
checkout can be imported. Looked for: python3.X on the PATH, and the versions that pyenv has installed; of a minor version the newest patch.

Usage: python tools/release_check.py [--quick]     quick: what the sdist installs is compared with the wheel, and the wheel is tried
under the newest CPython with what it requires and no more
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DIST = CHECKOUT / "dist"
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
LOWEST = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
ASK = "import platform, sys; print(platform.python_implementation(), *sys.version_info[:3], sys.version_info.releaselevel)"
LEFT_OUT = ".ci/"
"""What of the checkout an sdist does not have."""

_RELEASED = re.compile(r"## (?P<version>\d+(\.\d+)+) \((?P<date>\d{4}-\d\d-\d\d)\)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, CHECKOUT, stdout=subprocess.DEVNULL)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    in_git = subprocess.run(("git", "ls-files"), cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.splitlines()
    changes, citation = ((CHECKOUT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    wrong = [*unlike_checkout(sdist, in_git), *unlike_sdist(wheel, sdist), *misdated(version_of(wheel), changes, citation)]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"== {sdist.name} and {wheel.name} hold what they should", flush=True)
    pythons = dict([*found().items()][-1 if quick else 0 :])
    print("== found CPython", ", ".join(pythons), flush=True)
    failed = [
        f"{artifact.name} under CPython {version}"
        for version, python in pythons.items()
        for artifact in ([wheel] if quick else [wheel, sdist])
        if not passes(artifact, sdist, python, version, whole=not quick)
    ]
    if failed:
        sys.exit(f"the smoke subset fails on {', '.join(failed)}")


# What is in them.


def unlike_checkout(sdist: Path, in_git: list[str]) -> Iterator[str]:
    """An sdist has every file that git has, and no other but its metadata."""
    wanted = {name for name in in_git if not name.startswith(LEFT_OUT)} | {"PKG-INFO"}
    yield from differences(sdist, set(in_sdist(sdist)), wanted)


def unlike_sdist(wheel: Path, sdist: Path) -> Iterator[str]:
    """A wheel has the package, byte for byte, and its metadata, which are the sdist's."""
    source, installed = in_sdist(sdist), in_wheel(wheel)
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info/"
    wanted = {name: content for name, content in source.items() if name.startswith("rectilinear/")}
    wanted |= {f"{info}METADATA": source["PKG-INFO"], f"{info}licenses/LICENSE": source["LICENSE"]}
    yield from differences(wheel, set(installed), {*wanted, f"{info}WHEEL", f"{info}RECORD"})
    yield from (f"{wheel.name}: {name} is not as in the sdist" for name in wanted if installed.get(name, wanted[name]) != wanted[name])


def version_of(wheel: Path) -> str:
    (metadata,) = (content for name, content in in_wheel(wheel).items() if name.endswith("/METADATA"))
    return str(BytesHeaderParser().parsebytes(metadata)["Version"])


def misdated(version: str, changes: str, citation: str) -> Iterator[str]:
    """The version is written in rectilinear/__init__.py; CHANGELOG.md and CITATION.cff, which need the date of a release, have to agree."""
    released = _RELEASED.search(changes)
    if released is None:
        yield "CHANGELOG.md: no heading of a release, such as ## 1.0.0 (2026-01-31)"
        return
    if (".dev" in version) != ("## Unreleased" in changes):
        yield f"CHANGELOG.md: a section Unreleased goes with a version that ends in .dev0, and this is {version}"
    elif ".dev" not in version and version != released["version"]:
        yield f"CHANGELOG.md: the newest release is {released['version']}, this is {version}"
    for line in (f"version: {released['version']}", f"date-released: {released['date']}"):
        if line not in citation.splitlines():
            yield f"CITATION.cff: has no line {line!r}, as CHANGELOG.md has it"


def differences(artifact: Path, has: set[str], wanted: set[str]) -> Iterator[str]:
    yield from (f"{artifact.name}: lacks {name}" for name in sorted(wanted - has))
    yield from (f"{artifact.name}: has {name}, which should not be there" for name in sorted(has - wanted))


def in_sdist(sdist: Path) -> dict[str, bytes]:
    """Name -> content, without the leading folder."""
    with tarfile.open(sdist) as archive:
        return {m.name.partition("/")[2]: f.read() for m in archive if (f := archive.extractfile(m)) is not None}


def in_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Where they are tried.


def found() -> dict[str, Path]:
    """The released CPythons, by version."""
    newest: dict[tuple[int, ...], tuple[tuple[int, ...], Path]] = {}
    for python in candidates():
        version = released_cpython(python)
        if version and version >= LOWEST:
            newest[version[:2]] = max(newest.get(version[:2], ((), python)), (version, python))
    return {".".join(map(str, version)): python for version, python in sorted(newest.values())}


def candidates() -> Iterator[Path]:
    yield Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder in [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), *sorted(pyenv.glob("versions/*/bin"))]:
        yield from (path for path in sorted(folder.glob("python3.*")) if re.fullmatch(r"python3\.\d+", path.name))


def released_cpython(python: Path) -> tuple[int, ...] | None:
    """The version of a released CPython; None of anything else, such as a shim that leads nowhere."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    words = done.stdout.split()
    if done.returncode or words[0] != "CPython" or words[-1] != "final":
        return None
    return tuple(map(int, words[1:4]))


def passes(artifact: Path, sdist: Path, python: Path, version: str, *, whole: bool) -> bool:
    print(f"== {artifact.name} under CPython {version}", flush=True)
    report = CHECKOUT / "out" / f"smoke-{version}{''.join(artifact.suffixes[-1:])}.xml"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        (tree,) = place.iterdir()
        shutil.rmtree(tree / "rectilinear")
        run(python, "-m", "venv", "--without-pip", place / "venv")
        inside = place / "venv" / "bin" / "python"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            install(inside, artifact, "pytest")
            where = "import rectilinear; print(rectilinear.__file__)"
            shown = subprocess.run((inside, "-c", where), cwd=tree, env=environment, check=True, text=True, capture_output=True).stdout
            if "site-packages" not in shown:
                sys.exit(f"rectilinear was imported from {shown.strip()}, not from where it was installed")
            pytest = (inside, "-m", "pytest", "-q", "-p", "no:cacheprovider")
            bare = ("-c", os.devnull, "--rootdir", tree / "tests", "--noconftest", "-o", "markers=smoke")
            run(*pytest, *bare, "tests/test_smoke.py", cwd=tree, env=environment)
            if whole:
                install(inside, f"{artifact}[smoke]")
                run(*pytest, "-m", "smoke and not libraries and not cuda", f"--junitxml={report}", cwd=tree, env=environment)
        except subprocess.CalledProcessError:
            return False
    return True


def install(python: Path, *what: object) -> None:
    """By the pip of this environment; an empty one then needs none of its own. Most modules are never loaded, so none is compiled ahead."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    run(*pip, "-c", CHECKOUT / "constraints.txt", *what)


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
