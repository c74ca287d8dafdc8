"""Calls from many threads at once, the first ones included, are right."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import rectilinear as r
from rectilinear.testing.cases import step
from rectilinear.testing.lib import Lib

WORKERS = 8


def test_many_threads_at_once(lib: Lib) -> None:
    want = [step(lib, seed) for seed in range(WORKERS)]
    rounds, together = 30 if lib.on_numpy else 5, threading.Barrier(WORKERS)

    def work(seed: int) -> bool:
        with r.use_backend(lib.backend):
            together.wait(60)
            return all(
                np.allclose(a, b, rtol=1e-12, atol=1e-12) for _ in range(rounds) for a, b in zip(step(lib, seed), want[seed], strict=True)
            )

    with ThreadPoolExecutor(WORKERS) as pool:
        assert all(pool.map(work, range(WORKERS)))
