"""Planted bugs: read from a file of TOML, each put into a checkout of its own, where nothing can find the code that is right."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Edit(NamedTuple):
    """In `file` of the package, the first `old` becomes `new`."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    name: str
    edits: tuple[Edit, ...]

    @property
    def file(self) -> str:
        return Path(self.edits[0].file).name


def read(path: Path) -> list[Mutant]:
    """The tables ``mutant`` of a file: name, file, old, new; further edits of the same bug in tables ``mutant.also``."""
    with path.open("rb") as file:
        tables = tomllib.load(file)["mutant"]
    return [Mutant(table.pop("name"), tuple(Edit(**edit) for edit in (*table.pop("also", ()), table))) for table in tables]


@contextmanager
def checkout(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with the package, its tests and tools, and the bug planted; SystemExit where the code to change is not there any more."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("rectilinear", "tests", "tools"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for edit in mutant.edits if mutant else ():
            file = folder / "rectilinear" / edit.file
            text = file.read_text(encoding="utf-8")
            if edit.old not in text:
                raise SystemExit(f"{mutant and mutant.name}: what it replaces is no longer in {edit.file}")
            file.write_text(text.replace(edit.old, edit.new, 1), encoding="utf-8")
        yield folder
