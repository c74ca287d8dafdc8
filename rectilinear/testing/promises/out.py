"""`out`: results go where they are wanted, into every element, and what does not fit is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import FEATURES, operands_of
from rectilinear.testing.lib import Lib


@FEATURES
def test_out_everywhere(lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    x, w, b, dout = map(lib.array, operands_of(rng, features))
    calls: list[tuple[Callable[[Any], Any], tuple[int, ...]]] = [
        (lambda out: r.affine_forward(x, w, b, out=out)[0], (5, 4)),
        (lambda out: r.affine_relu_forward(x, w, b, out=out)[0], (5, 4)),
        (lambda out: r.relu_forward(x, out=out)[0], x.shape),
        (lambda out: r.relu_backward(dout, dout, out=out), (5, 4)),
        (lambda out: r.softmax_loss(dout, [0, 1, 2, 3, 0], out=out)[1], (5, 4)),
    ]
    for call, shape in calls:
        want = lib.numpy(call(None))
        if not lib.writable:
            with pytest.raises(TypeError, match="immutable"):
                call(lib.empty(shape, "float64"))
            continue
        out = lib.empty(shape, "float64")
        assert call(out) is out
        np.testing.assert_array_equal(lib.numpy(out), want)


@pytest.mark.parametrize("layer", ["affine", "affine_relu"])
@FEATURES
def test_out_of_backward(lib: Lib, rng: np.random.Generator, features: tuple[int, ...], layer: str) -> None:
    x, w, b, dout = map(lib.array, operands_of(rng, features))
    cache = getattr(r, f"{layer}_forward")(x, w, b)[1]
    backward = getattr(r, f"{layer}_backward")
    want = [lib.numpy(g) for g in backward(dout, cache)]
    if not lib.writable:
        with pytest.raises(TypeError, match="immutable"):
            backward(dout, cache, out=(None, lib.empty((6, 4), "float64"), None))
        return
    for given in ((True, True, True), (True, False, False), (False, True, True)):
        out = tuple(lib.empty(g.shape, "float64") if have else None for g, have in zip(want, given, strict=True))
        got = backward(dout, cache, out=out)
        for result, buffer, wish in zip(got, out, want, strict=True):
            assert buffer is None or result is buffer
            np.testing.assert_array_equal(lib.numpy(result), wish)


@pytest.mark.parametrize("how", ["fortran", "every other", "negative", "float16"])
@FEATURES
def test_out_of_any_layout(numpy_lib: Lib, rng: np.random.Generator, features: tuple[int, ...], how: str) -> None:
    """Also a dx buffer that no view can flatten to (N, D)."""
    x, w, b, dout = (a.astype(np.float16) if how == "float16" else a for a in operands_of(rng, features))

    def buffer(shape: tuple[int, ...]) -> np.ndarray:
        dtype = x.dtype
        if how == "fortran":
            return np.full(shape, 77, dtype, order="F")
        if how == "every other":
            return np.full((*shape[:-1], 2 * shape[-1]), 77, dtype)[..., ::2]
        return np.full(shape, 77, dtype)[..., ::-1]

    z = buffer((5, 4))
    out, cache = r.affine_relu_forward(x, w, b, out=z)
    assert out is z
    np.testing.assert_array_equal(out, r.affine_relu_forward(x, w, b)[0])
    want = r.affine_relu_backward(dout, cache)
    given = buffer(x.shape), buffer((6, 4)), buffer((4,))
    got = r.affine_relu_backward(dout, cache, out=given)
    for have, to, wish in zip(got, given, want, strict=True):
        assert have is to
        np.testing.assert_array_equal(have, wish)
    db = buffer((4,))
    assert r.affine_backward(dout, (x, w, b), needs=(False, False, True), out=(None, None, db))[2] is db
    np.testing.assert_array_equal(db, r.affine_backward(dout, (x, w, b), needs=(False, False, True))[2])
    np.testing.assert_array_equal(r.relu_forward(x, out=buffer(x.shape))[0], r.relu_forward(x)[0])
    np.testing.assert_array_equal(r.relu_backward(dout, dout, out=buffer((5, 4))), r.relu_backward(dout, dout))
    labels = [0, 1, 2, 3, 0]
    np.testing.assert_array_equal(r.softmax_loss(dout, labels, out=buffer((5, 4)))[1], r.softmax_loss(dout, labels)[1])


@FEATURES
def test_relu_backward_in_place(lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    x, w, b, _ = map(lib.array, operands_of(rng, features))
    cache = r.affine_relu_forward(x, w, b)[1][1]
    dout = lib.empty((5, 4), "float64")
    want = lib.numpy(r.relu_backward(dout, cache))
    if not lib.writable:
        with pytest.raises(TypeError, match="immutable"):
            r.relu_backward(dout, cache, out=dout)
        return
    assert r.relu_backward(dout, cache, out=dout) is dout
    np.testing.assert_array_equal(lib.numpy(dout), want)


@pytest.mark.parametrize("size", [100, 5000])
def test_relu_backward_in_place_through_another_view(numpy_lib: Lib, size: int, rng: np.random.Generator, tmp_path: Path) -> None:
    # Mixed dtypes and memmaps reach a backend as views of their own, of which neither is the other.
    z, values = rng.integers(-3, 4, size).astype("f4"), rng.integers(-3, 4, size).astype("f8")
    want = np.where(z < 0, 0, values)
    dout = values.copy()
    assert r.relu_backward(dout, z, out=dout) is dout
    np.testing.assert_array_equal(dout, want)
    mapped = np.memmap(tmp_path / "dout", "f8", "w+", shape=(size,))
    mapped[:] = values
    r.relu_backward(mapped, z.astype("f8"), out=mapped)
    np.testing.assert_array_equal(mapped, want)


@FEATURES
def test_out_may_not_touch_an_argument(numpy_lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    x, w, b, dout = (np.array(a) for a in operands_of(rng, features))
    room = np.zeros(60)
    cache = r.affine_relu_forward(x, w, b)[1]
    bad: list[Callable[[], Any]] = [
        lambda: r.relu_forward(x, out=x),
        lambda: r.affine_forward(room[:20].reshape(5, 4), np.ones((4, 4)), None, out=room[10:30].reshape(5, 4)),
        lambda: r.affine_backward(dout, (x, w, b), out=(x, None, None)),
        lambda: r.affine_backward(dout, (x, w, b), out=(None, w, None)),
        lambda: r.affine_relu_backward(dout, cache, out=(None, None, dout[0])),
        lambda: r.relu_backward(dout, np.ones((5, 4)), out=dout[::-1]),
        lambda: r.relu_backward(dout, cache_of_relu := dout * 1, out=cache_of_relu),
        lambda: r.affine_relu_backward(
            room[:4].reshape(2, 2),
            ((np.ones((2, 2)), np.eye(2), None), room[20:24].reshape(2, 2)),
            out=(room[20:24].reshape(2, 2), None, None),
        ),
        lambda: r.softmax_loss(dout, [0] * 5, out=dout),
        lambda: r.softmax_loss(np.ones((2, 2)), room[:2].view(np.int64), out=room[:4].reshape(2, 2)),
        lambda: r.affine_backward(
            np.ones((4, 4)), (np.ones((4, 4)), np.ones((4, 4)), None), out=(room[:16].reshape(4, 4), room[:16].reshape(4, 4), None)
        ),
    ]
    for call in bad:
        before = [a.copy() for a in (x, w, b, dout, room)]
        with pytest.raises(ValueError, match="shares memory with"):
            call()
        for a, was in zip((x, w, b, dout, room), before, strict=True):
            np.testing.assert_array_equal(a, was)


@pytest.mark.parametrize("count", [8, 3000])  # a backend may have another way for many elements
def test_interleaved_views_do_not_overlap(numpy_lib: Lib, rng: np.random.Generator, count: int) -> None:
    room = rng.integers(-3, 4, (count, 2)).astype(np.float64)
    x, out = room[:, 0], room[:, 1]
    before, kept = x.copy(), rng.integers(-3, 4, count).astype(np.float64)
    assert r.relu_forward(x, out=out)[0] is out
    np.testing.assert_array_equal(out, np.maximum(before, 0))
    assert r.relu_backward(x, kept, out=out) is out
    np.testing.assert_array_equal(out, np.where(kept < 0, 0, before))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (np.zeros((5, 3)), r.ShapeError, r"out has shape \(5, 3\) but the result has \(5, 4\)"),
        (np.zeros((5, 4), np.float32), r.DTypeError, "out has dtype float32 but the result has float64"),
        ([0], TypeError, "out is a list"),
    ],
)
@FEATURES
def test_wrong_out(
    numpy_lib: Lib, rng: np.random.Generator, features: tuple[int, ...], out: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        r.affine_forward(*operands_of(rng, features)[:3], out=out)


@FEATURES
def test_read_only_out(numpy_lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    out = np.zeros((5, 4))
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out is read-only"):
        r.affine_forward(*operands_of(rng, features)[:3], out=out)


@pytest.mark.smoke
@FEATURES
def test_nothing_is_half_written(numpy_lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    """A wrong db buffer leaves the right dx buffer alone."""
    x, w, b, dout = operands_of(rng, features)
    dx = np.full(x.shape, 77.0)
    with pytest.raises(r.ShapeError):
        r.affine_backward(dout, (x, w, b), out=(dx, None, np.zeros(5)))
    assert (dx == 77).all()


@FEATURES
@pytest.mark.parametrize("layer", ["affine", "affine_relu"])
def test_every_element_of_out_is_written(lib: Lib, rng: np.random.Generator, features: tuple[int, ...], layer: str) -> None:
    """Results of 0 too, which a buffer that happened to be 0 would hide."""
    if not lib.writable:
        return
    x, w, b, dout = (lib.array(np.zeros_like(a)) for a in operands_of(rng, features))
    out = lib.empty((5, 4), "float64")
    _, cache = getattr(r, f"{layer}_forward")(x, w, b, out=out)
    grads = tuple(lib.empty(shape, "float64") for shape in ((5, *features), (6, 4), (4,)))
    getattr(r, f"{layer}_backward")(dout, cache, out=grads)
    for array in (out, *grads):
        np.testing.assert_array_equal(lib.numpy(array), 0)
