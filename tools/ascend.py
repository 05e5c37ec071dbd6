"""The Triton kernels on Ascend, without an NPU: lowered to linalg for Ascend910B, then to this CPU, then checked.

triton-ascend's own front end and adapter turn every kernel into linalg, as they do for an NPU; Debian's mlir-opt-19,
mlir-translate-19 and clang-19 make a shared object of that, and a loop over program numbers stands in for the chip.
Golden runs and the conformance kit then go through the library as on any device. ``make ascend`` prepares the
environment, since triton-ascend installs under the name triton.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime import JITFunction

from kvcondense.backends import triton as backend
from kvcondense.backends.triton import tuning
from kvcondense.conformance.invariants import INVARIANTS, check
from kvcondense.conformance.own import KINDS, load_factory
from kvcondense.formats import FORMATS
from kvcondense.golden import calibrated
from kvcondense.golden.inputs import GoldenCase, make_inputs
from kvcondense.golden.run import compare, run_backend, run_reference

ARCH = "Ascend910B3"
TRIES = 4
"""Of the adapter, which crashes now and then (double free or corruption) on what it takes the next time."""
TOOLS = ("mlir-opt-19", "mlir-translate-19", "clang-19")
_PASSES = (
    "--allow-unregistered-dialect",
    "--convert-linalg-to-affine-loops",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--lower-affine",
    "--convert-linalg-to-loops",
    "--convert-scf-to-cf",
    "--expand-strided-metadata",
    "--convert-cf-to-llvm",
    "--convert-arith-to-llvm",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-index-to-llvm",
    "--memref-expand",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass
class Device:
    """Kernels compiled so far, and how often each ran."""

    kernels: dict[str, Any] = field(default_factory=dict)
    lowered: list[str] = field(default_factory=list)
    programs: int = 0

    def run(self, kernel: JITFunction, *args: Any, grid: tuple[int, ...], c: Any, **options: Any) -> None:
        """What ``kernel[grid](*args, c=c, ...)`` does on a chip."""
        del options  # warps and fusion are a GPU's
        names = kernel.arg_names
        defaults = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
        signature, constants = {}, {**defaults, "c": c}
        for name, value in zip(names, args, strict=False):
            if value is None:
                constants[name] = None
            else:
                signature[name] = f"*{_TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        key = f"{kernel.__name__} {sorted(signature.items())} {c!r}"
        if key not in self.kernels:
            self.kernels[key] = build(kernel, signature, constants)
            self.lowered.append(kernel.__name__)
        function, hidden = self.kernels[key]
        operands = [0] * 5 * hidden
        for value in args:
            if isinstance(value, torch.Tensor):  # a memref: allocated, aligned, offset, size, stride
                operands += [value.data_ptr(), value.data_ptr(), 0, value.numel(), 1]
            elif value is not None:
                operands.append(value)
        for program in range(grid[0]):
            function(*(ctypes.c_int64(v) for v in (*operands, grid[0], 1, 1, program, 0, 0)))
        self.programs += grid[0]

    def run_as_method(self) -> Any:
        """``run`` in the place of ``JITFunction.run``."""

        def run(kernel: JITFunction, *args: Any, warmup: bool = False, **options: Any) -> None:
            assert not warmup
            self.run(kernel, *args, **options)

        return run


class LoweringError(Exception):
    """A kernel that this toolchain does not take."""


def build(kernel: JITFunction, signature: dict[str, str], constants: dict[str, Any]) -> tuple[Any, int]:
    """Lower one kernel; (callable, number of memrefs that the adapter puts before the arguments)."""
    chip = ascend.AscendBackend(GPUTarget("npu", ARCH, 0))
    options = chip.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    module = ASTSource(kernel, signature, constants).make_ir(options, chip.get_codegen_implementation(), {}, context)
    metadata = {**vars(options), "hash": "kvcondense"}
    module = ascend.make_ttir(module, metadata, options)
    for left in reversed(range(TRIES)):
        try:
            linalg = ascend.ttir_to_linalg(module, metadata, options, named_ops=False)
            break
        except subprocess.CalledProcessError as error:
            if left:
                continue
            raise LoweringError(
                f"{kernel.__name__}: triton-adapter-opt failed: {error.stderr.decode()[:90]}"
            ) from error
    folder = Path(tempfile.gettempdir()) / "kvcondense-ascend"
    folder.mkdir(exist_ok=True)
    stem = folder / f"{kernel.__name__}-{hashlib.sha256(linalg.encode()).hexdigest()[:16]}"
    library = stem.with_suffix(".so")
    if not library.is_file():
        source, lowered, llvm = (stem.with_suffix(s) for s in (".mlir", ".llvm.mlir", ".ll"))
        source.write_text(linalg)
        call(TOOLS[0], source, *_PASSES, "-o", lowered)
        call(TOOLS[1], lowered, "--mlir-to-llvmir", "-o", llvm)
        # No contraction: an fma where the source has none would change bits.
        call(TOOLS[2], "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-lm", llvm, "-o", library)
    function = getattr(ctypes.CDLL(str(library)), kernel.__name__)
    function.restype = None
    header = linalg.split(f"@{kernel.__name__}(", 1)[1].split(" attributes", 1)[0]
    return function, header.count("memref<") - sum(kind.startswith("*") for kind in signature.values())


def load_runtime() -> None:
    """The function that lowered copies of strided memory call."""
    found = sorted(Path("/usr/lib/llvm-19/lib").glob("libmlir_c_runner_utils.so*"))
    if not found:
        sys.exit("libmlir_c_runner_utils of MLIR 19 is missing: apt-get install mlir-19-tools libmlir-19 clang-19")
    ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


def call(tool: str, *words: object) -> None:
    """Run a tool; its own words if it fails."""
    done = subprocess.run([tool, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError(f"{tool} failed: {done.stderr[:300]}")


def golden() -> dict[str, bool]:
    """The golden run of every kind of compressor in every cache format."""
    results = {}
    for form in FORMATS.values():
        for kind in calibrated.kinds_of(form):
            name = f"golden {kind} {form.name}"
            inputs = make_inputs(GoldenCase(kind, batch=2, history=300, rotate=kind == "indexer", format=form.name))
            why = ""
            try:
                outcome = compare(inputs, run_backend(inputs, backend.BACKEND), run_reference(inputs))
                results[name] = all(r.passed for r in outcome.values())
            except (LoweringError, CompilationError) as error:
                results[name], why = False, f": {error!s:.200}"
            print(f"{'PASS' if results[name] else 'FAIL'}  {name}{why}", flush=True)
    return results


def conformance(kinds: list[str]) -> dict[str, bool]:
    """The conformance kit, for each kind of state."""
    results = {}
    for kind in kinds:
        for invariant in INVARIANTS:
            name = f"{kind} {invariant.name}"
            outcome = check(invariant, load_factory(f"triton:{kind}"))
            results[name] = outcome.passed
            print(f"{'PASS' if outcome.passed else 'FAIL'}  {name} {outcome.detail or ''}", flush=True)
    return results


def main() -> None:
    """Check everything; exit status 1 if something fails."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: make ascend")
    parser.add_argument("--json", type=Path, help="write the result there")
    parts = ("golden", *KINDS)
    parser.add_argument("--part", choices=parts, action="append", help="only this part; may be given again")
    arguments = parser.parse_args()
    chosen, wanted = arguments.part or parts, arguments.json
    torch.set_num_threads(1)
    load_runtime()
    device = Device()
    JITFunction.run = device.run_as_method()
    backend.why_no_device = lambda _: None
    tuning.architecture = lambda _: "Ascend"
    start = time.time()
    results = golden() if "golden" in chosen else {}
    results |= conformance([kind for kind in KINDS if kind in chosen])
    report = {
        "target": ARCH,
        "triton-ascend": version("triton-ascend"),
        "machine": platform.machine(),
        "kernels lowered": len(device.lowered),
        "programs run": device.programs,
        "seconds": round(time.time() - start),
        "passed": sum(results.values()),
        "failed": [name for name, passed in results.items() if not passed],
    }
    print(json.dumps(report, indent=2))
    if wanted is not None:
        wanted.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    assert triton.__version__  # the environment's triton is triton-ascend
    main()
