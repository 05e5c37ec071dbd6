"""What the model knows of each architecture's chip: published figures with their sources, and what is assumed, by name.

Nothing here was measured. A datasheet's numbers are peaks: ``COPY``, ``PRODUCT`` and ``CACHE`` are the parts of them
that are assumed to be reached. ``kvcondense bench`` measures the first two, and a launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

COPY, PRODUCT, CACHE = 0.9, 0.8, 0.6
"""Parts of the datasheet's bandwidth, of its bf16 rate, and of the last cache's width. Assumed."""
LANES_OF_NVIDIA, LANES_OF_AMD = 32, 64

# Cycles until a result is there. Arithmetic 4, shared memory 20, last cache 200 and memory 400: V100, A100 and H100
# alike in table 3 of pmc.ncbi.nlm.nih.gov/articles/PMC10448217. The others are assumed.
_NVIDIA_LATENCY = {
    "fp32": 4.0, "integer": 4.0, "uniform": 8.0, "special": 20.0, "shuffle": 20.0, "shared_load": 20.0,
    "shared_store": 0.0, "matrix": 32.0, "barrier": 20.0, "cache": 200.0, "memory": 400.0, "other": 0.0,
}  # fmt: skip
# A wave's four cycles are those of its ISA documents. The others are assumed.
_AMD_LATENCY = {
    "fp32": 4.0, "integer": 4.0, "uniform": 4.0, "special": 16.0, "shuffle": 64.0, "shared_load": 64.0,
    "shared_store": 0.0, "matrix": 64.0, "barrier": 20.0, "cache": 500.0, "memory": 800.0, "other": 0.0,
}  # fmt: skip
_NVIDIA_UNITS = MappingProxyType({kind: (kind,) for kind in ("fp32", "integer", "special")})
_AMD_UNITS = MappingProxyType({"vector": ("fp32", "integer", "special")})


@dataclass(frozen=True)
class Machine:
    """One chip. Rates are of the whole chip a second, cycles a processor's for one instruction of a warp (AMD: wave).

    clock [Hz]; memory [B/s], cache [B/s, of the last cache that all processors share], product [bf16 flop/s]: peaks;
    port: bytes a cycle between a processor and that cache; shared: bytes a cycle of its shared memory; lanes of a warp;
    registers [32 bit], shared_bytes, threads, programs: that a processor has for programs at once; each: bytes of
    shared memory that a program takes beside its own; fp32, integer, special: cycles; issue: cycles between two
    instructions of one warp; slots: instructions of any kind in a cycle; units: kinds of instructions by what does them
    one after the other; launch: seconds from the end of one kernel to the first instruction of the next, assumed;
    copy_part, product_part: of memory and product that are reached, 1 where the rate was measured; latencies: cycles,
    by kind.
    """

    name: str
    clock: float
    processors: int
    memory: float
    cache: float
    product: float
    registers: int
    shared_bytes: int
    threads: int
    programs: int
    fp32: float
    integer: float
    source: str
    special: float = 2.0
    slots: float = 4.0
    issue: float = 1.0
    port: float = 64.0
    shared: float = 128.0
    lanes: int = LANES_OF_NVIDIA
    each: int = 1024
    launch: float = 2e-6
    units: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NVIDIA_UNITS)
    copy_part: float = COPY
    product_part: float = PRODUCT
    latencies: Mapping[str, float] = field(default_factory=lambda: MappingProxyType(_NVIDIA_LATENCY))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in plain.items()}

    @property
    def copy_rate(self) -> float:
        """Bytes a second that a long copy is assumed to read and write."""
        return self.copy_part * self.memory

    @property
    def cache_rate(self) -> float:
        """Bytes a second from the last cache that all share."""
        return CACHE * self.cache

    @property
    def product_rate(self) -> float:
        """Flops a second of bf16 products that a library is assumed to reach."""
        return self.product_part * self.product

    def cycles(self, kind: str, width: int = 0) -> float:
        """Of a processor, for one instruction of a warp: of the unit that it takes longest. width: bytes of a lane."""
        found = {"fp32": self.fp32, "integer": self.integer, "special": self.special}.get(kind, 0.0)
        moved = width * self.lanes / self.shared if kind.startswith("shared") or kind == "shuffle" else 0.0
        return max(1 / self.slots, found, moved)

    def latency(self, kind: str, width: int = 0) -> float:
        """Cycles from an instruction's begin until its result is there.

        Loads of 16 bytes are of what nobody has read before, and come from memory; narrower ones are of tables that all
        programs read, and come from the last cache.
        """
        if kind in ("load", "store", "atomic"):
            return self.latencies["memory" if kind == "load" and width >= 16 else "cache"]
        return self.latencies[kind]


_ARITHMETIC = "instructions a cycle and limits of a processor: CUDA programming guide"


def _amd(name: str, clock: float, processors: int, memory: float, product: float, **more: Any) -> Machine:
    """A chip with what AMD's have in common."""
    return Machine(
        name, clock, processors, memory, 17.2e12, product, registers=131072, threads=2048, programs=32, fp32=1.0,
        integer=1.0, special=4.0, slots=5.0, issue=4.0, lanes=LANES_OF_AMD, each=0, launch=4e-6,
        latencies=MappingProxyType(_AMD_LATENCY), units=_AMD_UNITS, **more,
    )  # fmt: skip


