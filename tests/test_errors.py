"""A user who does something wrong learns from the message alone what to change."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from typing import Any

import numpy as np
import pytest

import rectilinear as r

from .conftest import on_cupy

ON_IT = ["cupy"] if on_cupy() else []

X, W, B, DOUT = np.ones((5, 6)), np.ones((6, 4)), np.ones(4), np.ones((5, 4))
MASK = r.KeepMask(np.zeros((5, 1), np.uint8), (5, 8))
STACKED = np.ones((3, 6, 4))


def _matrix(x: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # NumPy would rather that nobody made one
        return np.matrix(x)


# The exact words, for a few: a change of wording should be a decision.
VERBATIM = [
    (
        lambda: r.affine_forward(np.ones((100, 32, 32, 3)), np.ones((768, 50)), np.ones(50)),
        r.ShapeError,
        "affine_forward: x has 3072 features per sample (shape (100, 32, 32, 3)) but w takes 768 (shape (768, 50))",
    ),
    (
        lambda: r.affine_relu_forward(X, W, np.ones(5)),
        r.ShapeError,
        "affine_relu_forward: b has shape (5,) but w of shape (6, 4) wants (4,)",
    ),
    (
        lambda: r.softmax_loss(np.ones((3, 10)), np.array([0, 12, 3])),
        ValueError,
        "softmax_loss: y[1] is 12 but x has 10 classes, labels go from 0 to 9",
    ),
    (
        lambda: r.relu_forward([1.0, -1.0]),
        TypeError,
        "relu_forward: x is a list, not an array; pass rectilinear.asarray(x)",
    ),
]

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
        lambda: r.affine_backward(DOUT, ((X, W, B), DOUT)),
        TypeError,
        ["cache", "tuple of 2", "affine_relu_backward"],
    ),
    "plain cache in fused": (lambda: r.affine_relu_backward(DOUT, (X, W, B)), TypeError, ["cache", "tuple of 3", "affine_relu_forward"]),
    "cache that is an array": (lambda: r.affine_backward(DOUT, X), TypeError, ["cache is a ndarray", "(x, w, b)"]),
    "tuple in relu": (lambda: r.relu_backward(DOUT, (X, W, B)), TypeError, ["relu_backward", "cache", "tuple of 3", "relu_forward"]),
    "no relu half": (lambda: r.affine_relu_backward(DOUT, ((X, W, B), None)), TypeError, ["ReLU half of cache is None", "KeepMask"]),
    "relu half of other shape": (lambda: r.affine_relu_backward(DOUT, ((X, W, B), X)), r.ShapeError, ["ReLU half", "(5, 6)", "(5, 4)"]),
    "scalar": (lambda: r.relu_forward(1.0), TypeError, ["relu_forward", "x is a float", "rectilinear.asarray(x)"]),
    "None for w": (lambda: r.affine_forward(X, None, B), TypeError, ["affine_forward", "w is None"]),
    "None for x": (lambda: r.relu_forward(None), TypeError, ["relu_forward", "x is None"]),
    "None for a cache": (lambda: r.relu_backward(DOUT, None), TypeError, ["relu_backward", "cache is None"]),
    "matrix": (lambda: r.affine_forward(_matrix(X), W, B), TypeError, ["x is a numpy.matrix", "np.asarray(x)"]),
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
    "a name that is no string": (lambda: r.set_backend(3), TypeError, ["set_backend", "int", "'numpy'"]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "error", "words"), VERBATIM, ids=range(len(VERBATIM)))
def test_word_for_word(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == words


@pytest.mark.parametrize("backend", ["numpy", "loopback", *ON_IT])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_explain_themselves(name: str, backend: str) -> None:
    call, error, words = BAD_CALLS[name]
    with r.use_backend(backend), pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.smoke
def test_our_errors_are_the_built_in_ones_too() -> None:
    assert issubclass(r.ShapeError, ValueError)
    assert issubclass(r.DTypeError, TypeError)
    assert issubclass(r.BackendError, RuntimeError)


@pytest.mark.smoke
def test_two_libraries_in_one_call() -> None:
    import array_api_strict

    with pytest.raises(TypeError, match=r"x is a numpy array but w is an array_api_strict array.*with rectilinear\.to_numpy\(w\)"):
        r.affine_forward(X, array_api_strict.ones((6, 4)), None)
    with pytest.raises(
        TypeError, match=r"x is an array_api_strict array but y is a numpy array.*array_api_strict\.asarray\(rectilinear\.to_numpy\(y\)\)"
    ):
        r.softmax_loss(array_api_strict.ones((2, 3)), np.zeros(2, np.int64))
    with pytest.raises(TypeError, match="out is a numpy array"):
        r.relu_forward(array_api_strict.ones(3), out=np.ones(3))
    with pytest.raises(TypeError, match=r"b is a list, not an array; pass array_api_strict\.asarray\(b\)"):
        r.affine_forward(array_api_strict.ones((5, 6)), array_api_strict.ones((6, 4)), [0.0] * 4)


def test_two_devices_in_one_call() -> None:
    import array_api_strict as xp

    x, w = xp.ones((5, 6), device=xp.Device("device1")), xp.ones((6, 4))
    with pytest.raises(TypeError, match=r"x is on device .*device1.* but w is on device .*CPU_DEVICE.*to_device\(w, .*device\(x\)\)"):
        r.affine_forward(x, w, None)
    with pytest.raises(TypeError, match=r"x is on device .*CPU_DEVICE.* but out is on device .*device1"):
        r.relu_forward(w, out=xp.ones((6, 4), device=xp.Device("device1")))


def test_results_stay_on_their_device() -> None:
    import array_api_strict as xp

    device = xp.Device("device1")
    x, w, b, dout = (xp.ones(shape, device=device) for shape in ((5, 6), (6, 4), (4,), (5, 4)))
    out, cache = r.affine_relu_forward(x, w, b)
    results = [out, *r.affine_relu_backward(dout, cache), r.relu_forward(x)[0], *r.softmax_loss(x, [0] * 5)]
    assert all(array.device == device for array in results)
    # Labels there cannot be read without waiting: a bad one shows as NaN.
    loss, dx = r.softmax_loss(x, xp.asarray([0, 1, 99, 2, -1], device=device))
    assert np.isnan(
        float(xp.to_device(loss, xp.Device("CPU_DEVICE")) if hasattr(xp, "to_device") else loss.to_device(xp.Device("CPU_DEVICE")))
    )
    bad = np.isnan(r.to_numpy(dx)).all(axis=1)
    np.testing.assert_array_equal(bad, [False, False, True, False, True])


def test_halves_that_do_not_promote() -> None:
    import ml_dtypes

    with pytest.raises(r.DTypeError, match="x float16, w bfloat16"):
        r.affine_forward(X.astype(np.float16), W.astype(ml_dtypes.bfloat16), None)


def test_strict_promotion_takes_the_floats_dtype() -> None:
    import array_api_strict as xp

    out, _ = r.affine_forward(xp.ones((2, 3), dtype=xp.int64), xp.ones((3, 4), dtype=xp.float32), None)
    assert out.dtype == xp.float32


# ---------------------------------------------------------------- remedies run as written


class Table:
    """What pandas, Polars and Arrow have in common here."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def to_numpy(self) -> np.ndarray:
        return self.values


