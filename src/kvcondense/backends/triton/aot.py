"""Compiling the kernels ahead of time, for any architecture and without a GPU: registers, spills and shared memory.

``VARIANTS`` is what the backend can launch for DeepSeek-V4's compressors: every entry of the tuning table, every state,
every cache format, every type of tokens. ``kvcondense aot`` prints it, a test fails when one stops compiling.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.constants import Constants, constants
from kvcondense.config import ModelConfig
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.spec import CompressorSpec, Rounding

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
_PAGE_ROWS = 64
_MAIN = {"csa": "fp8_model1", "hca": "fp8_model1", "indexer": "mxfp4_indexer", "r2": "fp4_v41", "r1": "fp4_v41"}
_RING = {"csa": 16, "indexer": 16, "hca": 136, "r2": 8, "r1": 8}


@dataclass(frozen=True)
class Variant:
    """One kernel: which compressor, kind of state, types of tokens and state ("" for none), format and rows."""

    kind: str
    state: str = "ring"
    tokens: str = "fp32"
    state_type: str = "fp32"
    format: str = ""
    rows: int = 16
    latent: bool = False
    rounding: Rounding = Rounding.REFERENCE

    @property
    def name(self) -> str:
        """Short and unique."""
        extra = ("latent",) * self.latent + (self.rounding.value,) * (self.rounding is Rounding.FUSED)
        return "-".join((self.kind, self.state or "stateless", self.tokens, self.state_type, f"{self.rows}rows",
                         self.format or "rows", *extra))  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What came of a variant. error: the compiler's, else None; spills in registers or bytes, as the tool counts."""

    variant: str
    arch: str
    kernel: str
    block: int
    num_warps: int
    seconds: float
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@functools.cache
def specs() -> dict[str, CompressorSpec]:
    """The compressors that are compiled."""
    flash, v41 = ModelConfig.FLASH, ModelConfig.V41_FLASH
    return {
        "hca": CompressorSpec.hca(flash),
        "csa": CompressorSpec.csa(flash),
        "indexer": CompressorSpec.indexer(flash),
        "r2": CompressorSpec.for_layer(v41, 2),
        "r1": CompressorSpec.for_layer(v41, 20),
    }


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every entry of the tuning table with each state, then every format, type and profile."""
    return tuple(dict.fromkeys(_variants()))


def _variants() -> Iterator[Variant]:
    kinds = specs()
    for kind, spec in kinds.items():
        for rows in _row_classes(spec):
            for state in ("ring", "paged", "") + (() if spec.overlap else ("online",)):
                yield Variant(kind, state, format=_MAIN[kind], rows=rows)
        for form in FORMATS.values():
            if _fits(form, spec):
                yield Variant(kind, format=form.name)
        yield Variant(kind, latent=True, format="bf16", rounding=Rounding.FUSED)
        for tokens in ("bf16", "fp16"):
            yield Variant(kind, tokens=tokens, state_type="bf16", format="bf16")
        yield Variant(kind)


def _fits(form: Any, spec: CompressorSpec) -> bool:
    try:
        form.check(spec.head_dim, spec.rope_dim)
    except UnsupportedError:
        return False
    return True


@functools.cache
def _row_classes(spec: CompressorSpec) -> tuple[int, ...]:
    """A number of rows for every entry that the tuning table has for this compressor, on any architecture."""
    found = {1 << 20}
    for part in tuning.table().values():
        found |= {e[2] for e in part["entries"] if (e[0], e[1]) == (spec.ratio, spec.head_dim) and e[2] is not None}
    return tuple(sorted(found))


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compile for ``arch`` (sm_NN or gfxNNN); a failure is reported, not raised."""
    import triton
    from triton.compiler import ASTSource

    spec = replace(specs()[variant.kind], rounding=variant.rounding)
    choice = tuning.choose_for(arch, spec.ratio, spec.window, spec.head_dim, variant.rows)
    c = constants(
        spec,
        (variant.state, _state_rows(variant), variant.state_type == "bf16" and variant.state != ""),
        FORMATS[variant.format] if variant.format else None,
        _PAGE_ROWS,
        variant.latent,
        choice,
    )
    kernel, signature, constexprs = _signature(variant, c)
    head = Compiled(variant.name, arch, kernel.__name__, choice.block, choice.num_warps, 0.0)
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("_stride")
    }
    start = time.perf_counter()
    try:
        source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        options = {"num_warps": choice.num_warps, "enable_fp_fusion": False}
        built = triton.compile(source, target=target(arch), options=options)
    except Exception as error:  # whatever a compiler raises is the finding
        return replace(head, seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}"[-2000:])
    seconds = time.perf_counter() - start
    registers, spills = _amd_usage(built) if arch.startswith("gfx") else _nvidia_usage(built)
    return replace(head, seconds=seconds, registers=registers, spills=spills, shared=built.metadata.shared)


def _state_rows(variant: Variant) -> int:
    return {"ring": _RING[variant.kind], "paged": 32, "online": 8, "": 0}[variant.state]


def target(arch: str) -> Any:
    """Triton's name for an architecture; raises UnsupportedError for one that it does not compile for."""
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise UnsupportedError("arch", f"{', '.join(ARCHITECTURES)}, or another sm_NN or gfx9NN", repr(arch))


def _signature(variant: Variant, c: Constants) -> tuple[Any, dict[str, str], dict[Any, Any]]:
    """(kernel, type of each argument, values of those that are compile-time)."""
    from kvcondense.backends.triton.kernels.condense import condense_kernel
    from kvcondense.backends.triton.kernels.online import online_kernel

    kernel = online_kernel if c.online else condense_kernel
    types = {"kv_score": f"*{variant.tokens}", "state": f"*{variant.state_type}", "cache": "*u8", "counters": "*i32"}
    types |= dict.fromkeys(("ape", "gamma", "cos", "sin", "rows", "latent", "acc", "log", "scales"), "*fp32")
    absent = {
        "ape": not c.has_ape,
        "latent": not c.latent,
        "state": not c.has_state,
        "state_table": not c.has_state,
        "cache": not c.has_cache,
        "scales": c.rows_map is None or not (c.rows_map.scales_outside or variant.format == "fp8_tensor"),
        "counters": c.blocks == 1 or not c.counters,
    }
    signature, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name == "c" or absent.get(name):
            signature[name] = "constexpr"
            constexprs[(index,)] = c if name == "c" else None
        elif name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = "i32" if name == "window_programs" else types.get(name, "*i64")
    return kernel, signature, constexprs


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
    """(vector registers of a lane, spilled registers) as the assembly's notes have them."""
    text = built.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
    return (int(registers[1]), sum(map(int, spilled))) if registers and spilled else (None, None)
