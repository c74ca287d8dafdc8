"""Plug-ins: who serves the arrays of which library, what is said of those that do not, and the example, installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
import venv
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

import rectilinear as r
from rectilinear.backends import registry
from rectilinear.backends.generic import GenericBackend
from rectilinear.backends.numpy_backend import NumpyBackend

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE = CHECKOUT / "examples" / "backend_plugin"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What makes these backends (name -> attribute of this file) and claims (library, name) the installed ones."""
    import importlib.metadata

    def install(backends: dict[str, str], claims: list[tuple[str, str]]) -> None:
        points = {
            registry.ENTRY_POINTS: tuple(EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in backends.items()),
            registry.LIBRARIES: tuple(EntryPoint(name, value, registry.LIBRARIES) for name, value in claims),
        }
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points[group])
        registry._plug_ins.cache_clear()

    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    yield install
    registry._plug_ins.cache_clear()


class Strict(GenericBackend):
    library = "array_api_strict"


class Twin(Strict):
    pass


class OfNumPy(NumpyBackend):
    pass


class Newer(Strict):
    api_version = 99


class NoVersion(Strict):
    api_version = "1"  # type: ignore[assignment]


class Half:
    api_version = 1
    library = "array_api_strict"

    def probe(self) -> Any:
        raise AssertionError("asked before it was looked at")


class NoProbe(Strict):
    def probe(self) -> Any:
        return True


class BadThreads(Strict):
    def threads(self) -> int:
        raise RuntimeError("no number of threads")


HERE = "tests.test_plug_ins:"


def row(name: str) -> r.backends.registry.BackendInfo:
    (info,) = (info for info in r.list_backends() if info.name == name)
    return info


def test_the_claimed_library_is_served_by_the_plug_in(installed: Any) -> None:
    installed({"Mine": HERE + "Strict"}, [("array_api_strict", " MINE ")])
    assert type(registry.serving("array_api_strict")) is Strict
    assert row("mine").usable
    assert row("mine").reason == "serves the arrays of array_api_strict"
    assert registry.serving("torch").name == "generic"


