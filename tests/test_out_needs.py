"""`out` and `needs` in single libraries, beyond what the kit asks of every backend."""

from __future__ import annotations

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import FEATURES, operands_of

from .loopback import LoopbackBackend


def test_strict_out_overlap() -> None:
    import array_api_strict as xp

    for device in ("CPU_DEVICE", "device1"):
        x = xp.ones(6, device=xp.Device(device))
        with pytest.raises(ValueError, match="shares memory"):
            r.relu_forward(x[:4], out=x[2:])


@pytest.mark.libraries
def test_torch_out_overlap() -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(12, dtype=dtype)
        with pytest.raises(ValueError, match="shares memory"):
            r.relu_forward(x[:4], out=x[2:6])
        with pytest.raises(ValueError, match="shares memory"):
            r.relu_forward(x, out=x[:])
        assert r.relu_forward(x[::2], out=x[1::2])[0].data_ptr() == x[1::2].data_ptr()
    with pytest.raises(TypeError, match="out is on device meta"):
        r.relu_forward(torch.ones(3), out=torch.zeros(3, device="meta"))


@FEATURES
def test_what_is_not_needed_is_not_computed(rng: np.random.Generator, features: tuple[int, ...]) -> None:
    x, w, b, dout = operands_of(rng, features)
    with r.use_backend("loopback"):
        LoopbackBackend.calls.clear()
        assert r.affine_backward(dout, (x, w, b), needs=(False, False, False)) == (None, None, None)
        assert not LoopbackBackend.calls
        r.affine_backward(dout, (x, w, b), needs=(False, False, True))
        assert LoopbackBackend.calls == {"bias_backward": 1}
