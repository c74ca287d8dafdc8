"""The stacked form: every operand has one more leading axis, the groups, and each is a layer by itself."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import assert_close, assert_layers_are_right, operands
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("groups", [1, 3, 0])
@pytest.mark.parametrize("shape", [(5, 6, 4), (33, 17, 31), (130, 3, 2)])
def test_stacked_values(lib: Lib, rng: np.random.Generator, shape: tuple[int, int, int], groups: int, dtype: str) -> None:
    assert_layers_are_right(lib, operands(rng, (groups,), *shape, dtype), dtype)


def test_a_group_is_as_it_is_alone(lib: Lib, rng: np.random.Generator) -> None:
    x, w, b, dout = operands(rng, (3,), 40, 6, 5)
    out, cache = r.affine_relu_forward(*map(lib.array, (x, w, b)))
    together = [lib.numpy(a) for a in (out, *r.affine_relu_backward(lib.array(dout), cache))]
    for i in range(3):
        out, cache = r.affine_relu_forward(*map(lib.array, (x[i], w[i], b[i])))
        alone = [lib.numpy(a) for a in (out, *r.affine_relu_backward(lib.array(dout[i]), cache))]
        for got, want in zip(together, alone, strict=True):
            assert_close(got[i], want)
