"""Functions that kernels are made of: Numba types and lowers them, and makes no machine code of any by itself.

It would optimise and compile each one as soon as it is seen, with all that it calls, for Python to call: most of a
minute for a kernel. Nobody calls them so. The object file is made of the entry's module, once (``native``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from numba import njit, types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering, NopythonTypeInference


class _Library(CPUCodeLibrary):
    """LLVM's module of one function, as it was lowered; what it calls is linked in the end."""

    def _optimize_functions(self, ll_module: Any) -> None:
        pass

    def finalize(self) -> None:
        self._raise_if_finalized()
        self._finalize_dynamic_globals()
        self._finalized = True

    def reached(self) -> list[Any]:
        """This library and all that it calls, callers first."""
        found: dict[Any, None] = {self: None}
        waiting = [self]
        while waiting:
            for library in waiting.pop(0)._linking_libraries:
                if library not in found:
                    found[library] = None
                    waiting.append(library)
        return list(found)


_signatures: dict[Any, Any] = {}


@contextlib.contextmanager
def _looked_up_once() -> Iterator[None]:
    """What an operator makes of its operands' types is found once within: kernels have thousands.

    Numba's lock keeps others out; a function that is compiled for another is inside already.
    """
    kind: Any = types.Function
    if "get_call_type" in vars(kind):
        yield
        return
    find = kind.get_call_type

    def found(self: Any, context: Any, args: Any, kws: Any) -> Any:
        if kws:
            return find(self, context, args, kws)
        key = self, args
        if key not in _signatures:
            _signatures[key] = find(self, context, args, kws)
        return _signatures[key]

    kind.get_call_type = found
    try:
        yield
    finally:
        del kind.get_call_type


@register_pass(mutates_CFG=True, analysis_only=False)
class _Typing(NopythonTypeInference):
    _name = "kvcondense_typing"

    def run_pass(self, state: Any) -> Any:
        with _looked_up_once():
            return super().run_pass(state)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "kvcondense_lowering"

    def run_pass(self, state: Any) -> Any:
        context = state.targetctx
        state.library = _Library(context.codegen(), state.func_id.func_qualname)
        context.get_executable = _no_executable  # of this instance; Numba's lock keeps others out
        try:
            with _looked_up_once():
                return super().run_pass(state)
        finally:
            del context.get_executable


def _no_executable(library: Any, fndesc: Any, env: Any) -> Any:  # noqa: ARG001 - as Numba calls it
    """What Numba knows a function by, which must be a builtin, and another one each time."""
    return [].append


_IDLE = {
    "WithLifting", "InlineClosureLikes", "GenericRewrites", "RewriteSemanticConstants", "MakeFunctionToJitFunction",
    "InlineInlinables", "FindLiterallyCalls", "LiteralUnroll", "LiteralPropagationSubPipelinePass", "AnnotateTypes",
    "InlineOverloads", "NopythonRewrites", "DumpParforDiagnostics",
}  # fmt: skip
"""Passes for closures, containers, arrays and reports. Kernels have none, and each pass goes over every function."""


_OURS = {NativeLowering: _Lowering, NopythonTypeInference: _Typing}


class _Pipeline(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [(_OURS.get(of, of), why) for of, why in manager.passes if of.__name__ not in _IDLE]
        manager.finalize()
        return [manager]


_OPTIONS: dict[str, Any] = {
    "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _Pipeline,
}  # fmt: skip


def _once(**options: Any) -> Any:
    """njit for functions that are typed once: Numba would do it anew for each constant that they are called with."""

    def wrap(function: Any) -> Any:
        made = njit(**_OPTIONS, **options)(function)
        typed = made.get_call_template

        def of_plain_types(args: Any, kws: Any) -> Any:
            found = typed(tuple(map(types.unliteral, args)), kws)
            assert len(made.overloads) == 1, f"{function.__name__} is called with arguments of several types"
            return found

        made.get_call_template = of_plain_types
        return made

    return wrap


kernel: Any = _once()
inlined: Any = _once(forceinline=True)
entry: Any = njit("void(int64)", **_OPTIONS)
"""Of a kernel: it is lowered when its module is imported."""


def module_of(kernel: Any) -> tuple[str, str]:
    """LLVM's module of an entry, as text, and the name of its function, int32(result*, error**, int64)."""
    (compiled,) = kernel.overloads.values()
    with global_compiler_lock:
        first, *others = compiled.library.reached()
        module = first._get_module_for_linking().clone()
        for library in others:
            module.link_in(library._get_module_for_linking(), preserve=True)
    return str(module), compiled.fndesc.llvm_func_name
