"""Threads, forks, spawns, interrupts, memory: what a user of a library should never notice."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

import rectilinear as r

from .conftest import NUMPY_LIBS, Lib

TIMEOUT = 60
FORKS = pytest.mark.no_cupy("a CUDA context does not survive a fork, and each process would make its own")


@pytest.fixture(params=sorted({lib.backend for lib in NUMPY_LIBS} - {"loopback"}))
def backend(request: pytest.FixtureRequest) -> str:
    """Backends that other processes know too."""
    return str(request.param)


def step(seed: int = 0, n: int = 65) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x, w, b, dout = (rng.standard_normal(shape) for shape in ((n, 33), (33, 17), (17,), (n, 17)))
    out, cache = r.affine_relu_forward(x, w, b)
    return [out, *r.affine_relu_backward(dout, cache)]  # type: ignore[list-item]


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.smoke
def test_the_same_bits_on_every_run(numpy_lib: Lib) -> None:
    first = step()
    assert all(same_bits(step(), first) for _ in range(10))


def test_many_threads_at_once(numpy_lib: Lib) -> None:
    want = [step(seed) for seed in range(8)]
    name = numpy_lib.backend

    def work(seed: int) -> bool:
        with r.use_backend(name):
            return all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for _ in range(30) for a, b in zip(step(seed), want[seed], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def child_step(backend: str) -> list[np.ndarray]:
    with r.use_backend(backend):
        return step(n=300)


FORK = """
import multiprocessing, sys, threading
import numpy as np
import rectilinear as r
from tests.test_processes import step

r.set_backend({backend!r})
want = step(n=300)
context = multiprocessing.get_context("fork")


def child(pipe):
    pipe.send(step(n=300))


def run():
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    if not ours.poll({timeout}):
        print("the child hangs")
        process.kill()
        return
    got = ours.recv()
    process.join()
    right = all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, want))
    print("right" if right and process.exitcode == 0 else f"wrong, exit code {{process.exitcode}}")


if {from_thread}:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
"""


@FORKS
@pytest.mark.parametrize("from_thread", [False, True])
def test_a_process_forked_after_use_computes(backend: str, from_thread: bool) -> None:
    code = FORK.format(backend=backend, timeout=TIMEOUT / 2, from_thread=from_thread)
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stdout.strip() == "right", done.stdout + done.stderr


@FORKS
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_process_pools(backend: str, method: str) -> None:
    want = child_step(backend)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        for got in pool.map(child_step, [backend] * 4, timeout=TIMEOUT):
            assert all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, want, strict=True))


INTERRUPT = """
import os, signal, threading, time
import numpy as np
import rectilinear as r

r.set_backend({backend!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
x, w = np.ones((600, 600)), np.ones((600, 600))
r.affine_relu_forward(x, w, None)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    end = time.time() + 30
    while time.time() < end:
        r.affine_relu_forward(x, w, None)
    print("never interrupted")
except KeyboardInterrupt:
    out, _ = r.affine_relu_forward(x, w, None)
    print("usable" if (out == 600).all() else "wrong")
"""


def test_a_keyboard_interrupt_leaves_the_library_usable(backend: str) -> None:
    done = subprocess.run(
        (sys.executable, "-c", INTERRUPT.format(backend=backend)), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.stdout.strip() == "usable", done.stderr


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.no_cupy("10^5 calls of a GPU take minutes, and pinned memory grows: tools/gpu_check.py looks at its pool")
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_memory_is_flat(backend: str) -> None:
    r.set_backend(backend)
    rng = np.random.default_rng(0)
    x, w, b, dout = (rng.standard_normal(shape) for shape in ((4, 8), (8, 4), (4,), (4, 4)))

    def calls(count: int) -> None:
        for _ in range(count):
            out, cache = r.affine_relu_forward(x, w, b)
            r.affine_relu_backward(dout, cache)
            r.softmax_loss(out, [0, 1, 2, 3])

    calls(2_000)
    gc.collect()
    before = resident_bytes()
    calls(34_000)  # three functions each: 10**5 calls
    gc.collect()
    assert resident_bytes() - before < 4 * 2**20


@pytest.mark.parametrize("backend", [pytest.param("numpy", marks=pytest.mark.nightly), "numba"])
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
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        end = time.monotonic() + TIMEOUT
        while not seen and time.monotonic() < end:
            step()
    finally:
        signal.signal(signal.SIGALRM, old)
    assert seen
