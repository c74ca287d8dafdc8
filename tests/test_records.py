"""Records: one layout and one meaning in plain Python, in jitted code and in emitted code."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from rectilinear.kernels.loops.gradients import Samples
from rectilinear.kernels.loops.host import Host
from rectilinear.kernels.loops.plan import Backward, Matmul, Reduction
from rectilinear.kernels.loops.product import Product
from rectilinear.kernels.micro.tile import TileOperands
from rectilinear.kernels.runtime.cache import jit_too
from rectilinear.kernels.runtime.native import fetch_add, load
from rectilinear.kernels.runtime.records import WORD_BYTES, Atomic, address_of, at, bytes_of, offsets_of, padded_record, record, words_of


@record
class Point:
    x: int = 0
    y: int = 0


@record
class Line:
    start: Point = Point()
    end: Point = Point()
    color: int = 0


@padded_record(128)
class Shared:
    """Of a size of its own, so that what follows it lies apart."""

    count: Atomic = Atomic()


@record
class Board:
    first: Shared = Shared()
    second: Shared = Shared()
    end: int = 0


@record
class Drawing:
    count: int = 0
    line: Line = Line()
    frame: Line = Line()


def in_memory(record: Any) -> np.ndarray:
    """Its words where jitted code finds them."""
    return np.array(words_of(record), np.int64)


@pytest.mark.parametrize("cls", [Point, Line, Drawing, Host, Matmul, Backward, Reduction, Product, Samples, TileOperands])
def test_words_lie_where_their_offsets_say(cls: Any) -> None:
    made, offsets = cls(), offsets_of(cls)
    assert words_of(made) == [0] * len(offsets)
    assert list(offsets.values()) == list(range(0, cls.layout.size, WORD_BYTES))
    for number, path in enumerate(offsets):
        *parents, name = path.split(".")
        place = made
        for parent in parents:
            place = getattr(place, parent)
        setattr(place, name, number)
    assert words_of(made) == list(range(len(offsets)))


def test_offsets_of_nested_records_have_dotted_names() -> None:
    assert offsets_of(Line) == {"start.x": 0, "start.y": 8, "end.x": 16, "end.y": 24, "color": 32}


def test_a_record_of_a_given_size_keeps_what_follows_apart() -> None:
    assert offsets_of(Board) == {"first.count.value": 0, "second.count.value": 128, "end": 256}
    assert (bytes_of(Shared), bytes_of(Board)) == (128, 264)


def test_a_record_passes_for_its_address() -> None:
    @numba.njit
    def count(address: int) -> int:
        board = at(Board, address)
        fetch_add(board.second.count, 5)
        board.end = load(board.second.count)
        return address_of(board.second.count)

    memory = np.zeros(bytes_of(Board) // WORD_BYTES, np.int64)
    assert count(memory.ctypes.data) == memory.ctypes.data + 128
    assert {int(place): int(memory[place]) for place in np.flatnonzero(memory)} == {16: 5, 32: 5}


@jit_too
def _draw(drawing: Drawing, seven: int) -> None:
    """Every way to write to a record: fields, nested ones, whole records, made by position, by name, or not at all."""
    drawing.count += seven
    drawing.line.start.x = seven
    drawing.line.end = Point(seven, 8)
    drawing.line.start = drawing.line.end  # a copy
    drawing.line.end.y = -1
    drawing.frame = drawing.line
    drawing.frame.end = Point(y=drawing.line.start.y)
    drawing.line.color = Line(Point(1, 2), color=5).color
    line = Line(end=drawing.frame.end)  # another copy
    line.end.x = 99
    drawing.count += line.end.x + line.start.y + line.color
    same = drawing.line  # not a copy
    same.start.y = 1000
    for i in range(3):
        point = Point(y=i)  # each of them new
        point.x += 1
        drawing.frame.start = point


def test_jitted_code_and_python_do_the_same() -> None:
    @numba.njit
    def draw(address: int, seven: int) -> None:
        _draw(at(Drawing, address), seven)

    begun = Drawing(3, Line(Point(1, 2), Point(3, 4), 5), frame=Line(color=6))
    memory = in_memory(begun)
    draw(memory.ctypes.data, 7)
    _draw(begun, 7)
    assert memory.tolist() == words_of(begun)
    assert begun == Drawing(109, Line(Point(7, 1000), Point(7, -1), 5), Line(Point(1, 2), Point(0, 8), 5))


def test_a_record_made_in_jitted_code_lies_in_memory_as_in_python() -> None:
    @numba.njit
    def made(words: np.ndarray, one: int) -> None:
        drawing = Drawing(one, Line(Point(2, 3), end=Point(y=5), color=6))
        for i in range(words.size):
            words[i] = at(Point, address_of(drawing) + 8 * i).x

    words = np.full(len(offsets_of(Drawing)), 77)
    made(words, 1)
    assert words.tolist() == words_of(Drawing(1, Line(Point(2, 3), end=Point(y=5), color=6))) == [1, 2, 3, 0, 5, 6, 0, 0, 0, 0, 0]


def test_a_record_that_is_given_to_a_function_is_the_callers() -> None:
    @numba.njit
    def move(point: Point) -> None:
        point.x += 1

    @numba.njit
    def moved(one: int) -> int:
        line = Line(start=Point(one))
        move(line.start)
        move(line.start)
        return line.start.x

    assert moved(1) == 3


@pytest.mark.parametrize("use", ["point.z", "point.z = 1", "Point(1, z=1)", "Point(1, 2, 3)"])
def test_a_field_that_is_not_there_is_an_error_that_names_it(use: str) -> None:
    space: dict[str, Any] = {"Point": Point}
    exec(f"def misspelt(one):\n    point = Point(one)\n    {use}\n", space)
    wrong = "'z'" if "z" in use else "too many positional arguments|takes from 1 to 3 positional arguments"
    with pytest.raises((AttributeError, TypeError), match=wrong):
        space["misspelt"](1)
    with pytest.raises((numba.TypingError, TypeError), match=wrong):
        numba.njit(space["misspelt"])(1)


def test_a_record_cannot_be_returned_from_jitted_code() -> None:
    """It would end with the function that made it, and be read all the same."""

    @numba.njit
    def made(x: int) -> Point:
        return Point(x, 1)

    @numba.njit
    def among_others(x: int) -> tuple[Point, int]:
        return Point(x, 1), 2

    for function in (made, among_others):
        with pytest.raises(TypeError, match="Point is returned from jitted code"):
            function(3)
