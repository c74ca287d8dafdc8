"""What pyproject.toml asks for, so that no other file has to list it again.

Usage: python tools/requirements.py EXTRA ...           names and ranges, one a line: the project's own and those of the extras
       python tools/requirements.py --floors EXTRA ...  pip's constraints for the lowest versions that these ranges allow

The test runner is no floor: it keeps the version of constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
RUNNERS = ("pytest", "hypothesis")

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?(>=(?P<floor>[\w.]+))?")


def requirements(extras: list[str]) -> Iterator[str]:
    """The requirements of the project and of these extras, which may name one another."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    yield from project["dependencies"]
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            if _part(requirement, "name") == project["name"]:
                named = _part(requirement, "extras").split(",")
                yield from (r for r in requirements(named) if r not in project["dependencies"])
            else:
                yield requirement


def floors(extras: list[str]) -> Iterator[str]:
    for requirement in requirements(extras):
        name = _part(requirement, "name")
        if name.startswith(RUNNERS):
            (pinned,) = (line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if line.startswith(f"{name}=="))
            yield pinned
        else:
            yield f"{name}=={_part(requirement, 'floor')}"


def _part(requirement: str, part: str) -> str:
    found = _REQUIREMENT.match(requirement)
    if not found or not found[part]:
        raise SystemExit(f"pyproject.toml: {requirement!r} names no {part}; write name[extras]>=floor")
    return found[part]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floors", action="store_true")
    parser.add_argument("extras", nargs="*")
    asked = parser.parse_args()
    print(*dict.fromkeys((floors if asked.floors else requirements)(asked.extras)), sep="\n")
