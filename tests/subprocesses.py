"""Run a piece of Python in a process of its own, with a time limit: a new one, or one forked from a process that waits."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 120


def start(code: str, *, stdin: int | None = None, **environment: str | None) -> subprocess.Popen[str]:
    """Start it; variables that are None are taken away. Warnings are errors there as well."""
    merged = os.environ | {"PYTHONPATH": str(ROOT)} | {k: v for k, v in environment.items() if v is not None}
    for name in [k for k, v in environment.items() if v is None]:
        merged.pop(name, None)
    command = [sys.executable, "-W", "error", "-X", "faulthandler", "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, env=merged, text=True, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")


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


SERVER = """
import json, os, sys, tempfile, traceback
{preparation}
for line in sys.stdin:
    code, environment = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                for name, value in environment.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({{name: value}})
                exec(compile(code, "<string>", "exec"), {{"__name__": "__main__"}})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""


@contextlib.contextmanager
def forks(preparation: str) -> Iterator[Callable[..., str]]:
    """As `run`, in forks of a process that has done the slow part: numba takes most of a second to start.

    For what is read from the environment after `preparation`, and where nothing has to happen at exit.
    """
    server = start(SERVER.format(preparation=preparation), stdin=subprocess.PIPE)
    assert server.stdin is not None
    assert server.stdout is not None

    def run_in_fork(code: str, **environment: str | None) -> str:
        print(json.dumps([textwrap.dedent(code), environment]), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, server.communicate()
        status, out, err = json.loads(answer)
        assert (status, err) == (0, ""), f"status {status}: {out}{err}"
        return out

    try:
        yield run_in_fork
    finally:
        finish(server)
