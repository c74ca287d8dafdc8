"""What numba and llvmlite promise to nobody and these kernels use all the same, in one list that the backend's probe goes through.

A release may rename or drop any of it. Without the look that would show as an error somewhere in a call, or as a wrong result: were
functions not numbered apart (`number_functions_apart`), cached kernels would call one another's symbols. Importing this file imports
neither library.
"""

from __future__ import annotations

import importlib
import itertools
import os
from types import ModuleType
from typing import Any

FLOOR = (0, 62)
"""The oldest numba whose LLVM reads the kernels that are emitted here; the extra ``numba`` in pyproject.toml says so too."""

NEEDED = {
    "numba": "config extending njit",
    "numba.core.bytecode.FunctionIdentity": "_unique_ids from_function",
    "numba.core.caching": "NullCache",
    "numba.core.cgutils": "alloca_once gep_inbounds get_or_insert_function pack_array",
    "numba.core.codegen.CPUCodeLibrary": "add_linking_library has_dynamic_globals",
    "numba.core.codegen.JITCodeLibrary": "_finalize_final_module _finalized _optimize_final_module "
    "_optimize_functions enable_object_caching",
    "numba.core.compiler.Compiler": "compile_extra",
    "numba.core.compiler.CompileResult": "_rebuild _reduce _replace codegen entry_point fndesc library lifted signature",
    "numba.core.compiler.Flags": "enable_ssa no_compile",
    "numba.core.compiler_lock.global_compiler_lock": "_lock",
    "numba.core.descriptors": "TargetDescriptor",
    "numba.core.funcdesc.FunctionDescriptor": "mangled_name",
    "numba.core.serialize": "dumps",
    "numba.core.registry.cpu_target": "target_context",
    "numba.core.cpu.CPUContext": "active_code_library call_conv cast codegen declare_function get_dummy_value insert_user_function refresh",
    "numba.core.typing.templates": "AbstractTemplate AttributeTemplate infer_getattr infer_global signature",
    "numba.extending": "intrinsic lower_builtin lower_getattr_generic lower_setattr_generic register_jitable register_model",
    "numba.extending.models": "PrimitiveModel",
    "numba.types": "Any Dispatcher ExternalFunction Function IntegerLiteral Omitted StringLiteral Type UniTuple VarArg unliteral",
    "numba.types.Dispatcher": "dispatcher get_call_type",
    "llvmlite.binding": "add_symbol address_of_symbol get_process_triple",
    "llvmlite.binding.ffi": "ObjectRef",
    "llvmlite.binding.ffi.lib": "_lock",
    "llvmlite.binding.ffi.lib._lock": "_lock",
}
"""Where it is, and its names there."""

NEEDED_OF_INSTANCES = {
    "codegen": "_data_layout _get_host_cpu_name _module_pass_manager _tm_features magic_tuple",
    "dispatcher": "_cache _compiler get_call_template overloads py_func stats targetoptions",
    "function": "typing_key",
    "library": "_codegen _final_module",
    "literal": "literal_value",
    "signature": "args replace return_type",
}
"""The same for what only an instance has."""


def unfit() -> str | None:
    """What is wrong with the numba that is installed, and what to do about it; None if nothing is known to be."""
    import numba

    version = tuple(int(part) for part in numba.__version__.split(".")[:2] if part.isdecimal())
    floor = ".".join(map(str, FLOOR))
    if version < FLOOR:
        return f"numba {numba.__version__} is too old for these kernels, whose code its LLVM cannot read; install numba>={floor}"
    lacking = missing()
    if not lacking:
        return None
    below = ".".join(map(str, version))
    remedy = f"install numba>={floor}" + (f",<{below}" if version > FLOOR else "")
    return f"numba {numba.__version__} lacks {', '.join(lacking)}, which these kernels need; {remedy}"


def missing() -> list[str]:
    """Full names of what is not there."""
    looked_for = [_first_missing(f"{place}.{name}") for place, names in NEEDED.items() for name in names.split()]
    lacking = list(dict.fromkeys(filter(None, looked_for)))
    if lacking:  # what makes the instances may be among it
        return lacking
    for kind, names in NEEDED_OF_INSTANCES.items():
        instance = _instance(kind)
        where = f"{type(instance).__module__}.{type(instance).__qualname__}"
        lacking += [f"{where}.{name}" for name in names.split() if not hasattr(instance, name)]
    if not number_functions_apart():
        lacking.append("numba.core.bytecode.FunctionIdentity._unique_ids that counts")
    return lacking


def _first_missing(path: str) -> str | None:
    """The shortest beginning of a dotted path through packages, modules and what they hold that is not there; None if all of it is."""
    found: Any = None
    names = path.split(".")
    for i, name in enumerate(names, 1):
        so_far = ".".join(names[:i])
        if hasattr(found, name):
            found = getattr(found, name)
        elif found is None or isinstance(found, ModuleType):
            try:
                found = importlib.import_module(so_far)
            except ImportError:
                return so_far
        else:
            return so_far
    return None


def _instance(kind: str) -> Any:
    if kind in ("codegen", "library"):
        from numba.core.registry import cpu_target

        codegen = cpu_target.target_context.codegen()
        return codegen if kind == "codegen" else codegen.create_library("probe")
    import numba
    from numba.core.typing import templates

    if kind == "function":
        return numba.types.Function(type("Nothing", (templates.AbstractTemplate,), {"key": _nothing}))
    if kind == "literal":
        return numba.types.literal(0)
    if kind == "signature":
        return numba.types.void(numba.types.intp)
    return numba.njit(_nothing)


def _nothing() -> None:
    """A function to number and to make a dispatcher of."""


def number_functions_apart() -> bool:
    """Make numba number the functions it compiles from a random number on, not from 1 in every process; returns whether it does.

    The number is what tells symbols of equal name apart. Cached code keeps the symbols of the process that compiled it;
    two products of one factory, each compiled as number 7 in its own process and loaded into a third, would be one symbol to
    LLVM, and calls of the one would run the other.
    """
    from numba.core.bytecode import FunctionIdentity

    first = 2**32 + int.from_bytes(os.urandom(6))  # beyond any number that a process has come to by counting from 1
    FunctionIdentity._unique_ids = itertools.count(first)
    return bool(FunctionIdentity.from_function(_nothing).unique_id >= first)
