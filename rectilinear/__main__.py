"""``python -m rectilinear``: what works here (info), and how fast (bench)."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import rectilinear
from rectilinear.backends.registry import BackendInfo, choice_error

_CHOSEN_BY = {
    "context": "active (chosen by use_backend)",
    "process": "active (chosen by set_backend)",
    "variable": "active (chosen by RECTILINEAR_BACKEND)",
    "auto": "active (chosen by auto)",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rectilinear", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="show every backend: usable, or why not; which one is active, and why")
    info.add_argument("--json", action="store_true", help="the same as JSON, for bug reports")
    commands.add_parser("bench", add_help=False, help="measure the backends here, and write a report; bench --help says more")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        from rectilinear.measure import cli

        return cli.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _info(arguments.json)


def _info(as_json: bool) -> int:
    infos = rectilinear.list_backends()
    error = choice_error()
    if as_json:
        state = {
            "rectilinear": rectilinear.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "backends": [asdict(row) for row in infos],
        }
        if error is not None:
            state["error"] = error
        print(json.dumps(state, indent=2))
        return 0
    _print_table(infos)
    if error is not None:
        print(error)
    return 0


def _print_table(infos: Sequence[BackendInfo]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"rectilinear {rectilinear.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    for column in ("backend", "state", "version", "device", "threads", "SIMD / BLAS kernel"):
        table.add_column(column, overflow="fold")
    for row in infos:
        state = _CHOSEN_BY[row.chosen_by] if row.chosen_by else ("usable" if row.usable else "not usable")
        if row.name == "generic":
            state = "serves other libraries' arrays"
        if row.reason:
            state += f": {row.reason}"
        cells = (row.name, state, row.version, row.device, row.threads, row.simd)
        style = "bold" if row.active else None if row.usable else "dim"
        # As Text: rich would read the brackets of a reason such as "pip install rectilinear[numba]" as markup.
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in cells), style=style)
    Console(soft_wrap=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
