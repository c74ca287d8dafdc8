"""Memory that `out` shares with an argument, a cached array or another `out` is found however the two came to share it.

Looking at owners and bounds first is only a shortcut; here every pair of arrays of every function meets every way to share.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear import buffers

Shape = tuple[int, ...]
Arrays = dict[str, np.ndarray]

AFFINE = {"x": (3, 3), "w": (3, 3), "b": (3,)}  # gradients of equal shape, which may be one object
IMAGES = {"x": (4, 3, 2), "w": (6, 5), "b": (5,)}
FEATURE = {"x": (3,), "w": (1, 3), "b": (3,)}  # here dx and db
STACKED = {"x": (2, 4, 3), "w": (2, 3, 5), "b": (2, 5)}


def gradients(a: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return a["dx"], a["dw"], a["db"]


def bits(a: Arrays) -> r.KeepMask:
    return r.KeepMask(a["bits"].view(np.uint8)[..., :1], a["dout"].shape)


def forward(shapes: dict[str, Shape]) -> tuple[dict[str, Shape], dict[str, Shape]]:
    return shapes, {"out": (*shapes["x"][: len(shapes["w"]) - 1], shapes["w"][-1])}


def backward(shapes: dict[str, Shape], keep: str | None = None) -> tuple[dict[str, Shape], dict[str, Shape]]:
    out = forward(shapes)[1]["out"]
    kept = {} if keep is None else {keep: out if keep == "z" else (*out[:-1], 1)}
    return {"dout": out, **shapes, **kept}, {f"d{name}": shape for name, shape in shapes.items()}


FUNCTIONS: dict[str, tuple[Callable[[Arrays], Any], dict[str, Shape], dict[str, Shape]]] = {
    "relu_forward": (lambda a: r.relu_forward(a["x"], out=a["out"])[0], {"x": (4, 5)}, {"out": (4, 5)}),
    "relu_backward": (lambda a: r.relu_backward(a["dout"], a["z"], out=a["out"]), {"dout": (4, 5), "z": (4, 5)}, {"out": (4, 5)}),
    "relu_backward by bits": (
        lambda a: r.relu_backward(a["dout"], bits(a), out=a["out"]),
        {"dout": (4, 5), "bits": (4, 1)},
        {"out": (4, 5)},
    ),
    "softmax_loss": (lambda a: r.softmax_loss(a["x"], [0, 1, 2, 3], out=a["out"])[1], {"x": (4, 5)}, {"out": (4, 5)}),
}
for form, shapes in (("", AFFINE), (", one feature", FEATURE), (", images", IMAGES), (", stacked", STACKED)):
    FUNCTIONS |= {
        f"affine_forward{form}": (lambda a: r.affine_forward(a["x"], a["w"], a["b"], out=a["out"])[0], *forward(shapes)),
        f"affine_relu_forward{form}": (lambda a: r.affine_relu_forward(a["x"], a["w"], a["b"], out=a["out"])[0], *forward(shapes)),
        f"affine_backward{form}": (
            lambda a: r.affine_backward(a["dout"], (a["x"], a["w"], a["b"]), out=gradients(a)),
            *backward(shapes),
        ),
        f"affine_relu_backward{form}": (
            lambda a: r.affine_relu_backward(a["dout"], ((a["x"], a["w"], a["b"]), a["z"]), out=gradients(a)),
            *backward(shapes, "z"),
        ),
        f"affine_relu_backward by bits{form}": (
            lambda a: r.affine_relu_backward(a["dout"], ((a["x"], a["w"], a["b"]), bits(a)), out=gradients(a)),
            *backward(shapes, "bits"),
        ),
    }


def pairs(arguments: dict[str, Shape], outs: dict[str, Shape]) -> Iterator[tuple[str, str]]:
    """Names of every out with every argument and every out before it."""
    names = [*arguments, *outs]
    for out in outs:
        yield from ((other, out) for other in names[: names.index(out)])


# ---------------------------------------------------------------- memory, and two arrays in it


def _cut(room: np.ndarray, start: int, shape: Shape) -> np.ndarray:
    return room[start : start + math.prod(shape)].reshape(shape)


def _kept(size: int, path: Path) -> np.ndarray:
    return buffers.empty((buffers.LARGE_BYTES // 8,), np.dtype("f8"))[:size]


ROOMS: dict[str, Callable[[int, Path], np.ndarray]] = {
    "views of an array": lambda size, path: np.zeros(size),
    "views of a kept result": _kept,
    "a buffer": lambda size, path: np.frombuffer(bytearray(8 * size)),
    "strided tricks": lambda size, path: np.lib.stride_tricks.as_strided(np.zeros(size), (size,), (8,)),
    "a file": lambda size, path: np.asarray(np.memmap(path / "file", np.float64, "w+", shape=(size,))),
}
KINDS = [*ROOMS, "two arrays on one buffer", "no base"]


def in_one_room(kind: str, first: Shape, second: Shape, step: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays in one piece of memory; the second begins `step` elements after the end of the first, with -1 in its last one."""
    start = math.prod(first) + step
    size = start + math.prod(second)
    if kind == "no base":
        room = np.zeros(size)
        return _without_base(room, 0, first), _without_base(room, start, second)
    if kind == "two arrays on one buffer":
        buffer = bytearray(8 * size)
        return _cut(np.frombuffer(buffer), 0, first), np.frombuffer(buffer, offset=8 * start).reshape(second)
    room = ROOMS[kind](size, path)
    return _cut(room, 0, first), _cut(room, start, second)


