"""The code blocks of README, CONTRIBUTING and docs/, for tests/test_documents.py; ``python -m tests.documents`` counts them.

A block's language says how it runs:

- ``python``, ``pycon``: as it stands, or as a doctest where it has ``>>>``. The blocks of a page share their names, in order.
- ``sh``: in bash, in a folder that has what the checkout has. Commands that take minutes, or change the machine, are checked and not
  run: `PRELUDE` says which, and how.
- ``toml``: is read.
- ``text``: output, formulas; nothing runs.

A comment on the line before says more: ``<!-- GPU -->``, a block that runs under TESTS_ON_CUPY=1 alone; ``<!-- not run: WHY -->``.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "pycon", "sh", "toml", "text")
LARGE = re.compile(r"^(?:>>> )?\s*(?:import|from) (?:torch|jax|dask|distributed|rectilinear\.(?:torch|jax|dask))\b", re.M)
"""Imports of the libraries that `make test` does without."""

_FENCE = re.compile(r"^(?:<!-- (?P<note>.*?) -->\n)?(?P<indent> *)```(?P<info>.*)\n(?P<code>(?:.*\n)*?)(?P=indent)```$", re.M)

PRELUDE = r"""
set -euo pipefail
make() { command make --dry-run "$@" > made; }
pip() { command python -m tests.documents "$@"; }
.venv-gpu/bin/pip() { pip "$@"; }
.ci/run() { test -x .ci/run; }
env() { while [ "$1" = -u ]; do unset "$2"; shift 2; done; "$@"; }
pytest() { command python -m pytest --collect-only -q -W ignore "$@" > collected; }
python() {
    case "$*" in
        "-m rectilinear bench"*--from* | "-m rectilinear bench"*--compare*) command python "$@" --help > helped ;;
        "-m rectilinear bench"*) command python "$@" --list > listed ;;
        "-m rectilinear tune"*) command python "$@" --help > helped ;;
        "-m venv "*) mkdir -p "$3/bin" && : > "$3/bin/activate" ;;
        *) command python "$@" ;;
    esac
}
"""
"""make: the targets exist, and so does what they need. pip: the project has these extras. bench: there are such cases."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    note: str
    code: str

    @property
    def is_python(self) -> bool:
        return self.language in ("python", "pycon")

    @property
    def on_gpu(self) -> bool:
        return self.note == "GPU"

    @property
    def runs(self) -> bool:
        return self.language in ("python", "pycon", "sh") and not self.note.startswith("not run: ")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        indent = len(found["indent"])
        code = "".join(each[indent:] for each in found["code"].splitlines(keepends=True))
        yield Block(page, line, found["info"], found["note"] or "", code)


def fences(page: Path) -> int:
    """How many blocks there should be: half of the lines that open or close one."""
    return len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)) // 2


def needs_large_library(page: Path) -> bool:
    return any(LARGE.search(block.code) for block in blocks(page))


# ---------------------------------------------------------------- pip, as PRELUDE has it


def unknown_extras(arguments: list[str]) -> list[str]:
    """What ``pip install`` would not find in this project."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [re.fullmatch(r"(?:\.|rectilinear)(?:\[(.*)\])?", argument) for argument in arguments]
    wanted = [extra for match in named if match and match[1] for extra in match[1].split(",")]
    return [extra for extra in wanted if extra not in project["optional-dependencies"]]


_CHECKED = re.compile(r"\s*(?:\w+=\S+ )*(?:make|pip|pytest|env|\S+/pip|\.ci/run|python -m (?:venv|rectilinear (?:bench|tune)))\b")
"""Commands that `PRELUDE` checks and does not run."""


def count() -> Counter[str]:
    kinds: Counter[str] = Counter()
    for block in (block for page in pages() for block in blocks(page)):
        if block.on_gpu:
            kinds["blocks run on a GPU alone"] += 1
        elif not block.runs:
            kinds[block.note or f"blocks of {block.language}"] += 1
        elif block.is_python:
            kinds["Python blocks run in make test-all" if needs_large_library(block.page) else "Python blocks run in make test"] += 1
        else:
            kinds["shell blocks run"] += 1
            for line in filter(None, block.code.splitlines()):
                kinds["commands in them checked without being run" if _CHECKED.match(line) else "commands in them run"] += 1
    return kinds


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["install"]:
        unknown = unknown_extras(arguments)
        print(*(f"no such extra: {extra}" for extra in unknown), sep="\n", file=sys.stderr)
        return len(unknown)
    print(f"{len(pages())} pages:", ", ".join(f"{number} {kind}" for kind, number in sorted(count().items())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
