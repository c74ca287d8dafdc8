"""What messages name as extras is there, and in one place. What they say: tests/test_smoke.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import rectilinear
from rectilinear import extras

CHECKOUT = Path(__file__).parent.parent


def test_every_extra_that_messages_name_is_one() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert set(get_args(extras.Extra)) <= set(project["optional-dependencies"])


def test_extras_are_named_in_one_place() -> None:
    """So that no message gives a command that is right for an installed package only."""
    package = Path(rectilinear.__file__).parent
    named = {path.name for path in package.rglob("*.py") if re.search(r"rectilinear\[\w", path.read_text(encoding="utf-8"))}
    assert named == {"extras.py"}
