"""Memory is flat: nothing is left of a call when its results are gone."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import operands
from rectilinear.testing.lib import Lib
from rectilinear.testing.promises import STATM


def resident_bytes() -> int:
    with open(STATM) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(lib: Lib, n: int, before: int, count: int) -> int:
    """Bytes by which the process grows in so many calls of three functions each, after some to settle."""
    x, w, b, dout = map(lib.array, operands(np.random.default_rng(0), (), n, 8, 4))
    y = lib.array(np.zeros(n, np.int64))

    def calls(times: int) -> None:
        for _ in range(times):
            out, cache = r.affine_relu_forward(x, w, b)
            results = [out, *r.affine_relu_backward(dout, cache), *r.softmax_loss(out, y)]
            if lib.lazy:
                for result in results:
                    lib.numpy(result)

    calls(before)
    gc.collect()
    start = resident_bytes()
    calls(count)
    gc.collect()
    return resident_bytes() - start


@pytest.mark.no_cupy("10^5 calls of a GPU take minutes, and pinned memory grows: tools/gpu_check.py looks at its pool")
@pytest.mark.skipif(not os.path.exists(STATM), reason=f"memory is read from {STATM}")
def test_memory_is_flat(installed_lib: Lib) -> None:
    assert growth(installed_lib, n=4, before=2_000, count=34_000) < 4 * 2**20  # 10**5 calls


@pytest.mark.no_cupy("pinned memory grows: tools/gpu_check.py looks at its pool")
@pytest.mark.skipif(not os.path.exists(STATM), reason=f"memory is read from {STATM}")
def test_large_results_are_let_go(any_lib: Lib) -> None:
    """Each round makes more than 2 MiB; a library that keeps some for reuse keeps those of a few."""
    rounds = 24
    assert growth(any_lib, n=20_000, before=6, count=rounds) < rounds * 2**20
