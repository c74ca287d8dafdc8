"""Arguments are never written to, and never kept: the arrays stay the caller's."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import operands
from rectilinear.testing.lib import Lib


@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arguments_keep_their_values(lib: Lib, rng: np.random.Generator, stack: tuple[int, ...], dtype: str) -> None:
    """Of every function, with NaN and infinities among them, which a careless ``x * (x > 0)`` in place would change too."""
    case = operands(rng, stack, 9, 7, 5, dtype)
    for a in case:
        a.reshape(-1)[:4] = [np.nan, -np.inf, -0.0, -1e-30]
    x, w, b, dout = arrays = [lib.array(a) for a in case]
    labels = np.arange(9) % 5
    y = lib.array(labels)
    with np.errstate(all="ignore"):  # lazy arrays are computed as late as at the end
        _, cache = r.affine_relu_forward(x, w, b)
        z = None if isinstance(cache[1], r.KeepMask) else lib.numpy(cache[1]).copy()
        r.affine_relu_backward(dout, cache)
        r.affine_forward(x, w, b)
        r.affine_backward(dout, cache[0])
        r.affine_backward(dout, cache[0], needs=(False, False, True))
        r.relu_forward(x)
        r.relu_backward(dout, cache[1])
        r.relu_backward(x, x)
        if not stack:
            r.softmax_loss(dout, y)
        for array, value in zip([*arrays, y], [*case, labels], strict=True):
            np.testing.assert_array_equal(lib.numpy(array), value)
        if z is not None:
            np.testing.assert_array_equal(lib.numpy(cache[1]), z)


def test_arguments_are_not_kept(plain_lib: Lib, rng: np.random.Generator) -> None:
    arrays = list(operands(rng, (), 9, 7, 5))
    seen = [weakref.ref(a) for a in arrays]
    _, cache = r.affine_relu_forward(*arrays[:3])
    r.affine_relu_backward(arrays[3], cache)
    r.affine_backward(arrays[3], cache[0])
    r.relu_forward(arrays[0])
    r.softmax_loss(arrays[3], [0] * 9)
    del arrays, cache
    gc.collect()
    assert [reference() for reference in seen] == [None] * 4
