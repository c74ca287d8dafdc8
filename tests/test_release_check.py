"""tools/release_check.py: what it says where an sdist, a wheel, the changelog or the citation is not as it should be."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.release_check import misdated, unlike_checkout, unlike_sdist

SOURCE = {"LICENSE": "free", "PKG-INFO": "Version: 1.0", "rectilinear/__init__.py": "x = 1", "tests/test_x.py": ""}
INFO = "rectilinear-1.0.dist-info/"
WHEEL = {"rectilinear/__init__.py": "x = 1", f"{INFO}METADATA": "Version: 1.0", f"{INFO}licenses/LICENSE": "free"} | dict.fromkeys(
    (f"{INFO}WHEEL", f"{INFO}RECORD"), ""
)
IN_GIT = [".ci/run", *(name for name in SOURCE if name != "PKG-INFO")]


def sdist(folder: Path, files: dict[str, str] = SOURCE) -> Path:
    with tarfile.open(folder / "rectilinear-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"rectilinear-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return folder / "rectilinear-1.0.tar.gz"


def wheel(folder: Path, files: dict[str, str] = WHEEL) -> Path:
    with zipfile.ZipFile(folder / "rectilinear-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return folder / "rectilinear-1.0-py3-none-any.whl"


def test_what_is_as_it_should_be_passes(tmp_path: Path) -> None:
    assert [*unlike_checkout(sdist(tmp_path), IN_GIT), *unlike_sdist(wheel(tmp_path), sdist(tmp_path))] == []


def test_an_sdist_has_what_git_has(tmp_path: Path) -> None:
    (lacks,) = unlike_checkout(sdist(tmp_path), [*IN_GIT, "docs/new.md"])
    assert lacks.endswith("lacks docs/new.md")
    (stray,) = unlike_checkout(sdist(tmp_path, SOURCE | {"notes.txt": ""}), IN_GIT)
    assert stray.endswith("has notes.txt, which should not be there")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tests/test_x.py": ""}, "has tests/test_x.py, which should not be there"),
        ({"rectilinear/__init__.py": None}, "lacks rectilinear/__init__.py"),
        ({"rectilinear/__init__.py": "x = 2"}, "rectilinear/__init__.py is not as in the sdist"),
        ({f"{INFO}METADATA": "Version: 2.0"}, "METADATA is not as in the sdist"),
    ],
)
def test_a_wheel_has_the_package_of_the_sdist(tmp_path: Path, change: dict[str, str | None], words: str) -> None:
    files = {name: content for name, content in (WHEEL | change).items() if content is not None}
    (wrong,) = unlike_sdist(wheel(tmp_path, files), sdist(tmp_path))
    assert wrong.endswith(words)


CHANGES = "# Changelog\n\n## 1.0 (2026-01-31)\n\n- First.\n"
UNRELEASED = CHANGES.replace("## 1.0", "## Unreleased\n\n- More.\n\n## 1.0")
CITATION = "version: 1.0\ndate-released: 2026-01-31\n"


@pytest.mark.parametrize(
    ("version", "changes", "citation", "words"),
    [
        ("1.0", CHANGES, CITATION, None),
        ("1.1.dev0", UNRELEASED, CITATION, None),
        ("1.1", CHANGES, CITATION, "the newest release is 1.0, this is 1.1"),
        ("1.0", UNRELEASED, CITATION, "a section Unreleased goes with a version that ends in .dev0, and this is 1.0"),
        ("1.1.dev0", CHANGES, CITATION, "a section Unreleased goes with a version that ends in .dev0, and this is 1.1.dev0"),
        ("1.0", "## Unreleased\n", CITATION, "no heading of a release, such as ## 1.0.0 (2026-01-31)"),
        ("1.0", CHANGES, CITATION.replace("1.0", "0.9"), "has no line 'version: 1.0', as CHANGELOG.md has it"),
        ("1.0", CHANGES, CITATION.replace("31", "30"), "has no line 'date-released: 2026-01-31', as CHANGELOG.md has it"),
    ],
)
def test_versions_and_dates_agree(version: str, changes: str, citation: str, words: str | None) -> None:
    found = list(misdated(version, changes, citation))
    assert [line.partition(": ")[2] for line in found] == [words] * bool(words)