class Sparse(Table):
    """And SciPy's sparse arrays and matrices."""

    def toarray(self) -> np.ndarray:
        return self.values


NOT_ARRAYS: dict[str, Any] = {
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(a.tolist()),
    "table": Table,
    "sparse": Sparse,
    "masked": lambda a: np.ma.masked_array(a, a > 0),
    "matrix": _matrix,
    "numpy": np.array,
}
REMEDY = re.compile(r"(?:pass|for example with|with) ((?:\w+\.)+\w+\(.*\))")


def follow(error: BaseException, names: dict[str, Any]) -> None:
    """Do to the arguments what the message says."""
    found = REMEDY.search(str(error))
    assert found, str(error)
    argument = re.search(rf"\b({'|'.join(names)})\b", found[1])  # the first one named is the one to be replaced
    assert argument, found[1]
    made: dict[str, Any] = {"np": np, "rectilinear": r}
    for module in re.findall(r"((?:\w+\.)+)\w+\(", found[1]):
        root = module.split(".")[0]
        if root not in made and root not in names:
            importlib.import_module(module.rstrip("."))
            made[root] = sys.modules[root]
    names[argument[1]] = eval(found[1], made | names)


def run_with_remedies(call: Any, names: dict[str, Any]) -> Any:
    """The result, when each error on the way has been followed; there are no more of them than arguments."""
    for _ in range(2 * len(names) + 1):
        try:
            return call(**names)
        except TypeError as error:
            follow(error, names)
    raise AssertionError(f"no end of remedies: {names}")


