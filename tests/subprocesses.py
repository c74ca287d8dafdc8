"""Run a piece of Python in a process of its own, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 120


def start(code: str, **environment: str | None) -> subprocess.Popen[str]:
    """Start it; variables that are None are taken away. Warnings are errors there as well."""
    merged = os.environ | {"PYTHONPATH": str(ROOT)} | {k: v for k, v in environment.items() if v is not None}
    for name in [k for k, v in environment.items() if v is None]:
        merged.pop(name, None)
    command = [sys.executable, "-W", "error", "-X", "faulthandler", "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, env=merged, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")


def finish(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> str:
    """What it printed. It must end in time, with status 0, and say nothing on stderr."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit_s} s; so far: {out}{err}") from None
    assert (process.returncode, err) == (0, ""), f"status {process.returncode}: {out}{err}"
    return out


def run(code: str, limit_s: float = LIMIT_S, **environment: str | None) -> str:
    return finish(start(code, **environment), limit_s)
