"""The processor that kernels are compiled for: its name and features as LLVM calls them, and how long its vectors are.

It is this machine's, unless the variables that Numba itself reads name another one: NUMBA_CPU_NAME (haswell, say) and
NUMBA_CPU_FEATURES (+avx2,+fma, say; only those count then). Code for less than this machine runs here, too, which is
how one machine tests another's. KVCONDENSE_LANES (4, 8 or 16) forces the length of vectors alone.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from kvcondense.errors import RangeError

WIDTHS = (4, 8, 16)
"""fp32 values of a vector: NEON's and SSE's, AVX2's, AVX-512's."""
_VARIABLE = "KVCONDENSE_LANES"


@dataclass(frozen=True)
class Target:
    """cpu, flags: its name and features as LLVM takes them; features: those that it has; lanes: fp32 of a vector."""

    cpu: str
    flags: str
    lanes: int

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """Names of those that ``flags`` turns on."""
        return _turned_on(self.flags)

    @property
    def widest(self) -> int:
        """fp32 values of its registers, which ``lanes`` is unless another length was forced."""
        return _widest(self.features)

    @property
    def registers(self) -> int:
        """Vector registers: 16 on x86 without AVX-512, else 32."""
        return 32 if "avx512f" in self.features or "neon" in self.features else 16

    @property
    def bf16_products(self) -> bool:
        """True if it multiplies pairs of bf16 and adds them in fp32, in vectors of 16."""
        return {"avx512bf16", "avx512f"} <= self.features and self.lanes == 16

    @property
    def fast_bf16_products(self) -> bool:
        """True if that beats fp32's products of widened rows: Intel takes two cycles, so that it gains nothing."""
        return self.bf16_products and self.cpu.startswith("znver")

    @property
    def product_channels(self) -> int:
        """Channels of a product's task, whose rows stay in caches: widened, in panels, they take twice the room."""
        return 64 if self.fast_bf16_products else 32


@functools.cache
def target() -> Target:
    """What kernels are compiled for in this process. Raises RangeError if KVCONDENSE_LANES is none of ``WIDTHS``."""
    import llvmlite.binding as llvm

    cpu, flags = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if flags is None:
        # A virtual machine may lack what its processor's name stands for: all features are said, with their signs.
        flags = "" if cpu else llvm.get_host_cpu_features().flatten()
    return Target(cpu or llvm.get_host_cpu_name(), flags, lanes_of(flags))


def _turned_on(flags: str) -> frozenset[str]:
    return frozenset(flag[1:] for flag in flags.split(",") if flag.startswith("+"))


def _widest(features: frozenset[str]) -> int:
    return 16 if "avx512f" in features else 8 if {"avx2", "fma"} <= features else 4


def lanes_of(flags: str) -> int:
    """fp32 values of a processor's vectors, or as many as KVCONDENSE_LANES says."""
    forced = os.environ.get(_VARIABLE, "")
    if forced:
        if forced not in map(str, WIDTHS):
            raise RangeError(_VARIABLE, "4, 8 or 16", forced)
        return int(forced)
    return _widest(_turned_on(flags))
