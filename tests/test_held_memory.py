"""Memory kept for reuse: one limit, given back when asked, and arrays that behave as any other of NumPy's."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from pathlib import Path

import numpy as np
import pytest

import rectilinear as r
from rectilinear import buffers
from rectilinear.kernels.runtime import allocator

from .subprocesses import run

MIB = 1 << 20
BYTE = np.dtype("u1")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory of a process is read from /proc")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

START = """
import os, sys, threading
import numpy as np
import rectilinear as r
from rectilinear import buffers
r.set_backend("numba")
MIB = 1 << 20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def filled(mib, value=1):
    made = buffers.empty((mib * MIB,), np.dtype("u1"))
    made.fill(value)
    return made
"""


def run_here(code: str, **environment: str | None) -> str:
    return run(START + code, **{"RECTILINEAR_CACHE_BYTES": None, **environment})


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with r.use_backend("numba"):
        yield


def the_allocator() -> allocator.Allocator:
    """The one that results come from, which the first large one makes."""
    buffers.empty((MIB,), BYTE)
    assert buffers._allocator
    return buffers._allocator


# ---------------------------------------------------------------- arrays as any other


def results(n: int) -> dict[str, np.ndarray]:
    """A result of each function, of n rows of 64."""
    x, w, dout = np.full((n, 64), 2.0, "f4"), np.full((64, 64), 0.5, "f4"), np.ones((n, 64), "f4")
    out, cache = r.affine_relu_forward(x, w, None)
    return {
        "affine_relu_forward": out,
        "affine_forward": r.affine_forward(x, w, None)[0],
        "affine_backward": r.affine_relu_backward(dout, cache)[0],
        "relu_forward": r.relu_forward(x)[0],
        "relu_backward": r.relu_backward(dout, x),
        "softmax_loss": r.softmax_loss(x, np.zeros(n, int))[1],
    }


@pytest.mark.parametrize("n", [10, 400, 1 << 12, 1 << 14])
def test_results_own_their_memory_and_can_be_resized_at_every_size(n: int) -> None:
    made = results(n)
    for name in list(made):
        y = made.pop(name)
        assert y.flags.owndata, name
        assert y.base is None, name
        before = y.copy()
        y.resize((2 * n, 64))
        np.testing.assert_array_equal(y[:n], before, name)
        assert not y[n:].any(), name
        y.resize((n // 2, 64))
        np.testing.assert_array_equal(y, before[: n // 2], name)
        view = y[:1]
        with pytest.raises(ValueError, match="cannot resize"):
            y.resize((n, 64))
        del view


def test_the_latest_memory_given_up_serves_the_next_result_of_its_size() -> None:
    r.release_memory()
    first, second = (buffers.empty((3 * MIB,), BYTE) for _ in range(2))
    addresses = [first.ctypes.data, second.ctypes.data]
    del first
    assert buffers.empty((10 * MIB,), BYTE).ctypes.data not in addresses
    held = r.held_memory()
    again = buffers.empty((3 * MIB - 5,), BYTE)
    assert again.ctypes.data == addresses[0]
    assert r.held_memory() <= held - 3 * MIB
    half = second[MIB:]
    third, fourth = (buffers.empty((2 * MIB,), BYTE) for _ in range(2))
    latest = fourth.ctypes.data
    del third, fourth
    assert buffers.empty((2 * MIB,), BYTE).ctypes.data == latest
    del second, again
    assert buffers.empty((3 * MIB,), BYTE).ctypes.data == addresses[0]  # half keeps the other
    del half


def test_any_size_and_zeros_and_reallocation() -> None:
    """As the allocator of all of NumPy, over the edges where blocks begin to be kept and mappings to be aligned."""
    edges = [0, 1, 63, 64, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB - 64, 2 * MIB, 5 * MIB + 3]

    def everything() -> None:
        assert np._core.multiarray.get_handler_name() == "rectilinear"
        for size in edges:
            dirty = np.empty(size, np.uint8)
            dirty.fill(255)
            assert dirty.ctypes.data % 64 == 0
            del dirty
            assert not np.zeros(size, np.uint8).any()
            assert not np.zeros((size, 3), np.uint8).any()
            for other in edges:
                array = np.empty(size, np.uint8)
                array[:] = np.arange(size) % 251
                array.resize(other)
                common = min(size, other)
                np.testing.assert_array_equal(array[:common], np.arange(common) % 251)
                assert not array[common:].any()

    the_allocator()._context.copy().run(everything)
    with pytest.raises(MemoryError):
        the_allocator().empty((1 << 61,), BYTE)


@linux
def test_zeros_take_no_memory_before_they_are_written_to() -> None:
    run_here("""
