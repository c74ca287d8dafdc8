"""The choice of backend: precedence, threads, tasks, nesting, the variable, plug-ins, and what is said about it."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest

import rectilinear as r
from rectilinear.__main__ import main
from rectilinear.backends import contract, registry
from rectilinear.backends.numpy_backend import NumpyBackend

from .loopback import PRIMITIVES, LoopbackBackend


def in_thread(function: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        (sys.executable, "-W", "error", "-c", code),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------- precedence


@pytest.mark.smoke
def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECTILINEAR_BACKEND", "loopback")
    r.set_backend(None)
    assert r.get_backend() == "loopback"
    r.set_backend("numpy")
    assert r.get_backend() == "numpy"
    with r.use_backend("loopback"):
        assert r.get_backend() == "loopback"
    assert r.get_backend() == "numpy"
    r.set_backend(None)
    assert r.get_backend() == "loopback"


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    unset = r.get_backend()
    monkeypatch.setenv("RECTILINEAR_BACKEND", value)
    r.set_backend(None)
    assert r.get_backend() == unset
    assert active().chosen_by == "auto"


@pytest.mark.parametrize("name", ["LoopBack", " loopback ", "LOOPBACK\n"])
def test_case_and_blanks_do_not_matter(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("RECTILINEAR_BACKEND", name)
    r.set_backend(None)
    assert r.get_backend() == "loopback"
    r.set_backend(name)
    with r.use_backend(name):
        assert r.get_backend() == "loopback"


def test_the_variable_is_read_once_and_anew_after_set_backend_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECTILINEAR_BACKEND", "loopback")
    r.set_backend(None)
    assert r.get_backend() == "loopback"
    monkeypatch.setenv("RECTILINEAR_BACKEND", "numpy")
    assert r.get_backend() == "loopback"
    r.set_backend(None)
    assert r.get_backend() == "numpy"


def active() -> registry.BackendInfo:
    (info,) = (info for info in r.list_backends() if info.active)
    return info


def test_what_chose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert active().chosen_by == "auto"
    r.set_backend("numpy")
    assert active().chosen_by == "process"
    with r.use_backend("loopback"):
        assert (active().name, active().chosen_by) == ("loopback", "context")
    monkeypatch.setenv("RECTILINEAR_BACKEND", "numpy")
    r.set_backend(None)
    assert active().chosen_by == "variable"


def test_auto_remembers_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_AUTO_ORDER", ("broken", "numpy"))
    monkeypatch.setitem(registry._BUILT_IN, "broken", "no_such_module:Backend")
    r.set_backend(None)
    assert active().name == "numpy"
    assert "auto passed over broken: ModuleNotFoundError" in (active().reason or "")


def test_auto_passes_over_what_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_AUTO_ORDER", ("unusable", "numpy"))
    monkeypatch.setitem(registry._BUILT_IN, "unusable", "tests.test_backends:Unusable")
    r.set_backend(None)
    assert r.get_backend() == "numpy"
    assert "auto passed over unusable: no such device" in (active().reason or "")


def test_auto_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECTILINEAR_BACKEND", "auto")
    r.set_backend(None)
    assert active().chosen_by == "variable"
    r.set_backend("auto")
    assert active().chosen_by == "process"


class Unusable(NumpyBackend):
    def probe(self) -> contract.Probe:
        return contract.Probe(False, "no such device; plug one in")


# ---------------------------------------------------------------- unknown and unusable names


def test_an_unknown_name_raises_at_once_and_changes_nothing() -> None:
    r.set_backend("loopback")
    for ask in (r.set_backend, r.use_backend):
        with pytest.raises(r.BackendError, match=r"unknown backend 'nmupy' \(did you mean 'numpy'\?\)") as caught:
            ask("nmupy")
        for row in ("auto", "numpy", "loopback"):
            assert f"\n  {row}" in str(caught.value)
    assert r.get_backend() == "loopback"


def test_generic_is_listed_and_never_chosen() -> None:
    assert "generic" in [info.name for info in r.list_backends()]
    with pytest.raises(r.BackendError, match="never chosen"):
        r.set_backend("generic")


def test_an_unusable_backend_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register("unusable", Unusable)
    try:
        with pytest.raises(r.BackendError, match="backend 'unusable' is not usable here: no such device; plug one in"):
            r.set_backend("unusable")
        (info,) = (info for info in r.list_backends() if info.name == "unusable")
        assert (info.usable, info.reason) == (False, "no such device; plug one in")
    finally:
        registry.unregister("unusable")


def test_names_are_registered_and_taken_back_alike() -> None:
    registry.register(" Q ", Unusable)
    registry.unregister(" Q ")
    with pytest.raises(KeyError, match="unregister: no backend is registered as 'q'"):
        registry.unregister("Q")
    with pytest.raises(ValueError, match="register: name is empty"):
        registry.register(" ", Unusable)


def test_a_bad_variable_raises_only_in_calls_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import array_api_strict as xp

    monkeypatch.setenv("RECTILINEAR_BACKEND", "nmupy")
    r.set_backend(None)
    out, _ = r.relu_forward(xp.ones(3))  # serves itself
    assert isinstance(out, type(xp.ones(3)))
    with r.use_backend("numpy"):
        r.relu_forward(np.ones(3))
    assert not any(info.active for info in r.list_backends())
    for call in (lambda: r.relu_forward(np.ones(3)), r.get_backend, lambda: r.asarray([1.0])):
        with pytest.raises(r.BackendError, match=r"RECTILINEAR_BACKEND='nmupy': unknown backend"):
            call()
    r.set_backend("numpy")
    r.relu_forward(np.ones(3))


def test_a_bad_variable_does_not_break_the_import() -> None:
    assert in_new_process("import rectilinear; print('imported')", RECTILINEAR_BACKEND="nmupy") == "imported"


# ---------------------------------------------------------------- threads, tasks, nesting


def test_nesting_restores_exactly_what_was_before() -> None:
    r.set_backend("numpy")
    outer = r.use_backend("loopback")
    with outer:
        with r.use_backend("numpy"):
            with outer:  # the same object, open twice
                assert r.get_backend() == "loopback"
            assert r.get_backend() == "numpy"
        r.set_backend("loopback")  # the process's choice, from inside a context
        assert r.get_backend() == "loopback"
        r.set_backend("numpy")
        assert r.get_backend() == "loopback"
    assert r.get_backend() == "numpy"
    with pytest.raises(KeyError), r.use_backend("loopback"):
        raise KeyError
    assert r.get_backend() == "numpy"


def test_new_threads_see_the_process_and_not_the_context() -> None:
    r.set_backend("loopback")
    assert in_thread(r.get_backend) == "loopback"
    with r.use_backend("numpy"):
        assert in_thread(r.get_backend) == "loopback"


def test_threads_do_not_disturb_each_other() -> None:
    gate, wrong = threading.Barrier(2), []

    def work(name: str) -> None:
        for _ in range(200):
            with r.use_backend(name):
                gate.wait(10)
                if r.get_backend() != name:
                    wrong.append(name)
                r.relu_forward(np.ones(3))
                gate.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("numpy", "loopback")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.smoke
def test_tasks_inherit_and_do_not_leak() -> None:
    async def child() -> tuple[str, str]:
        await asyncio.sleep(0)
        return r.get_backend(), await asyncio.to_thread(r.get_backend)

    async def other() -> str:
        with r.use_backend("numpy"):
            await asyncio.sleep(0.01)
            return r.get_backend()

    async def run() -> tuple[Any, ...]:
        with r.use_backend("loopback"):
            return await asyncio.gather(child(), other(), child())

    r.set_backend("numpy")
    assert asyncio.run(run()) == [("loopback", "loopback"), "numpy", ("loopback", "loopback")]
    assert r.get_backend() == "numpy"


def test_a_thread_that_inherits_its_starters_context_ignores_it() -> None:
    """What a free-threaded build does by itself (sys.flags.thread_inherit_context), done by hand here."""

    class Inheriting(threading.Thread):
        def start(self) -> None:
            self._context = contextvars.copy_context()
            super().start()

        def run(self) -> None:
            self.seen = self._context.run(r.get_backend)
            self.given = meant.run(r.get_backend)  # as asyncio.to_thread does

    r.set_backend("numpy")
    with r.use_backend("loopback"):
        meant = contextvars.copy_context()
        thread = Inheriting()
        thread.start()
        thread.join()
    assert (thread.seen, thread.given) == ("numpy", "loopback")


def test_many_threads_choose_first_together() -> None:
    gate = threading.Barrier(8)

    def choose(_: int) -> str:
        gate.wait(10)
        return r.get_backend()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            r.set_backend(None)
            assert len(set(pool.map(choose, range(8)))) == 1


def test_blocks_closed_out_of_order() -> None:
    """A generator that holds a block may be closed inside of another block."""

    def holder() -> Any:
        with r.use_backend("loopback"):
            yield

    r.set_backend("numpy")
    held = holder()
    next(held)
    with r.use_backend("numpy"):
        held.close()
        assert r.get_backend() == "numpy"
    assert active().chosen_by == "process"


FORK_WHILE_LOCKED = """
import os, threading
import rectilinear as r
from rectilinear.backends import registry

