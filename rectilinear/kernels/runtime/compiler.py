"""How numba compiles these kernels: everything once.

numba optimizes a function, links it with all that it calls, optimizes the whole, twice, and makes machine code of it. Then it does the same
for each of the function's callers, with the function in it. Of some hundred and fifty functions of the passes Python calls eight, so
nearly all of that is done for nobody. Here code is optimized in these eight alone, and once: with an empty cache, a first step takes half
the time (docs/threads.md).
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

OPTIONS = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_rewrites": True}
"""Of ``numba.njit``, for all kernels: they divide as NumPy does. Rewrites are for arrays, and for branches on None."""


class _Library(JITCodeLibrary):  # type: ignore[misc]  # numba is untyped
    """The code of a function that Python calls."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class _InnerLibrary(_Library):
    """Code for callers to take in."""

    def _optimize_final_module(self) -> None:
        """Callers do."""

    def _finalize_final_module(self) -> None:
        self._finalized = True


class OuterCompiler(Compiler):  # type: ignore[misc]
    """Of functions that Python calls."""

    library = _Library

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, return_type: Any, flags: Any, locals: Any) -> None:
        flags.enable_ssa = False  # LLVM does that
        library = self.library(targetctx.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


class InnerCompiler(OuterCompiler):
    """Of functions that only jitted code calls."""

    library = _InnerLibrary

    def compile_extra(self, func: Any) -> Any:
        self.state.flags.no_compile = True
        compiled = super().compile_extra(func)
        # What stands for the function as it is called: numba wants a builtin function for each. These fail if Python calls them.
        compiled = compiled._replace(entry_point=[].pop)
        self.state.targetctx.insert_user_function(compiled.entry_point, compiled.fndesc, [compiled.library])
        return compiled


def forget_literals(dispatcher: Any) -> None:
    """Compile a function for ints once, not again for each argument that is a constant somewhere."""
    template = dispatcher.get_call_template

    def get_call_template(args: Any, kws: Any) -> Any:
        return template([types.unliteral(kind) for kind in args], {name: types.unliteral(kind) for name, kind in kws.items()})

    dispatcher.get_call_template = get_call_template
