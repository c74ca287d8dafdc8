"""A user who does something wrong learns from the message alone what to change, and a failing call changes nothing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.dispatch import readable
from rectilinear.testing.lib import Lib

X: Any
W: Any
B: Any
DOUT: Any
X, W, B, DOUT = (np.ones(shape) for shape in ((5, 6), (6, 4), 4, (5, 4)))
MASK = r.KeepMask(np.zeros((5, 1), np.uint8), (5, 8))
STACKED = np.ones((3, 6, 4))


def matrix(x: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # NumPy would rather that nobody made one
        return np.matrix(x)


# function, argument, what was met, what was wanted or the remedy
BAD_CALLS: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "another number of features": (
        lambda: r.affine_forward(X, np.ones((5, 4)), B),
        r.ShapeError,
        ["x has 6 features", "(5, 6)", "takes 5"],
    ),
    "0-d x": (lambda: r.affine_forward(np.float64(1), W, B), r.ShapeError, ["affine_forward", "x", "()", "(N, ...)"]),
    "w of one axis": (lambda: r.affine_forward(X, B, B), r.ShapeError, ["affine_forward", "w", "(4,)", "(D, M)", "(B, D, M)"]),
    "stacked x without groups": (lambda: r.affine_forward(np.ones(3), STACKED, None), r.ShapeError, ["x", "(3,)", "(B, N, ...)"]),
    "other number of groups": (lambda: r.affine_forward(np.ones((2, 5, 6)), STACKED, None), r.ShapeError, ["x has 2 groups", "w has 3"]),
    "b for the plain form": (lambda: r.affine_forward(np.ones((3, 5, 6)), STACKED, B), r.ShapeError, ["b", "(4,)", "(3, 4)"]),
    "b of one column": (lambda: r.affine_forward(X, W, np.ones((1, 4))), r.ShapeError, ["b", "(1, 4)", "(4,)"]),
    "dout": (lambda: r.affine_backward(np.ones((4, 5)), (X, W, B)), r.ShapeError, ["affine_backward", "dout", "(4, 5)", "(5, 4)"]),
    "relu dout": (lambda: r.relu_backward(np.ones(4), X), r.ShapeError, ["relu_backward", "dout", "(4,)", "(5, 6)"]),
    "fused cache in affine": (
        lambda: r.affine_backward(DOUT, ((X, W, B), DOUT)),  # type: ignore[arg-type]
        TypeError,
        ["cache", "tuple of 2", "affine_relu_backward"],
    ),
    "plain cache in fused": (
        lambda: r.affine_relu_backward(DOUT, (X, W, B)),  # type: ignore[arg-type]
        TypeError,
        ["cache", "tuple of 3", "affine_relu_forward"],
    ),
    "cache that is an array": (lambda: r.affine_backward(DOUT, X), TypeError, ["cache is a numpy.ndarray", "(x, w, b)"]),
    "tuple in relu": (lambda: r.relu_backward(DOUT, (X, W, B)), TypeError, ["relu_backward", "cache", "tuple of 3", "relu_forward"]),
    "no relu half": (lambda: r.affine_relu_backward(DOUT, ((X, W, B), None)), TypeError, ["ReLU half of cache is None", "KeepMask"]),
    "relu half of other shape": (lambda: r.affine_relu_backward(DOUT, ((X, W, B), X)), r.ShapeError, ["ReLU half", "(5, 6)", "(5, 4)"]),
    "scalar": (lambda: r.relu_forward(1.0), TypeError, ["relu_forward", "x is a float", "rectilinear.asarray(x)"]),
    "None for w": (lambda: r.affine_forward(X, None, B), TypeError, ["affine_forward", "w is None"]),
    "None for x": (lambda: r.relu_forward(None), TypeError, ["relu_forward", "x is None"]),
    "None for a cache": (lambda: r.relu_backward(DOUT, None), TypeError, ["relu_backward", "cache is None"]),
    "matrix": (lambda: r.affine_forward(matrix(X), W, B), TypeError, ["x is a numpy.matrix", "np.asarray(x)"]),
    "masked": (lambda: r.affine_forward(X, np.ma.masked_array(W), B), TypeError, ["w is a numpy.ma.MaskedArray", "w.filled(0)"]),
    "complex": (lambda: r.affine_forward(X * 1j, W, B), r.DTypeError, ["x complex128", "convert x to float32"]),
    "longdouble": (lambda: r.relu_forward(X.astype(np.longdouble)), r.DTypeError, [f"x {np.dtype(np.longdouble).name}", "float64"]),
    "object": (lambda: r.affine_forward(X, W.astype(object), B), r.DTypeError, ["w object"]),
    "strings": (lambda: r.relu_forward(np.array(["a"])), r.DTypeError, ["relu_forward", "x str"]),
    "label too small": (lambda: r.softmax_loss(X, [0, 0, -1, 0, 0]), ValueError, ["y[2] is -1", "0 to 5"]),
    "float labels": (lambda: r.softmax_loss(X, np.zeros(5)), r.DTypeError, ["y has dtype float64", "integers"]),
    "bool labels": (lambda: r.softmax_loss(X, np.zeros(5, bool)), r.DTypeError, ["y has dtype bool", "integers"]),
    "list of float labels": (lambda: r.softmax_loss(X, [0.5] * 5), r.DTypeError, ["y is a list", "ints", "0 to 5"]),
    "ragged labels": (lambda: r.softmax_loss(X, [[0], [1, 2]]), r.DTypeError, ["y is a list", "ints"]),
    "one int": (lambda: r.softmax_loss(X, 3), TypeError, ["y is an int, not an array"]),
    "tuple as the relu half": (
        lambda: r.affine_relu_backward(DOUT, ((X, W, B), (DOUT,))),
        TypeError,
        ["ReLU half", "a tuple of 1", "KeepMask"],
    ),
    "mask for x": (lambda: r.affine_forward(MASK, W, B), TypeError, ["affine_forward", "x is a KeepMask", "cache of a ReLU"]),
    "mask for dout": (lambda: r.relu_backward(MASK, DOUT), TypeError, ["relu_backward", "dout is a KeepMask"]),
    "mask for out": (lambda: r.relu_forward(DOUT, out=MASK), TypeError, ["out is a KeepMask; pass an array"]),
    "mask of another shape": (lambda: r.affine_relu_backward(DOUT, ((X, W, B), MASK)), r.ShapeError, ["ReLU half", "(5, 8)", "(5, 4)"]),
    "out in another byte order": (lambda: r.relu_forward(X, out=np.zeros((5, 6), ">f8")), r.DTypeError, ["float64, in another byte order"]),
    "out that overlaps itself": (
        lambda: r.relu_forward(B, out=np.lib.stride_tricks.as_strided(np.zeros(1), (4,), (0,))),
        ValueError,
        ["stride of 0"],
    ),
    "label beyond int64": (lambda: r.softmax_loss(X, [0, 0, 2**70, 0, 0]), ValueError, [f"y[2] is {2**70}", "6 classes", "0 to 5"]),
    "label far below 0": (lambda: r.softmax_loss(X, (0, -(2**70), 0, 0, 0)), ValueError, [f"y[1] is -{2**70}", "0 to 5"]),
    "label beyond the dtype": (lambda: r.softmax_loss(X, np.full(5, 2**64 - 1, np.uint64)), ValueError, [f"y[0] is {2**64 - 1}", "0 to 5"]),
    "NumPy label beyond int64": (lambda: r.softmax_loss(X, [0, 0, 0, 0, np.uint64(2**63)]), ValueError, [f"y[4] is {2**63}", "0 to 5"]),
    "label below 0 in an array": (lambda: r.softmax_loss(X, np.array([0, 0, 0, -128, 0], np.int8)), ValueError, ["y[3] is -128"]),
    "too few labels": (lambda: r.softmax_loss(X, [0, 1]), r.ShapeError, ["y", "(2,)", "(5, 6)", "one label per sample"]),
    "one-hot labels": (lambda: r.softmax_loss(X, np.eye(5, 6, dtype=int)), r.ShapeError, ["y", "(5, 6)", "one label per sample"]),
    "no classes": (lambda: r.softmax_loss(np.ones((5, 0)), [0] * 5), r.ShapeError, ["x", "(5, 0)", "C >= 1"]),
    "scores of one axis": (lambda: r.softmax_loss(np.ones(5), [0] * 5), r.ShapeError, ["x", "(5,)", "(N, C)"]),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_explain_themselves(plain_lib: Lib, name: str) -> None:
    call, error, words = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_misfits_are_told_in_every_library(lib: Lib) -> None:
    x, w, b, dout = (lib.array(np.ones(shape)) for shape in ((5, 6), (6, 4), (4,), (5, 4)))
    for call in (
        lambda: r.affine_forward(x, x, None),
        lambda: r.affine_relu_forward(x, w, w),
        lambda: r.affine_backward(x, (x, w, b)),
        lambda: r.affine_relu_backward(dout, ((x, w, b), x)),
        lambda: r.relu_backward(dout, x),
        lambda: r.softmax_loss(b, [0] * 4),
    ):
        with pytest.raises(r.ShapeError, match=r"\("):
            call()


def test_a_result_that_does_not_fit_into_memory_is_an_error(plain_lib: Lib) -> None:
    """What goes wrong below comes up as it is, and the next call is served."""
    many = np.broadcast_to(1.0, (1 << 46, 1))  # 2**49 bytes, more than an address space holds
    with pytest.raises(MemoryError):
        r.affine_forward(many, np.ones((1, 1)), None)
    with pytest.raises(MemoryError):
        r.relu_forward(many)
    np.testing.assert_array_equal(r.relu_forward(np.array([-1.0, 1.0]))[0], [0.0, 1.0])


def test_a_label_that_is_no_class(lib: Lib) -> None:
    """An error where labels can be read without waiting, else NaN in the loss and in the label's row."""
    x, y = lib.array(np.zeros((3, 4))), lib.array(np.array([0, 7, 1]))
    if readable(y) is not None:
        with pytest.raises(ValueError, match=r"y\[1\] is 7"):
            r.softmax_loss(x, y)
        return
    loss, dx = r.softmax_loss(x, y)
    assert np.isnan(lib.numpy(loss))
    np.testing.assert_array_equal(np.isnan(lib.numpy(dx)).all(axis=1), [False, True, False])
