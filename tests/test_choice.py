"""The choice of a backend and that of a number of threads are one thing: who chooses, who sees it, and what a bad variable does."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear import threads
from rectilinear.__main__ import main
from rectilinear.backends import registry

from .subprocesses import run


@dataclass(frozen=True)
class Way:
    """One of the two choices, with three values of it."""

    choose: Callable[[Any], None]
    block: Callable[[Any], Any]
    look: Callable[[], Any]
    variable: str
    values: tuple[Any, Any, Any]


WAYS = {
    "backend": Way(r.set_backend, r.use_backend, r.get_backend, "RECTILINEAR_BACKEND", ("numpy", "loopback", "numba")),
    "threads": Way(r.set_num_threads, r.num_threads, r.get_num_threads, "RECTILINEAR_NUM_THREADS", (3, 4, 5)),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (threads.VARIABLE, *threads.LIMITS):
        monkeypatch.delenv(name, raising=False)
    r.set_num_threads(None)
    yield
    monkeypatch.undo()
    r.set_num_threads(None)


def test_functions_whose_body_runs_later_are_not_decorated(way: Way) -> None:
    async def task() -> None: ...

    def values() -> Iterator[int]:
        yield 1

    async def later() -> Any:
        yield 1

    for function in (task, values, later, functools.partial(task)):
        name = re.escape(getattr(function, "__name__", repr(function)))
        with pytest.raises(TypeError, match=f"{name} runs after the call.*with block"):
            way.block(way.values[0])(function)
    assert way.block(way.values[0])(way.look)() == way.values[0]


def test_the_strongest_counts(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    by_variable, by_process, by_context = way.values
    monkeypatch.setenv(way.variable, str(by_variable))
    way.choose(None)
    assert way.look() == by_variable
    way.choose(by_process)
    with way.block(by_context):
        assert way.look() == by_context
    assert way.look() == by_process
    monkeypatch.setenv(way.variable, str(by_context))
    way.choose(None)
    assert way.look() == by_context, "the variable is read anew"


def test_a_thread_that_inherits_its_starters_context_ignores_it(way: Way) -> None:
    """What a free-threaded build does by itself (sys.flags.thread_inherit_context), done by hand here."""
    by_process, by_context, _ = way.values

    class Inheriting(threading.Thread):
        def start(self) -> None:
            self._context = contextvars.copy_context()
            super().start()

        def run(self) -> None:
            self.seen = self._context.run(way.look)
            self.given = meant.run(way.look)  # as asyncio.to_thread does

    way.choose(by_process)
    with way.block(by_context):
        meant = contextvars.copy_context()
        thread = Inheriting()
        thread.start()
        thread.join()
    assert (thread.seen, thread.given) == (by_process, by_context)


def test_tasks_inherit_and_do_not_leak(way: Way) -> None:
    by_process, by_context, other = way.values

    async def child() -> list[Any]:
        await asyncio.sleep(0)
        return [way.look(), await asyncio.to_thread(way.look)]

    async def stranger() -> Any:
        with way.block(other):
            await asyncio.sleep(0.01)
            return way.look()

    async def all_together() -> list[Any]:
        with way.block(by_context):
            return await asyncio.gather(child(), stranger(), child())

    way.choose(by_process)
    assert asyncio.run(all_together()) == [[by_context] * 2, other, [by_context] * 2]
    assert way.look() == by_process


def test_blocks_closed_out_of_order_and_opened_twice(way: Way) -> None:
    by_process, by_context, other = way.values

    def holder() -> Any:
        with way.block(other):
            yield

    way.choose(by_process)
    held = holder()
    next(held)
    block = way.block(by_context)
    with block:
        held.close()
        with block:
            assert way.look() == by_context
        assert way.look() == by_context
    assert way.look() == by_process


@pytest.mark.parametrize("module", [threads, registry])
def test_a_reload_keeps_what_was_chosen(module: Any) -> None:
    r.set_num_threads(4)
    r.set_backend("loopback")
    before = dict(vars(module))
    try:
        with r.num_threads(3), r.use_backend("numpy"):
            importlib.reload(module)
            assert (r.get_num_threads(), r.get_backend()) == (3, "numpy")
        assert (r.get_num_threads(), r.get_backend()) == (4, "loopback")
    finally:
        vars(module).update(before)  # other tests pickle its functions, which have to be found where they say they are


# The number of threads and the environment


@pytest.mark.parametrize(
    ("omp", "numba", "limit"),
    [("1", None, 1), (None, "1", 1), ("1,7", "9", 1), (" 1 ", "", 1), ("x", "-1", None), ("0", "1.5", None), ("999999", None, None)],
)
def test_others_variables_are_upper_limits(monkeypatch: pytest.MonkeyPatch, omp: str | None, numba: str | None, limit: int | None) -> None:
    monkeypatch.setattr(threads, "_allowed_cores", lambda: 8)
    monkeypatch.setattr(threads, "_cgroup_cores", lambda: None)
    for name, value in (("OMP_NUM_THREADS", omp), ("NUMBA_NUM_THREADS", numba)):
        if value is not None:
            monkeypatch.setenv(name, value)
    r.set_num_threads(None)
    assert r.get_num_threads() == threads.call_threads() == (limit or 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert r.get_num_threads() == (limit or 8), "read at the first call"
    monkeypatch.setenv("RECTILINEAR_NUM_THREADS", "6")
    r.set_num_threads(None)
    assert r.get_num_threads() == 6, "our own variable is no limit but the choice"


def numba_info() -> r.backends.registry.BackendInfo:
    (info,) = (info for info in r.list_backends() if info.name == "numba")
    return info


def test_the_listed_number_is_what_a_call_made_here_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numba_info().threads == r.get_num_threads()
    r.set_num_threads(7)
    assert numba_info().threads == 7
    with r.num_threads(2):
        assert numba_info().threads == 2
    r.set_num_threads(None)
    monkeypatch.setattr(threads, "_allowed_cores", lambda: 5)
    monkeypatch.setattr(threads, "_cgroup_cores", lambda: None)
    r.set_num_threads(None)
    assert numba_info().threads == 5


BAD = """
import numpy as np, rectilinear as r
x, w = np.ones((3, 2)), np.ones((2, 4))
for _ in range(2):
    try:
        r.affine_forward(x, w, None)
    except ValueError as error:
        assert str(error).startswith("RECTILINEAR_NUM_THREADS: the number of threads must be from 1 to 1024, not "), error
    else:
        raise AssertionError(f"computed by {r.get_backend()}")