made = buffers._made_allocator()
before = resident()
zeros = made._context.copy().run(np.zeros, 512 * MIB, np.uint8)
assert resident() - before < 64 * MIB
assert not zeros[:: 64 * MIB].any()
""")


def test_the_users_own_allocator_is_kept_to() -> None:
    ours = the_allocator()
    handler = allocator._Handler(b"mine", 1, ours._state, *allocator._entry_points()[:4])

    def inside() -> tuple[str, str]:
        allocator._install(handler)
        return tuple(np._core.multiarray.get_handler_name(buffers.empty((size,), BYTE)) for size in (10, 4 * MIB))  # type: ignore[return-value]

    assert Context().run(inside) == ("mine", "mine")


def test_nobody_elses_arrays_come_from_it() -> None:
    buffers.empty((4 * MIB,), BYTE)
    assert np._core.multiarray.get_handler_name() == "default_allocator"
    assert np._core.multiarray.get_handler_name(np.empty(4 * MIB, np.uint8)) == "default_allocator"


def test_inputs_are_not_kept_alive() -> None:
    x, w, dout = np.ones((1 << 13, 64)), np.ones((64, 64)), np.ones((1 << 13, 64))
    gone = [weakref.ref(array) for array in (x, w, dout)]
    out, cache = r.affine_relu_forward(x, w, None)
    gradients = r.affine_relu_backward(dout, cache)
    loss = r.softmax_loss(x, np.zeros(1 << 13, int))
    del x, w, dout, cache
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    del out, gradients, loss


# ---------------------------------------------------------------- one limit

STEPS = """
x, w, dout = np.ones((1 << 13, 64)), np.ones((64, 64)), np.ones((1 << 13, 64))
def steps(n=3):
    most = 0
    for i in range(n):
        out, cache = r.affine_relu_forward(x[i:], w, None)
        gradients = r.affine_relu_backward(dout[i:], cache)
        relu = [r.relu_forward(x[: 1 << (10 + j % 4)])[0] for j in range(8)]
        del out, cache, gradients, relu
        most = max(most, r.held_memory())
    return most
"""


@pytest.mark.parametrize(
    "limit", ["0", "3 MiB", *(pytest.param(limit, marks=pytest.mark.nightly) for limit in ("1000000", "1 MiB", "20 MiB", "1 GiB"))]
)
def test_no_more_is_kept_than_the_limit_says(limit: str) -> None:
    """Of results and scratch together, with many threads at once, whatever sizes come one after the other."""
    allowed = buffers._bytes(limit)
    most, after, released, left = json.loads(
        run_here(
            STEPS
            + """
most = steps()
threads = [threading.Thread(target=steps) for _ in range(8)]
[thread.start() for thread in threads]
while any(thread.is_alive() for thread in threads):
    most = max(most, r.held_memory())
after = r.held_memory()
print([most, after, r.release_memory(), r.held_memory()])
""",
            RECTILINEAR_CACHE_BYTES=limit,
        )
    )
    assert most <= allowed
    assert after <= allowed
    assert (released, left) == (after, 0)
    if allowed >= 20 * MIB:
        assert after > MIB  # something is kept at all


def test_old_sizes_give_way_to_new_ones() -> None:
    """Two of the 16 MiB are for scratch, and 14 MiB do not fit into the others with their header."""
    run_here(
        """
for size, held in ((6, 6), (3, 9), (7, 10), (14, 10), (13, 13), (1, 1), (2, 3)):
    array = filled(size)
    del array
    assert held <= r.held_memory() / MIB < held + 0.1, (size, r.held_memory() / MIB)
