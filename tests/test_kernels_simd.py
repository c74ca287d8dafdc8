"""Every instruction set: those that the host has are executed, and of all the inner loop's assembly is checked for spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from rectilinear.kernels.micro import simd
from rectilinear.kernels.micro.dots import DOTS_TALL, dots_rows, emit_dots
from rectilinear.kernels.micro.library import host_simd
from rectilinear.kernels.micro.panels import emit_panels
from rectilinear.kernels.micro.relu import emit_relu
from rectilinear.kernels.micro.rows import emit_rows
from rectilinear.kernels.micro.sgd import emit_sgd
from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON, SSE2, Simd
from rectilinear.kernels.micro.softmax import emit_softmax
from rectilinear.kernels.micro.strip import STRIP_DEPTH, emit_strip, strip_tiles
from rectilinear.kernels.micro.tile import OWN_BASES, ROWS_PER_BASE, Tile, emit_tile
from rectilinear.kernels.micro.transpose import emit_transpose

from .widths import FEATURES

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
# Of some processors LLVM believes that loops have to be unrolled, of others not; numba compiles for the one that it runs on.
TARGETS = [
    (AVX512, X86, "znver4"),
    (AVX512, X86, "sapphirerapids"),
    (AVX2, X86, "haswell"),
    (SSE2, X86, "x86-64"),
    (NEON, ARM, "neoverse-n1"),
]
MORE_TARGETS = [
    (AVX512, X86, "x86-64-v4"),
    (AVX2, X86, "znver3"),
    (NEON, ARM, "generic"),
]
EVERY_TARGET = [
    *(pytest.param(target, id=f"{target[0].name}-{target[2]}") for target in TARGETS),
    *(pytest.param(target, id=f"{target[0].name}-{target[2]}", marks=pytest.mark.nightly) for target in MORE_TARGETS),
]

MULTIPLY = re.compile(r"\s(v?f[n]?madd\w*|v?mul[ps][sd]|fmla|fmul)\s")
STACK = re.compile(r"\(%rsp[,)]|\[sp[,\]]")  # these kernels keep no frame, so rbp is a register like others
VECTOR_ON_STACK = re.compile(r"%[xyz]mm\d.*\(%rsp\)|\(%rsp\).*%[xyz]mm\d|\bq\d+.*\[sp[,\]]")


Target = tuple[Simd, str, str]


def assembly(module: ir.Module, target: Target) -> str:
    """What LLVM makes of `module` for a target, optimised as numba does."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    _, module.triple, cpu = target
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_assembly(parsed)


def basic_blocks(text: str) -> dict[str, list[str]]:
    """The instructions after each label."""
    blocks: dict[str, list[str]] = {"": []}
    for line in text.splitlines():
        if label := re.match(r"([.\w]+):", line):
            blocks[label[1]] = []
        elif re.match(r"\s+[a-z]", line):
            blocks[list(blocks)[-1]].append(line)
    return blocks


def inner_loop(text: str) -> list[str]:
    """The instructions of the basic block that multiplies most; of several, the one that jumps to its own beginning."""
    blocks = basic_blocks(text)

    def rank(name: str) -> tuple[int, bool]:
        return multiplies(blocks[name]), any(re.search(rf"\s{re.escape(name)}$", line) for line in blocks[name])

    name = max(blocks, key=rank)
    loop = blocks[name]
    ends = [i for i, line in enumerate(loop) if re.search(rf"\s{re.escape(name)}$", line)]
    return loop[: ends[0] + 1] if ends else loop  # what follows the jump has no label where nothing else jumps there


def inner_loop_of(target: Target, emit: Callable[..., ir.Function], *what: Any) -> list[str]:
    module = ir.Module("kernel")
    emit(module, *what, "kernel")
    return inner_loop(assembly(module, target))


def multiplies(loop: list[str]) -> int:
    return sum(bool(MULTIPLY.search(line)) for line in loop)


