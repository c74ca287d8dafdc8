"""Builds the CUDA kernel file for the CPU with g++, and loads it in the shape of `cupy.RawModule`.

The loader checks what CuPy never does: number, dtype, contiguity, alignment and device of the arguments, against the kernel's
C++ signature.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from standin import device_work

HERE = Path(__file__).parent
DTYPES = ("float32", "float64", "float16", "bfloat16")

# No contraction to FMA and no strict aliasing: nvcc contracts, but here only softmax leaves it the choice.
_FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
# Shared variables of inline functions would else be one and the same in the libraries of all dtypes.
_FLAGS.append("-fno-gnu-unique")
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# What CUDA takes for granted: comparing blockIdx with what is signed, functions that a dtype does not use, constants as enums.
_QUIET = ["-Wno-sign-compare", "-Wno-unused-function", "-Wno-unknown-pragmas", "-Wno-deprecated-enum-enum-conversion"]


def kernel_names(source: str, dtype: str = "float32") -> list[str]:
    """Names of the kernels in a CUDA file, those made by macros included, and without those that a dtype has not."""
    if dtype == "float64":
        source = re.sub(r"^#ifndef DTYPE_float64$.*?^#endif  // DTYPE_float64$", "", source, flags=re.MULTILINE | re.DOTALL)
    plain = re.findall(r'^extern "C" __global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(', source, re.MULTILINE)
    return plain + re.findall(r"^(?:BIAS_ADD|BIAS_RELU_MASK|SELECT_COLSUM|SGD_STEP|SMALL_BACKWARD)\((\w+),", source, re.MULTILINE)


def library(folder: Path, dtype: str, sanitize: bool = False) -> Path:
    """Where `build` puts it."""
    return folder / f"{dtype}{'_sanitized' if sanitize else ''}.so"


def build(source: str, dtype: str, folder: Path, sanitize: bool = False) -> Path:
    """Compile kernel source for one dtype into a shared library in `folder`."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no g++ here; install one: these tests run the CUDA kernels on the CPU")
    exports = "".join(f"EXPORT({name})\n" for name in kernel_names(source, dtype))
    unit = folder / f"{dtype}.cc"
    unit.write_text(f'#include "cuda_host.h"\n#line 1 "layers.cu"\n{source}\n{exports}')
    built = library(folder, dtype, sanitize)
    flags = [*_FLAGS, *_QUIET, *(_SANITIZE if sanitize else []), f"-DDTYPE_{dtype}", "-I", str(HERE)]
    done = subprocess.run([compiler, *flags, str(unit), "-o", str(built)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernels for {dtype}:\n{done.stderr}")
    return built


def build_all(source: str, folder: Path, dtypes: Iterable[str] = DTYPES, sanitize: bool = False) -> dict[str, Path]:
    """The libraries of several dtypes, two compilers at a time."""
    from concurrent.futures import ThreadPoolExecutor

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(dtypes, pool.map(lambda dtype: build(source, dtype, folder, sanitize), dtypes), strict=True))


_one_at_a_time = threading.Lock()  # the header keeps the launch in globals, and ctypes lets go of the GIL


class _Launch(ctypes.Structure):
    """`host::Launch` of cuda_host.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("first", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("schedule", ctypes.c_uint),
        ("flush", ctypes.c_int),
    )


class HostModule:
    """Stands in for `cupy.RawModule`.

    `schedule` and `flush` set how the next launches run: the order of the threads, and whether subnormals are flushed.
    `window` (first, count) runs only these blocks, for grids that no CPU could run whole. `launched` gets each kernel's name.
    """

    def __init__(self, library: Path, dtype: str, cp: Any) -> None:
        self.library = ctypes.CDLL(str(library))
        self.dtype, self.cp = dtype, cp
        self.schedule, self.window = 0, (0, 2**63)
        self.flush = dtype != "float64"  # -ftz is about float32; the CPU's mode would flush float64 too
        self.launched: list[str] = []

    def get_function(self, name: str) -> HostKernel:
        return HostKernel(self, name)


class HostKernel:
    """Stands in for `cupy.RawKernel`."""

    def __init__(self, module: HostModule, name: str) -> None:
        self.module, self.name = module, name
        self._function = getattr(module.library, "host_" + name)
        self._function.restype = ctypes.c_char_p
        signature = getattr(module.library, "signature_" + name)
        signature.restype = ctypes.c_char_p
        self._signature = signature().decode().split(",")[:-1]

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...]) -> None:
        module = self.module
        if len(args) != len(self._signature):
            raise TypeError(f"{self.name}: {len(args)} arguments given, the kernel takes {len(self._signature)}")
        values = [self._value(i, arg, code) for i, (arg, code) in enumerate(zip(args, self._signature, strict=True))]
        module.launched.append(self.name)
        launch = _Launch(_three(grid), _three(block), *module.window, module.schedule, module.flush)
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        workspaces = [arg.data for arg, code in zip(args, self._signature, strict=True) if _is_workspace(arg, code)]
        sizes = [arg.nbytes for arg, code in zip(args, self._signature, strict=True) if _is_workspace(arg, code)]

        def run() -> None:
            with _one_at_a_time:
                for workspace, size in zip(workspaces, sizes, strict=True):  # nothing of an earlier launch, which might be right
                    ctypes.memset(workspace.ptr, 0xFF, size)
                failure = self._function(ctypes.byref(launch), pointers)
            if failure:
                raise RuntimeError(f"{self.name}: {failure.decode()}")

        pointers._values = values  # type: ignore[attr-defined]  # what they point at
        device_work(run)

    def _value(self, i: int, arg: Any, code: str) -> Any:
        """The argument as eight bytes in memory, after checking it against the parameter: *f4, i8, *V2, ..."""
        what = f"{self.name}: argument {i}"
        if not code.startswith("*"):
            if not isinstance(arg, np.generic) or arg.dtype.str[1:] != code:
                raise TypeError(f"{what} is {arg!r} ({type(arg).__name__}), the kernel takes {code}")
            return np.array([arg])
        if isinstance(arg, np.uintp) and arg == 0:
            return np.array([arg])
        wanted = self.module.dtype if code == "*V2" else np.dtype(code[1:]).name
        workspace = _is_workspace(arg, code)
        if not workspace and (not isinstance(arg, self.module.cp.ndarray) or arg.dtype.name != wanted):
            raise TypeError(f"{what} is {getattr(arg, 'dtype', type(arg))}, the kernel takes an array of {wanted}")
        if not arg.flags.c_contiguous:
            raise TypeError(f"{what} is not C-contiguous")
        if arg.size and arg.data.ptr % np.dtype(code[1:] if workspace else arg.dtype).itemsize:  # which stops a GPU, and no CPU
            raise TypeError(f"{what} does not lie on a multiple of its item size")
        if arg.device != self.module.cp.cuda.Device():
            raise RuntimeError(f"{what} is on {arg.device}, the launch goes to {self.module.cp.cuda.Device()}")
        return np.array([arg.data.ptr], np.uint64)


def _is_workspace(arg: Any, code: str) -> bool:
    """Bytes where the kernel takes sums: memory that holds anything."""
    return code in ("*f4", "*f8") and getattr(arg, "dtype", None) == np.uint8


def _three(extents: tuple[int, ...]) -> Any:
    return (ctypes.c_uint * 3)(*extents, *[1] * (3 - len(extents)))
