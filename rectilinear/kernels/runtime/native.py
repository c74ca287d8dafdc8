"""What jitted code needs of the machine and numba does not offer: atomics, C function pointers, calls into libc.

Addresses are plain ``intp``; the memory behind them holds 64-bit words. `threads` builds its pool from these; kernels
use `c_address` to hand a jitted function to native code.

No address of this process ends up in compiled code: libc is reached by symbol name, and `c_address` is a relocation
inside the module that uses it. That keeps everything fit for the cache on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from rectilinear.kernels.runtime.cache import jit_inner

intrinsic: Callable[[Callable[..., Any]], Callable[..., int]] = extending.intrinsic
"""numba's decorator, with the type that callers in jitted code see."""

_WORD = ir.IntType(64)
# Target intrinsics rather than inline assembly, which LLVM as numba sets it up cannot parse. 1 is AArch64's YIELD.
_PAUSE = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
    "arm64": ("llvm.aarch64.hint", (1,)),
}


def _word_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The word at `address`, read atomically. All atomics here are sequentially consistent."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word_at(builder, args[0]), "seq_cst", 8, typ=_WORD)

    return types.intp(types.intp), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write `value` to the word at `address`, atomically."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _word_at(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


def _read_modify_write(operation: str) -> Callable[..., int]:
    def typed(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _word_at(builder, args[0]), args[1], "seq_cst")

        return types.intp(types.intp, types.intp), codegen

    return intrinsic(typed)


fetch_add = _read_modify_write("add")
"""fetch_add(address, value): add to the word, and return what was there before."""

exchange = _read_modify_write("xchg")
"""exchange(address, value): write the word, and return what was there before."""


@intrinsic
def compare_exchange(typingctx: Any, address: Any, old: Any, new: Any) -> Any:
    """Write `new` to the word at `address` if it holds `old`; returns whether it did."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_word_at(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.intp), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a waiting loop, so that it gives way to its sibling."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, operands = _PAUSE.get(builder.module.triple.split("-")[0], (None, ()))
        if name is not None:
            ctype = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(operands))
            hint = cgutils.get_or_insert_function(builder.module, ctype, name)
            builder.call(hint, [ir.Constant(ir.IntType(32), operand) for operand in operands])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def monotonic_ns(typingctx: Any) -> Any:
    """Nanoseconds of the monotonic clock."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        timespec = cgutils.alloca_once(builder, ir.ArrayType(_WORD, 2))
        ctype = ir.FunctionType(ir.IntType(32), [ir.IntType(32), timespec.type])
        clock_gettime = cgutils.get_or_insert_function(builder.module, ctype, "clock_gettime")
        builder.call(clock_gettime, [ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC), timespec])
        seconds, rest = (builder.load(cgutils.gep_inbounds(builder, timespec, 0, i)) for i in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(_WORD, 1_000_000_000)), rest)

    return types.intp(), codegen


def _call_at_address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Call what lies at the first argument with the others."""
    ctype = ir.FunctionType(ir.VoidType(), [_WORD] * (len(args) - 1))
    builder.call(builder.inttoptr(args[0], ctype.as_pointer()), args[1:])
    return context.get_dummy_value()


@intrinsic
def call_number(typingctx: Any, function: Any) -> Any:
    """Call the C function ``int (void)`` that is at the address `function`, as ``omp_get_thread_num``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ctype = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], ctype.as_pointer()), []), _WORD)

    return types.intp(types.intp), codegen


@intrinsic
def call_task(typingctx: Any, function: Any, index: Any, arg: Any, slot: Any) -> Any:
    """Call the C function ``void (intp, intp, intp)`` that is at the address `function`."""
    return types.void(*(types.intp,) * 4), _call_at_address


@intrinsic
def call_team(typingctx: Any, start: Any, function: Any, arg: Any, nthreads: Any, flags: Any) -> Any:
    """Call the C function ``void (void (*)(void *), void *, unsigned, unsigned)`` that is at the address `start`, as ``GOMP_parallel``."""
    return types.void(*(types.intp,) * 5), _call_at_address


@intrinsic
def symbol_address(typingctx: Any, name: Any) -> Any:
    """The address of this process's symbol `name` (a literal string), looked up when the code is loaded."""
    if not isinstance(name, types.StringLiteral):
        return None
    text = name.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        symbol = builder.module.globals.get(text)
        if symbol is None:
            symbol = ir.GlobalVariable(builder.module, ir.IntType(8), name=text)
        return builder.ptrtoint(symbol, _WORD)

    return types.intp(name), codegen


@intrinsic
def c_address(typingctx: Any, function: Any) -> Any:
    """The address of jitted `function` as a C function that takes only ``intp`` and returns ``intp`` or nothing.

    An exception that `function` raises is dropped: native code has nobody to hand it to.
    """
    if not isinstance(function, types.Dispatcher):
        return None
    arguments = (types.intp,) * len(function.dispatcher._compiler.pysig.parameters)
    function.get_call_type(typingctx, arguments, {})  # compiles it
    compiled = function.dispatcher.overloads[arguments]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wrapper = _c_wrapper(context, builder.module, compiled)
        context.active_code_library.add_linking_library(compiled.library)
        return builder.ptrtoint(wrapper, _WORD)

    return types.intp(function), codegen


def _c_wrapper(context: Any, module: Any, compiled: Any) -> Any:
    """A function of C's calling convention around a compiled one, in `module`."""
    name = f"c.{compiled.fndesc.mangled_name}"
    if name in module.globals:
        return module.globals[name]
    result, arguments = compiled.signature.return_type, compiled.signature.args
    returns_nothing = result == types.none
    ctype = ir.FunctionType(ir.VoidType() if returns_nothing else _WORD, [_WORD] * len(arguments))
    wrapper = ir.Function(module, ctype, name)
    wrapper.linkage = "internal"
    builder = ir.IRBuilder(wrapper.append_basic_block())
    inner = context.declare_function(module, compiled.fndesc)
    _, value = context.call_conv.call_function(builder, inner, result, arguments, wrapper.args)
    builder.ret_void() if returns_nothing else builder.ret(value)
    return wrapper


def external(name: str, arguments: int, result: Any = types.int32) -> Callable[..., int]:
    """The C function `name` of this process, callable from jitted code with ``intp`` arguments; returns a C ``int``.

    Pointers, ``size_t`` and ``int`` all travel as ``intp``, which the calling conventions of x86-64 and aarch64 allow. Of what
    returns a pointer the `result` is ``intp``, of what returns nothing ``void``.
    """
    function: Callable[..., int] = types.ExternalFunction(name, result(*(types.intp,) * arguments))
    return function


_save_thread: Callable[[], int] = types.ExternalFunction("PyEval_SaveThread", types.intp())
_restore_thread: Callable[[int], None] = types.ExternalFunction("PyEval_RestoreThread", types.void(types.intp))


@jit_inner
def let_go_of_gil(really: bool) -> int:
    """Let other Python threads run from here on, if `really`; for `take_gil_back`. Jobs of a microsecond are done sooner without."""
    return _save_thread() if really else 0


@jit_inner
def take_gil_back(state: int) -> None:
    if state != 0:
        _restore_thread(state)
