"""Functions that kernels are made of: Numba types and lowers them, and makes no machine code of any by itself.

It would optimise and compile each one as soon as it is seen, with all that it calls, for Python to call: most of a
minute for a kernel. Nobody calls them so. The object file is made of the entry's module, once (``native``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite.binding import parse_assembly
from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.typed_passes import NativeLowering


class _Library(CPUCodeLibrary):
    """LLVM's text of one function, as it was lowered; what it calls is linked in the end (``module_of``)."""

    text = ""

    def add_ir_module(self, ir_module: Any) -> None:
        self.text = str(ir_module)

    def add_linking_library(self, library: Any) -> None:
        if library is not rtsys.library:  # for counted objects, which kernels have none of
            self._linking_libraries.append(library)

    def finalize(self) -> None:
        self._raise_if_finalized()
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


class _Lower(Lower):
    """Without what it asks LLVM for each variable that a debugger might show: nobody debugs these."""

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:  # noqa: ARG002 - as Numba calls it
        return cgutils.alloca_once(self.builder, lltype, name=name)


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """What an operator makes of its operands' types is found once within, and Numba's own parts are looked for once.

    Kernels have thousands of operators, and every function and every operation of ours asks for the parts anew.
    """
    signatures: dict[Any, Any] = {}
    kind: Any = types.Function
    typing: Any = cpu_target.typing_context
    lowering: Any = cpu_target.target_context
    find = kind.get_call_type

    def found(self: Any, context: Any, args: Any, kws: Any) -> Any:
        if kws:
            return find(self, context, args, kws)
        key = self, args
        if key not in signatures:
            signatures[key] = find(self, context, args, kws)
        return signatures[key]

    def known() -> None:  # operations enter one of these when they are typed
        for registry in list(lowering._registries):
            lowering.install_registry(registry)

    with global_compiler_lock:
        typing.refresh()
        lowering.refresh()
        with (
            _instead(typing, "load_additional_registries", lambda: None),
            _instead(lowering, "load_additional_registries", known),
            _instead(kind, "get_call_type", found),
        ):
            yield


@contextlib.contextmanager
def _instead(of: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute that an object inherits, set within."""
    assert name not in vars(of), f"{of} has its own {name}"
    setattr(of, name, value)
    try:
        yield
    finally:
        delattr(of, name)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "kvcondense_lowering"
    lowering_class: Any = _Lower

    def run_pass(self, state: Any) -> Any:
        context = state.targetctx
        state.library = _Library(context.codegen(), state.func_id.func_qualname)
        with _instead(context, "get_executable", _no_executable):
            return super().run_pass(state)


def _no_executable(library: Any, fndesc: Any, env: Any) -> Any:  # noqa: ARG001 - as Numba calls it
    """What Numba knows a function by, which must be a builtin, and another one each time."""
    return [].append


_IDLE = {
    "WithLifting", "InlineClosureLikes", "GenericRewrites", "RewriteSemanticConstants", "MakeFunctionToJitFunction",
    "InlineInlinables", "FindLiterallyCalls", "LiteralUnroll", "LiteralPropagationSubPipelinePass", "AnnotateTypes",
    "InlineOverloads", "NopythonRewrites", "DumpParforDiagnostics",
}  # fmt: skip
"""Passes for closures, containers, arrays and reports. Kernels have none, and each pass goes over every function."""


class _Pipeline(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (_Lowering if of is NativeLowering else of, why) for of, why in manager.passes if of.__name__ not in _IDLE
        ]
        manager.finalize()
        return [manager]


_OPTIONS: dict[str, Any] = {
    "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False,
    "pipeline_class": _Pipeline,
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


def entry(function: Any) -> Any:
    """Of a kernel, which takes int64 and returns nothing: it is lowered when its module is imported."""
    with _lean():
        return njit(types.void(*[types.int64] * function.__code__.co_argcount), **_OPTIONS)(function)


_PLAIN = """
declare i32 @"{inner}"(ptr, ptr, {types})
define void @{name}({given}) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %error, {given})
  ret void
}}
"""
"""An entry as others call it, without the places for a result and an error that Numba's functions have."""


def module_of(kernel: Any, name: str) -> Any:
    """LLVM's module of an entry and all that it calls, with the entry as a plain function of that name."""
    (compiled,) = kernel.overloads.values()
    count, inner = len(compiled.signature.args), compiled.fndesc.llvm_func_name
    given = ", ".join(f"i64 %given{i}" for i in range(count))
    plain = _PLAIN.format(inner=inner, name=name, types=", ".join(["i64"] * count), given=given)
    texts = [cgutils.normalize_ir_text(library.text) for library in compiled.library.reached()]
    first, *others = map(parse_assembly, [*texts, plain])
    for module in others:
        first.link_in(module)
    return first