locked, done = threading.Event(), threading.Event()
def hold():
    with registry._lock:
        locked.set()
        done.wait(20)
threading.Thread(target=hold, daemon=True).start()
locked.wait()
child = os.fork()
if child == 0:
    r.set_backend("numpy")
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_another_thread_chooses() -> None:
    done = subprocess.run((sys.executable, "-c", FORK_WHILE_LOCKED), capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.strip() == "0", done.stderr


def test_a_plug_in_may_use_the_library_while_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, each with one of the two locks that an import and a choice take, must not wait for each other."""
    inside, go = threading.Event(), threading.Event()

    def slow() -> NumpyBackend:
        inside.set()
        go.wait(10)
        return NumpyBackend()

    registry.register("slow", slow)
    try:
        first = threading.Thread(target=lambda: r.use_backend("slow"))
        first.start()
        inside.wait(10)
        assert in_thread(lambda: (r.set_backend(None), r.get_backend())[1])
        go.set()
        first.join(10)
        assert not first.is_alive()
    finally:
        go.set()
        registry.unregister("slow")


# ---------------------------------------------------------------- loopback: the dispatcher itself


@pytest.mark.smoke
def test_every_primitive_is_reached_through_the_dispatcher() -> None:
    """A result that came another way would leave a count at 0."""
    x, w, b, dout = np.ones((3, 2)), np.ones((2, 4)), np.ones(4), np.ones((3, 4))
    by_primitive = {
        "affine_forward": lambda: r.affine_forward(x, w, b),
        "affine_relu_forward": lambda: r.affine_relu_forward(x, w, b),
        "affine_backward": lambda: r.affine_backward(dout, (x, w, b)),
        "bias_backward": lambda: r.affine_backward(dout, (x, w, b), needs=(False, False, True)),
        "relu_forward": lambda: r.relu_forward(x),
        "relu_backward": lambda: r.relu_backward(x, x),
        "softmax_loss": lambda: r.softmax_loss(x, [0, 1, 0]),
        "asarray": lambda: r.asarray([1.0]),
        "synchronize": r.synchronize,
    }
    assert set(by_primitive) == set(PRIMITIVES) - {"to_numpy"}  # NumPy arrays need no way back
    with r.use_backend("loopback"):
        for primitive, call in by_primitive.items():
            LoopbackBackend.calls.clear()
            result = call()
            assert LoopbackBackend.calls[primitive] == 1, primitive
            made = {id(array) for array in LoopbackBackend.made}
            first = result[0] if isinstance(result, tuple) and result[0] is not None else result[2] if isinstance(result, tuple) else result
            assert id(first) in made, primitive


def test_the_primitives_are_the_contracts() -> None:
    methods = {name for name, value in vars(contract.Backend).items() if callable(value) and not name.startswith("_")}
    assert methods - {"probe"} == set(PRIMITIVES)


class Elsewhere(LoopbackBackend):
    """Computes in another library than NumPy, on a device that NumPy cannot reach: what the dispatcher must do for a GPU."""

    name = "elsewhere"
    library = "array_api_strict"

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        import array_api_strict as xp

        return xp.asarray(np.array(x), dtype=dtype, device=xp.Device("device1"))

    def to_numpy(self, x: Any) -> Any:
        import array_api_strict as xp

        if isinstance(x, r.KeepMask):
            return r.KeepMask(self.to_numpy(x.bits), x.shape)
        return np.asarray(x.to_device(xp.Device("CPU_DEVICE")))


class ElsewhereWithMasks(Elsewhere):
    """As `Elsewhere`, and it returns the bits of the keep-set as a GPU's kernels do."""

    def affine_relu_forward(self, x: Any, w: Any, b: Any, out: Any) -> Any:
        result, z = super().affine_relu_forward(x, w, b, out)
        keep = ~(np.asarray(self.to_numpy(z)) < 0)
        bits = np.packbits(keep, axis=-1, bitorder="little")
        return result, r.KeepMask(Elsewhere.asarray(self, bits), keep.shape)

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        return r.KeepMask(self.asarray(x.bits), x.shape) if isinstance(x, r.KeepMask) else super().asarray(x, dtype)


@pytest.mark.parametrize("kind", [Elsewhere, ElsewhereWithMasks])
@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 6)])
def test_numpy_arrays_are_taken_to_a_backend_elsewhere_and_back(rng: np.random.Generator, kind: Any, shape: tuple[int, ...]) -> None:
    x, w, b, dout = rng.standard_normal(shape), rng.standard_normal((6, 4)), rng.standard_normal(4), rng.standard_normal((5, 4))
    registry.register("elsewhere", kind)
    try:
        got = []
        for name in ("numpy", "elsewhere"):
            with r.use_backend(name):
                out, cache = r.affine_relu_forward(x, w, b)
                room = np.empty_like(dout)
                loss, dx = r.softmax_loss(dout, [0, 1, 2, 3, 0], out=room)
                plain = r.affine_forward(x, w, b)[0]
                got.append(
                    [plain, out, np.asarray(cache[1]) < 0, *r.affine_relu_backward(dout, cache), r.relu_backward(dout, cache[1]), loss, dx]
                )
                assert dx is room
                assert cache[0][0] is x
        for have, want in zip(*got, strict=True):
            assert type(have) is type(want)
            np.testing.assert_allclose(have, want, rtol=1e-12)
    finally:
        registry.unregister("elsewhere")


