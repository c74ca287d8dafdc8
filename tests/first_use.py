"""The first calls of a process, of all kinds, from many threads at once, and a fork in the middle; run by test_memory_safety.

Values are small integers, so that every result is exact whoever computes it. Ends with status 0 and no word if all were right.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable

import numpy as np

import rectilinear as r

THREADS = 8


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def affine(dtype: str) -> None:
    x, w, b, dout = (integers(shape, dtype, i) for i, shape in enumerate([(37, 41), (41, 29), (29,), (37, 29)]))
    out, cache = r.affine_forward(x, w, b)
    assert np.array_equal(out, x @ w + b)
    dx, dw, db = r.affine_backward(dout, cache)
    assert np.array_equal(dx, dout @ w.T)
    assert np.array_equal(dw, x.T @ dout)
    assert np.array_equal(db, dout.sum(axis=0))


def affine_relu(dtype: str) -> None:
    x, w, b, dout = (integers(shape, dtype, i) for i, shape in enumerate([(3, 65, 34), (3, 34, 19), (3, 19), (3, 65, 19)]))
    out, cache = r.affine_relu_forward(x, w, b)
    z = x @ w + b[:, None]
    assert np.array_equal(out, np.maximum(z, 0))
    dx, dw, db = r.affine_relu_backward(dout, cache)
    dz = np.where(z < 0, 0, dout)
    assert np.array_equal(dx, dz @ w.swapaxes(1, 2))
    assert np.array_equal(dw, x.swapaxes(1, 2) @ dz)
    assert np.array_equal(db, dz.sum(axis=1))
    assert np.array_equal(r.relu_backward(dout, cache[1]), dz)


def bias(dtype: str) -> None:
    dout = integers((1000, 30), dtype, 0)
    _, _, db = r.affine_backward(dout, (dout[:, :7], np.zeros((7, 30), dtype), np.zeros(30, dtype)), needs=(False, False, True))
    assert np.array_equal(db, dout.sum(axis=0))


def relu(dtype: str) -> None:
    x, dout = integers((123, 45), dtype, 0), integers((123, 45), dtype, 1)
    assert np.array_equal(r.relu_forward(x)[0], np.maximum(x, 0))
    assert np.array_equal(r.relu_backward(dout, x), np.where(x < 0, 0, dout))
    assert np.array_equal(r.relu_backward(dout.T[::2], x.T[::2]), np.where(x < 0, 0, dout).T[::2])


def softmax(dtype: str) -> None:
    loss, dx = r.softmax_loss(np.zeros((50, 4), dtype), [1] * 50)
    assert np.allclose(loss, np.log(4), rtol=1e-6)
    assert np.allclose(dx[:, 1], -0.75 / 50, rtol=1e-5)


KINDS: tuple[Callable[[str], None], ...] = (affine, affine_relu, bias, relu, softmax)


def churn() -> None:
    """Overwrite what has been freed."""
    for size in (24, 40, 88, 640, 4096):
        kept = [np.full(size, -1, np.int8) for _ in range(200)]
        del kept


def main(seed: int, dtypes: tuple[str, ...] = ("f4", "f8")) -> None:
    kinds = [(kind, dtype) for kind in KINDS for dtype in dtypes]
    r.set_backend("numba")
    wrong: list[BaseException] = []
    together = threading.Barrier(THREADS + 1)

    def work(number: int) -> None:
        try:
            order = kinds * 2
            if seed % 4 >= 2:  # else all make the same first call
                random.Random(seed * THREADS + number).shuffle(order)
            together.wait()
            for kind, dtype in order:
                kind(dtype)
                churn()
        except BaseException as error:  # whatever it is, the main thread tells
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    together.wait()
    child = os.fork() if seed % 2 else -1
    if child == 0:
        for kind, dtype in kinds:
            kind(dtype)
        os._exit(0)
    for thread in threads:
        thread.join()
    if child > 0:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if wrong:
        raise wrong[0]
    for kind, dtype in kinds:
        kind(dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]))
