"""A `KeepMask`, which a fused forward of another backend may have made, is read in any layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import rectilinear as r
from rectilinear import KeepMask
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("extents", [(0, 13), (4, 0), (0, 0), (4, 1), (4, 8), (4, 9), (2, 3, 17)], ids=str)
@pytest.mark.parametrize("layout", ["rows that are longer", "Fortran", "reversed", "one row for all", "every other byte"])
def test_bits_of_any_layout(plain_lib: Lib, rng: np.random.Generator, extents: tuple[int, ...], layout: str) -> None:
    keep = rng.random(extents) < 0.5
    if layout == "one row for all":
        keep = np.broadcast_to(keep[..., :1, :], extents)
    bits = np.packbits(keep, axis=-1, bitorder="little")
    layouts: dict[str, Callable[[], np.ndarray]] = {
        "rows that are longer": lambda: np.concatenate([bits, np.zeros_like(bits)], axis=-1),
        "Fortran": lambda: np.asfortranarray(bits),
        "reversed": lambda: np.ascontiguousarray(bits[..., ::-1, ::-1])[..., ::-1, ::-1],
        "one row for all": lambda: np.broadcast_to(bits[..., :1, :], bits.shape),
        "every other byte": lambda: np.repeat(bits, 2, axis=-1)[..., ::2],
    }
    bits = layouts[layout]()
    dout = rng.standard_normal(extents)
    np.testing.assert_array_equal(r.relu_backward(dout, KeepMask(bits, extents)), np.where(keep, dout, 0))


def made(keep: np.ndarray) -> KeepMask:
    return KeepMask(np.packbits(keep, axis=-1, bitorder="little"), keep.shape)


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_a_mask_that_another_backend_made(numpy_lib: Lib, rng: np.random.Generator, stack: tuple[int, ...]) -> None:
    keep = rng.random((*stack, 5, 13)) < 0.5
    dout, x, w = (rng.standard_normal(shape) for shape in (keep.shape, (*stack, 5, 4), (*stack, 4, 13)))
    fc = numpy_lib.array(x), numpy_lib.array(w), numpy_lib.array(np.zeros((*stack, 13)))
    z = numpy_lib.array(np.where(keep, 1.0, -1.0))
    for got, want in zip(
        r.affine_relu_backward(numpy_lib.array(dout), (fc, made(keep))), r.affine_relu_backward(numpy_lib.array(dout), (fc, z)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(r.relu_backward(numpy_lib.array(dout), made(keep)), np.where(keep, dout, 0))


def test_its_own_mask_is_one_that_others_read(numpy_lib: Lib, rng: np.random.Generator) -> None:
    """Whatever the fused forward returns for ReLU, the numpy backend makes of it what this one does."""
    x, w, dout = (numpy_lib.array(rng.standard_normal(shape)) for shape in ((5, 4), (4, 13), (5, 13)))
    out, cache = r.affine_relu_forward(x, w, None)
    assert cache[1].shape == (5, 13)
    kept = ~(np.asarray(cache[1]) < 0)
    np.testing.assert_array_equal(kept, out > 0)  # no z is 0 here
    here = r.relu_backward(dout, cache[1])
    with r.use_backend("numpy"):
        np.testing.assert_array_equal(r.relu_backward(dout, cache[1]), here)