""",
        RECTILINEAR_CACHE_BYTES="16 MiB",
    )


BAD = ["-1", "64 MB", "many", "1e6", "1.5 GiB", "MiB", "0x10", "1 2"]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=r"RECTILINEAR_CACHE_BYTES is .*must be a whole number of bytes.*unset it") as caught:
        buffers._bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("0", 0), ("7", 7), ("7 B", 7), ("64 MiB", 64 * MIB), ("64mib", 64 * MIB), ("2 KiB", 2048), ("9" * 30, 1 << 62)]
)
def test_numbers_of_bytes(text: str, bytes_: int) -> None:
    assert buffers._bytes(text) == bytes_


@pytest.mark.parametrize("call", ["r.relu_forward(np.ones((1024, 1024)))", "x = np.ones((2, 2)); r.affine_backward(x, (x, x, None))"])
def test_a_bad_variable_is_an_error_of_the_call_that_needs_it(call: str) -> None:
    run_here(
        f"""
assert r.held_memory() == r.release_memory() == 0
r.relu_forward(np.ones((4, 4)))
for _ in range(2):
    try:
        {call}
    except ValueError as error:
        assert "RECTILINEAR_CACHE_BYTES is 'much'" in str(error), error
    else:
        raise AssertionError("no error")
""",
        RECTILINEAR_CACHE_BYTES="much",
    )


def test_an_empty_variable_is_an_unset_one() -> None:
    assert run_here("print(buffers.memory_limit())", RECTILINEAR_CACHE_BYTES=" ").strip() == str(192 * MIB)


# ---------------------------------------------------------------- given back


@linux
def test_released_memory_is_the_systems_again() -> None:
    run_here(
        STEPS
        + """
steps()
r.release_memory()
before = resident()
arrays = [filled(4) for _ in range(32)]
assert resident() - before > 100 * MIB
del arrays
assert resident() - before > 100 * MIB
held = r.held_memory()
assert 128 * MIB <= held <= 168 * MIB, held
assert r.release_memory() == held
assert r.held_memory() == 0
assert resident() - before < 20 * MIB, (resident() - before) / MIB
"""
    )


@linux
def test_what_is_dropped_without_a_limit_to_keep_is_the_systems_at_once() -> None:
    run_here(
        """
filled(4)
before = resident()
arrays = [filled(64) for _ in range(4)]
del arrays
assert resident() - before < 40 * MIB, (resident() - before) / MIB
""",
        RECTILINEAR_CACHE_BYTES="0",
    )


def test_scratch_is_held_once_for_each_call_at_a_time_and_given_back() -> None:
    run_here(
        """
ones, w = np.ones((40, 40)), np.ones((40, 40))
r.affine_backward(ones, (ones, w, None))
assert r.held_memory() == buffers.SCRATCH_BYTES
r.affine_backward(ones, (ones, w, None))
assert r.release_memory() == buffers.SCRATCH_BYTES
assert r.held_memory() == 0
dx, dw, _ = r.affine_backward(ones, (ones, w, None))
assert (dx == 40).all() and (dw == 40).all()
"""
    )


@linux
def test_idle_memory_is_given_back_where_the_system_has_none_left() -> None:
    run_here(
        """
import resource
def room(mib):
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + mib * MIB, resource.RLIM_INFINITY))
for grow in (lambda: filled(160, 3), lambda: (a := filled(1, 3)).resize(160 * MIB) or a):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    arrays = [filled(20) for _ in range(7)]
    del arrays
    assert r.held_memory() > 100 * MIB
    room(80)
    array = grow()
    assert array.nbytes == 160 * MIB and array[0] == 3
    del array
    r.release_memory()
"""
    )


def test_asking_loads_no_numba() -> None:
    run(
        """
