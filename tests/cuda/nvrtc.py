"""Compiles the kernels for real, without a GPU: NVRTC with the options that `cupy.RawModule` gives it.

CuPy asks the current device for its architecture on the public path, so its private `_NVRTCProgram` is used here, and
nowhere else. The option list is the one of CuPy 14.2 (`core.compile_with_cache` and `compiler._compile_with_cache_cuda`).
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gpu_cases
from cupy._core import core
from cupy.cuda import compiler

from rectilinear.backends.cupy_loader import SOURCE, compile_options


@dataclass(frozen=True)
class Resources:
    """What one thread or block of a kernel takes, as ptxas reports it."""

    registers: int
    shared: int
    stack: int
    spills: int


def options(dtype: str, arch: int) -> tuple[str, ...]:
    """What NVRTC is given for one dtype and architecture."""
    return (
        *core.assemble_cupy_compiler_options(compile_options(dtype)),
        *("-ftz=true", f"-arch=sm_{arch}", "--device-as-default-execution-space"),
        *("--ptxas-options=-v", "-Werror", "all-warnings"),
    )


def compile_cubin(dtype: str, arch: int, source: str | None = None, extra: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """(cubin, compiler log) of the kernel file for one dtype and architecture; raises CuPy's CompileException."""
    log = io.StringIO()
    program = compiler._NVRTCProgram(source or SOURCE.read_text(), SOURCE.name, name_expressions=None, method="cubin")
    cubin, _ = program.compile((*options(dtype, arch), *extra), log)
    # nvrtc.getCUBIN of CuPy drops the last byte, taking it for a string's terminator; the disassemblers want it.
    return cubin + b"\0", log.getvalue()


def resources(log: str) -> dict[str, Resources]:
    """Kernel name -> what it takes, from the log of `compile_cubin`."""
    found = {}
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        name = entry[: entry.index("'")]
        numbers = {key: int((re.search(pattern, entry) or [0, 0])[1]) for key, pattern in _PATTERNS.items()}
        found[name] = Resources(numbers["registers"], numbers["shared"], numbers["stack"], numbers["stores"] + numbers["loads"])
    return found


_PATTERNS = {
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
    "stack": r"(\d+) bytes stack frame",
    "stores": r"(\d+) bytes spill stores",
    "loads": r"(\d+) bytes spill loads",
}


def disassemble(cubin: bytes) -> dict[str, str]:
    """Kernel name -> SASS text, by the nvdisasm that pip installs."""
    import nvidia

    tool = next(Path(root) / "cu13" / "bin" / "nvdisasm" for root in nvidia.__path__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
    return {part[: part.index(",")]: part for part in text.split(".section\t.text.")[1:]}


def version() -> str:
    """Of the NVRTC in use."""
    from importlib.metadata import version

    return version("nvidia-cuda-nvrtc")


def digest(architectures: tuple[int, ...]) -> str:
    """Of what the compiler is given, less the folders in which this machine has its headers: equal digests, equal machine code."""
    given = [[option for option in options(dtype, 0) if not option.startswith("-I")] for dtype in gpu_cases.DTYPES]
    return hashlib.sha256(SOURCE.read_bytes() + repr((given, architectures)).encode()).hexdigest()


def table(compiled: dict[tuple[str, int], tuple[bytes, str]], architectures: tuple[int, ...]) -> dict[str, dict[str, list[int]]]:
    """ "dtype kernel" -> architecture -> [registers, bytes of shared memory]."""
    found: dict[str, dict[str, list[int]]] = {}
    for (dtype, arch), (_, log) in compiled.items():
        if arch in architectures:
            for name, used in resources(log).items():
                found.setdefault(f"{dtype} {name}", {})[str(arch)] = [used.registers, used.shared]
    return dict(sorted(found.items()))
