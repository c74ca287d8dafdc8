"""What messages name as extras is there, and right in a checkout. What they say: tests/test_smoke.py."""

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


def test_every_command_is_right_in_a_checkout_too() -> None:
    """No package index may know the name, and whoever uses a checkout as it is has to be told what to type there."""
    for path in Path(rectilinear.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for named in re.finditer(r"'rectilinear\[([\w,{}]+)\]'", text):
            around = text[max(0, named.start() - 100) : named.end() + 60]
            assert f"'.[{named[1]}]'" in around, around
