"""Compiling the kernels ahead of time, for any architecture and without a GPU: registers, spills and shared memory.

What is compiled is in ``variants``. ``kvcondense aot`` prints it, a test fails when one stops compiling.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvcondense.backends.triton.launches import Launch
from kvcondense.backends.triton.variants import Variant, launches

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@dataclass(frozen=True)
class Compiled:
    """What came of a variant. error: the compiler's, else None; spills in bytes of a thread's memory.

    matrix: instructions of the matrix units (of warp groups, on sm_90) in the assembly; fences: those between copies
    and matrix units; loads: from global memory, by bits for a thread (both on NVIDIA). instructions: of the machine
    code, by name without what a dot follows (SASS; GCN by its whole name), whatever path they are on. listing: that
    code with the lines of source that it came from, where it is asked for.
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
    fences: int | None = None
    loads: dict[str, int] = field(default_factory=dict)
    instructions: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    listing: str = field(default="", repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the listing."""
        return {name: value for name, value in asdict(self).items() if name != "listing"}


def compile_variant(variant: Variant, arch: str) -> list[Compiled]:
    """Compile each kernel that the variant's step launches for ``arch`` (sm_NN or gfxNNN).

    A failure is reported, not raised.
    """
    start = time.perf_counter()
    try:
        asked = launches(variant, arch)
    except Exception as error:
        return [Compiled(variant.name, arch, "", 0, 0, time.perf_counter() - start, error=_reason(error))]
    return [compile_launch(variant, launch, arch) for launch in asked]


def compile_launch(variant: Variant, launch: Launch, arch: str, *, listing: bool = False) -> Compiled:
    """Compile one kernel, as the variant's step launches it; a failure is reported, too."""
    head = Compiled(variant.name, arch, launch.name, launch.block, launch.options["num_warps"], 0.0)
    start = time.perf_counter()
    try:
        built = launch.compile(arch)
    except Exception as error:  # whatever a compiler raises is the finding
        return replace(head, seconds=time.perf_counter() - start, error=_reason(error))
    seconds = time.perf_counter() - start
    amd = arch.startswith("gfx")
    registers, spills, instructions = _amd_usage(built) if amd else _nvidia_usage(built)
    return replace(
        head,
        seconds=seconds,
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        matrix=matrix_instructions(built, arch),
        fences=None if amd else len(re.findall(r"fence\.proxy\.async", built.asm["ptx"])),
        loads={} if amd else global_loads(built.asm["ptx"]),
        instructions=instructions,
        listing=listing_of(built, amd) if listing else "",
    )


def _reason(error: BaseException) -> str:
    """Its kind, and the first of its errors."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{type(error).__name__}: {first}"[-2000:]


def global_loads(ptx: str) -> dict[str, int]:
    """Instructions that load from global memory, by the bits that a thread gets from each."""
    found: Counter[str] = Counter()
    for vector, bits in re.findall(r"\bld\.(?:volatile\.)?global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx):
        found[str(int(vector or 1) * int(bits))] += 1
    return dict(found)


def matrix_instructions(built: Any, arch: str) -> int:
    """Instructions of the matrix units in the assembly: wgmma on sm_90, tcgen05 or mma on other NVIDIA chips."""
    if arch.startswith("gfx"):
        return len(re.findall(r"\bv_mfma_", built.asm["amdgcn"]))
    words = r"wgmma\.mma_async" if arch == "sm_90" else r"tcgen05\.mma|mma\.sync"
    return len(re.findall(words, built.asm["ptx"]))


def _nvidia_usage(built: Any) -> tuple[int | None, int | None, dict[str, int]]:
    """(registers of a thread, bytes of stack: where a thread's spills go, instructions) as cuobjdump has them."""
    if not (_tools() / "cuobjdump").is_file():
        return None, None, {}
    usage, code = (_asked("cuobjdump", [flag], built) for flag in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (re.search(rf"{word}:(\d+)", usage) for word in ("REG", "STACK"))
    found = sass_instructions(code)
    return (int(registers[1]), int(stack[1]), found) if registers and stack else (None, None, found)


def _tools() -> Path:
    """Where Triton's package has NVIDIA's."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _asked(tool: str, options: list[str], built: Any) -> str:
    """What one of them prints of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [_tools() / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def listing_of(built: Any, amd: bool) -> str:
    """Machine code with lines of source, and where those were inlined. Raises FileNotFoundError without nvdisasm."""
    return built.asm["amdgcn"] if amd else _asked("nvdisasm", ["-c", "-gi"], built)


def sass_instructions(code: str) -> dict[str, int]:
    """Instructions by name in cuobjdump's listing; those that fill its last lines are none."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z]\w*)", code, re.MULTILINE)
    return dict(Counter(name for name in names if name != "NOP").most_common())


def _amd_usage(built: Any) -> tuple[int | None, int | None, dict[str, int]]:
    """(vector registers of a lane, bytes of scratch memory, instructions) as the assembly and its notes have them.

    Scalar registers that lanes of vector registers take in do not reach memory, and are not counted.
    """
    text = built.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    names = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", text, re.MULTILINE)
    found = dict(Counter(name for name in names if name != "s_nop").most_common())
    return (int(registers[1]), int(scratch[1]), found) if registers and scratch else (None, None, found)
