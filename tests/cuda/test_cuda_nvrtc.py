"""(a) Every kernel and dtype compiled for real by NVRTC, with CuPy's options; registers, spills, shared memory, wide loads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_cases
import host_build
import pytest

from rectilinear.backends.cupy_loader import SOURCE

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SHOWN = (75, 80, 90, 100, 120)  # columns of the table in docs/gpu.md
# Registers a thread: four blocks of 256 fit into a multiprocessor's 65536; of the column sums and softmax (True), two.
BUDGET = {False: 64, True: 128}
TABLE = Path(__file__).parent / "resources.json"

NAMES = host_build.kernel_names(SOURCE.read_text())


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], tuple[bytes, str]]:
    """(dtype, architecture) -> cubin and compiler log."""
    import nvrtc

    keys = [(dtype, arch) for dtype in gpu_cases.DTYPES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(lambda key: nvrtc.compile_cubin(*key), keys), strict=True))


def test_every_kernel_compiles_for_every_architecture(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    import nvrtc

    for key, (cubin, log) in compiled.items():
        assert set(nvrtc.resources(log)) == set(NAMES), key
        assert cubin.startswith(b"\x7fELF"), key


def test_no_spills_and_budgets(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    """No spills and no local memory; at least two blocks fit on a multiprocessor; shared memory needs no opting in."""
    import nvrtc

    for (dtype, arch), (_, log) in compiled.items():
        for name, used in nvrtc.resources(log).items():
            where = f"{name} {dtype} sm_{arch}: {used}"
            assert used.spills == used.stack == 0, where
            assert used.registers <= BUDGET["colsum" in name or name == "softmax_loss"], where
            assert used.shared <= (16384 if "colsum" in name else 0), where


def test_the_stored_table_is_what_the_compiler_says(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    """tools/gpu_check.py compares it with what the GPU's own compiler made; another NVRTC than the stored one may differ."""
    import nvrtc

    stored = json.loads(TABLE.read_text())
    assert stored["nvrtc"] == nvrtc.version(), "another NVRTC: run tests/cuda/make_resources.py"
    assert stored["kernels"] == nvrtc.table(compiled, SHOWN)


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_wide_kernels_move_16_bytes_at_a_time(compiled: dict[tuple[str, int], tuple[bytes, str]], dtype: str) -> None:
    """In the machine code: loads and stores of 128 bits and, beside mask bytes and partial sums, of nothing else."""
    import nvrtc

    code = nvrtc.disassemble(compiled[dtype, 90][0])
    for name in (name for name in NAMES if name.endswith("_wide")):
        assert "LDG.E.128" in code[name], name
        assert ("STG.E.128" in code[name]) == (name != "colsum_wide"), name
        narrow = [line for line in code[name].splitlines() if "LDG.E" in line and "LDG.E.128" not in line]
        allowed = "LDG.E.U8" if "mask_" in name else None
        if "relu" in name and "mask" not in name:  # one scalar path for the tail
            continue
        assert all(allowed is not None and allowed in line for line in narrow), (name, narrow)
    for name in (name for name in NAMES if not name.endswith("_wide")):
        assert ".128" not in code[name], name


def test_no_atomics_and_a_barrier_where_sums_meet(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    import nvrtc

    code = nvrtc.disassemble(compiled["float32", 90][0])
    for name, text in code.items():
        assert "ATOM" not in text, name
        assert "RED." not in text, name
        assert ("BAR.SYNC" in text) == ("colsum" in name), name


def test_a_spill_would_be_seen() -> None:
    """The reader of the log, on a kernel that must spill."""
    import nvrtc

    body = "".join(f"float a{i} = p[{i}];" for i in range(200)) + "__syncthreads();" + "".join(f"p[{i}] = a{199 - i};" for i in range(200))
    source = f'extern "C" __global__ void __launch_bounds__(1024) crowded(volatile float* p) {{ {body} }}'
    _, log = nvrtc.compile_cubin("float32", 80, source)
    assert nvrtc.resources(log)["crowded"].spills > 0


def test_a_warning_is_an_error() -> None:
    import nvrtc
    from cupy.cuda.compiler import CompileException

    with pytest.raises(CompileException, match=r"never referenced|never used"):
        nvrtc.compile_cubin("float32", 80, 'extern "C" __global__ void f(float* p) { int unused; p[0] = 1; }')
