"""Results are fresh: they share memory with no argument, no cache and no other result."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import operands
from rectilinear.testing.lib import Lib


@pytest.mark.smoke
def test_results_are_fresh(numpy_lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = map(numpy_lib.array, operands(rng, (), 5, 6, 4))
    out, cache = r.affine_relu_forward(x, w, b)
    dx, dw, db = r.affine_relu_backward(dout, cache)
    relu = r.relu_forward(x)[0]
    results = [out, dx, dw, db, relu, r.relu_backward(dout, cache[1]), r.softmax_loss(x, [0] * 5)[1]]
    for i, a in enumerate(results):
        assert type(a) is np.ndarray
        assert a.flags.writeable
        for other in [x, w, b, dout, *results[:i], *([cache[1]] if isinstance(cache[1], np.ndarray) else [])]:
            assert not np.shares_memory(a, other)


def test_what_is_written_into_one_array_is_seen_in_no_other(any_lib: Lib, rng: np.random.Generator) -> None:
    if not any_lib.writable:
        return  # nobody could see it
    x, w, b, dout = map(any_lib.array, operands(rng, (), 6, 6, 6))  # results of equal shape, which may be one object
    out, cache = r.affine_relu_forward(x, w, b)
    made = {"out": out, **dict(zip(("dx", "dw", "db"), r.affine_relu_backward(dout, cache), strict=True))}
    made |= {
        "affine out": r.affine_forward(x, w, b)[0],
        **dict(zip(("affine dx", "affine dw", "affine db"), r.affine_backward(dout, cache[0]), strict=True)),
    }
    made |= {"relu out": r.relu_forward(x)[0], "relu dx": r.relu_backward(dout, x), "softmax dx": r.softmax_loss(x, [0] * 6)[1]}
    everything = {"x": x, "w": w, "b": b, "dout": dout, **made}
    if not isinstance(cache[1], r.KeepMask):
        everything["z"] = cache[1]
    values = {name: any_lib.numpy(array).copy() for name, array in everything.items()}
    for name in made:
        everything[name][...] = 77
        values[name][...] = 77
        for other, value in values.items():
            np.testing.assert_array_equal(any_lib.numpy(everything[other]), value, err_msg=f"{other}, after {name} has been written to")


@pytest.mark.parametrize("n", [1, 4])
def test_what_changes_nothing_still_makes_a_copy(any_lib: Lib, n: int) -> None:
    """relu of what is positive, its gradient, a layer of ones: equal values in memory of their own, for one row too."""
    if not any_lib.writable:
        return  # nobody could see it
    x, w, b, dout = (any_lib.array(a) for a in (np.ones((n, 3)), np.eye(3), np.zeros(3), np.full((n, 3), 2.0)))
    out, cache = r.affine_relu_forward(x, w, b)
    made = [out, *r.affine_relu_backward(dout, cache), r.affine_forward(x, w, None)[0], *r.affine_backward(dout, (x, w, b))]
    made += [r.relu_forward(x)[0], r.relu_backward(dout, x), r.relu_backward(dout, cache[1])]
    made += [r.affine_backward(dout, (x, w, b), needs=(False, False, True))[2]]
    values = [any_lib.numpy(array).copy() for array in made]
    for array in (x, w, b, dout):
        array[...] = 77
    for array, value in zip(made, values, strict=True):
        np.testing.assert_array_equal(any_lib.numpy(array), value)


def test_a_result_stays_when_the_next_call_comes(lib: Lib, rng: np.random.Generator) -> None:
    """A backend that hands out one buffer again and again changes results behind their owners' backs."""
    kept: list[tuple[object, np.ndarray]] = []
    for _ in range(3):
        x, w, b, dout = map(lib.array, operands(rng, (), 6, 6, 6))
        out, cache = r.affine_relu_forward(x, w, b)
        for made in (out, *r.affine_relu_backward(dout, cache), r.relu_forward(x)[0], r.softmax_loss(x, [0] * 6)[1]):
            kept.append((made, lib.numpy(made).copy()))
    for made, value in kept:
        np.testing.assert_array_equal(lib.numpy(made), value)
