"""The fuzzing itself: a few cases of it, and that it would notice. ``make fuzz`` runs it for longer."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("guard pages by mprotect", allow_module_level=True)

from tests import planted, subprocesses, widths
from tests.fuzz import __main__ as fuzz
from tests.fuzz.cases import FUNCTIONS, Case, machine
from tests.guard import Memory

NUMPY = machine("numpy")


@pytest.mark.parametrize("name", [next(iter(widths.executable())).name, fuzz.NUMPY])
def test_some_cases_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--only", name, "--first", "0", "--cases", "300"]) == 0, capsys.readouterr().out
    assert "300 calls" in capsys.readouterr().out


def test_the_seed_decides_the_case() -> None:
    def drawn(seed: int) -> list[Any]:
        case = Case(seed, NUMPY, Memory())
        return [str(case), case.error, *(operand.before.tobytes() for operand in case.operands)]

    for seed in range(50):
        assert drawn(seed) == drawn(seed)


def test_cases_are_of_every_kind() -> None:
    memory = Memory()
    cases = [Case(seed, NUMPY, memory) for seed in range(1500)]
    counts = Counter(case.function for case in cases)
    assert min(counts[function] for function in FUNCTIONS) > 1500 / len(FUNCTIONS) / 2
    text = "\n".join(map(str, cases))
    kinds = ["bad call: shape", "bad call: label", *(f"bad mask: {kind}" for kind in ("short", "rows", "dtype", "axes"))]
    kinds += [f": {kind}" for kind in ("itself", "argument", "shape", "dtype", "read-only")]
    kinds += ["out is dout", "float32", "float64", "strides (0, ", "strides (-", "bool", ">f4", "threads 2", "'kc': 8", "of the host"]
    assert [kind for kind in kinds if kind not in text] == []
    operands = [operand for case in cases for operand in case.operands]
    assert {operand.array.ndim for operand in operands} >= {0, 1, 2, 3, 4}
    assert max(operand.region.bytes.size for operand in operands) <= 1 << 26


@pytest.mark.parametrize(
    "touched",
    [
        "guarded(a, True).ctypes.data + a.nbytes",
        "guarded(a, False).ctypes.data - 1",
        "allocated(True).ctypes.data + a.nbytes",
        "allocated(False).ctypes.data - 1",
    ],
)
@pytest.mark.parametrize("how", ["ctypes.string_at({}, 1)", "ctypes.memset({}, 0, 1)"])
def test_a_guard_faults(touched: str, how: str) -> None:
    code = """
        import ctypes
        import numpy as np
        from tests.guard import Allocator, guarded

        a, allocator, kept = np.zeros(37, "f4"), Allocator(), []

        def allocated(at_end):
            allocator.at_end = at_end
            with allocator:
                kept.append(np.empty(37, "f4"))
            assert np.isnan(kept[0]).all() and allocator.intact()
            return kept[0]

        """
    process = subprocesses.start(code + how.format(touched))
    process.communicate(timeout=subprocesses.LIMIT_S)
    assert process.returncode == -signal.SIGSEGV


def test_what_is_written_beside_an_array_is_seen() -> None:
    memory = Memory()
    case = next(case for seed in range(100) if min((case := Case(seed, NUMPY, memory)).operands[0].array.strides, default=0) > 0)
    operand = case.operands[0]
    assert operand.untouched()
    beside = 0 if operand.offset > 0 else operand.region.bytes.size - 1
    operand.region.bytes[beside] ^= 1
    assert not operand.untouched()
    operand.region.bytes[beside] ^= 1
    operand.array.flat[0] += 1
    assert not operand.untouched()
    operand.result = True
    assert operand.untouched()


WITH_A_CRASH = """
    import ctypes, faulthandler, time
    import numpy as np
    from tests.fuzz import cases, worker

    class Odd(cases.Case):
        def run(self, allocator):
            if self.seed == 3:
                ctypes.string_at(0)
            if self.seed == 5:
                raise cases.Failed("wrong")
            if self.seed == 6:
                time.sleep(60)

    faulthandler.disable()  # it speaks on stderr
    worker.Case, worker.CASE_S = Odd, 1
    board = np.memmap(PATH, np.int64, "w+", shape=(worker.BOARD_WORDS,))
    worker.work(worker.Order(1, 8, 60.0, 20), board, cases.machine("numpy"))
    assert board[worker.SEED] == 8 and board[worker.CALLS:].sum() == 6, board
"""


def test_a_crash_is_a_failing_case_and_not_the_end(tmp_path: Path) -> None:
    out = subprocesses.run(WITH_A_CRASH.replace("PATH", repr(str(tmp_path / "board"))))
    found = {line["seed"]: line["what"] for line in map(json.loads, out.splitlines())}
    assert found == {3: "dies of SIGSEGV", 5: "Failed: wrong", 6: "hangs"}


def test_failing_cases_end_it_non_zero_with_how_to_run_them_again(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    found = fuzz.Worker.failures
    wrong = {"seed": 123, "what": "wrong", "case": "some call"}
    monkeypatch.setattr(fuzz.Worker, "failures", lambda self, limit_s: [*found(self, limit_s), wrong])
    assert fuzz.main(["--only", "numpy", "--cases", "1"]) == 1
    assert "-m tests.fuzz --only numpy --seed 123\n" in capsys.readouterr().out


def test_a_name_that_the_host_has_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--only", "AVX-1024"]) == 2
    assert "this host has no AVX-1024; it has " in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["tests", "tests/fuzz", "tests/cuda"])
def test_planted_bugs_can_be_planted(folder: str) -> None:
    """The code that they change is there, once."""
    for mutant in planted.read(planted.ROOT / folder / "mutants.toml"):
        for edit in mutant.edits:
            assert edit.new in edit.made_in(planted.ROOT / "rectilinear"), mutant.name


@pytest.mark.parametrize(("old", "times"), [("no such code", 0), ("import ", 10)])
def test_a_bug_that_cannot_be_planted_is_an_error(old: str, times: int, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("import os\n" * 10)
    with pytest.raises(ValueError, match=f"stands {times} times in file.py"):
        planted.Edit("file.py", old, "").made_in(tmp_path)
