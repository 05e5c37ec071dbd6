"""Compiled kernels: machine code cached on disk, compiled by Numba when there is none, called by address.

The cache holds object files of one function each. Their names are a digest of everything that decides their content:
the kernels' sources, the versions of Numba and llvmlite, the processor and its features. Loading one needs
llvmlite alone, so that a process that finds its kernels compiled never imports Numba.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STEP, TRAINING, PLAN, MARKS = ("condense", "project"), ("training",), ("plan",), ("marks",)
KERNELS = STEP + TRAINING + PLAN + MARKS
"""Modules of ``kernels`` with a function ``entry`` each."""
_SYMBOL = "kvcondense_{kernel}"
_ENTRY = """
define void @{name}(i64 %block) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %error, i64 %block)
  ret void
}}
"""
_DIGEST = 32
_lock = threading.RLock()
_engines: list[object] = []  # machine code lives as long as its engine


@dataclass(frozen=True)
class Kernel:
    """Where a kernel stands: its file in the cache, and whether it is there."""

    name: str
    path: Path
    cached: bool


def cache_directory() -> Path:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / "kvcondense"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvcondense"


def status() -> list[Kernel]:
    """Every kernel, and whether it is compiled for this machine and these sources."""
    return [Kernel(name, _path(name), _path(name).is_file()) for name in KERNELS]


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
    if all(_path(kernel).is_file() for kernel in kernels):
        return None
    try:
        import_module("numba")
    except Exception as error:
        return f"numba cannot be imported ({error})"
    return None


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Name and features of this processor, as LLVM calls them."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def has_bf16_products() -> bool:
    """True if the processor multiplies pairs of bf16 and adds them in fp32."""
    return {"avx512bf16", "avx512f"} <= processor()[1]


@functools.cache
def address(kernel: str) -> int:
    """Address of a kernel's entry, void(int64). Compiles it if it is not cached, and says so on standard error."""
    with _lock:
        code = _read(_path(kernel))
        if code is None:
            code = _compile(kernel)
            _write(_path(kernel), code)
        return _link(code, _SYMBOL.format(kernel=kernel))


def compile_all(progress: Callable[[str], None]) -> None:
    """Compile what is not cached yet."""
    for kernel in status():
        progress(f"{kernel.name}: {'cached' if kernel.cached else 'compiling'} ({kernel.path})")
        address(kernel.name)


@functools.cache
def _stamp() -> str:
    name, features = processor()
    parts = [version("numba"), version("llvmlite"), platform.machine(), sys.platform, name, *sorted(features)]
    digest = hashlib.sha256("\n".join(parts).encode())
    here = Path(__file__).parent
    for source in (
        here.parent / "jobs.py",
        here / "blocks.py",
        *sorted(here.glob("*params.py")),
        *sorted((here / "kernels").glob("*.py")),
    ):
        digest.update(source.read_bytes())
    digest.update(_ENTRY.encode())
    return digest.hexdigest()[:24]


def _path(kernel: str) -> Path:
    return cache_directory() / f"{kernel}-{_stamp()}.o"


def _read(path: Path) -> bytes | None:
    """The object code in a cache file, or None if there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keep object code; a directory that cannot be written costs a compilation in the next process, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        sys.stderr.write(f"kvcondense: compiled kernels are not kept: {error}\n")


def _compile(kernel: str) -> bytes:
    """Object code of a kernel: Numba's LLVM module with a plain entry, everything else internal, optimised once more.

    What Numba wraps around a callback (the GIL, Python's errors) is cut off: kernels raise nothing, and the object
    needs no symbol of Numba's.
    """
    import llvmlite.binding as llvm

    sys.stderr.write(f"kvcondense: compiling the CPU kernel {kernel!r}, once for this machine ... ")
    sys.stderr.flush()
    began = time.perf_counter()
    entry = import_module(f"kvcondense.backends.cpu.kernels.{kernel}").entry
    wrapper = rf'^define [^\n]*@"?{re.escape(entry.native_name)}"?\(.*?^}}$'
    text, found = re.subn(wrapper, "", entry.inspect_llvm(), flags=re.MULTILINE | re.DOTALL)
    assert found == 1, "the callback that Numba made is in its module"
    name = _SYMBOL.format(kernel=kernel)
    text += _ENTRY.format(name=name, inner=entry.native_name.removeprefix("cfunc."))
    module, target = llvm.parse_assembly(text), _target(llvm)
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    code = target.emit_object(module)
    sys.stderr.write(f"{time.perf_counter() - began:.1f} s, kept in {cache_directory()}\n")
    return code


def _link(code: bytes, symbol: str) -> int:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly("")
    engine = llvm.create_mcjit_compiler(module, _target(llvm))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


def _target(llvm: Any) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=processor()[0], features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )
