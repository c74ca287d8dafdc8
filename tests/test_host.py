"""What the host does to the process is heard: affinity, forks, the compile cache's directory, another numba, another system."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rectilinear
from rectilinear.backends.numba_backend import NumbaBackend
from rectilinear.kernels.runtime import cache, numba_private
from rectilinear.measure.machine import thread_pools
from rectilinear.measure.subjects import backend_subjects
from rectilinear.measure.turns import started

from .subprocesses import ROOT, run
from .test_cache import ON_TERMINAL

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
posix = pytest.mark.skipif(os.name != "posix", reason="owners, permissions and forks of POSIX")


# Cores


@linux
def test_workers_stay_on_the_cores_that_are_left() -> None:
    """Two cores, then one: neither its own memory nor a caller's presence brings a worker back to the other."""
    run(
        """
        import os, time
        from pathlib import Path
        from tests.pool_demo import busy, check
        one, *more = sorted(os.sched_getaffinity(0))
        others = set(Path("/proc/self/task").iterdir())
        busy(0.002, 8, 3)
        workers = [int(task.name) for task in set(Path("/proc/self/task").iterdir()) - others]
        assert len(workers) == 2
        for kept in ([one], more[:1] or [one], [one, *more], [one]):
            for task in (os.getpid(), *workers):  # as taskset -a -p does
                os.sched_setaffinity(task, kept)
            for _ in range(20):
                busy(0.002, 8, 3)
                time.sleep(0.001)
                for worker in workers:
                    assert os.sched_getaffinity(worker) <= set(kept), (os.sched_getaffinity(worker), kept)
        check(3)
        """
    )


@linux
def test_workers_follow_the_main_thread() -> None:
    """Where only the process is told (taskset -p, os.sched_setaffinity), its workers are too, when they are woken."""
    run(
        """
        import os, time
        from pathlib import Path
        from tests.pool_demo import busy
        allowed = os.sched_getaffinity(0)
        others = set(Path("/proc/self/task").iterdir())
        busy(0.002, 8, 2)
        (worker,) = (int(task.name) for task in set(Path("/proc/self/task").iterdir()) - others)
        for kept in ({min(allowed)}, {max(allowed)}, allowed):
            os.sched_setaffinity(0, kept)
            for _ in range(100):
                time.sleep(0.01)
                busy(0.002, 8, 2)
                now = os.sched_getaffinity(worker)
                if now <= kept and len(kept - now) <= 1:
                    break
            else:
                raise AssertionError((now, kept))
        """
    )


@linux
def test_the_default_number_follows_the_cores() -> None:
    run(
        """
        import os, time
        import rectilinear as r
        from rectilinear.threads import available_cores, call_threads
        allowed = os.sched_getaffinity(0)
        assert r.get_num_threads() == call_threads() == available_cores()
        os.sched_setaffinity(0, {min(allowed)})
        assert r.get_num_threads() == 1
        assert call_threads() == 1
        os.sched_setaffinity(0, allowed)
        time.sleep(0.01)
        assert call_threads() == available_cores()
        r.set_num_threads(3)
        os.sched_setaffinity(0, {min(allowed)})
        assert r.get_num_threads() == 3, "a choice stands"
        """,
        RECTILINEAR_NUM_THREADS=None,
        OMP_NUM_THREADS=None,
        NUMBA_NUM_THREADS=None,
    )


# Forks

FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork with threads; surviving it is the point
import numpy as np
import rectilinear as r
from rectilinear.kernels.runtime import forks

rng = np.random.default_rng(0)
x, w, b, dout = (rng.standard_normal(shape) for shape in ((65, 33), (33, 17), (17,), (65, 17)))
z = x @ w + b
want = [np.where(z < 0, 0, z)]
dz = np.where(z < 0, 0, dout)
want += [dz @ w.T, x.T @ dz, dz.sum(0)]

def step():
    out, cache = r.affine_relu_forward(x, w, b)
    got = [out, *r.affine_relu_backward(dout, cache)]
    assert all(np.allclose(g, v, rtol=1e-12, atol=1e-12) for g, v in zip(got, want))
    assert np.array_equal(r.relu_forward(z)[0], want[0])
    assert np.array_equal(r.relu_backward(dout, z), dz)
    loss, dx = r.softmax_loss(z[:4], [0, 1, 2, 3])
    assert np.isfinite(loss) and abs(dx.sum()) < 1e-12

def in_child(do):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang is a failure
        try:
            do()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

let_go, taken = threading.Event(), threading.Event()
def hold(lock):
    with lock:
        taken.set()
        let_go.wait(100)  # stands for a compilation that takes that long
def holding(lock):
    thread = threading.Thread(target=hold, args=(lock,))
    thread.start()
    taken.wait()
    return thread
