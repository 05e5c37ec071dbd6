"""Compiling the kernels ahead of time, for any architecture and without a GPU: registers, spills and shared memory.

What is compiled is in ``variants``. ``kvcondense aot`` prints it, a test fails when one stops compiling.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.tuning import Choice
from kvcondense.backends.triton.variants import STRIDE, Variant, arguments
from kvcondense.errors import UnsupportedError

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


@dataclass(frozen=True)
class Compiled:
    """What came of a variant. error: the compiler's, else None; spills in bytes of a thread's memory.

    matrix: instructions of the matrix units (of warp groups, on sm_90) in the assembly.
    """

    variant: str
    arch: str
    kernel: str
    block: int
    num_warps: int
    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    matrix: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compile for ``arch`` (sm_NN or gfxNNN); a failure is reported, not raised."""
    import triton
    from triton.compiler import ASTSource

    kernel, choice, signature, constexprs, attrs = _signature(variant, arch)
    head = Compiled(variant.name, arch, kernel.__name__, choice.block, choice.num_warps, 0.0)
    start = time.perf_counter()
    try:
        source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        options = {"num_warps": choice.num_warps, **tuning.product_options(arch if variant.multiplies else "")}
        built = triton.compile(source, target=target(arch), options=options)
    except Exception as error:  # whatever a compiler raises is the finding, and the first of its errors the reason
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        text = f"{type(error).__name__}: {reason}"[-2000:]
        return replace(head, seconds=time.perf_counter() - start, error=text)
    seconds = time.perf_counter() - start
    registers, spills = _amd_usage(built) if arch.startswith("gfx") else _nvidia_usage(built)
    return replace(
        head,
        seconds=seconds,
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        matrix=matrix_instructions(built, arch),
    )


def matrix_instructions(built: Any, arch: str) -> int:
    """Instructions of the matrix units in the assembly: wgmma on sm_90, tcgen05 or mma on other NVIDIA chips."""
    if arch.startswith("gfx"):
        return len(re.findall(r"\bv_mfma_", built.asm["amdgcn"]))
    words = r"wgmma\.mma_async" if arch == "sm_90" else r"tcgen05\.mma|mma\.sync"
    return len(re.findall(words, built.asm["ptx"]))


def target(arch: str) -> Any:
    """Triton's name for an architecture; raises UnsupportedError for one that it does not compile for."""
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise UnsupportedError("arch", f"{', '.join(ARCHITECTURES)}, or another sm_NN or gfx9NN", repr(arch))


def _signature(variant: Variant, arch: str) -> tuple[Any, Choice, dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """(kernel, tiling, type of each argument, values of those that are compile-time, alignment)."""
    kernel, choice, types, values = arguments(variant, arch)
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attrs: dict[Any, Any] = {}

    def one(path: tuple[int, ...], name: str, given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(one((*path, i), f"{name}_{i}", g) for i, g in enumerate(given))
        if given is None:
            constexprs[path] = None
            return "constexpr"
        if given.startswith("*") or given == STRIDE:
            attrs[path] = [["tt.divisibility", 16]]
        return "i32" if given == STRIDE else given

    for index, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name] = "constexpr"
            constexprs[(index,)] = values[name]
        else:
            signature[name] = one((index,), name, types[name])
    return kernel, choice, signature, constexprs, attrs


def _nvidia_usage(built: Any) -> tuple[int | None, int | None]:
    """(registers of a thread, bytes of stack: where a thread's spills go) as cuobjdump has them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (re.search(rf"{word}:(\d+)", done.stdout) for word in ("REG", "STACK"))
    return (int(registers[1]), int(stack[1])) if registers and stack else (None, None)


def _amd_usage(built: Any) -> tuple[int | None, int | None]:
    """(vector registers of a lane, bytes of scratch memory) as the assembly's notes have them.

    Scalar registers that lanes of vector registers take in do not reach memory, and are not counted.
    """
    text = built.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return (int(registers[1]), int(scratch[1])) if registers and scratch else (None, None)
