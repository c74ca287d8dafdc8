"""`needs`: what is not needed is None, and the rest as ever."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import FEATURES, operands_of
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("layer", ["affine", "affine_relu"])
@pytest.mark.parametrize("needs", [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)])
@FEATURES
def test_needs(lib: Lib, rng: np.random.Generator, features: tuple[int, ...], layer: str, needs: tuple[bool, bool, bool]) -> None:
    x, w, b, dout = map(lib.array, operands_of(rng, features))
    cache = getattr(r, f"{layer}_forward")(x, w, b)[1]
    backward = getattr(r, f"{layer}_backward")
    everything = backward(dout, cache)
    for got, want, need in zip(backward(dout, cache, needs=needs), everything, needs, strict=True):
        if need:
            np.testing.assert_allclose(lib.numpy(got), lib.numpy(want), rtol=1e-12)
        else:
            assert got is None


@FEATURES
def test_wrong_needs_and_outs(plain_lib: Lib, rng: np.random.Generator, features: tuple[int, ...]) -> None:
    x, w, b, dout = operands_of(rng, features)
    with pytest.raises(TypeError, match=r"needs is .*takes three bools"):
        r.affine_backward(dout, (x, w, b), needs=(True, True))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs is .*takes three bools"):
        r.affine_backward(dout, (x, w, b), needs=(1, 0, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a tuple \(dx, dw, db\)"):
        r.affine_backward(dout, (x, w, b), out=np.zeros((5, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out has an array for dw, which is not computed"):
        r.affine_backward(dout, (x, w, b), needs=(True, False, True), out=(None, np.zeros((6, 4)), None))