"""


@posix
@pytest.mark.parametrize(
    ("lock", "used"),
    [
        ("numba.core.compiler_lock.global_compiler_lock", ""),
        ("numba.core.compiler_lock.global_compiler_lock", "r.affine_forward(x, w, b)"),
        ("llvmlite.binding.ffi.lib._lock", "step()"),
        ("forks.loading()", ""),
    ],
)
def test_a_fork_does_not_wait_for_a_compilation(lock: str, used: str) -> None:
    """The lock is let go of only after the child has ended: were it waited for, the fork would never come back."""
    run(
        FORK
        + f"""
import llvmlite.binding, numba.core.compiler_lock
r.set_backend("numba")
{used}
thread = holding({lock})
def child():
    assert forks.frozen
    step()
    in_child(step)
    assert [info.name for info in r.list_backends() if info.active] == ["numba"]
    import gc; gc.collect()
    try:
        numba.njit(lambda a: a + 1)(1)
    except forks.CannotCompileError as error:
        assert "forked while another thread" in str(error)
    else:
        raise AssertionError("compiled")
in_child(child)
let_go.set()
thread.join()
step()
assert not forks.frozen
in_child(lambda: (step(), numba.njit(lambda a: a + 2)(1)))  # with all locks free, a child compiles as ever
""",
        limit_s=280,  # all kernels compile where the cache is cold
    )


@posix
def test_a_fork_while_numba_is_being_imported() -> None:
    """Python's own import locks are copied as they are, too."""
    run(
        FORK
        + """
import importlib.abc, importlib.machinery

class Slow(importlib.abc.MetaPathFinder):
    # The module is slow to run, not to be found: a fork waits for whoever is finding one.
    def find_spec(self, name, path, target=None):
        if name != "numba.core.config":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run_module = spec.loader.exec_module
        def run_slowly(module):
            taken.set()
            assert let_go.wait(100)
            run_module(module)
        spec.loader.exec_module = run_slowly
        return spec

sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=step)
thread.start()
taken.wait()
def child():
    step()
    (info,) = [info for info in r.list_backends() if info.name == "numba"]
    assert info.usable and "NumPy computes" in info.reason, info
in_child(child)
let_go.set()
thread.join()
step()
""",
        limit_s=280,
        RECTILINEAR_BACKEND="numba",
    )


# The compile cache's directory


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "made" / "here"))
    return tmp_path / "made" / "here" / "kernels"


@posix
def test_directories_that_are_made_are_private(directory: Path) -> None:
    old = os.umask(0o002)
    try:
        cache.write(directory / "a.kernel", b"", b"content")
    finally:
        os.umask(old)
    for made in (directory, directory.parent, directory.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700


@posix
def test_a_directory_that_others_can_write_to_is_told_once_with_a_remedy_that_works(tmp_path: Path) -> None:
    place = tmp_path / "with blank"
    (place / "kernels").mkdir(parents=True)
    (place / "kernels").chmod(0o775)
    use = "from tests import pool_demo\npool_demo.check(2)\npool_demo.busy(0.0, 2, 2)"
    said = run(ON_TERMINAL.format(use), RECTILINEAR_CACHE_DIR=str(place))
    assert said.count("kernels compile at every start") == 1
    remedy = re.search(r"chmod go-w .*?(?=\r?\n)", said)
    assert remedy is not None
    subprocess.run(remedy[0], shell=True, check=True)
    assert (place / "kernels").stat().st_mode & 0o777 == 0o755
    assert run(ON_TERMINAL.format(use), RECTILINEAR_CACHE_DIR=str(place)) == "|end\n", "nothing compiles and nothing is said"


def test_a_relative_directory_stays_where_it_was_first_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, f"relative-{tmp_path.name}")
    monkeypatch.chdir(tmp_path)
    first = cache.directory()
    assert first == tmp_path / f"relative-{tmp_path.name}" / "kernels"
    monkeypatch.chdir(tmp_path.parent)
    assert cache.directory() == first


def entry(directory: Path, name: str, days: float, size: int = 10) -> Path:
    path = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


def test_what_was_not_used_for_long_is_removed(directory: Path) -> None:
    used, unused = entry(directory, "used.kernel", 10), entry(directory, "unused.kernel", cache.KEPT_DAYS + 1)
    half_written, being_written = entry(directory, "new-killed", 2), entry(directory, "new-now", 0.1)
    foreign = entry(directory, "README", 1000)
    with unused.open("rb") as reader:  # another process is at it
        cache.write(directory / "made.kernel", b"", b"content")
        if os.name == "posix":
            assert len(reader.read()) == 10
    assert sorted(directory.iterdir()) == sorted([used, being_written, foreign, directory / "made.kernel"])
    assert not half_written.exists()


def test_the_size_is_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT_BYTES", 1000)
    kept = [entry(directory, f"{days}.kernel", days, 400) for days in (1, 2, 3, 4)]
    cache.write(directory / "made.kernel", b"", b"content")
    assert [path.exists() for path in kept] == [True, True, False, False]
    assert (directory / "made.kernel").exists()


def test_an_entry_that_is_used_stays(directory: Path) -> None:
    key, path = bytes(32), directory / "a.kernel"
    cache.write(path, key, b"content")
    os.utime(path, (time.time() - 86400 * (cache.KEPT_DAYS + 1),) * 2)
    assert cache.read(path, key) == b"content"
    cache.write(directory / "b.kernel", key, b"content")
    assert path.exists()


