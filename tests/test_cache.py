"""Compiled kernels on disk: whatever the directory is like and whoever else uses it, results are right, and stale code is never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from numba import types

import rectilinear
from rectilinear.kernels.runtime import cache, fingerprint
from rectilinear.kernels.runtime.cache import jit, jit_inner

from .subprocesses import finish, forks, run, start

posix = pytest.mark.skipif(os.name != "posix", reason="owners and permissions of POSIX")

# Prints how many of the two kernels used came from the disk.
USE = "from tests import cache_demo; print(cache_demo.use())"
# The same for two kernels that are used in earnest: the pool's own, and one that runs on it.
USE_POOL = """
from tests import pool_demo
from rectilinear.kernels.runtime import threads
pool_demo.check(2)
print(sum(sum(kernel.stats.cache_hits.values()) for kernel in (pool_demo._slab_sums, threads._entry_points)))
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., str]]:
    """Runs code in processes that have numba, and nothing of ours, loaded."""
    with forks("import numba; numba.njit(lambda x: x)(1)") as run_in_fork:
        yield run_in_fork


@pytest.fixture
def use(forked: Callable[..., str]) -> Callable[[Path], int]:
    """How many of two kernels come from this directory; whatever it is like, they are right, and nothing is said."""
    return lambda directory: int(forked(USE, RECTILINEAR_CACHE_DIR=str(directory)))


def use_anew(directory: Path, **environment: str | None) -> int:
    """As `use`, in a process that reads all of its environment."""
    return int(run(USE, RECTILINEAR_CACHE_DIR=str(directory), **environment))


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("kernels/*"))


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("filled")
    assert use_anew(directory) == 0
    return {entry.name: entry.read_bytes() for entry in entries(directory)}


