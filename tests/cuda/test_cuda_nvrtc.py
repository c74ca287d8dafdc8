"""(a) Every kernel and dtype compiled for real by NVRTC, with CuPy's options; registers, spills, shared memory, wide loads.

To compile for seven architectures takes 80 seconds, and gives the same for the same source. So every change compiles for two, and has to
bring what make_resources.py wrote when it compiled that source for all (its digest is stored); all are compiled anew every night.
"""

from __future__ import annotations

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_cases
import host_build
import pytest

from rectilinear.backends.cupy_loader import SOURCE

EVERY_CHANGE = (75, 90)  # the oldest, and the one on which the backend last ran
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SHOWN = (75, 80, 90, 100, 120)  # columns of the table in docs/gpu.md
TABLE = Path(__file__).parent / "resources.json"

NAMES = {dtype: host_build.kernel_names(SOURCE.read_text(), dtype) for dtype in gpu_cases.DTYPES}

_REGISTERS = 65536  # of a multiprocessor
_BYTES_UNDER_WAY = 32 * 1024  # asked for by a multiprocessor full of blocks: twice what layers.cu calculates


def blocks_that_fit(name: str, dtype: str) -> int:
    """Blocks of 256 threads on a multiprocessor, by the registers a thread may take."""
    if name == "colsum":
        return 3
    return 2 if "colsum" in name or "small" in name or name == "softmax_loss" else 4


