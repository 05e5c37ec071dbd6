"""Compiled kernels: machine code cached on disk, compiled by Numba when there is none, called by address.

Object files (``kept``) hold one function each. Their names are a digest of everything that decides their content:
the kernels' sources, the versions of Numba and llvmlite, the processor and its features. Loading one needs
llvmlite alone, so that a process that finds its kernels compiled never imports Numba.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvcondense.backends import private
from kvcondense.backends.cpu import kept
from kvcondense.backends.cpu.target import target

STEP, TRAINING, PLAN, MARKS = ("condense", "encode", "online", "project"), ("training",), ("plan",), ("marks",)
KERNELS = STEP + TRAINING + PLAN + MARKS
"""Modules of ``kernels`` with a function ``entry`` each."""
_SYMBOL = "kvcondense_{kernel}"
_PATIENCE = 120.0
"""Seconds that a fork waits for a thread that compiles."""
_lock = threading.RLock()
_engines: list[object] = []  # machine code lives as long as its engine
_addresses: dict[str, int] = {}


@dataclass(frozen=True)
class Kernel:
    """Where a kernel stands: its file in the cache, and whether it is there."""

    name: str
    path: Path
    cached: bool


def status() -> list[Kernel]:
    """Every kernel, and whether it is compiled for this machine and these sources."""
    folder = private.place()
    paths = {name: (folder or Path("nowhere")) / _name(name) for name in KERNELS}
    return [Kernel(name, path, folder is not None and path.is_file()) for name, path in paths.items()]


@functools.cache
def problem(kernels: tuple[str, ...] = STEP) -> str | None:
    """Why these kernels cannot run here, or None. Numba is only looked for if one of them is not compiled."""
    try:
        version("numba")
        import llvmlite.binding  # noqa: F401
    except PackageNotFoundError:
        return "numba is not installed"
    except Exception as error:  # a broken installation fails in many ways
        return f"llvmlite cannot be imported ({error})"
    if all(k.cached for k in status() if k.name in kernels):
        return None
    try:
        with _uncollected():
            import_module("numba")
    except Exception as error:
        return f"numba cannot be imported ({error})"
    return None


def address(kernel: str) -> int:
    """Address of a kernel's entry. Compiles it if it is not cached, and says so on standard error.

    Of several threads that ask at once, one compiles; the others wait for it.
    """
    found = _addresses.get(kernel)
    if found is not None:
        return found
    with _lock:
        if kernel not in _addresses:
            code = kept.read(_name(kernel))
            if code is None:
                code = _compile(kernel)
            _addresses[kernel] = _link(code, _SYMBOL.format(kernel=kernel))
        return _addresses[kernel]


def compile_all(progress: Callable[[str], None]) -> None:
    """Compile what is not cached yet."""
    for kernel in status():
        progress(f"{kernel.name}: {'cached' if kernel.cached else 'compiling'} ({kernel.path})")
        address(kernel.name)


@functools.cache
def _stamp() -> str:
    of = target()
    parts = [version("numba"), version("llvmlite"), platform.machine(), sys.platform, of.cpu, of.flags, str(of.lanes)]
    digest = hashlib.sha256("\n".join(parts).encode())
    here = Path(__file__).parent
    for source in (
        here.parent / "jobs.py",
        here / "blocks.py",
        here / "kept.py",
        here / "native.py",
        here / "target.py",
        here.parent / "private.py",
        *sorted(here.glob("*params.py")),
        *sorted((here / "kernels").glob("*.py")),
    ):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _name(kernel: str) -> str:
    """Of its file: whoever has other sources, versions or another processor looks for another one."""
    return f"{kernel}-{_stamp()}.o"


def optimised(kernel: str, target_machine: Any, triple: str = "") -> Any:
    """LLVM's module of a kernel: what Numba lowered, with a plain entry, everything else internal, optimised once."""
    import llvmlite.binding as llvm

    functions = import_module("kvcondense.backends.cpu.kernels.functions")
    name = _SYMBOL.format(kernel=kernel)
    module = functions.module_of(import_module(f"kvcondense.backends.cpu.kernels.{kernel}").entry, name)
    if triple:
        module.triple, module.data_layout = triple, str(target_machine.target_data)
    for function in module.functions:
        if function.is_declaration:
            assert not function.name.startswith("_Z"), f"{function.name} is not in the module"
        elif function.name != name:
            function.linkage = "internal"
    passes = llvm.create_pass_builder(target_machine, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    return module


def _compile(kernel: str) -> bytes:
    """Object code of a kernel."""
    import llvmlite.binding as llvm

    sys.stderr.write(f"kvcondense: compiling the CPU kernel {kernel!r}, once for this machine ... ")
    sys.stderr.flush()
    began = time.perf_counter()
    target_machine = machine(llvm)
    with _uncollected():
        code = target_machine.emit_object(optimised(kernel, target_machine))
    seconds, folder = time.perf_counter() - began, kept.write(_name(kernel), code)
    sys.stderr.write(f"{seconds:.1f} s, {'for this process' if folder is None else f'kept in {folder}'}\n")
    return code


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage within: it would go over all that torch and Numba hold, time and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _link(code: bytes, symbol: str) -> int:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly("")
    engine = llvm.create_mcjit_compiler(module, machine(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


def machine(llvm: Any) -> Any:
    """LLVM's idea of the processor that kernels are compiled for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    of = target()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=of.cpu, features=of.flags, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


class _Forks:
    """A fork waits until no thread of the library's is inside the compiler, whose own locks a child would inherit."""

    def __init__(self) -> None:
        self.held = threading.local()  # by the thread that forks: another may fork meanwhile
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.before, after_in_parent=self.in_parent, after_in_child=self.in_child)

    def before(self) -> None:
        self.held.yes = _lock.acquire(timeout=_PATIENCE)

    def in_parent(self) -> None:
        if self.held.yes:
            _lock.release()

    def in_child(self) -> None:
        global _lock
        _lock = threading.RLock()


_Forks()
