"""What a compiled kernel depends on, as digests: the machine and tools, the sources, and the values frozen into it.

numba takes the values of globals and closure variables into the code as constants: tile sizes, block lengths read from
the caches of the host, options of a factory. Numba's own cache keeps only the closure's and the function's own bytecode in its
key; `fingerprint` follows every function that is called, too.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.resources
import inspect
import platform
import sys
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba.core import config
from numba.core.descriptors import TargetDescriptor

import rectilinear

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_DESCRIBED_BY_TEXT = (numba.types.Type, ir.Type, np.dtype, np.generic, enum.Enum)
# The target's settings are part of `environment`.
_KNOWN_BY_NAME = (ModuleType, type, BuiltinFunctionType, np.ufunc, TargetDescriptor)

# Their versions are part of `environment`, so their functions need only their names.
_VERSIONED = {"builtins", "llvmlite", "numba", "numpy"} | sys.stdlib_module_names

# numba's switches that say where and how loudly to compile, and whether PyYAML is there to read them from a file: not what comes out.
_IMMATERIAL_SWITCHES = ("CACHE_", "COLOR_", "CUDA_", "DEBUG_CACHE", "FULL_TRACEBACKS", "NUMBA_", "PARALLEL_", "THREADING_", "_HAVE_YAML")


def environment(codegen: Any) -> str:
    """Digest of the processor compiled for, the tools and numba's switches."""
    switches = {name: repr(value) for name, value in vars(config).items() if name.isupper() and isinstance(value, (*_ATOMS, enum.Enum))}
    material = {name: value for name, value in switches.items() if not name.startswith(_IMMATERIAL_SWITCHES)}
    versions = (rectilinear.__version__, numba.__version__, llvmlite.__version__, np.__version__)
    python = (sys.implementation.cache_tag, platform.python_version(), getattr(sys, "abiflags", ""))
    return digest((codegen.magic_tuple(), material, versions, python))


def fingerprint(dispatcher: Any) -> str:
    """Digest of a jitted function: its options, sources, code, and the values it and all that it calls take as constants."""
    function = inspect.unwrap(dispatcher)
    return digest((function.__module__, function.__qualname__, dispatcher, _kernel_sources()))


def digest(value: Any) -> str:
    """Digest of a value: equal in every process for equal constants and equal code. TypeError for what it cannot describe."""
    sha = hashlib.sha256()
    for word in _words(value, set()):
        sha.update(word.encode(errors="surrogatepass") + b"\0")
    return sha.hexdigest()


def _words(value: Any, seen: set[int]) -> Iterator[str]:
    """A description of `value` as text, word by word. Functions and what they refer to are described once each."""
    if isinstance(value, _ATOMS):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, (tuple, list)):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _words(item, seen)
    elif isinstance(value, (set, frozenset)):
        yield from _words(sorted(map(repr, value)), seen)
    elif isinstance(value, dict):
        yield from _words(sorted(value.items(), key=lambda item: str(item[0])), seen)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif isinstance(value, _DESCRIBED_BY_TEXT):
        yield f"{type(value).__qualname__} {value!r}"
    elif id(value) in seen:
        yield f"again {getattr(value, '__qualname__', type(value).__qualname__)}"
    else:
        seen.add(id(value))
        yield from _words_of_object(value, seen)


def _words_of_object(value: Any, seen: set[int]) -> Iterator[str]:
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    yield f"{type(value).__qualname__} {getattr(value, '__module__', '')} {name}"
    if isinstance(value, CodeType):
        yield value.co_code.hex()
        yield from _words([value.co_names, value.co_varnames, value.co_freevars, *value.co_consts], seen)
    elif isinstance(value, FunctionType):
        if _package(value.__module__) not in _VERSIONED:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield from _words([value.__code__, value.__defaults__, value.__kwdefaults__, cells, _globals_of(value)], seen)
    elif hasattr(value, "__wrapped__"):  # a jitted function, an intrinsic, a memoised function
        yield from _words([getattr(value, "targetoptions", None), value.__wrapped__], seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _words([getattr(value, field.name) for field in dataclasses.fields(value)], seen)
    elif not isinstance(value, _KNOWN_BY_NAME):
        raise TypeError(f"cannot tell {value!r} from others of its type, so code made from it cannot be cached")


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that `function` names, nested functions included, and what it may read from modules of its own package."""
    names = set(_names(function.__code__))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for module in [value for value in found.values() if isinstance(value, ModuleType)]:
        if _package(module.__name__) == _package(function.__module__):
            found |= {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _package(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def _kernel_sources() -> str:
    """Digest of all Python files of this package, wherever it was imported from."""
    return digest(sorted(_python_files(importlib.resources.files("rectilinear.kernels"))))


def _python_files(folder: Traversable) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _python_files(entry)
        elif entry.name.endswith(".py"):
            yield entry.name, entry.read_bytes()
