"""Equal values, dtype, shape and strides give the same bits, on every run."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import operands, same_bits, step
from rectilinear.testing.lib import Lib


@pytest.mark.smoke
def test_the_same_bits_on_every_run(lib: Lib) -> None:
    first = step(lib)
    assert all(same_bits(step(lib), first) for _ in range(10))


def test_the_same_bits_wherever_the_arrays_lie(lib: Lib, rng: np.random.Generator) -> None:
    """Arrays made anew, while others lie where the first ones did: the order of sums does not depend on addresses."""
    case = operands(rng, (), 301, 47, 21, "float32")
    kept, first = [], None
    for _ in range(5):
        x, w, b, dout = map(lib.array, case)
        out, cache = r.affine_relu_forward(x, w, b)
        loss, dx = r.softmax_loss(out, [0] * 301)
        kept.append((x, w, b, dout, out))
        got = [lib.numpy(a)[None] for a in (out, *r.affine_relu_backward(dout, cache), loss, dx)]
        first = first or got
        assert same_bits(got, first)
