"""Code that calls code by name: what is published once, and how jitted functions reach it.

A jitted function that calls another takes it in, and compiles it anew; what is large and called from several passes is compiled once
instead, and called under a name. Names end with the bits of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from rectilinear.kernels.runtime import forks
from rectilinear.kernels.runtime.cache import jit_inner
from rectilinear.kernels.runtime.native import intrinsic
from rectilinear.kernels.runtime.records import WORD

_KERNEL = ir.FunctionType(ir.VoidType(), [WORD])

_published: dict[str, Any] = {}
"""Keeps alive what published names point to, for as long as the process: linked code holds the addresses."""


class Once(dict[int, Any]):
    """What `make` makes for each key, made when first asked for and then kept: ``Once(make)[key]``.

    Unlike `functools.cache`, which lets every thread that asks meanwhile make its own: then two would publish one name, and code linked
    against the first would be left with an address that is freed when the second replaces it.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: int) -> Any:
        with forks.loading():
            if key not in self:
                self[key] = self._make(key)
        return self[key]


def publish(name: str, address: int, owner: Any) -> Any:
    """Let jitted code find `address` by `name`; `owner` is what must stay alive for it. A name is published once and stays as it is.

    Returns the owner of what is published.
    """
    if name not in _published:
        _published[name] = owner
        llvm.add_symbol(name, address)
    return _published[name]


def by_name(symbol: str) -> Any:
    """A kernel as a jittable function ``(zero, operands)`` of the dtype and a record; published as `symbol` with the bits of T appended."""

    def typed(typingctx, zero, operands):  # type: ignore[no-untyped-def]
        name = f"{symbol}_f{zero.bitwidth}"

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.call(cgutils.get_or_insert_function(builder.module, _KERNEL, name), [args[1]])
            return context.get_dummy_value()

        return types.void(zero, operands), codegen

    return intrinsic(typed)


called: list[tuple[str, Any, type]] = []
"""What `called_by_name` made: name, body and operands, in the order of definition: those called before those that call."""


def called_by_name(operands: type) -> Callable[[Callable[[Any, Any], None]], Any]:
    """Have a kernel ``(zero, operands)`` compiled once for a dtype and called by its name, where else each caller would compile its own."""

    def decorate(function: Callable[[Any, Any], None]) -> Any:
        called.append((f"rectilinear_{function.__name__}", jit_inner(function), operands))
        return by_name(f"rectilinear_{function.__name__}")

    return decorate


def from_table(symbol: str) -> Any:
    """As `by_name`, for a table of kernels: ``(zero, index, operands)``."""

    def typed(typingctx, zero, index, operands):  # type: ignore[no-untyped-def]
        name = f"{symbol}_f{zero.bitwidth}"

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            entry = builder.load(builder.gep(_global(builder, name), [args[1]], source_etype=WORD), typ=WORD)
            builder.call(builder.inttoptr(entry, _KERNEL.as_pointer()), [args[2]])
            return context.get_dummy_value()

        return types.void(zero, types.intp, operands), codegen

    return intrinsic(typed)


def record_of(symbol: str, cls: Any) -> Any:
    """A published record as a jittable function of zero."""

    def typed(typingctx, zero):  # type: ignore[no-untyped-def]
        name = f"{symbol}_f{zero.bitwidth}"
        return cls.layout(zero), lambda context, builder, signature, args: builder.ptrtoint(_global(builder, name), WORD)

    return intrinsic(typed)


def constant_of(value_for_itemsize: Callable[[int], int]) -> Callable[..., int]:
    """A jittable function of zero whose value is known when the kernel is compiled."""

    def typed(typingctx, zero):  # type: ignore[no-untyped-def]
        value = value_for_itemsize(zero.bitwidth // 8)
        return types.intp(zero), lambda context, builder, signature, args: WORD(value)

    return intrinsic(typed)


def _global(builder: Any, name: str) -> Any:
    found = builder.module.globals.get(name)
    return ir.GlobalVariable(builder.module, WORD, name=name) if found is None else found