@pytest.fixture(
    scope="module", params=[pytest.param(EVERY_CHANGE, id="two"), pytest.param(ARCHITECTURES, id="all", marks=pytest.mark.nightly)]
)
def compiled(request: pytest.FixtureRequest, made_once: Any) -> dict[tuple[str, int], tuple[bytes, str]]:
    """(dtype, architecture) -> cubin and compiler log."""
    import nvrtc

    keys = [(dtype, arch) for dtype in gpu_cases.DTYPES for arch in request.param]

    def fill(place: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            made = dict(zip(keys, pool.map(lambda key: nvrtc.compile_cubin(*key), keys), strict=True))
        (place / "compiled").write_bytes(pickle.dumps(made))

    made: dict[tuple[str, int], tuple[bytes, str]] = pickle.loads((made_once(f"cubins{len(keys)}", fill) / "compiled").read_bytes())
    return made


def test_every_kernel_compiles(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    import nvrtc

    for key, (cubin, log) in compiled.items():
        assert set(nvrtc.resources(log)) == set(NAMES[key[0]]), key
        assert cubin.startswith(b"\x7fELF"), key


def test_no_spills_and_budgets(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    """No spills and no local memory; as many blocks fit on a multiprocessor as should; shared memory needs no opting in."""
    import nvrtc

    for (dtype, arch), (_, log) in compiled.items():
        for name, used in nvrtc.resources(log).items():
            where = f"{name} {dtype} sm_{arch}: {used}"
            assert used.spills == used.stack == 0, where
            assert used.registers * 256 * blocks_that_fit(name, dtype) <= _REGISTERS, where
            summed = "colsum" in name or name == "softmax_loss"
            assert used.shared <= (20480 if "small" in name else 9216 if summed else 0), where


def test_the_stored_table_is_what_the_compiler_says(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    """tools/gpu_check.py compares it with what the GPU's own compiler made; another NVRTC than the stored one may differ."""
    import nvrtc

    stored = json.loads(TABLE.read_text())
    assert stored["nvrtc"] == nvrtc.version(), "another NVRTC: run tests/cuda/make_resources.py"
    assert stored["source"] == nvrtc.digest(ARCHITECTURES), "other kernels: run tests/cuda/make_resources.py, which compiles for all"
    archs = {str(arch) for _, arch in compiled}
    shown = {name: {arch: used for arch, used in row.items() if arch in archs} for name, row in stored["kernels"].items()}
    assert shown == nvrtc.table(compiled, SHOWN)


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_wide_kernels_move_16_bytes_at_a_time(compiled: dict[tuple[str, int], tuple[bytes, str]], dtype: str) -> None:
    """In the machine code: loads and stores of 128 bits and, beside mask bytes and partial sums, of nothing else."""
    import nvrtc

    code = nvrtc.disassemble(compiled[dtype, 90][0])
    for name in (name for name in NAMES[dtype] if name.endswith("_wide")):
        assert "LDG.E.128" in code[name], name
        assert ("STG.E.128" in code[name]) == (name != "colsum_wide"), name
        narrow = [line for line in code[name].splitlines() if "LDG.E" in line and "LDG.E.128" not in line]
        allowed = "LDG.E.U8" if name.startswith("mask_") else None
        if name in ("relu_wide", "relu_backward_wide", "sgd_step_wide"):  # one scalar path for the tail
            continue
        assert all(allowed is not None and allowed in line for line in narrow), (name, narrow)
    for name in (name for name in NAMES[dtype] if not name.endswith("_wide")):
        assert "LDG.E.128" not in code[name], name
        assert "STG.E.128" not in code[name], name


@pytest.mark.parametrize("dtype", gpu_cases.DTYPES)
def test_loads_are_issued_together(compiled: dict[tuple[str, int], tuple[bytes, str]], dtype: str) -> None:
    """In the machine code: so many loads of 16 bytes before the first use of one that a full multiprocessor has enough bytes under way."""
    import nvrtc

    for arch in {arch for _, arch in compiled} & {80, 90, 100}:
        code = nvrtc.disassemble(compiled[dtype, arch][0])
        for name in (name for name in NAMES[dtype] if name.endswith("_wide")):
            together = loads_together(code[name])
            under_way = together * 16 * 256 * blocks_that_fit(name, dtype)
            assert under_way >= _BYTES_UNDER_WAY, f"{name} {dtype} sm_{arch}: {together} loads together, {under_way} bytes"


def loads_together(code: str) -> int:
    """The most loads of 128 bits, plain ones, that stand in SASS before an instruction that reads what one of them brings."""
    waiting: list[int] = []
    most = 0
    for line in code.splitlines():
        found = re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*?);", line)
        if found is None:
            continue
        name, operands = found.groups()
        registers = [int(register) for register in re.findall(r"\bR(\d+)\b", operands)]
        if name.startswith("LDG.E.128") and "STRONG" not in name:
            waiting.append(registers[0])
            most = max(most, len(waiting))
        elif any(first <= register < first + 4 for register in registers for first in waiting):
            waiting = []
    return most


def test_loads_that_are_used_one_by_one_are_told() -> None:
    """The reader of the machine code, on a kernel whose stores may change what the next load brings, and on one that loads first."""
    import nvrtc

    head = 'extern "C" __global__ void __launch_bounds__(256) f(const float4* p, float4* q) { const int i = threadIdx.x; '
    one_by_one = head + "".join(f"q[i + {256 * r}] = p[i + {256 * r}];" for r in range(4)) + "}"
    loads, stores = ("".join(line.format(r, 256 * r) for r in range(4)) for line in ("float4 a{0} = p[i + {1}];", "q[i + {1}] = a{0};"))
    together = head + loads + stores + "}"
    found = [loads_together(nvrtc.disassemble(nvrtc.compile_cubin("float32", 90, source)[0])["f"]) for source in (one_by_one, together)]
    assert found == [1, 4]


def test_atomics_count_blocks_and_add_no_numbers(compiled: dict[tuple[str, int], tuple[bytes, str]]) -> None:
    """An atomic of an integer, between two fences, in each sum that is left to the last block; barriers where threads share memory."""
    import nvrtc

    code = nvrtc.disassemble(compiled["float32", 90][0])
    for name, text in code.items():
        sums = 2 if "small_backward" in name else 1 if "colsum" in name or name in ("softmax_loss", "small_forward") else 0
        assert re.findall(r"(?:ATOM|RED)[A-Z]*\.\S*", text) == ["ATOMG.E.ADD.STRONG.GPU"] * sums, name
        assert ("BAR.SYNC" in text) == (sums > 0), name
        order = re.findall(r"MEMBAR|ATOMG|STG\.E\.STRONG\.GPU|LDG\.E\S*\.STRONG\.GPU", text)
        # What a block leaves, the count between its fences, and what the last block loads.
        told = "".join({"MEMBAR": "f", "ATOMG": "a", "STG.E.STRONG.GPU": "s"}.get(each, "l") for each in order)
        assert re.fullmatch("(s+fafl+)" + f"{{{sums}}}", told), (name, told)


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