assert r.get_backend() == "numba"
with r.num_threads(1):
    r.affine_forward(x, w, None)
r.set_num_threads(2)
assert r.affine_forward(x, w, None)[0][0, 0] == 2
(info,) = [info for info in r.list_backends() if info.active]
assert (info.name, info.threads, info.chosen_by) == ("numba", 2, "auto"), info
"""


@pytest.mark.parametrize("text", ["auto", "0", *(pytest.param(text, marks=pytest.mark.nightly) for text in ("4,2", "-1"))])
def test_a_bad_variable_never_changes_the_backend(text: str) -> None:
    run(BAD, RECTILINEAR_NUM_THREADS=text, RECTILINEAR_BACKEND=None)


@pytest.mark.parametrize("text", ["auto", "0"])
def test_a_bad_variable_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str) -> None:
    monkeypatch.setenv("RECTILINEAR_NUM_THREADS", text)
    r.set_num_threads(None)
    info = numba_info()
    assert (info.usable, info.threads) == (True, None)
    assert f"must be from 1 to 1024, not {text!r}" in (info.reason or "")
    assert main(["info"]) == 0
    assert "must be from 1 to 1024" in " ".join(capsys.readouterr().out.split())
    assert main(["info", "--json"]) == 0
    (row,) = (row for row in json.loads(capsys.readouterr().out)["backends"] if row["name"] == "numba")
    assert row["threads"] is None
    with pytest.raises(ValueError, match="from 1 to 1024"), r.use_backend("numba"):
        r.relu_forward(np.ones(3))