MACHINES: Mapping[str, Machine] = MappingProxyType({
    "sm_80": Machine(
        "A100 SXM 80 GB", 1.41e9, 108, 2.039e12, 5120 * 1.41e9, 312e12, 65536, 164 << 10, 2048, 32, 0.5, 0.5,
        f"datasheet; whitepaper (5120 B a cycle from L2); {_ARITHMETIC}",
    ),
    "sm_89": Machine(
        "RTX 4090", 2.52e9, 128, 1.008e12, 5120 * 2.52e9, 165.2e12, 65536, 100 << 10, 1536, 24, 0.25, 0.5,
        f"Ada whitepaper (bf16 summed in fp32); L2 as wide as A100's, assumed; {_ARITHMETIC}",
    ),
    "sm_90": Machine(
        "H100 SXM", 1.83e9, 132, 3.35e12, 5120 * 1.83e9, 989.4e12, 65536, 228 << 10, 2048, 32, 0.25, 0.5,
        f"datasheet; clock: 989.4 TFLOP/s of 132 processors; L2: PMC10448217, table 3; {_ARITHMETIC}",
    ),
    "sm_100": Machine(
        "B200", 1.85e9, 148, 8e12, 10240 * 1.85e9, 2250e12, 65536, 228 << 10, 2048, 32, 0.25, 0.5,
        f"datasheet; clock: 2250 TFLOP/s of 148 processors; each die's L2 as wide as H100's, assumed; {_ARITHMETIC}",
    ),
    "sm_120": Machine(
        "RTX 5090", 2.41e9, 170, 1.792e12, 5120 * 2.41e9, 209.5e12, 65536, 100 << 10, 1536, 24, 0.25, 0.25,
        f"RTX Blackwell whitepaper (bf16 summed in fp32); L2 as wide as A100's, assumed; {_ARITHMETIC}",
    ),
    "gfx942": _amd(
        "MI300X", 2.1e9, 304, 5.3e12, 1307.4e12, shared_bytes=64 << 10,
        source="datasheet; CDNA 3 whitepaper (17.2 TB/s of the cache that its dies share)",
    ),
    "gfx950": _amd(
        "MI355X", 2.4e9, 256, 8e12, 2516.6e12, shared_bytes=160 << 10, shared=256.0,
        source="datasheet; CDNA 4 whitepaper (shared memory twice as wide); the dies' cache as MI300X's, assumed",
    ),
})  # fmt: skip
"""By architecture, as ``kvcondense aot`` names it."""