import sys
import numpy as np
import rectilinear as r
r.set_backend("numpy")
r.relu_forward(np.ones((1024, 1024)))
assert r.held_memory() == r.release_memory() == 0
assert not {"numba", "llvmlite"} & set(sys.modules)
""",
        RECTILINEAR_CACHE_BYTES="bad, but nothing needs it",
    )


# ---------------------------------------------------------------- threads, forks, signals, exit


def test_no_two_threads_get_the_same_memory() -> None:
    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        alive: list[tuple[np.ndarray, int]] = []
        for step in range(400):
            array = buffers.empty((int(rng.integers(MIB, 3 * MIB)),), BYTE)
            array[::4096] = mark = (seed * 31 + step) % 256
            alive.append((array, mark))
            if len(alive) > rng.integers(1, 4):
                old, mark = alive.pop(int(rng.integers(len(alive))))
                assert (old[::4096] == mark).all()
            if step % 50 == 0:
                r.release_memory()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 0 <= r.held_memory() <= buffers.DEFAULT_BYTES
    r.release_memory()
    assert r.held_memory() == 0


def test_no_two_threads_get_the_same_block_without_the_gil_either() -> None:
    """As on free-threaded builds: NumPy's calls are one at a time where there is a GIL, so here the compiled functions run without."""
    run_here(
        """
from concurrent.futures import ThreadPoolExecutor
import numba
from rectilinear.kernels.runtime import allocator
from rectilinear.kernels.runtime.native import load, store
filled(1)
state = buffers._allocator._state

@numba.njit(nogil=True)
def others_met(mark, passes):
    met = 0
    for i in range(passes):
        block = allocator._allocate(state, MIB)
        store(block, mark)
        for _ in range(20):
            met += load(block) != mark
        allocator._deallocate(state, block, MIB)
    return met

others_met(0, 1)
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(others_met, range(1, 5), [300_000] * 4)) == [0] * 4
held = r.held_memory()
assert 0 < held <= 4 * (MIB + 4096), held
assert r.release_memory() == held
"""
    )


@pytest.mark.nightly  # a read of a block that another thread had unmapped was met about once in 30 s
def test_memory_that_one_thread_puts_away_and_another_gives_back() -> None:
    run_here(
        """
import time
end = time.monotonic() + 80
def churn():
    while time.monotonic() < end:
        arrays = [buffers.empty((size * MIB,), np.dtype("u1")) for size in (1, 2, 3)]
        del arrays
        r.release_memory()
threads = [threading.Thread(target=churn) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert r.held_memory() == r.release_memory()
"""
    )


@forks
def test_children_forked_at_any_moment_go_on() -> None:
    """While other threads take, give up and release memory: the child's own arrays are right, and its count is what it has."""
    run_here(
        """
import warnings
warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
done = threading.Event()
def churn():
    while not done.is_set():
        arrays = [buffers.empty((size * MIB,), np.dtype("u1")) for size in (1, 2, 3)]
        del arrays
        r.release_memory()
mine = filled(4, 9)
threads = [threading.Thread(target=churn) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(60):
    if (child := os.fork()) == 0:
        status = 1
        try:
            assert (mine == 9).all()
            del mine
            arrays = [filled(size, size) for size in (1, 4, 2, 1)]
            assert all((array == array.nbytes // MIB).all() for array in arrays)
            del arrays
            held = r.held_memory()
            assert held > 7 * MIB, held
            assert r.release_memory() == held
            assert r.held_memory() == 0
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
done.set()
[thread.join() for thread in threads]
assert (mine == 9).all()
"""
    )


@forks
def test_a_child_does_not_count_what_other_threads_had_in_hand() -> None:
    run_here(
        """
filled(3)
held = r.held_memory()
buffers._allocator._held.value += 50 * MIB  # a thread has counted a block, and not put it in its slot yet
child = os.fork()
if child == 0:
    os._exit(0 if r.held_memory() == held == r.release_memory() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    )


@forks
def test_a_child_forked_while_another_thread_makes_the_allocator() -> None:
    run_here(
        """
buffers._making.acquire()
child = os.fork()
if child == 0:
    filled(4)
    os._exit(0 if r.held_memory() > 4 * MIB else 1)
assert os.waitpid(child, 0)[1] == 0
array = filled(4)  # whoever finds another thread at it does without
assert array.flags.owndata and (array == 1).all()
"""
    )


INTERRUPTED = """
import signal, time
interrupted = made = 0
filled(1)  # numba and LLVM are not meant here
def interrupt(*_):
    signal.setitimer(signal.ITIMER_REAL, 0)  # not once more while this one is dealt with
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        while time.monotonic() < end:
            array = buffers.empty((MIB + made % 3,), np.dtype("u1"))
            del array
            made += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.01)
    except KeyboardInterrupt:
        interrupted += 1
