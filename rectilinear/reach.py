"""Which arrays a function holds, and where: in its closures, defaults, globals and `self`, and in the objects behind these.

For `rectilinear.graphs`, whose records read such arrays by address, and must know when another has been put in the place of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from rectilinear.backends.contract import Array

_MOST_OBJECTS = 100_000  # looked at; what lies beyond, a data set in a list say, is not found

_LEAVES = (type, ModuleType, BuiltinFunctionType, CodeType, np.ndarray, np.generic, np.dtype, str, bytes, int, float, complex, type(None))
_LIBRARIES = ("rectilinear.", "cupy", "numpy", "array_api_compat")  # whose functions hold nothing of their users'

_INNER = ("rectilinear.graphs", "rectilinear.backends", "cupy")  # whose objects hold what belongs to them, but for the function captured


class _Slot(str):
    """The name of an attribute that lies in a slot of its object, not in a dict."""

    __slots__ = ()


class _Edge(NamedTuple):
    """`child` is at `key` of `where`: a dict, a list, a closure's cell, or an object with a `_Slot`; None where it cannot be replaced."""

    owner: int
    where: Any
    key: Any
    child: Any

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.owner, id(self.where), self.key, id(self.child)


class Held:
    """Arrays that are to stay alive, and the places where they are to be found."""

    def __init__(self, arrays: list[Array], edges: list[_Edge]) -> None:
        self._arrays = arrays
        in_slots = [edge for edge in edges if isinstance(edge.key, _Slot)]
        edges = [edge for edge in edges if not isinstance(edge.key, _Slot)]
        self._slots = [(edge.where, str(edge.key), edge.child) for edge in in_slots]
        self._dicts: list[tuple[dict[Any, Any], Any, Any]] = [
            (edge.where, edge.key, edge.child) for edge in edges if isinstance(edge.where, dict)
        ]
        self._lists: list[tuple[list[Any], Any, Any]] = [
            (edge.where, edge.key, edge.child) for edge in edges if isinstance(edge.where, list)
        ]
        self._cells = [(edge.where, edge.child) for edge in edges if isinstance(edge.where, CellType)]

    def in_place(self) -> bool:
        """Whether each is where it was. At every replay, so it looks at no more than identities."""
        for where, key, child in self._dicts:
            if where.get(key) is not child:
                return False
        for owner, name, child in self._slots:
            if getattr(owner, name, None) is not child:
                return False
        try:
            for items, place, child in self._lists:
                if items[place] is not child:
                    return False
            for cell, child in self._cells:
                if cell.cell_contents is not child:
                    return False
        except (IndexError, ValueError):  # a shorter list, an empty cell
            return False
        return True


def arrays_in(roots: Iterable[Any], is_array: Callable[[Any], bool]) -> list[Array]:
    """The arrays that can be reached from `roots`."""
    return list({id(edge.child): edge.child for edge in edges_from(roots, is_array) if is_array(edge.child)}.values())


def held(before: Iterable[_Edge], after: Iterable[_Edge], is_array: Callable[[Any], bool]) -> Held:
    """The arrays that could be reached before a call and can be after it, and all places on the way to them that were the same.

    What a call puts in the place of something else (caches, gradients) is its result; where it finds its parameters stays as it is.
    """
    known = {edge.identity for edge in before}
    known_arrays = {id(edge.child) for edge in before if is_array(edge.child)}
    arrays: dict[int, Array] = {}
    into: dict[int, list[_Edge]] = {}
    for edge in after:
        if id(edge.child) in known_arrays:
            arrays[id(edge.child)] = edge.child
        if edge.identity in known:
            into.setdefault(id(edge.child), []).append(edge)
    on_the_way: list[_Edge] = []
    open_ends, done = list(arrays), set(arrays)
    while open_ends:
        for edge in into.get(open_ends.pop(), ()):
            on_the_way.append(edge)
            if edge.owner not in done:
                done.add(edge.owner)
                open_ends.append(edge.owner)
    return Held(list(arrays.values()), on_the_way)


def edges_from(roots: Iterable[Any], is_array: Callable[[Any], bool]) -> list[_Edge]:
    """Every place from `roots` on in which there is an object that may hold arrays, or an array."""
    edges: list[_Edge] = []
    open_ends = list(roots)
    seen = {id(root): root for root in open_ends}
    while open_ends and len(seen) < _MOST_OBJECTS:
        x = open_ends.pop()
        for where, key, child in _children(x):
            if isinstance(child, _LEAVES):
                continue
            edges.append(_Edge(id(x), where, key, child))
            if id(child) not in seen and not is_array(child):
                seen[id(child)] = child
                open_ends.append(child)
    return edges


def _children(x: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(where, key, child) of everything that x holds."""
    if isinstance(x, dict):
        for key, child in list(x.items()):
            yield x, key, child
    elif isinstance(x, list):
        for key, child in enumerate(x):
            yield x, key, child
    elif isinstance(x, tuple | set | frozenset):
        for child in x:
            yield None, None, child
    elif isinstance(x, FunctionType):
        yield from _of_function(x)
    elif isinstance(x, MethodType):
        yield None, None, x.__self__
        yield None, None, x.__func__
    elif isinstance(x, functools.partial):
        for child in (x.func, x.args, x.keywords):
            yield None, None, child
    kind = type(x)
    if kind.__module__.startswith(_INNER):
        if hasattr(x, "__wrapped__"):
            yield None, None, x.__wrapped__
        return
    for name in _slots(kind):
        if hasattr(x, name):
            yield x, _Slot(name), getattr(x, name)
    attributes = getattr(x, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(x, FunctionType):
        for key, child in list(attributes.items()):
            yield attributes, key, child


def _of_function(x: FunctionType) -> Iterator[tuple[Any, Any, Any]]:
    if (x.__module__ or "").startswith(_LIBRARIES):
        return
    for cell in x.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield cell, None, cell.cell_contents
    for child in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
        yield None, None, child
    for name in _names(x.__code__):
        if name in x.__globals__:
            yield x.__globals__, name, x.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    """Names that code may look up globally, those in the functions within it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not (name.startswith("__") and name.endswith("__")):
                yield f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") else name