@pytest.mark.parametrize(
    ("backends", "claims", "name", "words"),
    [
        ({"a": "Strict", "b": "Twin"}, ["a", "b"], "a", "claims the arrays of array_api_strict, and so does b: the generic backend serves"),
        ({"a": "Strict", "b": "Twin"}, ["a", "b"], "b", "claims the arrays of array_api_strict, and so does a: the generic backend serves"),
        ({}, ["nobody"], "nobody", "claims the arrays of array_api_strict, but no backend of this name is installed"),
        ({"a": "Missing"}, ["a"], "a", "AttributeError while loading it: .*Missing.*; claims the arrays of array_api_strict: the generic"),
        ({"a": "Newer"}, ["a"], "a", "written for contract 99, this rectilinear has 1; update rectilinear; claims"),
        ({"a": "NoVersion"}, ["a"], "a", "TypeError while loading it: .*; claims"),
        ({"a": "Half"}, ["a"], "a", "it lacks affine_forward, affine_relu_forward, .*, half, which rectilinear.backends.contract asks"),
        ({"a": "NoProbe"}, ["a"], "a", "AttributeError while loading it: .*usable"),
        ({"a": "OfNumPy"}, ["a"], "a", "claims the arrays of array_api_strict, but computes in numpy: the generic backend serves them"),
        ({}, ["generic"], "generic", "claims the arrays of array_api_strict, but computes in array API"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list | dict) else None,
)
def test_a_claim_that_cannot_stand_is_a_row_and_harms_nobody(
    installed: Any, backends: dict[str, str], claims: list[str], name: str, words: str
) -> None:
    installed({name: HERE + value for name, value in backends.items()}, [("array_api_strict", claim) for claim in claims])
    assert type(registry.serving("array_api_strict")) is GenericBackend
    out, _ = r.relu_forward(strict.asarray([-1.0, 2.0]))
    np.testing.assert_array_equal(r.to_numpy(out), [0, 2])
    assert re.search(words, str(row(name).reason)), row(name).reason
    assert r.get_backend() in ("numba", "numpy")


@pytest.mark.parametrize(("library", "words"), [("numpy", "which the chosen backend serves"), ("cupy", "which the built-in backend cupy")])
def test_a_built_in_library_cannot_be_claimed(installed: Any, library: str, words: str) -> None:
    kind = type("Claims", (GenericBackend,), {"library": library})
    globals()["Claims"] = kind
    installed({"a": HERE + "Claims"}, [(library, "a")])
    assert words in str(row("a").reason)
    assert not isinstance(registry.active(), kind)
    if library == "cupy":
        assert registry._find_server(library) == registry.GENERIC  # never asked for
        with pytest.raises(r.BackendError, match="backend 'cupy' is not usable here"):
            registry.serving(library)


def test_one_name_offered_twice(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    points = tuple(EntryPoint(name, HERE + kind, "g") for name, kind in (("a", "Strict"), ("A", "Twin"), ("numpy", "Twin")))
    installed({}, [])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else ())
    registry._plug_ins.cache_clear()
    assert row("a").reason == f"{HERE}Twin has this name too and is not used"
    assert f"{HERE}Twin has this name too and is not used" in str(row("numpy").reason)


def test_a_plug_in_that_cannot_tell_its_threads(installed: Any) -> None:
    installed({"a": HERE + "BadThreads"}, [])
    assert (row("a").threads, row("a").reason) == (None, "no number of threads")


def test_metadata_that_cannot_be_read(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def unreadable(group: str) -> Any:
        raise TypeError("no = in a line")

    installed({}, [])
    monkeypatch.setattr(importlib.metadata, "entry_points", unreadable)
    registry._plug_ins.cache_clear()
    assert registry.serving("array_api_strict").name == "generic"
    assert "plug-ins were not looked for: TypeError in the metadata of what is installed: no = in a line" in str(row("generic").reason)


# ---------------------------------------------------------------- a library that nobody knows


class TinyArray:
    """An array over NumPy of a library of its own, with what the standard asks and no more; its namespace is made anew each time."""

    def __init__(self, held: Any) -> None:
        self.held = np.asarray(held)

    shape = property(lambda self: self.held.shape)
    ndim = property(lambda self: self.held.ndim)
    dtype = property(lambda self: self.held.dtype)
    device = "tiny"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return TinyNamespace()

    def __getitem__(self, key: Any) -> TinyArray:
        return TinyArray(self.held[key])


class TinyNamespace:
    def __eq__(self, other: object) -> bool:
        return type(other) is TinyNamespace

    def __hash__(self) -> int:
        return 1

    __name__ = "tinyarray"
    asarray = staticmethod(TinyArray)

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function
        return lambda *given, **how: TinyArray(function(*(x.held if isinstance(x, TinyArray) else x for x in given), **how))


class Tiny:
    """Computes with NumPy, and keeps a list of what it was asked."""

    api_version = 1
    library = "tinyarray"
    half = False
    asked: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        primitive = getattr(NumpyBackend(), name)
        if name == "probe":
            return primitive

        def counted(*operands: Any) -> Any:
            Tiny.asked += (name,)
            made = primitive(*(x.held if isinstance(x, TinyArray) else x for x in operands))
            if name == "to_numpy" or made is None:
                return made
            return tuple(map(TinyArray, made)) if isinstance(made, tuple) else TinyArray(made)

        return counted


def test_arrays_of_a_library_that_no_one_knows(installed: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Every function, with flattened samples and mixed dtypes, reaches the plug-in and gives that library's arrays."""
    monkeypatch.setitem(sys.modules, "tinyarray", types.ModuleType("tinyarray"))
    monkeypatch.setattr(TinyArray, "__module__", "tinyarray")
    installed({"tiny": HERE + "Tiny"}, [("tinyarray", "tiny")])
    x, w, b = rng.standard_normal((5, 2, 3)), rng.standard_normal((6, 4)), rng.integers(-3, 3, 4)
    dout = rng.standard_normal((5, 4))
    results = []
    for make in (np.asarray, TinyArray):
        with r.use_backend("numpy"):
            out, cache = r.affine_relu_forward(make(x), make(w), make(b))
            loss, dx = r.softmax_loss(out, make(np.array([0, 3, 1, 2, 0])))
            plain = r.affine_forward(make(x), make(w), None)[0]
            results.append([out, loss, dx, plain, *r.affine_relu_backward(make(dout), cache), r.relu_backward(make(dout), cache[1])])
    for want, got in zip(*results, strict=True):
        assert type(got) is TinyArray
        have = r.to_numpy(got)
        assert type(have) is np.ndarray
        assert got.shape == np.shape(want)
        np.testing.assert_array_equal(have, want)
    assert {"affine_relu_forward", "softmax_loss", "affine_backward", "relu_backward", "to_numpy"} <= set(Tiny.asked)
    r.synchronize(results[1][0])
    assert Tiny.asked[-1] == "synchronize"
    with pytest.raises(TypeError, match=r"x is a tinyarray array but w is a numpy array.*tinyarray\.asarray\(rectilinear\.to_numpy\(w\)\)"):
        r.affine_forward(TinyArray(x), w, None)


# ---------------------------------------------------------------- the example


CODE = """
import sys, numpy as np, array_api_strict as xp, rectilinear as r
x, w, dout, y = np.array([[1.0, -2.0]] * 3), np.eye(2), np.ones((3, 2)), np.array([0, 1, 1])
loaded = "rectilinear_strict" in sys.modules
with r.use_backend("numpy"):
    def all_of(to):
        out, cache = r.affine_relu_forward(to(x), to(w), to(np.ones(2)))
        loss, dx = r.softmax_loss(out, to(y))
        return [r.to_numpy(a) for a in (out, loss, dx, *r.affine_relu_backward(dx, cache))]
    want = all_of(np.asarray)
    loaded |= "rectilinear_strict" in sys.modules
    got = all_of(xp.asarray)
served = type(r.backends.registry.serving("array_api_strict")).__name__
np.testing.assert_array_equal(r.relu_forward(x)[0], np.maximum(x, 0))
got += all_of(np.asarray)
for a, b in zip(got, want * 2, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)
print(loaded, served, r.get_backend(), [row.reason for row in r.list_backends() if row.name == "strict"], len(got))
"""
WANT = "False StrictBackend strict ['serves the arrays of array_api_strict'] 12"


def run(python: Any, code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        (python, "-W", "error", "-c", code), env=kept | environment, capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_example_serves_once_it_is_found(tmp_path: Path) -> None:
    """Through the metadata of an installed distribution; it is imported when its library's first array comes, not before."""
    import tomllib

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "rectilinear_strict-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join(map(str, (tmp_path, EXAMPLE, CHECKOUT)))
    assert run(sys.executable, CODE, PYTHONPATH=path, RECTILINEAR_BACKEND="strict") == WANT
    assert len((EXAMPLE / "rectilinear_strict.py").read_text().splitlines()) < 80


@pytest.mark.nightly
def test_the_example_installed_into_a_fresh_environment(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CHECKOUT / "constraints.txt")
    subprocess.run([*pip, CHECKOUT, EXAMPLE], check=True, timeout=280)
    assert run(python, CODE, RECTILINEAR_BACKEND="strict") == WANT
