"""A keep-mask is checked when it is made, stays what it was, and is never taken for z."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.keepmask import KeepMask

from .subprocesses import run

BYTES = np.full((4, 8), 0b10110101, np.uint8)


def made(keep: np.ndarray) -> KeepMask:
    return KeepMask(np.packbits(keep, axis=-1, bitorder="little"), keep.shape)


@pytest.fixture
def keep(rng: np.random.Generator) -> np.ndarray:
    return rng.random((4, 13)) < 0.5


# ---------------------------------------------------------------- what is checked

WRONG: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "rows too short": (BYTES[:, :1], (4, 64), ValueError, r"bits has shape \(4, 1\) but a mask of shape \(4, 64\) takes \(4, 8\)"),
    "one bit too short": (BYTES, (4, 65), ValueError, r"takes \(4, 9\)"),
    "too few rows": (BYTES[:3], (4, 64), ValueError, r"\(3, 8\)"),
    "too many rows": (BYTES, (3, 64), ValueError, r"\(4, 8\)"),
    "no rows": (BYTES[0], (4, 64), ValueError, r"\(8,\)"),
    "groups on one side": (BYTES, (1, 4, 64), ValueError, r"\(1, 4, 64\)"),
    "negative": (BYTES, (4, -64), ValueError, "negative"),
    "no axes": (np.uint8(1)[...], (), ValueError, r"\(N, M\)"),
    "half a column": (BYTES, (4, 64.0), TypeError, "tuple of ints"),
    "a number for a shape": (BYTES, 4, TypeError, "tuple of ints"),
    "signed": (BYTES.view(np.int8), (4, 64), TypeError, "int8.*uint8"),
    "wider": (BYTES.view(np.uint64), (4, 64), TypeError, "uint64.*uint8"),
    "bool": (BYTES.astype(bool), (4, 64), TypeError, "bool.*uint8"),
    "a list": (BYTES.tolist(), (4, 64), TypeError, "bits is a list"),
    "nothing": (None, (4, 64), TypeError, "bits is a NoneType"),
    "a masked array": (np.ma.masked_array(BYTES), (4, 64), TypeError, "MaskedArray"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bits_are_checked_against_the_shape(name: str) -> None:
    bits, shape, error, words = WRONG[name]
    with pytest.raises(error, match=words):
        KeepMask(bits, shape)
    with pytest.raises(error, match=words):  # as a pickle of an earlier version, or a doctored one, would
        object.__new__(KeepMask).__setstate__((bits, shape))


def test_a_pickle_with_other_bits_is_refused(keep: np.ndarray) -> None:
    mask = made(keep)
    make, (bits, shape) = mask.__reduce__()

    class Doctored:
        def __reduce__(self) -> Any:
            return make, (bits[:, :1], shape)

    with pytest.raises(ValueError, match="bits has shape"):
        pickle.loads(pickle.dumps(Doctored()))


def test_shapes_are_ints_whatever_they_came_as() -> None:
    mask = KeepMask(BYTES, [np.int64(4), np.uint8(60)])  # type: ignore[arg-type]
    assert mask.shape == (4, 60)
    assert [type(extent) for extent in mask.shape] == [int, int]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles(keep: np.ndarray, protocol: int) -> None:
    mask = made(keep)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask, protocol))):
        assert other.shape == mask.shape
        np.testing.assert_array_equal(other.to_bool(), keep)
    assert not np.may_share_memory(copy.deepcopy(mask).bits, mask.bits)


# ---------------------------------------------------------------- it stays what it was


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_nothing_that_users_do_to_a_mask_changes_its_extents(rng: np.random.Generator, backend: str) -> None:
    dout = rng.standard_normal((4, 64))
    with r.use_backend(backend):
        x, w = rng.standard_normal((4, 3)), rng.standard_normal((3, 64))
        for mask in (KeepMask(BYTES.copy(), (4, 64)), r.affine_relu_forward(x, w, None)[1][1]):
            want = r.relu_backward(dout, mask)
            if not isinstance(mask, KeepMask):
                continue
            for name, value in (("bits", BYTES[:, :1]), ("shape", (1, 1)), ("ndim", 1)):
                with pytest.raises(AttributeError):
                    setattr(mask, name, value)
            with warnings.catch_warnings(action="ignore"):  # NumPy would rather that nobody set a shape
                mask.bits.shape = (1, 32)
            with pytest.raises(ValueError, match="does not own its data"):
                mask.bits.resize((1,))
            assert mask.bits.shape == (4, 8)
            np.testing.assert_array_equal(r.relu_backward(dout, mask), want)


def test_the_array_it_was_made_of_may_be_given_another_shape() -> None:
    bits = BYTES.copy()
    mask = KeepMask(bits, (4, 64))
    with warnings.catch_warnings(action="ignore"):
        bits.shape = (32,)
    assert mask.bits.shape == (4, 8)
    with pytest.raises(ValueError, match="refer"):
        bits.resize((1,))


# ---------------------------------------------------------------- not z

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    **{
        name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
    },
    **{name: getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "imatmul", "iand", "lshift", "rshift")},
    "divmod": divmod,
    **{name: getattr(np, name) for name in ("maximum", "minimum", "multiply", "matmul", "copysign", "logical_and", "arctan2")},
}
OF_ONE: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "~": operator.invert,
    "abs": abs,
    "exp": np.exp,
    "sign": np.sign,
    "isnan": np.isnan,
    "logical_not": np.logical_not,
    "sum": np.sum,
    "add.reduce": np.add.reduce,
    "greater.outer": lambda mask: np.greater.outer(mask, 0),
    "out": lambda mask: np.negative(np.ones(mask.shape), out=mask),
    "out of a comparison": lambda mask: np.greater(np.ones(mask.shape), 0, out=mask),
}
OTHERS = {"array": np.ones((4, 4)), "number": 2, "float": 0.5, "scalar": np.float32(2), "0-d": np.array(2.0)}


def names_the_way_out(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"KeepMask: .*mask") as caught:
        call()
    for way in ("np.asarray(mask)", "mask > 0", "relu_backward(dout, mask)"):
        assert way in str(caught.value)


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("other", OTHERS)
def test_arithmetic_is_an_error_in_either_order(name: str, other: str) -> None:
    mask, value = KeepMask(BYTES, (4, 4)), OTHERS[other]
    names_the_way_out(lambda: ARITHMETIC[name](mask, value))
    names_the_way_out(lambda: ARITHMETIC[name](value, mask))
    names_the_way_out(lambda: ARITHMETIC[name](mask, mask))


@pytest.mark.parametrize("name", OF_ONE)
def test_other_functions_of_a_mask_are_errors(name: str) -> None:
    names_the_way_out(lambda: OF_ONE[name](KeepMask(BYTES, (4, 4))))


@pytest.mark.parametrize("name", ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"])
def test_comparisons_answer_as_operators_and_as_ufuncs(keep: np.ndarray, name: str) -> None:
    mask, signs, ufunc = made(keep), np.where(keep, 1, -1), getattr(np, name)
    compare = getattr(operator, {"equal": "eq", "not_equal": "ne", "less_equal": "le", "greater_equal": "ge"}.get(name, name[0] + "t"))
    for other in (0, 0.0, 1, np.zeros(13), np.int8(-1)):
        np.testing.assert_array_equal(compare(mask, other), ufunc(signs, other))
        np.testing.assert_array_equal(compare(other, mask), ufunc(other, signs))
        np.testing.assert_array_equal(ufunc(mask, other), ufunc(signs, other))
        np.testing.assert_array_equal(ufunc(other, mask), ufunc(other, signs))
    np.testing.assert_array_equal(ufunc(mask, mask), ufunc(signs, signs))
    into = np.empty(keep.shape, bool)
    assert ufunc(mask, 0, out=into) is into
    np.testing.assert_array_equal(into, ufunc(signs, 0))


@pytest.mark.parametrize("name", ["mean", "sum", "dot", "cumsum", "concatenate", "count_nonzero"])
def test_functions_that_are_no_ufuncs_are_errors_too(keep: np.ndarray, name: str) -> None:
    mask = made(keep)
    arguments = {"dot": (mask, keep.T), "concatenate": ((mask, mask),)}.get(name, (mask,))
    names_the_way_out(lambda: getattr(np, name)(*arguments))


def test_questions_about_shape_and_equality_are_answered(keep: np.ndarray) -> None:
    mask = made(keep)
    assert (np.shape(mask), np.ndim(mask), np.size(mask)) == (keep.shape, keep.ndim, keep.size)
    assert (np.shape(a=mask), np.size(a=mask)) == (keep.shape, keep.size)
    assert np.array_equal(mask, np.where(keep, 1, -1))
    assert np.array_equal(a1=np.where(keep, 1, -1), a2=mask)
    assert not np.array_equal(mask, np.where(keep, -1, 1))


def test_selecting_by_a_comparison_stays(keep: np.ndarray) -> None:
    np.testing.assert_array_equal(np.where(made(keep) > 0, 2.0, 0.0), np.where(keep, 2.0, 0.0))
    np.testing.assert_array_equal(np.where(made(keep), 1, 0), 1)  # as with z, what is not zero is true


# ---------------------------------------------------------------- modules that are loaded anew

ANEW = {
    "reload of its module": "importlib.reload(rectilinear.keepmask)",
    "reload of it and the layers": "[importlib.reload(m) for m in (rectilinear.keepmask, rectilinear.dispatch, rectilinear.layers)]",
    "reload of the backend": "[importlib.reload(m) for m in (rectilinear.keepmask, rectilinear.backends.numba_backend)]",
    "import from the beginning": "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('rectilinear')]; import rectilinear",
    # What IPython's autoreload does: the old class gets the attributes of the new one, the instances become the new one's.
    "autoreload": """
