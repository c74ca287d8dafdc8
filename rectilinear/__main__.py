"""``python -m rectilinear``: what works here (info), how fast (bench), what to try on this machine (tune), what is kept (conform)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import rectilinear
from rectilinear import buffers
from rectilinear.backends.registry import BackendInfo, choice_error

_CHOSEN_BY = {"context": "use_backend", "process": "set_backend", "variable": "RECTILINEAR_BACKEND", "auto": "auto"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rectilinear", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="show every backend: usable, or why not; which one is active, and why")
    info.add_argument("--json", action="store_true", help="the same as JSON, for bug reports")
    commands.add_parser("bench", add_help=False, help="measure the backends here, and write a report; bench --help says more")
    commands.add_parser("tune", add_help=False, help="measure what the numba kernels guess of this machine; tune --help says more")
    commands.add_parser("conform", add_help=False, help="run every promise of the contract on a backend; conform --help says more")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        from rectilinear.measure import cli

        return cli.main(rest)
    if arguments.command == "tune":
        from rectilinear import tuning

        return tuning.main(rest)
    if arguments.command == "conform":
        from rectilinear.testing import cli as conformance

        return conformance.main(rest)
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
            "memory": _memory(),
            "tuned": _tuned(infos),
        }
        if error is not None:
            state["error"] = error
        print(json.dumps(state, indent=2))
        return 0
    _print_table(infos)
    memory = _memory()
    print(memory.get("error") or f"memory kept for reuse: {memory['held']:,} bytes of at most {memory['limit']:,} ({buffers.VARIABLE})")
    if _has_kernels(infos):
        print(_tuned_in_words(_tuned(infos)))
    if error is not None:
        print(error)
    return 0


def _memory() -> dict[str, int | str | None]:
    """Bytes kept for reuse, and the most that may be; why that is not known where its variable is bad."""
    held = rectilinear.held_memory()
    try:
        return {"held": held, "limit": buffers.memory_limit()}
    except ValueError as bad:
        return {"held": held, "limit": None, "error": str(bad)}


def _has_kernels(infos: Sequence[BackendInfo]) -> bool:
    return any(row.name == "numba" and row.usable for row in infos)


def _tuned(infos: Sequence[BackendInfo]) -> dict[str, dict[str, int]] | None:
    """What `tune` found on this machine, by dtype; None where it did not run, or there are no kernels to be tuned."""
    if not _has_kernels(infos):
        return None
    from rectilinear import tuning

    return tuning.state()


def _tuned_in_words(tuned: dict[str, dict[str, int]] | None) -> str:
    if tuned is None:
        return "host not tuned: the kernels go by their model of it, which python -m rectilinear tune would try out"
    found = [f"{name} {value} ({dtype})" for dtype, choices in tuned.items() for name, value in choices.items()]
    return f"host tuned: {', '.join(found) or 'the model stands'} (python -m rectilinear tune --reset forgets it)"


def _print_table(infos: Sequence[BackendInfo]) -> None:
    """In plain text, since this is what tells a user that a part is missing."""
    table = [["backend", "state", "version", "device", "threads", "runs on"]]
    for row in infos:
        state = f"active, by {_CHOSEN_BY[row.chosen_by]}" if row.chosen_by else "usable" if row.usable else "not usable"
        cells = (row.name, state, row.version, row.device, row.threads, row.simd)
        table.append(["" if cell is None else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    print(f"rectilinear {rectilinear.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}\n")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()
    for row in infos:
        if row.reason:
            print(f"{row.name}: {row.reason}")
    print("generic is never chosen: it serves the arrays of libraries that no other backend serves")


def _run() -> int:
    """`main`, for a reader who may leave before the end: ``python -m rectilinear info | head -1``."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 0


if __name__ == "__main__":
    sys.exit(_run())
