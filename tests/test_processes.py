"""What a user of a library should never notice, beyond what the kit asks of every backend: very long arrays, signals."""

from __future__ import annotations

import signal
import time

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing import library_lib
from rectilinear.testing.cases import step

TIMEOUT = 60


@pytest.mark.nightly  # gigabytes, for 12 s
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_more_elements_than_a_32_bit_index(backend: str) -> None:
    """Views of stride 0, so that neither operands nor results need memory."""
    n = 2**31 + 3
    ones, one = np.broadcast_to(np.float32(1), (n, 1)), np.ones((1, 1), np.float32)
    with r.use_backend(backend):
        db = r.affine_backward(ones, (ones, one, one[0]), needs=(False, False, True))[2]
        assert abs(float(db[0]) - n) <= 1e-5 * n
        long = np.broadcast_to(1.0, (n, 1))
        out, _ = r.affine_forward(long.T, long, None)
        assert out == n


def test_time_is_not_lost_to_a_sleeping_signal_handler() -> None:
    """A signal handler of the user's runs in the main thread while calls go on."""
    seen: list[float] = []
    lib = library_lib("numpy", "numpy")
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        end = time.monotonic() + TIMEOUT
        while not seen and time.monotonic() < end:
            step(lib)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert seen