# ---------------------------------------------------------------- plug-ins


def plug_in(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    import importlib.metadata

    made = tuple(EntryPoint(name, value, "rectilinear.backends") for name, value in points)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: made if group == "rectilinear.backends" else ())
    registry._plug_ins.cache_clear()


def test_plug_ins_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, ("Plugged", "tests.test_backends:Plugged"), ("numpy", "tests.test_backends:Plugged"))
    with r.use_backend("plugged"):
        assert r.get_backend() == "plugged"
        np.testing.assert_array_equal(r.relu_forward(np.array([-1.0, 1.0]))[0], [0, 1])
    assert "plugged" in [info.name for info in r.list_backends()]
    r.set_backend("numpy")
    assert type(registry.active()) is NumpyBackend  # a plug-in cannot take a built-in's name
    with pytest.raises(ValueError, match="name of a built-in"):
        registry.register("Numpy", Plugged)


def test_the_name_chosen_is_the_name_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the backend calls itself: the chosen name is the one that can be chosen again."""
    plug_in(monkeypatch, ("nameless", "tests.test_backends:Nameless"))
    with r.use_backend("nameless") as name:
        assert name == r.get_backend() == active().name == "nameless"
    registry._loaded.pop("nameless", None)


class Nameless(NumpyBackend):
    pass


@pytest.mark.smoke
def test_plug_ins_installed_for_real(tmp_path: Any) -> None:
    """Found through the metadata of an installed distribution, in a new process."""
    info = tmp_path / "some_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rectilinear.backends]\nsome = some_backend:Backend\n")
    (tmp_path / "some_backend.py").write_text(
        "from rectilinear.backends.numpy_backend import NumpyBackend\nclass Backend(NumpyBackend):\n    name = 'some'\n"
    )
    code = "import numpy, rectilinear; print(rectilinear.get_backend(), rectilinear.relu_forward(numpy.array([-1.0]))[0])"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert in_new_process(code, RECTILINEAR_BACKEND="some", PYTHONPATH=path) == "some [0.]"


class Plugged(NumpyBackend):
    name = "plugged"


class Newer(NumpyBackend):
    api_version = 99


def exits() -> None:
    raise SystemExit(3)


class Outdated(NumpyBackend):
    name = "outdated"
    api_version = 0


def test_broken_plug_ins_are_listed_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(
        monkeypatch,
        ("broken", "no_such_module:Backend"),
        ("outdated", "tests.test_backends:Outdated"),
        ("newer", "tests.test_backends:Newer"),
        ("exits", "tests.test_backends:exits"),
        ("auto", "tests.test_backends:Plugged"),
    )
    infos = {info.name: info for info in r.list_backends()}
    reasons = {name: info.reason for name, info in infos.items()}
    assert "auto" not in infos
    assert not any(infos[name].usable for name in ("broken", "outdated", "newer", "exits"))
    assert "ModuleNotFoundError" in str(reasons["broken"])
    assert "SystemExit" in str(reasons["exits"])
    assert "written for contract 0, this rectilinear has 1; update it" in str(reasons["outdated"])
    assert "written for contract 99, this rectilinear has 1; update rectilinear" in str(reasons["newer"])
    assert r.get_backend()
    with pytest.raises(r.BackendError, match="no_such_module"):
        r.set_backend("broken")


@pytest.fixture(autouse=True)
def _forget_plug_ins() -> Any:
    yield
    registry._plug_ins.cache_clear()
    for name in ("plugged", "outdated", "newer", "broken", "exits", "unusable"):
        registry._loaded.pop(name, None)


# ---------------------------------------------------------------- what is said about it


def test_infos_are_frozen() -> None:
    info = r.list_backends()[0]
    with pytest.raises(FrozenInstanceError):
        info.name = "other"  # type: ignore[misc]
    assert replace(info, name="other").name == "other"


@pytest.mark.smoke
def test_info_as_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    r.set_backend("numpy")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "active, by set_backend" in out
    assert "generic" in out


@pytest.mark.smoke
def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert list(state) == ["rectilinear", "python", "platform", "backends", "memory", "tuned"]
    assert state["rectilinear"] == r.__version__
    rows = {row["name"]: row for row in state["backends"]}
    assert rows["numpy"]["usable"] is True
    assert sum(row["active"] for row in rows.values()) == 1
    assert set(rows["numpy"]) == {"name", "usable", "reason", "version", "device", "threads", "simd", "active", "chosen_by"}


def test_info_shows_a_bad_variable_and_exits_with_0() -> None:
    for arguments in (("info",), ("info", "--json")):
        done = subprocess.run(
            (sys.executable, "-m", "rectilinear", *arguments),
            env={**os.environ, "RECTILINEAR_BACKEND": "nmupy"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0
        assert "unknown backend 'nmupy' (did you mean 'numpy'?)" in done.stdout


@pytest.mark.parametrize("arguments", [("info",), ("info", "--json")], ids=" ".join)
@pytest.mark.parametrize("options", [(), ("-u",)], ids=str)
def test_a_reader_may_leave_before_the_end(options: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = (sys.executable, *options, "-m", "rectilinear", *arguments)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("reason", ["pip install 'rectilinear[extra]'", "no [/usr/lib/libcuda.so]"])
def test_info_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    class Bracketed(NumpyBackend):
        def probe(self) -> contract.Probe:
            return contract.Probe(False, reason)

    monkeypatch.setenv("COLUMNS", "200")
    registry.register("bracketed", Bracketed)
    try:
        assert main(["info"]) == 0
    finally:
        registry.unregister("bracketed")
    assert reason in capsys.readouterr().out


@pytest.mark.smoke
def test_import_is_pure() -> None:
    """Of array libraries only NumPy; nothing that is needed only elsewhere."""
    loaded = in_new_process("import sys, rectilinear, rectilinear.layers; print(*{name.partition('.')[0] for name in sys.modules})").split()
    heavy = {"numba", "llvmlite", "cupy", "torch", "jax", "dask", "sparse", "rich", "threadpoolctl", "safetensors", "matplotlib", "scipy"}
    assert not heavy & set(loaded)
    assert "numpy" in loaded


@pytest.mark.smoke
def test_public_names() -> None:
    from rectilinear import layers

    seven = {
        "affine_forward",
        "affine_backward",
        "relu_forward",
        "relu_backward",
        "affine_relu_forward",
        "affine_relu_backward",
        "softmax_loss",
    }
    assert set(layers.__all__) == seven
    assert set(r.__all__) >= seven | {
        *("set_backend", "use_backend", "get_backend", "list_backends", "asarray", "to_numpy", "synchronize"),
        *("BackendError", "ShapeError", "DTypeError", "KeepMask"),
    }
    for name in r.__all__:
        assert getattr(r, name)
        assert type(getattr(r, name)).__name__ != "module"