LIBRARIES = [
    "numpy",
    "array_api_strict",
    *ON_IT,
    *(pytest.param(name, marks=pytest.mark.libraries) for name in ("torch", "jax.numpy", "dask.array")),
]


@pytest.mark.parametrize("kind", NOT_ARRAYS)
@pytest.mark.parametrize("which", ["x", "w", "b", "x w b"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_message_says_to_do_works(library: str, which: str, kind: str) -> None:
    xp = pytest.importorskip(library)
    arrays = {"x": X, "w": W, "b": np.arange(4.0)}
    names = {name: NOT_ARRAYS[kind](a) if name in which.split() else xp.asarray(a) for name, a in arrays.items()}
    if kind == "matrix":  # of which none has b's one axis
        names["b"] = xp.asarray(arrays["b"])
    out, _ = run_with_remedies(r.affine_forward, names)
    if kind == "masked":
        arrays = {name: np.where(a > 0, 0, a) if name in which.split() else a for name, a in arrays.items()}
    np.testing.assert_array_equal(r.to_numpy(out), arrays["x"] @ arrays["w"] + arrays["b"])


def test_what_a_message_about_devices_says_to_do_works() -> None:
    import array_api_strict as xp

    names = {"x": xp.ones((5, 6), device=xp.Device("device1")), "w": xp.ones((6, 4)), "b": None}
    out, _ = run_with_remedies(r.affine_forward, names)
    assert out.device == xp.Device("device1")


@pytest.mark.parametrize("x", [Sparse(X), Table(X), np.ma.masked_array(X, X > 0)], ids=["sparse", "table", "masked"])
def test_what_asarray_says_to_do_works(x: Any) -> None:
    assert run_with_remedies(lambda x: r.asarray(x), {"x": x}).dtype == X.dtype


@pytest.mark.parametrize(
    "x", [{1: 2}, [object()], np.array([None]), [[1], "a", None], {1, 2}], ids=["dict", "list", "array", "ragged", "set"]
)
def test_nothing_becomes_an_array_of_objects(x: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        r.asarray(x)


def test_what_a_mask_says_to_do_works() -> None:
    keep = np.eye(4, 6) > 0
    mask, dout = r.KeepMask(np.packbits(keep, axis=-1, bitorder="little"), keep.shape), np.ones((4, 6))
    with pytest.raises(TypeError) as caught:
        mask * dout
    ways = re.search(r"pass (.*) for the gradient, (.*) for what was kept, or (.*) for", str(caught.value))
    assert ways
    gradient, kept, signs = (eval(way, {"np": np, "mask": mask, "dout": dout, "relu_backward": r.relu_backward}) for way in ways.groups())
    np.testing.assert_array_equal(gradient, keep)
    np.testing.assert_array_equal(kept, keep)
    np.testing.assert_array_equal(signs, np.where(keep, 1, -1))