module, old = rectilinear.keepmask, rectilinear.keepmask.KeepMask
kept = {name: module.__dict__[name] for name in ("__name__", "__loader__", "__spec__")}
module.__dict__.clear()
module.__dict__.update(kept)
importlib.reload(module)
for name in list(vars(old)):
    try:
        setattr(old, name, getattr(module.KeepMask, name))
    except (AttributeError, TypeError):
        pass
mask.__class__ = module.KeepMask
""",
}


@pytest.mark.parametrize("name", ANEW)
@pytest.mark.parametrize("backend", ["numba", pytest.param("numpy", marks=pytest.mark.nightly)])
def test_a_mask_survives_its_module(name: str, backend: str) -> None:
    assert "kept" in run(
        f"""
import importlib, pickle, sys
import numpy as np, rectilinear
import rectilinear.backends.numba_backend
x, w = np.ones((2, 3)), np.ones((3, 1)) * [1.0, -1.0]
with rectilinear.use_backend("numba"):
    _, (fc, mask) = rectilinear.affine_relu_forward(x, w, None)
{ANEW[name]}
with rectilinear.use_backend("{backend}"):
    again = rectilinear.affine_relu_forward(x, w, None)[1]
    for cache in ((fc, mask), again, (fc, pickle.loads(pickle.dumps(rectilinear.KeepMask(mask.bits, mask.shape))))):
        dx, dw, db = rectilinear.affine_relu_backward(np.ones((2, 2)), cache)
        assert (dx == 1).all(), dx
        assert (rectilinear.relu_backward(np.ones((2, 2)), cache[1]) == [1.0, 0.0]).all()
    assert isinstance(mask, rectilinear.KeepMask)
    assert rectilinear.to_numpy(mask) is mask
    try:
        mask * np.ones((2, 2))
    except TypeError as error:
        assert "relu_backward" in str(error)
        print("kept")
"""
    )
