"""``bench --isa``: every process is held, the user's own settings stay, and what was not held is said."""

import json
import os
import subprocess
import sys

import pytest

from rectilinear.measure import compare, figures, isa, report
from rectilinear.measure.ceilings import _LLVM, _fma_ir
from rectilinear.measure.cli import main
from rectilinear.measure.record import load
from rectilinear.measure.subjects import PEERS, backend_subjects
from rectilinear.measure.turns import environment, started

from .test_measure_report import made_up

needs_avx2 = pytest.mark.cpu("AVX2")


def avx2_host(monkeypatch, simd="avx512f", fma=True):
    monkeypatch.setattr(isa, "describe", lambda: {"simd": simd, "fma": fma})


# ---------------------------------------------------------------- the variables


def test_the_users_other_settings_are_kept(monkeypatch):
    avx2_host(monkeypatch)
    user = {
        "XLA_FLAGS": "--xla_mine=1 --xla_cpu_max_isa=AVX512",
        "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.cpu.hwcaps=AVX512F",
    }
    held = isa.variables("avx2", user)
    flags = held["XLA_FLAGS"].split()
    assert "--xla_mine=1" in flags
    assert [flag for flag in flags if "max_isa" in flag] == ["--xla_cpu_max_isa=AVX2"]
    assert held["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW"


def test_a_run_that_is_not_held_sets_nothing_and_drops_what_the_user_set(monkeypatch):
    assert isa.variables("host", os.environ) == {}
    avx2_host(monkeypatch)
    held = isa.variables("avx2", {})
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1 --xla_cpu_max_isa=AVX2")
    given = environment(PEERS[0], 1)
    assert given["XLA_FLAGS"] == "--xla_mine=1"
    assert set(held) & set(given) == {"XLA_FLAGS", "GLIBC_TUNABLES"}  # the tunables hold more than the instruction set


def test_what_holds_a_run_wins_over_the_users_and_stays_out_of_this_process(monkeypatch):
    avx2_host(monkeypatch)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "SkylakeX")
    before = dict(os.environ)
    assert environment(PEERS[0], 1, isa.variables("avx2", os.environ))["OPENBLAS_CORETYPE"] == "Haswell"
    assert dict(os.environ) == before


def test_every_variable_is_of_a_library_that_the_report_names(monkeypatch):
    avx2_host(monkeypatch)
    assert set(isa.variables("avx2", {})) == {name for names in isa.BY.values() for name in names}
    assert {name for name, _, _ in isa._ASKED} | {"OpenBLAS"} == set(isa.BY)


@pytest.mark.parametrize(("simd", "fma"), [(None, True), ("asimd", True), ("avx", False), ("avx2", False)])
def test_a_processor_that_cannot_is_an_error_of_one_line(monkeypatch, capsys, simd, fma):
    avx2_host(monkeypatch, simd, fma)
    with pytest.raises(SystemExit) as stopped:
        main(["--isa", "avx2", "--only", "step-1x64x64-float32"])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--isa avx2 needs an x86 processor with AVX2 and FMA" in line
    assert line.endswith("leave --isa out")


def test_an_unknown_instruction_set_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit):
        main(["--isa", "avx10"])
    assert "'host', 'avx2'" in capsys.readouterr().err


# ---------------------------------------------------------------- what they do


@needs_avx2
def test_numpy_takes_the_names_without_a_warning_and_has_no_wide_loops_left():
    code = "import warnings; warnings.simplefilter('error'); from rectilinear.measure import isa; "
    code += "found = isa._numpy_features(); print([n for n in found['dispatch'] if n.startswith(isa._WIDE) and n in found['enabled']])"
    held = environment(PEERS[0], 1, isa.variables("avx2", os.environ))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=held, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def said_by(subjects):
    with started(subjects, 1, isa.variables("avx2", os.environ)) as (_, greetings, missing):
        assert not missing
        return {name: {a["library"]: a["says"] for a in greeting["runs_on"]} for name, greeting in greetings.items()}


@needs_avx2
def test_numpy_openblas_and_the_kernels_say_that_they_are_held():
    backends = [subject for subject in backend_subjects()[0] if subject.name in ("numba", "numpy")]
    said = said_by([*backends, PEERS[0]])
    for name, answers in said.items():
        assert not [library for library, says in answers.items() if isa.held(says) is False], name
    assert said["cs231n"]["NumPy's loops"] in ("X86_V3", "AVX2")
    assert said["numba"]["rectilinear"].startswith("AVX2 (")
    assert "rectilinear" not in said["numpy"]


@pytest.mark.libraries
@pytest.mark.nightly  # every library, loaded twice
@needs_avx2
def test_the_other_libraries_say_that_they_are_held():
    said = said_by([peer for peer in PEERS if peer.name in ("torch", "jax", "sklearn", "thinc")])
    for name, answers in said.items():
        assert not [library for library, says in answers.items() if isa.held(says) is False], name
    assert said["torch"]["PyTorch"] == "AVX2"
    assert said["thinc"]["thinc's BLIS"] == "haswell"
    assert said["jax"]["XLA"] is None


