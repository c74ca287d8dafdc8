"""What a user of a library should never notice: forks, new processes, interrupts."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import rectilinear as r
from rectilinear.testing.cases import step
from rectilinear.testing.lib import Lib, library_lib

TIMEOUT = 60


FORKS = pytest.mark.no_cupy("a CUDA context does not survive a fork, and each process would make its own")


def child_step(backend: str) -> list[np.ndarray]:
    with r.use_backend(backend):
        return step(library_lib("numpy", "numpy"), n=300)


FORK = """
import multiprocessing, sys, threading
import numpy as np
import rectilinear as r
from rectilinear.testing.promises.processes import child_step

r.set_backend({backend!r})
want = child_step({backend!r})
context = multiprocessing.get_context("fork")


def child(pipe):
    pipe.send(child_step({backend!r}))


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
def test_a_process_forked_after_use_computes(installed_lib: Lib, from_thread: bool) -> None:
    code = FORK.format(backend=installed_lib.backend, timeout=TIMEOUT / 2, from_thread=from_thread)
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stdout.strip() == "right", done.stdout + done.stderr


@FORKS
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_process_pools(installed_lib: Lib, method: str) -> None:
    backend = installed_lib.backend
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


def test_a_keyboard_interrupt_leaves_the_library_usable(installed_lib: Lib) -> None:
    done = subprocess.run(
        (sys.executable, "-c", INTERRUPT.format(backend=installed_lib.backend)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.stdout.strip() == "usable", done.stderr
