"""What .ci/run says of skipped tests: those that the CPU cannot execute are named, any other fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .subprocesses import ROOT

TESTS = """
import pytest

@pytest.mark.cpu("AVX-512")
def test_wide(): pass

@pytest.mark.cpu("SSE2")
@pytest.mark.skipif({skip}, reason="no such luck")
def test_other(): pass

def test_plain(): pass
"""


def report(folder: Path, name: str, *, skip: bool, without: str = "") -> Path:
    """The report of a run of TESTS."""
    (folder / "conftest.py").write_text("from tests.conftest import pytest_runtest_setup\n")
    (folder / "test_made.py").write_text(TESTS.format(skip=skip))
    path = folder / name
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        f"--junitxml={path}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TESTS_WITHOUT_CPU": without}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def check(*reports: Path) -> tuple[int, str]:
    command = [sys.executable, ROOT / "tools" / "check_skips.py", *reports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def test_what_the_cpu_lacks_is_named_and_does_not_fail(tmp_path: Path) -> None:
    status, said = check(report(tmp_path, "a.xml", skip=False, without="AVX-512"))
    assert status == 0
    assert "left out, since this CPU does not execute AVX-512: test_made::test_wide\n" in said
    assert "2 tests ran, 1 need another CPU, 0 were skipped everywhere" in said


def test_any_other_skip_fails_even_of_a_test_with_the_marker(tmp_path: Path) -> None:
    skipping = report(tmp_path, "a.xml", skip=True, without="AVX-512")
    status, said = check(skipping)
    assert status == 1
    assert "skipped in every target (no such luck): test_made::test_other\n" in said
    assert check(skipping, report(tmp_path, "b.xml", skip=False, without="AVX-512"))[0] == 0


def test_nothing_that_ran_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<testsuites><testsuite/></testsuites>")
    assert check(tmp_path / "a.xml")[0] == 1
