"""Suite: what a call at (1, 64, 64) costs before a profile was ever open, while one is open, and afterwards."""

import contextlib

import numpy as np
import pytest

import rectilinear as r


@pytest.mark.parametrize("when", ["before", "open", "after"])
def test_call(benchmark, when):
    x, w, b = np.ones((1, 64), "f4"), np.ones((64, 64), "f4"), np.ones(64, "f4")
    if when == "after":
        with r.profile():
            r.affine_forward(x, w, b)
    with r.profile() if when == "open" else contextlib.nullcontext():
        benchmark(r.affine_forward, x, w, b)
