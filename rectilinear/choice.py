"""A choice that can be made in several places: the backend's, the number of threads'. Strongest first:

the context (a ``with`` block), the process (a ``set_...`` function), and what stands where neither has chosen, usually a variable of
the environment, found when it is first needed and kept. What can be chosen, and how a bad choice is told, is the business of
`rectilinear.backends.registry` and `rectilinear.threads`.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

_lock = threading.Lock()


def _renew_lock() -> None:
    # A lock held by another thread at the moment of a fork would stay locked in the child for ever.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class _Open(NamedTuple):
    """A ``with`` block that is open: what it chose, which one it is, the thread that opened it, and the block around it."""

    value: Any
    block: object
    thread: int
    outer: _Open | None


class Choice(Generic[T]):
    """One choice of values other than None.

    Parameters
    ----------
    name : str
    otherwise : callable
        Gives the value where nobody has chosen; called by the first `current` that needs it, and again after ``choose(None)``. What
        it raises, `current` raises, and the next one calls it again.

    Examples
    --------
    >>> colour = Choice("colour", lambda: "grey")
    >>> colour.choose("red")
    >>> with Block(colour, "blue"):
    ...     colour.current()
    'blue'
    >>> colour.choose(None)
    >>> colour.current()
    'grey'
    """

    __slots__ = ("_open", "_otherwise", "ever_open", "settled")

    # A ContextVar alone cannot be the process's choice, new threads would not see it; a global alone cannot be a context's.
    def __init__(self, name: str, otherwise: Callable[[], T]) -> None:
        self._open: ContextVar[_Open | None] = ContextVar(f"rectilinear_{name}", default=None)
        self._otherwise = otherwise
        self.ever_open = False
        """Most programs open no block, and save looking for one."""
        self.settled: T | None = None
        """What holds outside of blocks; None until it is needed. For hot paths to look at first."""

    def current(self) -> T:
        """The value chosen here and now."""
        if self.ever_open:
            block = self._open.get()
            if block is not None and (block.thread == threading.get_ident() or not _in_threads_own_context()):
                return block.value  # type: ignore[no-any-return]
        value = self.settled
        return self._find() if value is None else value

    def _find(self) -> T:
        found = self._otherwise()
        with _lock:  # and not before: `otherwise` may import a module that asks, too
            if self.settled is None:
                self.settled = found
        return found

    def choose(self, value: T | None) -> None:
        """Choose for the process, threads started later included. None drops that choice, and what was found where there was none."""
        with _lock:
            self.settled = value


class Block(ContextDecorator, Generic[T]):
    """Choose `value` for a ``with`` block or a decorated function, in this thread or task and the tasks started from it. A generator or
    an ``async`` function, whose body runs after the call, is not decorated: TypeError.

    Tasks and ``asyncio.to_thread`` inherit the choice, new threads do not. Leaving the block restores what was before. One object may
    be open in several threads, and more than once.
    """

    def __init__(self, choice: Choice[T], value: T) -> None:
        self._choice = choice
        self._value = value

    def __call__(self, func: Callable[..., Any]) -> Any:
        if inspect.iscoroutinefunction(func) or inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
            name = getattr(func, "__name__", repr(func))
            raise TypeError(f"{type(self).__name__}: {name} runs after the call that a decorator sees; put a with block into it")
        return super().__call__(func)

    def __enter__(self) -> Any:
        choice = self._choice
        choice.ever_open = True
        choice._open.set(_Open(self._value, self, threading.get_ident(), choice._open.get()))
        return self._value

    def __exit__(self, *_: object) -> None:
        # The chain, and not a token kept on self, so that one object may be open more than once; its own link of the chain, and not
        # the last, since a generator may be closed inside of another block.
        self._choice._open.set(_without(self._choice._open.get(), self))


def _without(link: _Open | None, block: object) -> _Open | None:
    if link is None or link.block is block:
        return link and link.outer
    return link._replace(outer=_without(link.outer, block))


_mark: ContextVar[object] = ContextVar("rectilinear_mark")


def _in_threads_own_context() -> bool:
    """Whether the current context is the copy of its starter's that this thread runs in, and not one handed over since.

    On free-threaded builds (``sys.flags.thread_inherit_context``) a new thread starts with such a copy, which elsewhere it does
    not; what it holds from outside was not meant for the thread. A task's or ``asyncio.to_thread``'s context was.
    """
    own = getattr(threading.current_thread(), "_context", None)
    if own is None:
        return False
    mark = object()
    _mark.set(mark)  # in the current context; a thread's own context object tells whether it is that one
    return own.get(_mark) is mark