def _without_base(room: np.ndarray, start: int, shape: Shape) -> np.ndarray:
    """An array that says neither that it owns its memory nor who does, as wrappers of C libraries hand out."""
    KEPT_ALIVE.append(room)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(pointer(np._core.multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    thing, number, address = ctypes.py_object, ctypes.c_int, ctypes.c_void_p
    kind = ctypes.PYFUNCTYPE(thing, thing, number, address, number, address, address, number, number, address)
    new = kind(table[93])  # PyArray_New has this place in NumPy's C API
    extents, data = (ctypes.c_ssize_t * len(shape))(*shape), room.ctypes.data + 8 * start
    contiguous_aligned_writeable = 0x501
    made: np.ndarray = new(
        np.ndarray, len(shape), ctypes.addressof(extents), room.dtype.num, None, data, 0, contiguous_aligned_writeable, None
    )
    assert made.base is None
    assert not made.flags.owndata
    return made


KEPT_ALIVE: list[np.ndarray] = []


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    KEPT_ALIVE.clear()


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def _backend(request: pytest.FixtureRequest, _no_choice: None) -> Iterator[None]:
    with r.use_backend(request.param):
        yield


# ---------------------------------------------------------------- the properties


def arrays_for(name: str, rng: np.random.Generator, special: Arrays) -> Arrays:
    _, arguments, outs = FUNCTIONS[name]
    arrays = {key: special.get(key, np.empty(shape)) for key, shape in (arguments | outs).items()}
    for array in arrays.values():
        array[...] = rng.standard_normal(array.shape)
    return arrays


def refused(name: str, rng: np.random.Generator, special: Arrays) -> None:
    """The call is an error, and nothing has been written."""
    arrays = arrays_for(name, rng, special)
    before = {key: array.copy() for key, array in arrays.items()}
    with pytest.raises(ValueError, match="shares memory with"):
        FUNCTIONS[name][0](arrays)
    for key, was in before.items():
        np.testing.assert_array_equal(arrays[key], was)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_overlap_of_every_pair_is_found(rng: np.random.Generator, tmp_path: Path, name: str, kind: str) -> None:
    _, arguments, outs = FUNCTIONS[name]
    shapes = arguments | outs
    for one, other in pairs(arguments, outs):
        for first, second in ((one, other), (other, one)):
            a, b = in_one_room(kind, shapes[first], shapes[second], -1, tmp_path)
            refused(name, rng, {first: a, second: b})
            refused(name, rng, {first: a[::-1], second: b})
            refused(name, rng, {first: a, second: b[::-1]})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_overlap_with_an_owner_is_found(rng: np.random.Generator, name: str) -> None:
    """One array owns the memory, the other is a view of it, or the same object."""
    _, arguments, outs = FUNCTIONS[name]
    shapes = arguments | outs
    for one, other in pairs(arguments, outs):
        for whole, part in ((one, other), (other, one)):
            if math.prod(shapes[part]) > math.prod(shapes[whole]):
                continue
            owner = np.empty(shapes[whole])
            refused(name, rng, {whole: owner, part: _cut(owner.reshape(-1), 0, shapes[part])})
            refused(name, rng, {whole: owner, part: _cut(owner.reshape(-1)[::-1], 0, shapes[part])})
            refused(name, rng, {whole: owner, part: _without_base(owner, 0, shapes[part])})
            if shapes[part] == shapes[whole] and (one, other) != ("dout", "out"):
                refused(name, rng, {whole: owner, part: owner})


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_do_not_overlap(rng: np.random.Generator, tmp_path: Path, name: str, kind: str) -> None:
    _, arguments, outs = FUNCTIONS[name]
    shapes = arguments | outs
    for one, other in pairs(arguments, outs):
        for first, second in ((one, other), (other, one)):
            a, b = in_one_room(kind, shapes[first], shapes[second], 0, tmp_path)
            arrays = arrays_for(name, rng, {first: a, second: b})
            want = FUNCTIONS[name][0]({key: array.copy() for key, array in arrays.items()})
            for got, wish in zip(FUNCTIONS[name][0](arrays), want, strict=True):
                np.testing.assert_array_equal(got, wish)


# ---------------------------------------------------------------- an out whose elements share memory with one another

as_strided = np.lib.stride_tricks.as_strided
SELF_OVERLAPS: dict[str, Callable[[np.ndarray, Shape], np.ndarray]] = {
    "windows": lambda room, shape: as_strided(room, shape, (8,) * len(shape)),
    "windows, backwards": lambda room, shape: as_strided(room[100:], shape, (-8,) * len(shape)),
    "half an element on": lambda room, shape: as_strided(room, shape, (*(64 * n for n in range(len(shape), 1, -1)), 4)),
    "one row for all": lambda room, shape: as_strided(room, shape, (0,) * (len(shape) - 1) + (8,)),
    "rows that reach into the next": lambda room, shape: as_strided(room, shape, (*(800,) * (len(shape) - 2), 8 * (shape[-1] - 1), 8)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", SELF_OVERLAPS)
def test_an_out_that_overlaps_itself_is_refused(name: str, kind: str) -> None:
    _, arguments, outs = FUNCTIONS[name]
    for out, shape in outs.items():
        one_row = math.prod(shape) == shape[-1]
        if one_row and kind not in ("windows", "half an element on"):
            continue
        room = np.zeros(4000)
        special = as_strided(room, shape, (4,) * len(shape)) if one_row else SELF_OVERLAPS[kind](room, shape)
        arrays = {key: np.ones(s) for key, s in (arguments | outs).items()} | {out: special}
        with pytest.raises(ValueError, match="share memory with one another"):
            FUNCTIONS[name][0](arrays)
        assert not room.any()


APART: dict[str, Callable[[Shape], np.ndarray]] = {
    "permuted axes": lambda shape: np.empty(shape[::-1]).transpose(),
    "gaps": lambda shape: np.empty([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)],
    "reversed": lambda shape: np.empty(shape)[tuple(slice(None, None, -1) for _ in shape)],
    "a field of records": lambda shape: np.empty(shape, "f8, i1")["f0"],
    "columns": lambda shape: np.empty((*shape, 3))[..., 1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", APART)
def test_other_layouts_of_out_are_filled(rng: np.random.Generator, name: str, kind: str) -> None:
    outs = FUNCTIONS[name][2]
    arrays = arrays_for(name, rng, {})
    want = FUNCTIONS[name][0]({key: array.copy() for key, array in arrays.items()})
    got = FUNCTIONS[name][0](arrays | {out: APART[kind](shape) for out, shape in outs.items()})
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("stride", [0, 3, -8, 8, -40, 1 << 40, -(1 << 40)])
def test_strides_of_axes_that_never_step_mean_nothing(shape: Shape, stride: int) -> None:
    strides = [stride if n <= 1 or 0 in shape else 8 for n in shape]
    out = as_strided(np.zeros(200)[100:], shape, strides)
    x = np.arange(-2.0, np.prod(shape) - 2).reshape(shape)
    np.testing.assert_array_equal(r.relu_forward(x, out=out)[0], np.where(x < 0, 0, x))


def test_what_is_found_to_overlap_itself_is_no_more_than_what_interleaves(rng: np.random.Generator) -> None:
    """Against the exact answer: every overlap is found, and only layouts whose axes interleave are refused without one."""
    for _ in range(3000):
        shape = tuple(int(n) for n in rng.integers(0, 4, rng.integers(1, 4)))
        strides = tuple(8 * int(n) for n in rng.integers(-9, 10, len(shape)))
        out = as_strided(np.zeros(200)[100:], shape, strides)
        places = as_strided(np.arange(200)[100:], shape, strides).reshape(-1)
        overlaps = len(set(places.tolist())) < places.size
        steps = sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1)
        interleaves = any(step < sum(s * (n - 1) for s, n in steps[:i]) + 8 for i, (step, _) in enumerate(steps))
        try:
            r.relu_forward(np.zeros(shape), out=out)
        except ValueError:
            assert overlaps or interleaves
            assert places.size
        else:
            assert not overlaps
