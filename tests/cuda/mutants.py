"""(e) Planted bugs: each is put into a copy of the package, and the tests on the CPU have to find it, by numbers and not by stored bits.

``python tests/cuda/mutants.py`` runs them all and prints a table; arguments select by name. Ends non-zero if one survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = "kernels/cuda/layers.cu"
BACKEND = "backends/cupy_backend.py"
GEMM = "backends/cupy_gemm.py"

TESTS = ("test_cuda_kernels.py", "test_cuda_backend.py")
SELECTED = "not float64 and not 12345 and not (numbers_and_bits and (-0] or -1]))"
SECONDS = 150  # a mutant that takes longer hangs


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant("missing barrier in the tree", KERNELS, "        __syncthreads();\n        if (threadIdx.y < half)", "        if (threadIdx.y < half)"),
    Mutant("barrier under a condition", KERNELS, "        __syncthreads();\n        if (threadIdx.y < half)", "        if (threadIdx.y < half) { __syncthreads(); }\n        if (threadIdx.y < half)"),
    Mutant("tree stops one level early", KERNELS, "half > 0; half /= 2", "half > 1; half /= 2"),
    Mutant("tree adds the wrong line", KERNELS, "mine[half * line + k * blockDim.x];", "mine[line + k * blockDim.x];"),
    Mutant("shared memory read before written", KERNELS, "    UNROLL for (int k = 0; k < V; ++k) mine[k * blockDim.x] = acc[k];\n    for", "    if (threadIdx.y) UNROLL for (int k = 0; k < V; ++k) mine[k * blockDim.x] = acc[k];\n    for"),
    Mutant("zero not kept", KERNELS, "u32 u = __float_as_uint(z); return u <= 0x80000000u", "u32 u = __float_as_uint(z); return (u > 0u && u < 0x80000000u)"),
    Mutant("-0.0 not kept", KERNELS, "return u <= 0x80000000u || u > 0xff800000u;", "return u < 0x80000000u || u > 0xff800000u;"),
    Mutant("negative NaN dropped", KERNELS, "return u <= 0x80000000u || u > 0xff800000u;", "return u <= 0x80000000u;"),
    Mutant("-inf kept", KERNELS, "return u <= 0x80000000u || u > 0xff800000u;", "return u <= 0x80000000u || u >= 0xff800000u;"),
    Mutant("predicate by comparison, under -ftz", KERNELS, "return u <= 0x80000000u || u > 0xff800000u;", "(void)u; return !(z < 0.0f);"),
    Mutant("ReLU by multiplication", KERNELS, "if (!keeps(q.v[k])) p.v[k] = T();", "if (!keeps(q.v[k])) p.v[k] = Round<T>::of(widen(p.v[k]) * 0);"),
    Mutant("keep taken before rounding", KERNELS, "keeps(t.v[k]);  // of", "keeps(v);  // of"),
    Mutant("wrong bit of the mask", KERNELS, "bits |= (u32)keep << k;\n", "bits |= (u32)keep << (V - 1 - k);\n"),
    Mutant("mask bits of another lane", KERNELS, "bits <<= V * (lane & (lanes - 1));", "bits <<= V * (lane & lanes);"),
    Mutant("ballot byte of another lane", KERNELS, ">> (lane & 24u) & 0xffu", ">> (lane & 16u) & 0xffu"),
    Mutant("mask padding with what was there", KERNELS, "mask[(group * rows + row) * mask_row + (col >> 3)] = (u8)byte;", "mask[(group * rows + row) * mask_row + (col >> 3)] = (u8)(byte | (col + 8 > cols ? 0xffu << (cols & 7) : 0u));"),
    Mutant("last byte of a mask row not written", KERNELS, "if (inside && (col & 7) == 0) mask", "if (inside && (col & 7) == 0 && col + 8 <= cols) mask"),
    Mutant("ballot inside of the column guard", KERNELS, "                const u32 byte = mask_byte<V>(bits, lane);\n                if (inside &&", "                if (!inside) continue;\n                const u32 byte = mask_byte<V>(bits, lane);\n                if (inside &&"),
    Mutant("missing column guard", KERNELS, "const bool inside = row < rows && col < cols;", "const bool inside = row < rows;"),
    Mutant("missing row guard", KERNELS, "const bool inside = row < rows && col < cols;", "const bool inside = col < cols;"),
    Mutant("bias forgotten", KERNELS, "b ? s.v[k] + bias[k] : s.v[k];", "b && bias[k] != bias[k] ? s.v[k] + bias[k] : s.v[k];"),
    Mutant("bias of the first group", KERNELS, "load<V>(b + group * cols + col)", "load<V>(b + col)"),
    Mutant("missing bias turns -0.0 to 0.0", KERNELS, "b ? s.v[k] + bias[k] : s.v[k];", "s.v[k] + bias[k];"),
    Mutant("wrong row stride of dout", KERNELS, "const i64 stride = blockDim.y * cols,", "const i64 stride = (blockDim.y - 1) * cols + cols - 1,"),
    Mutant("wrong row stride of the mask", KERNELS, "keep_stride = blockDim.y * keep_row;", "keep_stride = keep_row;"),
    Mutant("mask row of the first group", KERNELS, "(const u8*)keep + (group * rows + first) * keep_row;", "(const u8*)keep + first * keep_row;"),
    Mutant("block sums one row too many", KERNELS, "(block + 1) * span < rows ? (block + 1) * span : rows;", "(block + 1) * span < rows ? (block + 1) * span + 1 : rows;"),
    Mutant("rows lost between chunks", KERNELS, "left > 0; left -= CHUNK", "left > 0; left -= CHUNK + 1"),
    Mutant("one long running sum", KERNELS, "chunk[k] += widen(d.v[k]);", "total[k] += widen(d.v[k]);"),
    Mutant("final sum skips the tail", KERNELS, "for (i64 block = threadIdx.y; block < blocks; block += blockDim.y)", "for (i64 block = threadIdx.y; block + 8 < blocks + threadIdx.y; block += blockDim.y)"),
    Mutant("missing tail of a flat array", KERNELS, "    if (rest < size) y[rest] = keeps(z[rest]) ? x[rest] : T();\n", "    (void)rest;\n"),
    Mutant("32-bit offsets, flat", KERNELS, "load<V>(x + i * V);", "load<V>(x + (int)(i * V));"),
    Mutant("32-bit offsets, bias", KERNELS, "const i64 at = (group * rows + row) * cols + col;", "const u32 at = (u32)((group * rows + row) * cols + col);"),
    Mutant("32-bit offsets, mask select", KERNELS, "store<V>(dx + row * cols + col, d);", "store<V>(dx + (u32)(row * cols + col), d);"),
    Mutant("32-bit offsets, column sum", KERNELS, "i64 at = (group * rows + first) * cols + col;", "u32 at = (u32)((group * rows + first) * cols + col);"),
    Mutant("bfloat16 truncated", KERNELS, "(u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16)", "(u16)(u >> 16)"),
    Mutant("bfloat16 ties away from even", KERNELS, "(u16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16)", "(u16)((u + 0x8000u) >> 16)"),
    Mutant("softmax without the maximum", KERNELS, "        top = warp_max(top);\n", "        top = 0;\n"),
    Mutant("softmax of half a warp", KERNELS, "for (int o = WARP / 2; o > 0; o /= 2) v +=", "for (int o = WARP / 4; o > 0; o /= 2) v +="),
    Mutant("label out of range read", KERNELS, "const bool valid = label >= 0 && label < c;", "const bool valid = label >= 0 && label <= c;"),
    Mutant("swapped stages", BACKEND, "        self._launch(name, width, dout.dtype, _grid(col_tiles * blocks, groups), block, pointers, (groups, rows, cols, row_bytes, span))\n        if not direct:\n            self._final_sum(parts, db, groups, blocks, cols)\n", "        if not direct:\n            self._final_sum(parts, db, groups, blocks, cols)\n        self._launch(name, width, dout.dtype, _grid(col_tiles * blocks, groups), block, pointers, (groups, rows, cols, row_bytes, span))\n"),
    Mutant("swapped arguments", BACKEND, "(rows, cols, bits.shape[-1]))", "(cols, rows, bits.shape[-1]))"),
    Mutant("too few blocks", BACKEND, "_grid(col_tiles * blocks, groups)", "_grid(max(1, col_tiles * blocks - 1), groups)"),
    Mutant("wide without looking at pointers", BACKEND, " and all(array.data.ptr % _WIDE_BYTES == 0 for array in arrays)", ""),
    Mutant("gradient of dz where dout was meant", BACKEND, "dz = dout if keep is None else self._relu_backward(dout, keep, None)", "dz = dout"),
    Mutant("cuBLAS operands not exchanged", GEMM, "*(op_b, op_a, m, n,", "*(op_a, op_b, m, n,"),
    Mutant("cuBLAS leading dimension of a copy", GEMM, "return x.copy(), cp.cuda.cublas.CUBLAS_OP_N, cols, rows * cols", "return x.copy(), cp.cuda.cublas.CUBLAS_OP_N, cols, group"),
)  # fmt: skip


def outcome(mutant: Mutant | None) -> str:
    """What the tests say of a mutant: the first that fails, or how the process ended; empty if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        # A whole checkout of its own, so that nothing can find the package that is right.
        for name in ("rectilinear", "tests", "tools"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            file = Path(folder) / "rectilinear" / mutant.file
            text = file.read_text(encoding="utf-8")
            if mutant.old not in text:
                raise SystemExit(f"{mutant.name}: what it replaces is no longer in {mutant.file}")
            file.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
        files = [f"tests/cuda/{name}" for name in TESTS]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", SELECTED]
        env = {**os.environ, "PYTHONPATH": "", "RECTILINEAR_CUDA_MUTANT": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "hangs"
    if "g++ refuses" in done.stdout:
        raise SystemExit(f"{mutant and mutant.name}: does not compile:\n{done.stdout[-2000:]}")
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    failed = re.search(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        crash = re.search(r'File "\S+", line \d+ in (test_\w+)', done.stderr)
        if crash is None:
            raise SystemExit(f"{mutant and mutant.name}: neither passed nor failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return f"crash in {crash[1]}"
    return failed[1] if failed else ""


def main(wanted: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not wanted or any(word in mutant.name for word in wanted)]
    if not wanted and outcome(None):
        print("the tests fail without a planted bug; nothing to learn from the others")
        return 1
    survivors = 0
    for mutant in chosen:
        found = outcome(mutant)
        survivors += not found
        print(f"{mutant.name:<40} {Path(mutant.file).name:<16} {found or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} planted bugs found")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