def full_and_wide(unit: Simd, itemsize: int) -> list[Tile]:
    _, nv = unit.tile(itemsize)
    return [Tile(unit, itemsize, mr, width) for width in (nv, 2 * nv) for mr in {unit.rows(width), 1}]


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_the_inner_loop_lives_in_registers(target: Target, itemsize: int) -> None:
    unit = target[0]
    for tile in full_and_wide(unit, itemsize):
        loop = inner_loop_of(target, emit_tile, tile)
        assert multiplies(loop) > 0
        assert multiplies(loop) % (tile.mr * tile.nv) == 0, "\n".join(loop)  # small loops come unrolled
        assert not any(STACK.search(line) for line in loop), "\n".join(loop)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_addresses_of_a_step_do_not_wait_for_one_another(target: Target) -> None:
    """Else each row's address is the one before plus a stride, and a step takes as many cycles as there are rows."""
    unit, _, _ = target
    mr, nv = unit.tile(4)
    loop = inner_loop_of(target, emit_tile, Tile(unit, 4, mr, nv))
    assert multiplies(loop) == mr * nv, "\n".join(loop)
    additions = [line for line in loop if re.search(r"\s(lea|add)[ql]?\s", line)]
    bases = 1 if mr <= OWN_BASES else -(-mr // ROWS_PER_BASE)
    # Of A, B, the prefetch and the count of k; ARM has no address of three parts, so there one addition more for most rows.
    assert len(additions) <= bases + 3 + (mr if unit is NEON else 0), "\n".join(loop)


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_inner_products_live_in_registers(target: Target, itemsize: int) -> None:
    """Each tile's loop over k: of three columns, of two, of a single one."""
    unit = target[0]
    module = ir.Module("kernel")
    emit_dots(module, unit, itemsize, "kernel")
    blocks = basic_blocks(assembly(module, target))
    loops = [loop for name, loop in blocks.items() if any(re.search(rf"\s{re.escape(name)}$", line) for line in loop)]
    loops = [loop for loop in loops if multiplies(loop) > 1]
    assert sorted(map(multiplies, loops)) == sorted([3 * dots_rows(unit), 2 * dots_rows(unit), DOTS_TALL]), loops
    assert not any(VECTOR_ON_STACK.search(line) for loop in loops for line in loop), loops


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_strips_live_in_registers(target: Target, itemsize: int) -> None:
    """Elements of A are loaded where they are multiplied: hoisted out of the loop over columns they would lie on the stack as vectors."""
    unit = target[0]
    for tile in strip_tiles(unit, itemsize):
        loop = inner_loop_of(target, emit_strip, tile)
        assert multiplies(loop) == STRIP_DEPTH * tile.mr * tile.nv, "\n".join(loop)
        assert not any(VECTOR_ON_STACK.search(line) for line in loop), "\n".join(loop)


def tile_assembly(target: Target, mr: int, nv: int) -> str:
    module = ir.Module("tile")
    emit_tile(module, Tile(target[0], 4, mr, nv), "tile")
    return assembly(module, target)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_the_inner_loop_asks_for_one_line_with_every_k(target: Target) -> None:
    """Where multiply-adds outnumber loads. A tile that loads bound would have one load more."""
    unit = target[0]
    asks = re.compile(r"\s(prefetch\w*|prfm)\s")
    mr, nv = unit.tile(4)
    assert sum(bool(asks.search(line)) for line in inner_loop(tile_assembly(target, mr, nv))) == 1
    assert not asks.search(tile_assembly(target, 1, 2 * nv))


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_multiplies_are_fused_and_of_full_width(target: Target) -> None:
    unit = target[0]
    mr, nv = unit.tile(4)
    loop = "\n".join(inner_loop(tile_assembly(target, mr, nv)))
    wanted = {AVX512: r"vfmadd\w+\s.*%zmm", AVX2: r"vfmadd\w+\s.*%ymm", SSE2: r"mulps\s.*%xmm", NEON: r"fmla\s+v\d+\.4s"}
    assert len(re.findall(wanted[unit], loop)) == mr * nv, loop


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_every_kernel_compiles_for_every_target(target: Target, itemsize: int) -> None:
    unit = target[0]
    module = ir.Module("kernels")
    for emit in (emit_rows, emit_panels, emit_transpose, emit_dots, emit_relu, emit_softmax):
        emit(module, unit, itemsize, emit.__name__)
    for tile in strip_tiles(unit, itemsize):
        emit_strip(module, tile, f"strip_{tile.mr}")
    text = assembly(module, target)
    called = set(re.findall(r"^\s*(?:callq?|bl)\s+(\S+)", text, re.MULTILINE))
    assert not called, f"calls in the middle of a kernel: {called}"


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_a_store_of_some_lanes_is_no_masked_instruction_of_avx2(target: Target, itemsize: int) -> None:
    """AMD's processors take some 20 cycles for it, as long as four rows of a tile. A masked load is as fast as any."""
    unit = target[0]
    module = ir.Module("kernels")
    for emit in (emit_rows, emit_relu, emit_softmax, emit_sgd):
        emit(module, unit, itemsize, emit.__name__)
    for tile in (*full_and_wide(unit, itemsize), *strip_tiles(unit, itemsize)):
        emit_tile(module, tile, f"tile_{tile.mr}_{tile.nv}_{len(module.functions)}")
    for tile in strip_tiles(unit, itemsize):
        emit_strip(module, tile, f"strip_{tile.mr}")
    masked = re.findall(r"\svp?maskmov\w+\s.*", assembly(module, target))
    stores = [line for line in masked if re.search(r"%[xy]mm\d+, *%[xy]mm\d+, *\S*\(", line)]
    assert not stores, stores
    assert bool(masked) == (unit is AVX2)  # the loads, so that the pattern is that of this assembler


def test_tiles_own_whole_bytes_of_the_mask() -> None:
    for unit in {target[0] for target in (*TARGETS, *MORE_TARGETS)}:
        for itemsize in (4, 8):
            mr, nv = unit.tile(itemsize)
            assert nv * unit.lanes(itemsize) % 8 == 0
            assert mr >= 2
            assert mr * nv + nv < unit.registers


@pytest.mark.parametrize(
    ("triple", "features", "wanted"),
    [
        ("x86_64-pc-linux-gnu", FEATURES[AVX512], AVX512),
        ("x86_64-pc-linux-gnu", FEATURES[AVX512].replace("+avx512vl", "-avx512vl"), AVX2),
        ("x86_64-pc-linux-gnu", FEATURES[AVX2], AVX2),
        ("x86_64-pc-linux-gnu", FEATURES[AVX2].replace("+fma", "-fma"), SSE2),
        ("x86_64-pc-linux-gnu", "", SSE2),
        ("aarch64-unknown-linux-gnu", "+neon", NEON),
        ("arm64-apple-darwin", "", NEON),
    ],
)
def test_the_target_decides(triple: str, features: str, wanted: Simd) -> None:
    assert simd.of_target(triple, features) is wanted


def _marks(unit: Simd) -> list[pytest.MarkDecorator]:
    """Nightly, since all kernels compile once more for each. Every CI run fuzzes AVX2 beside the widest of the host."""
    return [pytest.mark.cpu(unit.name), pytest.mark.nightly]


@pytest.mark.parametrize("unit", [pytest.param(unit, id=unit.name, marks=_marks(unit)) for unit in FEATURES if unit is not host_simd()])
def test_each_width_computes_right(unit: Simd) -> None:
    """The tails, layouts and edges of test_kernels.py in a process where numba compiles for this instruction set alone.

    The width that numba takes by itself here is tested by test_kernels.py as it is.
    """
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": FEATURES[unit]}
    asked = [sys.executable, "-c", "from rectilinear.kernels.micro.library import describe_host; print(describe_host())"]
    assert subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=60).stdout.startswith(unit.name)
    tests = Path(__file__).with_name("test_kernels.py")
    chosen = "tail or few_rows or depth or edges or relu or (any_layout and 30) or stacked or every_way or (bits and 333)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests), "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.smoke
@pytest.mark.parametrize("itemsize", [4, 8])
def test_exponentials_are_accurate_to_an_ulp_or_two(itemsize: int) -> None:
    from rectilinear.backends.numba_backend import NumbaBackend

    dtype = np.dtype(f"f{itemsize}")
    lowest = -100.0 if itemsize == 4 else -740.0
    x = np.stack([np.zeros(20_000), np.linspace(lowest, 0, 20_000)], axis=1).astype(dtype)
    _, dx = NumbaBackend().softmax_loss(x, np.zeros(len(x), int), None)
    e = np.exp(x[:, 1].astype(np.longdouble))
    exact = e / (1 + e) / len(x)
    normal = exact > np.finfo(dtype).tiny
    assert (np.abs(dx[:, 1] / exact - 1)[normal] < 4 * np.finfo(dtype).eps).all()
    assert (dx[:, 1] >= 0).all()