assert interrupted > 10, interrupted
assert np._core.multiarray.get_handler_name() == "default_allocator"
array = filled(3, 7)
assert (array == 7).all()
del array
held = r.held_memory()
assert 3 * MIB < held < 8 * MIB, held
assert r.release_memory() == held and r.held_memory() == 0
"""


@pytest.mark.skipif(os.name != "posix", reason="signals to oneself")
def test_interrupts_leave_nothing_behind() -> None:
    run_here(INTERRUPTED)


def test_arrays_may_outlive_everything_else() -> None:
    """Freed by whatever order the interpreter ends in: globals, cycles, threads, other modules, exit handlers."""
    run_here(
        """
import atexit, builtins, time, types
in_globals = filled(3)
sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].array = filled(2)
builtins.array = filled(2)
cycle = {"array": filled(2)}
cycle["cycle"] = cycle
class Late:
    def __init__(self): self.array, self.empty = filled(2), buffers.empty
    def __del__(self):
        self.array.resize(5 * MIB, refcheck=False)
        self.other = self.empty((2 * MIB,), self.array.dtype)
late = Late()
late.itself = late
atexit.register(lambda array=filled(2): array.fill(3))
kept_by_function = (lambda array: lambda: array)(filled(4))
def work():
    while True:
        array = filled(2)
        time.sleep(0.0001)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
local = threading.local()
local.array = filled(2)
time.sleep(0.1)
"""
    )


# ---------------------------------------------------------------- where there is less


@pytest.mark.parametrize(
    "missing",
    [
        "allocator._HOOK_SINCE = 1 << 30",
        "sys.modules['rectilinear.kernels.runtime.allocator'] = None",
        pytest.param("allocator._ALLOCATES = False", marks=pytest.mark.nightly),
        pytest.param("del np._core.multiarray.get_handler_name", marks=pytest.mark.nightly),
        pytest.param("allocator._Handler.version = property(lambda self: 2)", marks=pytest.mark.nightly),
    ],
)
def test_without_the_hook_results_are_plain_and_right(missing: str) -> None:
    run_here(
        STEPS
        + f"""
from rectilinear.kernels.runtime import allocator
{missing}
steps()
out, _ = r.affine_forward(x, w, None)
assert (out == 64).all() and out.flags.owndata
assert buffers._allocator is False
assert r.held_memory() == buffers.SCRATCH_BYTES == r.release_memory()
"""
    )


def test_without_mappings_memory_is_kept_as_well(tmp_path: Path) -> None:
    run_here(
        """
from rectilinear.kernels.runtime import allocator
allocator._MAPS = False
array = filled(3)
address = array.ctypes.data
assert address % 64 == 0
del array
again = buffers.empty((3 * MIB,), np.dtype("u1"))
assert again.ctypes.data == address
assert not buffers._allocator._context.copy().run(np.zeros, 3 * MIB, np.uint8).any()
del again
assert r.release_memory() > 3 * MIB
""",
        RECTILINEAR_CACHE_DIR=str(tmp_path),
    )


# ---------------------------------------------------------------- shown


def test_info_shows_the_limit_and_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    from rectilinear.__main__ import main

    buffers.empty((3 * MIB,), BYTE)
    held, limit = r.held_memory(), buffers.memory_limit()
    assert held >= 3 * MIB
    assert main(["info"]) == 0
    assert f"memory kept for reuse: {held:,} bytes of at most {limit:,} (RECTILINEAR_CACHE_BYTES)" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == {"held": held, "limit": limit}


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_info_shows_a_bad_variable(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rectilinear.__main__ import main

    monkeypatch.setenv("RECTILINEAR_CACHE_BYTES", "much")
    monkeypatch.setattr(buffers, "_limit", None)
    assert main(arguments) == 0
    assert "RECTILINEAR_CACHE_BYTES is 'much'" in capsys.readouterr().out
