"""Kernels compiled for the model, each once in a process, and what their machine code says of a case's launch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcondense.backends.triton import aot
from kvcondense.backends.triton.variants import Variant
from kvcondense.bench.predict.flow import Counts, Flow
from kvcondense.bench.predict.listing import KERNELS, read
from kvcondense.bench.predict.machines import Machine
from kvcondense.bench.predict.warp import alone
from kvcondense.bench.predict.work import Kernel
from kvcondense.errors import UnsupportedError

_kept: dict[tuple[Variant, str, str], tuple[aot.Compiled, Flow]] = {}


@dataclass(frozen=True)
class Launched:
    """What a program of a launch is: warps, 32-bit registers of a lane, bytes of shared memory, and its counts.

    chain: cycles that the slowest program takes alone; once: with one turn of each loop.
    """

    warps: int
    registers: int
    shared: int
    counts: Counts
    chain: float
    once: float


def of(kernel: Kernel, arch: str, machine: Machine) -> Launched | None:
    """A launch's program; None of the vendor's. Raises UnsupportedError if the kernel does not compile."""
    if kernel.launch is None:
        return None
    built, flow = compiled(kernel, arch)
    chain, once = (max(alone(flow, way, machine, built.num_warps, most) for way in kernel.ways) for most in (None, 1))
    return Launched(built.num_warps, built.registers or 0, built.shared or 0, flow.count(kernel.runs), chain, once)


def compiled(kernel: Kernel, arch: str) -> tuple[aot.Compiled, Flow]:
    """What comes of a launch, not of the vendor's. Raises UnsupportedError if the kernel does not compile."""
    assert kernel.launch is not None
    assert kernel.variant is not None
    key = (kernel.variant, kernel.launch.name, arch)
    if key not in _kept:
        with _own_cache():
            built = aot.compile_launch(kernel.variant, kernel.launch, arch, listing=True)
        if built.error is not None:
            raise UnsupportedError("predict", "kernels that compile", f"{kernel.launch.name}: {built.error}")
        _kept[key] = built, Flow(read(built.listing, arch))
    return _kept[key]


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """Within, Triton's cache on disk is one for these very sources.

    Its own takes a kernel for the same when lines were inserted above a function that it calls: the code is the same,
    but the lines that it says it came from are not.
    """
    from triton import knobs

    cache: Any = knobs.cache
    text = b"".join(file.read_bytes() for file in sorted(KERNELS.glob("*.py")))
    with cache.scope():
        cache.dir = str(Path(cache.dir) / f"kvcondense-{hashlib.sha256(text).hexdigest()[:16]}")
        yield
