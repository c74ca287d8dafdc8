"""A user who does something wrong learns from the message alone what to change."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.promises.errors import W, X, matrix

from .conftest import on_cupy

ON_IT = ["cupy"] if on_cupy() else []


# The exact words, for a few: a change of wording should be a decision.
VERBATIM = [
    (
        lambda: r.affine_forward(np.ones((100, 32, 32, 3)), np.ones((768, 50)), np.ones(50)),
        r.ShapeError,
        "affine_forward: x has 3072 features per sample (shape (100, 32, 32, 3)) but w takes 768 (shape (768, 50))",
    ),
    (
        lambda: r.affine_forward(np.ones(6), np.ones((6, 4)), None),
        r.ShapeError,
        "affine_forward: x has 1 feature per sample (shape (6,)) but w takes 6 (shape (6, 4)); of a single sample pass x[None]",
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


@pytest.mark.parametrize(("call", "error", "words"), VERBATIM, ids=range(len(VERBATIM)))
def test_word_for_word(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == words


def test_a_name_that_is_no_string() -> None:
    with pytest.raises(TypeError, match=r"set_backend: name is 3; .*'numpy'"):
        r.set_backend(3)  # type: ignore[arg-type]


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
    "matrix": matrix,
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
