"""asarray, to_numpy, synchronize, and the keep-mask as an object."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rectilinear as r


def test_asarray_takes_lists_scalars_and_arrays() -> None:
    assert r.asarray([[1, 2], [3, 4]]).shape == (2, 2)
    assert r.asarray(2.5).shape == ()
    assert r.asarray([1, 2], dtype="float32").dtype == np.float32
    x = np.ones(3)
    assert r.asarray(x) is x


@pytest.mark.parametrize(("x", "kind"), [(["a", "b"], "strings"), ([b"a"], "bytes"), ([None], "objects")])
def test_asarray_refuses_what_is_no_number(x: Any, kind: str) -> None:
    with pytest.raises(r.DTypeError, match=rf"asarray: x \(list\) would become an array of {kind}, not of numbers; pass numbers"):
        r.asarray(x)
    assert r.asarray(["1", "2"], dtype="float32").tolist() == [1.0, 2.0]


def test_asarray_refuses_to_lose_a_mask() -> None:
    with pytest.raises(TypeError, match=r"masked array.*filled"):
        r.asarray(np.ma.masked_array([1.0, 2.0], [True, False]))
    with pytest.raises(TypeError, match=r"masked array.*filled"):
        r.to_numpy(np.ma.masked_array([1.0, 2.0], [True, False]))


def test_asarray_knows_bfloat16_by_name_and_refuses_none() -> None:
    assert r.asarray([1.0], dtype="bfloat16").dtype.name == "bfloat16"
    with pytest.raises(TypeError, match="x is None"):
        r.asarray(None)


@pytest.mark.libraries
def test_torch_bfloat16_comes_to_the_host() -> None:
    import ml_dtypes
    import torch

    got = r.to_numpy(torch.tensor([1.5, -2.0], dtype=torch.bfloat16, requires_grad=True))
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), [1.5, -2.0])
    np.testing.assert_array_equal(r.to_numpy(torch.tensor([1.5, -2.0], requires_grad=True)), [1.5, -2.0])
    np.testing.assert_array_equal(r.to_numpy(torch.tensor([1 + 2j]).conj().imag), [-2.0])


# ---------------------------------------------------------------- KeepMask


def make_mask(keep: Any) -> r.KeepMask:
    return r.KeepMask(np.packbits(keep, axis=-1, bitorder="little"), keep.shape)


@pytest.fixture
def keep(rng: np.random.Generator) -> np.ndarray:
    return rng.random((5, 13)) < 0.5


@pytest.mark.smoke
def test_keepmask_shows_signs(keep: np.ndarray) -> None:
    mask = make_mask(keep)
    assert mask.shape == keep.shape
    assert mask.ndim == 2
    assert mask.nbytes <= keep.size
    signs = np.asarray(mask)
    assert signs.dtype == np.int8
    np.testing.assert_array_equal(signs, np.where(keep, 1, -1))
    assert np.asarray(mask, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.array(mask, copy=False)


def test_foreign_code_selects_what_was_kept(keep: np.ndarray) -> None:
    mask = make_mask(keep)
    for selected in (
        mask == 1,
        mask != -1,
        np.asarray(mask, dtype=bool),
        mask > 0,
        mask >= 0,
        ~(mask < 0),
        ~(mask <= 0),
        np.greater(mask, 0),
        0 < mask,
        np.asarray(mask) > 0,
    ):
        np.testing.assert_array_equal(selected, keep)
    dout = np.ones(keep.shape)
    np.testing.assert_array_equal(dout * (mask > 0), keep)


def test_repr_says_how_large_it_is(keep: np.ndarray) -> None:
    assert "KeepMask(shape=(5, 13)" in repr(make_mask(keep))


def test_a_mask_of_another_shape_is_refused(keep: np.ndarray) -> None:
    with pytest.raises(r.ShapeError, match=r"dout has shape \(5, 12\) but the forward's x had \(5, 13\)"):
        r.relu_backward(np.ones((5, 12)), make_mask(keep))


def test_a_mask_has_a_library_too(keep: np.ndarray) -> None:
    import array_api_strict

    with pytest.raises(TypeError, match="array_api_strict array but cache is a numpy array"):
        r.relu_backward(array_api_strict.ones((5, 13)), make_mask(keep))