@pytest.fixture
def filled(filled_once: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir(mode=0o700)
    for name, content in filled_once.items():
        path = tmp_path / "kernels" / name
        path.write_bytes(content)
        path.chmod(0o600)
    return tmp_path


@pytest.mark.smoke
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert int(run(USE_POOL, RECTILINEAR_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="1")) == 0
    before = {entry: entry.stat().st_mtime_ns for entry in entries(tmp_path)}
    assert len(before) == 2
    assert int(run(USE_POOL, RECTILINEAR_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="2")) == 2
    assert {entry: entry.stat().st_mtime_ns for entry in entries(tmp_path)} == before


def test_eight_processes_start_together_on_an_empty_cache(tmp_path: Path, use: Callable[[Path], int]) -> None:
    code = f"""
import os, time
from tests import cache_demo
print("ready", flush=True)
while not os.path.exists({str(tmp_path / "go")!r}):
    time.sleep(0.001)
cache_demo.use()
"""
    processes = [start(code, RECTILINEAR_CACHE_DIR=str(tmp_path)) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for process in processes:
        finish(process)
    assert [entry.suffix for entry in entries(tmp_path)] == [".kernel"] * 2  # nothing half-written is left
    assert use(tmp_path) == 2


# Places that cannot be written to


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/none", "~no_such_user_here/x"])
def test_a_directory_that_cannot_be(place: str, use: Callable[[Path], int]) -> None:
    assert use(Path(place)) == 0


@pytest.mark.parametrize("home", ["/proc/none", "relative"])
def test_a_home_that_is_missing_or_read_only(home: str, forked: Callable[..., str]) -> None:
    out = forked(USE, RECTILINEAR_CACHE_DIR=None, XDG_CACHE_HOME=None, HOME=home)
    assert out == "0\n"


def test_a_user_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (cache.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(FileNotFoundError, match="no home directory"):
        cache.directory()


def test_a_directory_without_permission(tmp_path: Path, forked: Callable[..., str]) -> None:
    # By hand, since permissions mean nothing to root.
    code = """
import tempfile
def refuse(*args, **options):
    raise PermissionError(13, "Permission denied")
tempfile.mkstemp = refuse
"""
    assert forked(code + USE, RECTILINEAR_CACHE_DIR=str(tmp_path)) == "0\n"
    assert entries(tmp_path) == []


@posix
def test_a_full_disk(tmp_path: Path, forked: Callable[..., str]) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + USE
    assert forked(code, RECTILINEAR_CACHE_DIR=str(tmp_path)) == "0\n"
    assert entries(tmp_path) == []  # the half-written file is gone


# Entries that must not be used

DAMAGE = {
    "empty": lambda data: b"",
    "no content": lambda data: data[: len(cache._MAGIC) + 64],
    "cut short": lambda data: data[:-100],
    "one bit": lambda data: data[:-5000] + bytes([data[-5000] ^ 4]) + data[-4999:],
    "another format": lambda data: b"x" + data[1:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen(filled: Path, kind: str) -> None:
    entry = entries(filled)[0]
    data = entry.read_bytes()
    key = cache._split(data)[1]
    assert cache.read(entry, key) == cache._split(data)[3]
    entry.write_bytes(DAMAGE[kind](data))
    with pytest.raises(ValueError, match="is damaged"):
        cache.read(entry, key)


def signed(data: bytes, content: bytes) -> bytes:
    """An entry with the key of `data` and a right checksum."""
    magic, key, _, _ = cache._split(data)
    return magic + key + hashlib.sha256(content).digest() + content


@pytest.mark.parametrize("content", [None, b"garbage", pickle.dumps((1, 2))])
def test_a_damaged_entry_is_replaced(filled: Path, content: bytes | None, use: Callable[[Path], int]) -> None:
    for entry in entries(filled):
        data = entry.read_bytes()
        entry.write_bytes(data[:-100] if content is None else signed(data, content))
    assert use(filled) == 0
    assert use(filled) == 2


def test_entries_in_each_others_place(filled: Path, use: Callable[[Path], int]) -> None:
    one, two = entries(filled)
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert use(filled) == 0
    assert use(filled) == 2


@posix
@pytest.mark.parametrize("bits", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_write_is_not_loaded(filled: Path, bits: int, use: Callable[[Path], int]) -> None:
    (filled / "kernels").chmod(0o700 | bits)
    assert use(filled) == 0
    (filled / "kernels").chmod(0o700)
    assert use(filled) == 2
    entries(filled)[0].chmod(0o600 | bits)
    assert use(filled) == 1


@posix
def test_links_are_not_followed(filled: Path, use: Callable[[Path], int]) -> None:
    entry = entries(filled)[0]
    entry.rename(filled / "elsewhere")
    entry.symlink_to(filled / "elsewhere")
    assert use(filled) == 1


@posix
def test_what_belongs_to_another_user_is_not_loaded(filled: Path, use: Callable[[Path], int]) -> None:
    if os.geteuid() != 0:
        with pytest.raises(PermissionError, match="belongs to another user"):
            cache._refuse_foreign(os.stat("/"), Path("/"))
        return
    for path in (*entries(filled), filled / "kernels"):
        os.chown(path, 65534, 65534)
    assert use(filled) == 0


# What an entry depends on


@pytest.mark.parametrize(
    "switch",
    [
        {"NUMBA_CPU_NAME": "generic"},
        *(
            pytest.param({name: value}, marks=pytest.mark.nightly)
            for name, value in (("NUMBA_OPT", "1"), ("NUMBA_BOUNDSCHECK", "1"), ("NUMBA_LOOP_VECTORIZE", "0"))
        ),
    ],
)
def test_switches_that_change_the_code(filled: Path, switch: dict[str, str], use: Callable[[Path], int]) -> None:
    assert use_anew(filled, **switch) == 0
    assert use_anew(filled, **switch) == 2
    assert use(filled) == 2


def test_switches_that_do_not(filled: Path) -> None:
    assert use_anew(filled, NUMBA_NUM_THREADS="1", NUMBA_CACHE_DIR="/proc/none") == 2


def test_what_else_is_installed_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML, which dask and PyTorch bring, is a switch of numba's."""
    from numba.core import config
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()
    before = fingerprint.environment(codegen)
    monkeypatch.setattr(config, "_HAVE_YAML", not config._HAVE_YAML)
    assert fingerprint.environment(codegen) == before
    monkeypatch.setattr(config, "OPT", 1)
    assert fingerprint.environment(codegen) != before


MODULE = """
import numba
from rectilinear.kernels.runtime.cache import jit

FACTOR = {factor}

@numba.njit
def callee(x):
    return x * FACTOR + {summand}

@jit()
def kernel(x):
    return callee(x)

def make(c):
    # Long enough that LLVM does not inline it, so that calls go through its symbol.
    @numba.njit
    def inner(x):
        s = 0
        for i in range(x):
            if i % 3 == 0:
                s += c * (i ^ s)
            elif i % 5 == 0:
                s -= (i * s) // 7
            elif i % 7 == 1:
                s ^= i * c
            else:
                for j in range(i):
                    s += (j * c) % 11
                    s ^= s // (j + 3)
        for i in range(x):
            if i % 3 == 1:
                s += c * (i ^ s)
            elif i % 5 == 2:
                s -= (i * s) // 7
            elif i % 7 == 3:
                s ^= i * c
            else:
                for j in range(i):
                    s += (j * c) % 13
                    s ^= s // (j + 4)
        return s

    @jit()
    def outer(x):
        return inner(x) + c + inner(x + 1) + inner(x + 2)

    return outer
"""


def use_module(forked: Callable[..., str], directory: Path, code: str, **values: int) -> str:
    (directory / "made.py").write_text(MODULE.format(**({"factor": 2, "summand": 1} | values)))
    code = f"import sys\nsys.path.insert(0, {str(directory)!r})\nsys.dont_write_bytecode = True\nimport made\n" + code
    return forked(code, RECTILINEAR_CACHE_DIR=str(directory))


@pytest.mark.smoke
def test_a_changed_callee_or_global_is_seen(tmp_path: Path, forked: Callable[..., str]) -> None:
    code = "print(made.kernel(10), *made.kernel.stats.cache_hits.values())"
    assert use_module(forked, tmp_path, code) == "21\n"
    assert use_module(forked, tmp_path, code) == "21 1\n"
    assert use_module(forked, tmp_path, code, factor=3) == "31\n"
    assert use_module(forked, tmp_path, code, summand=5) == "25\n"
    assert use_module(forked, tmp_path, code) == "21 1\n"


@pytest.mark.smoke
def test_products_of_one_factory_are_kept_apart(tmp_path: Path, forked: Callable[..., str]) -> None:
    """Each compiled as the first function of its process, then all loaded into one."""
    code = "for c in {}:\n    f = made.make(c)\n    assert f(10) == f.py_func(10), c\n    print(*f.stats.cache_hits.values())"
    assert use_module(forked, tmp_path, code.format([1])).split() == []
    assert use_module(forked, tmp_path, code.format([2])).split() == []
    assert use_module(forked, tmp_path, code.format([3, 1, 2])).split() == ["1", "1"]


def test_children_of_one_parent_number_functions_apart(tmp_path: Path, forked: Callable[..., str]) -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import numba
numba.njit(lambda: 1)()
for c in (1, 2, 3):
    if os.fork() == 0:
        made.make(c)(10)
        os._exit(0)
    os.wait()
for c in (1, 2, 3):
    f = made.make(c)
    assert f(10) == f.py_func(10), c
    assert sum(f.stats.cache_hits.values()) == 1
"""
    use_module(forked, tmp_path, code)


def test_digests_tell_values_apart() -> None:
    def function(value: object) -> object:
        return lambda: value

    values: list[object] = [None, 1, 1.0, True, "1", b"1", (1,), [1], {"a": 1}, {"a": 2}, {"b": 1}, frozenset({1}), 0.0, -0.0]
    values += [
        function(1),
        function(2),
        function("1"),
        lambda: 1,
        lambda: 2,
        rectilinear.keepmask.np.arange(3),
        rectilinear.keepmask.np.arange(4),
    ]
    assert len({fingerprint.digest(value) for value in values}) == len(values)
    assert fingerprint.digest(function(1)) == fingerprint.digest(function(1))


def test_digests_are_equal_in_every_process() -> None:
    code = "from rectilinear.kernels.runtime.fingerprint import digest; print(digest([frozenset('abcdefgh'), {'b': 1, 'a': 2}]))"
    assert run(code, PYTHONHASHSEED="1") == run(code, PYTHONHASHSEED="2")


def test_code_made_from_what_has_no_description_is_not_cached() -> None:
    with pytest.raises(TypeError, match="cannot be cached"):
        fingerprint.digest(object())


# Forks and terminals


ON_TERMINAL = """
import os, pty, threading
main, side = pty.openpty()
os.dup2(side, 2)
said = bytearray()
def listen():
    while not said.endswith(b"|end"):
        said.extend(os.read(main, 1000))
listener = threading.Thread(target=listen)
listener.start()
{}
os.write(2, b"|end")
listener.join()
print(said.decode())
"""


@posix
def test_a_user_at_a_terminal_is_told_once(tmp_path: Path) -> None:
    cold = run(ON_TERMINAL.format("from tests import cache_demo; cache_demo.use()"), RECTILINEAR_CACHE_DIR=str(tmp_path))
    assert cold.count("compiling kernels for this machine") == 1
    warm = run(ON_TERMINAL.format("from tests import cache_demo; cache_demo.use()"), RECTILINEAR_CACHE_DIR=str(tmp_path))
    assert warm == "|end\n"


WARMUP = """
from rectilinear import compilation
from rectilinear.compilation import warmup
from rectilinear.kernels.runtime import cache
compilation.KERNEL_MODULES = ("rectilinear.kernels.runtime.threads",)
done = []
@cache.warms
def jobs(dtype):
    return [(f"job {i} {dtype}", lambda i=i: done.append((i, dtype))) for i in range(2)]
warmup(%s)
assert done == %s, done
"""


def test_warmup_runs_all_jobs(tmp_path: Path) -> None:
    both = [(0, "float32"), (1, "float32"), (0, "float64"), (1, "float64")]
    run(WARMUP % ("", both), RECTILINEAR_CACHE_DIR=str(tmp_path))
    run(WARMUP % ("['<f4', 'float32']", both[:2]), RECTILINEAR_CACHE_DIR=str(tmp_path))
    assert [entry.name.partition("-")[0] for entry in entries(tmp_path)] == ["_entry_points"]


@posix
def test_warmup_shows_its_progress_instead_of_the_notice(tmp_path: Path) -> None:
    out = run(ON_TERMINAL.format(WARMUP % ("['f8']", [(0, "float64"), (1, "float64")])), RECTILINEAR_CACHE_DIR=str(tmp_path), TERM="xterm")
    assert "2/2" in out
    assert "job 1 float64" in out
    assert "compiling kernels" not in out


def test_a_second_warmup_compiles_nothing() -> None:
    """Of all kernels there are: none is made from something that cannot be cached. In the directory that other tests have filled."""
    code = """
import numba
from numba.core import event
compiled = []
class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(event.data["dispatcher"].__qualname__)
    def on_end(self, event):
        pass
event.register("numba:compile", Listener())
from rectilinear.compilation import warmup
warmup(["float32"])
numba.njit(lambda: 1)()
print(*compiled)
"""
    assert "<lambda>" in run(code)
    assert run(code) == "<lambda>\n"


@pytest.mark.parametrize("dtype", ["float16", "int64", "no such", object])
def test_warmup_refuses_other_dtypes(dtype: object) -> None:
    from rectilinear.compilation import warmup

    with pytest.raises(rectilinear.DTypeError, match="compiled for float32 and float64, not for"):
        warmup([dtype])


def test_without_numba() -> None:
    run(
        """
        import sys
        sys.modules["numba"] = None
        import rectilinear
        from rectilinear.compilation import warmup
        try:
            warmup()
        except rectilinear.BackendError as error:
            assert "numba cannot be imported" in str(error)
        else:
            raise AssertionError
        """
    )


def test_import_is_light() -> None:
    run(
        """
        import sys
        import rectilinear.threads, rectilinear.compilation
        assert not {"numba", "llvmlite", "rich"} & sys.modules.keys()
        """
    )


def test_an_inner_function_is_compiled_once_and_for_jitted_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each constant that it is called with, and not for Python, which would need machine code of it."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))  # where nothing is: what is loaded needs no inner function

    @jit_inner
    def twice(value: int) -> int:
        return 2 * value

    @jit()
    def total(value: int) -> int:
        return twice(value) + twice(3) + twice(4)

    assert total(5) == 24
    inner: Any = twice
    assert inner.signatures == [(types.intp,)]
    with pytest.raises(IndexError):
        inner(5)
