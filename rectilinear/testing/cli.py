"""``python -m rectilinear conform``: which promises a backend keeps, a line a promise, and what was met where one is broken."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import rectilinear
from rectilinear.errors import BackendError
from rectilinear.extras import how_to_install
from rectilinear.testing import NEEDED
from rectilinear.testing.lib import Lib, libs_for, version_of
from rectilinear.testing.promises import PROMISES

if TYPE_CHECKING:
    from rectilinear.testing.kit import Outcome

_SHOWN = 3
"""Failing examples of a promise that are printed; --json has them all."""

_DESCRIPTION = """Run every promise of the backend contract on a backend. The exit status is 0 if all that apply hold, 1 if one is
broken, 2 if the backend cannot be tried. A promise that the arrays cannot keep (out= of immutable ones) does not apply, and is shown with
the reason."""

_ARRAYS = """A backend is tried on NumPy arrays, chosen by its name, writable and read-only ones. One that computes in another library is
tried on that library's arrays too, if it is the backend that serves them. --library LIBRARY (its import name) takes the arrays of that
library alone: conform cupy --library numpy, conform generic --library torch. Without it, generic is tried on array_api_strict."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m rectilinear conform", description=_DESCRIPTION, epilog=_ARRAYS)
    parser.add_argument("name", metavar="NAME", help="a backend, as python -m rectilinear info lists it; generic too")
    parser.add_argument(
        "--library", help="take the arrays of this library alone: its import name, such as torch, jax, dask, array_api_strict"
    )
    parser.add_argument("--only", action="append", metavar="PROMISE", help="this promise alone; may be given again", choices=_names())
    parser.add_argument("--json", action="store_true", help="the same as JSON, with every failing example")
    asked = parser.parse_args(argv)
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        print(f"conform: not installed: {', '.join(absent)}; {how_to_install('testing')}", file=sys.stderr)
        return 2
    try:
        libs = libs_for(asked.name, asked.library)
    except (BackendError, ImportError) as error:
        print(f"conform: {error}", file=sys.stderr)
        return 2
    from rectilinear.testing.kit import conform

    if not asked.json:
        print(f"rectilinear {rectilinear.__version__}, backend {asked.name}, on {_in_words(libs)}", flush=True)
    outcomes = conform(libs, asked.only, said=(lambda outcome: None) if asked.json else _print)
    if asked.json:
        print(json.dumps(record(asked.name, libs, outcomes), indent=2))
    else:
        _print_summary(asked.name, outcomes)
    return 1 if any(outcome.state == "broken" for outcome in outcomes) else 0


def _names() -> list[str]:
    return [promise.name for promise in PROMISES]


def _in_words(libs: Sequence[Lib]) -> str:
    words = []
    for lib in libs:
        library = f"{lib.library} {version_of(lib.library)}".strip()
        words.append(f"{'read-only ' if lib.readonly_inputs else ''}{library} arrays")
    return ", ".join(words)


def _print(outcome: Outcome) -> None:
    promise, tests = outcome.promise, f"{outcome.tests} test{'' if outcome.tests == 1 else 's'}"
    if outcome.state == "broken":
        count = f"{len(outcome.failures)} of {tests} failed" if outcome.failures else outcome.reason
        print(f"{promise.name:<10} BROKEN          {promise.title}: {count}")
        for failure in outcome.failures[:_SHOWN]:
            print(f"    {failure.test}")
            print("".join(f"        {line}\n" for line in failure.words.splitlines()), end="")
        if len(outcome.failures) > _SHOWN:
            print(f"    and {len(outcome.failures) - _SHOWN} more; --json shows all")
    elif outcome.reason:
        print(f"{promise.name:<10} does not apply  {outcome.reason}")
    else:
        print(f"{promise.name:<10} holds           {promise.title} ({tests})")
    sys.stdout.flush()


def _print_summary(name: str, outcomes: Sequence[Outcome]) -> None:
    count = {state: sum(outcome.state == state for outcome in outcomes) for state in ("holds", "broken", "does not apply")}
    told = f"{count['holds']} hold, {count['broken']} broken, {count['does not apply']} do not apply"
    print(f"{name} {'does not keep' if count['broken'] else 'keeps'} the contract: {told}")


def record(name: str, libs: Sequence[Lib], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "rectilinear": rectilinear.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": name,
        "arrays": [{"name": lib.name, "library": lib.library, "version": version_of(lib.library)} for lib in libs],
        "conforms": all(outcome.state != "broken" for outcome in outcomes),
        "promises": [
            {
                "name": outcome.promise.name,
                "title": outcome.promise.title,
                "state": outcome.state,
                "tests": outcome.tests,
                "reason": outcome.reason,
                "failures": [{"test": failure.test, "words": failure.words} for failure in outcome.failures],
            }
            for outcome in outcomes
        ],
    }
