"""The conformance kit itself: it finds what is planted, says what does not apply, and can be asked from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rectilinear.testing
from rectilinear.__main__ import main
from rectilinear.backends import registry
from rectilinear.errors import BackendError
from rectilinear.testing import PROMISES, Lib, conform, libs_for, numpy_libs
from rectilinear.testing.promises import __file__ as promises_file

from .faults import FAULTS, Fault, Reference

PLANTED = "planted"


@pytest.fixture
def libs() -> Iterator[tuple[Lib, ...]]:
    yield numpy_libs(PLANTED)
    registry.unregister(PLANTED)


# ---------------------------------------------------------------- it bites


def test_the_reference_keeps_the_cheap_promises(libs: tuple[Lib, ...]) -> None:
    """So that what is found below is what was planted. loopback is the same code, and is asked everything."""
    registry.register(PLANTED, Reference)
    cheap = ["stacked", "softmax", "edges", "dtypes", "masks", "inputs", "results", "out", "arrays", "bits"]
    outcomes = conform(libs, cheap)
    assert [(outcome.promise.name, outcome.state) for outcome in outcomes] == [(name, "holds") for name in cheap]


PLANTINGS = [pytest.param(fault, id=fault.backend.__name__, marks=[pytest.mark.nightly] if fault.slow else []) for fault in FAULTS]


@pytest.mark.parametrize("fault", PLANTINGS)
def test_a_planted_fault_breaks_its_promise(libs: tuple[Lib, ...], fault: Fault) -> None:
    registry.register(PLANTED, fault.backend)
    (outcome,) = conform(libs, [fault.breaks], first_failure=True)
    assert (outcome.promise.name, outcome.state) == (fault.breaks, "broken")
    assert outcome.failures[0].words


def test_each_promise_has_a_fault_that_breaks_it() -> None:
    """But for `processes`, which asks new processes, where nothing has been planted."""
    assert {fault.breaks for fault in FAULTS} == {promise.name for promise in PROMISES} - {"processes"}
    assert len({fault.backend for fault in FAULTS}) == len(FAULTS)


def test_each_file_is_a_promise_and_each_promise_a_file() -> None:
    files = {path.stem for path in Path(promises_file).parent.glob("*.py")} - {"__init__"}
    assert files == {promise.name for promise in PROMISES}


# ---------------------------------------------------------------- what is tried


def test_what_a_backend_is_tried_on() -> None:
    assert [(lib.name, lib.library, lib.backend, lib.readonly_inputs) for lib in libs_for(" NumPy ")] == [
        ("numpy", "numpy", "numpy", False),
        ("numpy-readonly", "numpy", "numpy", True),
    ]
    assert [lib.library for lib in libs_for("generic")] == ["array_api_strict"]


@pytest.mark.parametrize(
    ("name", "library", "error", "words"),
    [
        ("nmupy", None, BackendError, r"unknown backend 'nmupy' \(did you mean 'numpy'\?\)"),
        ("numpy", "torch", BackendError, "numpy computes in numpy: .* no torch arrays"),
        ("generic", "numpy", BackendError, "numpy arrays are served by the chosen backend here, not by 'generic'"),
        ("generic", "no_such_library", ImportError, "no_such_library"),
    ],
)
def test_what_cannot_be_tried_is_told(name: str, library: str | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        libs_for(name, library)


def test_a_backend_that_claims_a_library_is_tried_on_its_arrays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Reference):
        library = "array_api_strict"

        def asarray(self, x: object, dtype: object = None) -> object:
            import array_api_strict

            return array_api_strict.asarray(x, dtype=dtype)

    registry.register(PLANTED, Elsewhere)
    try:
        assert [lib.library for lib in libs_for(PLANTED)] == ["numpy", "numpy"]  # another one serves those arrays
        monkeypatch.setitem(registry._SERVERS, "array_api_strict", PLANTED)
        assert [lib.library for lib in libs_for(PLANTED)] == ["numpy", "numpy", "array_api_strict"]
        assert [lib.name for lib in libs_for(PLANTED, "array_api_strict")] == ["planted on array_api_strict"]
        with pytest.raises(BackendError, match="array_api_strict arrays are served by backend 'reference' here, not by 'generic'"):
            libs_for("generic")
    finally:
        registry.unregister(PLANTED)


def test_what_does_not_apply_is_said() -> None:
    outcomes = {outcome.promise.name: outcome for outcome in conform(libs_for("generic"), ["masks", "processes", "bits"])}
    assert {name: outcome.state for name, outcome in outcomes.items()} == {
        "masks": "does not apply",
        "processes": "does not apply",
        "bits": "holds",
    }
    assert "array_api_strict" in str(outcomes["masks"].reason)


@pytest.mark.libraries
def test_immutable_arrays_have_no_out() -> None:
    (outcome,) = conform(libs_for("generic", "jax"), ["out"])
    assert (outcome.state, outcome.reason) == ("does not apply", "jax arrays are immutable; that out is refused has been tested")
    assert outcome.tests


# ---------------------------------------------------------------- from the command line


def test_a_line_a_promise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "numpy", "--only", "bits", "--only", "needs"]) == 0
    first, needs, bits, last = capsys.readouterr().out.splitlines()
    assert first.startswith("rectilinear ")
    assert "backend numpy, on numpy " in first
    assert needs.startswith("needs      holds ")
    assert bits.startswith("bits       holds ")
    assert last == "numpy keeps the contract: 2 hold, 0 broken, 0 do not apply"


def test_a_broken_promise_shows_what_was_met_and_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    fault = next(fault for fault in FAULTS if fault.breaks == "arrays")
    registry.register(PLANTED, fault.backend)
    try:
        assert main(["conform", PLANTED, "--only", "arrays"]) == 1
        said = capsys.readouterr().out
        assert "arrays     BROKEN " in said
        assert "test_asarray_keeps_values_and_takes_a_dtype[planted]" in said
        assert "float32" in said
        assert "planted does not keep the contract: 0 hold, 1 broken" in said
        assert main(["conform", PLANTED, "--only", "arrays", "--json"]) == 1
        record = json.loads(capsys.readouterr().out)
    finally:
        registry.unregister(PLANTED)
    assert (record["backend"], record["conforms"]) == (PLANTED, False)
    (promise,) = record["promises"]
    assert (promise["name"], promise["state"], len(promise["failures"])) == ("arrays", "broken", 1)
    assert [array["library"] for array in record["arrays"]] == ["numpy", "numpy"]


def test_what_cannot_be_tried_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "nmupy"]) == 2
    assert "unknown backend 'nmupy'" in capsys.readouterr().err
    assert main(["conform", "generic", "--library", "no_such_library"]) == 2
    assert "no_such_library" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["conform", "numpy", "--only", "nothing"])


def test_what_is_not_installed_is_told_first(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rectilinear.testing import cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "pytest" else object())
    assert main(["conform", "numpy"]) == 2
    assert capsys.readouterr().err == "conform: not installed: pytest; pip install 'rectilinear[testing]', or '.[testing]' in a checkout\n"


def test_a_promise_that_is_none() -> None:
    with pytest.raises(ValueError, match="there is no promise 'speed'; they are values, stacked"):
        conform(numpy_libs("numpy"), ["speed"])


def test_neither_the_package_nor_the_command_line_load_pytest() -> None:
    code = "import sys, rectilinear; print('rectilinear.testing' in sys.modules)"
    code += "; import rectilinear.testing.cli; print('pytest' in sys.modules)"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_place_it_is_called_from_has_no_say(tmp_path: Path) -> None:
    """No configuration, conftest or test of the working directory is read, and nothing is left there."""
    (tmp_path / "conftest.py").write_text("raise RuntimeError('read')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "test_mine.py").write_text("def test_mine(): assert False\n")
    path = os.pathsep.join([str(Path(rectilinear.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = (sys.executable, "-m", "rectilinear", "conform", "numpy", "--only", "bits")
    variables = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "--no-such-option"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conftest.py", "pytest.ini", "test_mine.py"]
