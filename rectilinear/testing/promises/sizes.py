"""Extents of 0 and 1 are ordinary: sums over nothing are 0, and results have the shapes that they always have."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import assert_layers_are_right, operands
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stack", [(), (1,), (3,), (0,)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 64, 10)], ids=str)
def test_values_of_small_extents(
    lib: Lib, rng: np.random.Generator, shape: tuple[int, int, int], stack: tuple[int, ...], dtype: str
) -> None:
    assert_layers_are_right(lib, operands(rng, stack, *shape, dtype), dtype)


@pytest.mark.parametrize("needs", [(False, False, True), (True, True, True)], ids=["db", "all"])
def test_no_samples_give_no_gradient(lib: Lib, needs: tuple[bool, bool, bool]) -> None:
    """dw and db are 0 then, not undefined; db also where it is asked for alone."""
    cache = tuple(lib.array(np.ones(shape)) for shape in ((0, 3), (3, 2), (2,)))
    _, dw, db = r.affine_backward(lib.array(np.ones((0, 2))), cache, needs=needs)
    np.testing.assert_array_equal(lib.numpy(db), np.zeros(2))
    if needs[1]:
        np.testing.assert_array_equal(lib.numpy(dw), np.zeros((3, 2)))