def test_what_cannot_be_removed_is_left(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = entry(directory, "unused.kernel", cache.KEPT_DAYS + 1)

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    cache.write(directory / "made.kernel", b"", b"content")
    assert unused.exists()
    assert (directory / "made.kernel").exists()


# Another numba


def probed() -> str:
    probe = NumbaBackend().probe()
    assert not probe.usable
    return str(probe.reason)


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in numba_private.NEEDED.items() for name in names.split()])
def test_a_name_that_numba_lacks_is_told(monkeypatch: pytest.MonkeyPatch, place: str, name: str) -> None:
    monkeypatch.setattr("numba.__version__", "0.99.0")
    monkeypatch.setitem(numba_private.NEEDED, place, f"{name} {name}_renamed")
    floor = ".".join(map(str, numba_private.FLOOR))
    lacking = f"{place}.{name}_renamed"
    assert probed() == f"numba 0.99.0 lacks {lacking}, which these kernels need; install numba>={floor},<0.99"


def test_a_private_name_hidden_in_numba_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.bytecode import FunctionIdentity

    monkeypatch.delattr(FunctionIdentity, "_unique_ids")
    assert "lacks numba.core.bytecode.FunctionIdentity._unique_ids, which" in probed()


@pytest.mark.parametrize("module", ["numba.core.caching", "numba.core.compiler_lock", "numba.core.serialize"])
def test_a_module_hidden_before_the_kernels_are_imported(module: str) -> None:
    """The look comes before the import that would fail."""
    out = run(
        f"""
        import sys, numba
        package, _, name = {module!r}.rpartition(".")
        delattr(sys.modules[package], name)
        sys.modules[{module!r}] = None
        import rectilinear as r
        print([info.reason for info in r.list_backends() if info.name == "numba"][0])
        assert not any(name.startswith("rectilinear.kernels.runtime.cache") for name in sys.modules)
        assert r.get_backend() == "numpy"
        """,
        RECTILINEAR_BACKEND=None,
    )
    assert re.search(rf"numba [0-9.]+ lacks {re.escape(module)}, which these kernels need; install numba>=", out)


@pytest.mark.parametrize("kind", numba_private.NEEDED_OF_INSTANCES)
def test_what_only_instances_have_is_looked_at(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    whole = numba_private._instance(kind)
    bare = type(type(whole).__qualname__, (), {"__module__": type(whole).__module__})()
    monkeypatch.setattr(numba_private, "_instance", lambda asked: bare if asked == kind else whole)
    monkeypatch.setattr(numba_private, "NEEDED_OF_INSTANCES", {kind: numba_private.NEEDED_OF_INSTANCES[kind]})
    for name in numba_private.NEEDED_OF_INSTANCES[kind].split():
        assert f"{type(whole).__module__}.{type(whole).__qualname__}.{name}" in probed()


def test_numbers_that_numba_no_longer_takes_from_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.bytecode import FunctionIdentity

    class Elsewhere:
        unique_id = 1

    monkeypatch.setattr(FunctionIdentity, "from_function", lambda function: Elsewhere)
    assert "FunctionIdentity._unique_ids that counts" in probed()


def test_a_numba_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.__version__", "0.61.2")
    assert probed() == "numba 0.61.2 is too old for these kernels, whose code its LLVM cannot read; install numba>=0.62"


def test_what_is_installed_has_it_all() -> None:
    assert numba_private.unfit() is None


# Another system


@pytest.mark.nightly  # half a minute: the tests of this file in one more process
def test_where_nothing_of_posix_is_there(tmp_path: Path) -> None:
    """The smoke subset, one thread, and a note that says so. The tests of the cache start processes, for which nothing is hidden."""
    smoke = ("-m", "smoke and not libraries and not cuda", "--ignore=tests/test_cache.py", "tests")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "tests.foreign_system", "-p", "no:cacheprovider", *smoke)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = run(
        """
        import tests.foreign_system
        import numpy as np, rectilinear as r, rectilinear.measure.cli, rectilinear.measure.run, rectilinear.measure.ours
        r.set_backend("numba")
        assert r.affine_forward(np.ones((300, 300)), np.ones((300, 300)), None)[0][0, 0] == 300
        (info,) = [info for info in r.list_backends() if info.name == "numba"]
        print(info.threads, info.reason)
        """
    )
    assert out.startswith("1 runs on one thread: "), out


# The benchmark


def test_subjects_run_on_the_number_of_threads_that_peers_get() -> None:
    ours = [subject for subject in backend_subjects()[0] if subject.name == "numba"]
    with started(ours, 5) as (_, greetings, _):
        assert {"internal_api": "rectilinear", "num_threads": 5} in greetings["numba"]["threads"]
    importlib.import_module("rectilinear.measure.ours")
    with rectilinear.num_threads(3):
        assert {"internal_api": "rectilinear", "num_threads": 3} in thread_pools()
