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
    """In `file` of the package `old`, which stands there once, becomes `new`."""

    file: str
    old: str
    new: str

    def made_in(self, package: Path) -> str:
        """The text of the file with the edit; ValueError where the code to change is not there any more, or is not the only one."""
        text = (package / self.file).read_text(encoding="utf-8")
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"what it replaces stands {times} times in {self.file}, and should once: {self.old}")
        return text.replace(self.old, self.new)


class Mutant(NamedTuple):
    name: str
    edits: tuple[Edit, ...]
    test: str = ""
    """The test that has to find it, where one is named."""
    isa: str = "host"
    """What kernels are held to then, one of `rectilinear.measure.isa.NAMES`, where wider ones do not come by it."""

    @property
    def file(self) -> str:
        return Path(self.edits[0].file).name


def read(path: Path) -> list[Mutant]:
    """The tables ``mutant`` of a file: name, file, old, new, maybe test and isa; further edits of a bug in tables ``mutant.also``."""
    with path.open("rb") as file:
        tables = tomllib.load(file)["mutant"]
    return [
        Mutant(
            table.pop("name"),
            test=table.pop("test", ""),
            isa=table.pop("isa", "host"),
            edits=tuple(Edit(**edit) for edit in (*table.pop("also", ()), table)),
        )
        for table in tables
    ]


@contextmanager
def checkout(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with the package, its tests and tools, and the bug planted; SystemExit where it cannot be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("rectilinear", "tests", "tools"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for edit in mutant.edits if mutant else ():
            try:
                text = edit.made_in(folder / "rectilinear")
            except (ValueError, OSError) as error:
                raise SystemExit(f"{mutant and mutant.name}: {error}") from None
            (folder / "rectilinear" / edit.file).write_text(text, encoding="utf-8")
        yield folder