@needs_avx2
def test_the_ceilings_of_a_held_run_use_no_wider_registers():
    probe = _LLVM("avx2")
    assert probe._widths == (32, 16)
    for width in probe._widths:
        module = probe._llvm.parse_assembly(_fma_ir("float32", width, 24))
        assembly = probe._machine().emit_assembly(module)
        assert "vfmadd" in assembly
        assert "zmm" not in assembly
        assert "ymm16" not in assembly


@pytest.mark.parametrize(
    ("threads", "found"),
    [
        (["AVX512_elapsed_ms:\t-1", "AVX512_elapsed_ms:\t40"], True),
        (["AVX512_elapsed_ms:\t-1", "AVX512_elapsed_ms:\t60"], False),
        (["AVX512_elapsed_ms:\t-1"], False),
        ([""], None),
        ([], None),
    ],
)
def test_what_linux_saw_within_a_turn(tmp_path, monkeypatch, threads, found):
    monkeypatch.setattr(isa, "PROC", tmp_path)
    for i, text in enumerate(threads):
        (tmp_path / "7" / "task" / str(i)).mkdir(parents=True)
        (tmp_path / "7" / "task" / str(i) / "arch_status").write_text(text + "\n")
    assert isa.wide_within(7, 0.05) is found


# ---------------------------------------------------------------- what is said


def held_record(says="Haswell", seen=0):
    record = made_up()
    record.settings["isa"] = "avx2"
    record.machine |= {"simd": "avx512f", "caches": {"L1": 2**15, "L2": 2**20}}
    record.held_by = {"OPENBLAS_CORETYPE": "Haswell", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
    record.subjects["cs231n"] |= {"runs_on": [{"library": "OpenBLAS", "says": says}], "wide": {"turns": 9, "seen": 0}}
    record.subjects["jax"] |= {"runs_on": [{"library": "XLA", "says": None}], "wide": {"turns": 9, "seen": seen}}
    record.subjects["cs231n"]["threads"] = [{"internal_api": "openblas", "architecture": says}]
    return record


def test_the_report_says_what_held_whom_and_what_cannot_be_asked():
    text = report.markdown(held_record())
    section = text.partition("## Held to AVX2")[2].partition("\n## ")[0]
    assert "| OpenBLAS | OPENBLAS_CORETYPE=Haswell | Haswell | yes | cs231n |" in section
    assert "| XLA | XLA_FLAGS=--xla_cpu_max_isa=AVX2 | cannot be asked | by its variable | jax |" in section
    assert "the caches are the host's: L1 32 KiB, L2 1,024 KiB" in section
    assert "| cs231n | in none of 9 turns |" in section
    assert "Not held" not in text
    assert text.splitlines()[0].endswith(", held to AVX2")


def test_what_was_not_held_is_said_first_and_by_the_command(tmp_path, capsys):
    record = held_record("SkylakeX", 3)
    lines = figures.not_held(record)
    assert lines == [
        "OpenBLAS says SkylakeX in cs231n's process",
        "registers of AVX-512 were in use in 3 of 9 turns of jax, where XLA cannot be asked",
    ]
    text = report.html(record)
    assert text.index("Not held to AVX2") < text.index("Headline")
    record.save(tmp_path / "run.json")
    main(["--from", str(tmp_path / "run.json"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"NOT HELD TO AVX2: {line}" in printed for line in lines)
    assert "BLAS kernel: openblas SkylakeX for cs231n" in printed


def test_an_ordinary_report_speaks_of_no_hold():
    record = held_record("SkylakeX", 3)
    record.settings["isa"] = "host"
    assert figures.not_held(record) == []
    text = report.markdown(record)
    assert "eld to AVX2" not in text


def test_runs_of_different_instruction_sets_are_not_compared(tmp_path, capsys, monkeypatch):
    made_up().save(tmp_path / "host.json")
    held_record().save(tmp_path / "avx2.json")
    monkeypatch.setattr("rectilinear.measure.cli.run", lambda *a, **k: pytest.fail("measured all the same"))
    ways = [("host.json", ["--from", str(tmp_path / "avx2.json")]), ("avx2.json", []), ("host.json", ["--isa", "avx2"])]
    for old, arguments in ways:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--compare", str(tmp_path / old), "--out", str(tmp_path)])
        assert stopped.value.code == 2
        assert "compare runs of one instruction set" in capsys.readouterr().err


def test_a_record_from_before_there_was_a_choice_is_the_hosts(tmp_path):
    record = made_up()
    record.save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data.pop("held_by") == {}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert load(tmp_path / "run.json") == record
    compare.refuse_unlike(load(tmp_path / "run.json"), "host")


@needs_avx2
def test_a_held_run_from_start_to_end(tmp_path):
    arguments = ["--subjects", "cs231n", "--only", "step-1x64x64-float32", "--rounds", "2", "--seconds", "0.05", "--no-ceilings"]
    assert main([*arguments, "--isa", "avx2", "--out", str(tmp_path)]) == 0
    record = load(tmp_path / "run.json")
    assert record.isa == "avx2"
    assert record.held_by == isa.variables("avx2", os.environ)
    assert record.subjects["cs231n"]["wide"]["turns"] == 2
    assert figures.not_held(record) == []
