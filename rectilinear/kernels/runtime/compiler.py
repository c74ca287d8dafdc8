"""How numba compiles what only jitted code calls: as far as callers need it, and once.

numba links every function with all that it calls, optimizes the whole and makes machine code of it, then does the same for each of its
callers. Of the hundred and thirty functions of the affine passes Python calls eight, so nearly all of that is done for nobody. Here it is
left to these eight: with an empty cache, a first step (Zen 3, float32) takes 14 s in place of 25, with the same code at the end.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "no_rewrites": True}
"""Options of ``numba.njit``. No rewrites: those are for arrays and for branches on None."""


class _InnerLibrary(JITCodeLibrary):  # type: ignore[misc]  # numba is untyped
    """Code for callers to take in."""

    def _optimize_final_module(self) -> None:
        """Callers do."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class InnerCompiler(Compiler):  # type: ignore[misc]
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any) -> None:
        flags.no_compile = True
        flags.enable_ssa = False  # LLVM does that
        super().__init__(typingctx, targetctx, _InnerLibrary(targetctx.codegen(), "inner"), args, return_type, flags, locals)

    def compile_extra(self, func: Any) -> Any:
        compiled = super().compile_extra(func)
        # What stands for the function as it is called: numba wants a builtin function, and each its own.
        compiled = compiled._replace(entry_point=[].append)
        self.state.targetctx.insert_user_function(compiled.entry_point, compiled.fndesc, [compiled.library])
        return compiled


def forget_literals(dispatcher: Any) -> None:
    """Compile a function for ints once, not again for each argument that is a constant somewhere."""
    template = dispatcher.get_call_template

    def get_call_template(args: Any, kws: Any) -> Any:
        return template([types.unliteral(kind) for kind in args], {name: types.unliteral(kind) for name, kind in kws.items()})

    dispatcher.get_call_template = get_call_template
