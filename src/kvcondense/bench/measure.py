"""Clocks: rates of this machine, interleaved timings, warm and cold, and what a case cannot be faster than."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcondense.bench.cases import Case

_COLD_BYTES = 1 << 28
"""Memory that is written between cold runs: more than a core's share of any cache."""
_WARM_BYTES = 1 << 23
_MANY_BYTES = 1 << 22
"""From there on reading takes longer than to begin to read."""
_BUDGET_S = 0.6
_FEWEST, _MOST, _MOST_COLD = 5, 20, 15
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_QUICK_S, _BURST = 0.005, 20
_SLOW_S = 0.5


@dataclass(frozen=True)
class Rates:
    """Bytes per second from memory and from the caches, and bf16 multiply-adds of torch per second, times two.

    cached: bytes that stay in the caches from one run to the next.
    """

    memory: float
    cache: float
    gemm: float
    cached: int = 2 * _WARM_BYTES

    @classmethod
    def measure(cls) -> Rates:
        """Best of several: a floor should be one."""
        x, w = torch.randn(2048, 4096).bfloat16(), torch.randn(1024, 4096).bfloat16()
        gemm = 2 * 2048 * 4096 * 1024 / _best(lambda: torch.nn.functional.linear(x, w), 7)
        return cls(0.0, 0.0, gemm).now()

    def now(self) -> Rates:
        """With bytes per second measured anew: a machine whose memory others use, too, has other ones each minute."""
        large, small = torch.ones(_COLD_BYTES // 4), torch.ones(_WARM_BYTES // 4)
        return replace(
            self,
            memory=_COLD_BYTES / min(clock(large.sum) for _ in range(7)),
            cache=_WARM_BYTES / min(clock(small.sum) for _ in range(50)),
        )

    def floor(self, case: Case | Any, cold: bool, read: float | None = None) -> float:
        """Seconds, for what has bytes and flops: the larger of bytes over bandwidth and flops over the GEMM's rate.

        Warm bytes come from the caches only if they are few enough to have been there. read: what reading as many bytes
        took instead, among the timings that are compared with it.
        """
        bandwidth = self.memory if cold or case.bytes > self.cached else self.cache
        return max(case.bytes / bandwidth if read is None else read, case.flops / self.gemm)


def keep_memory() -> None:
    """Ask glibc to keep freed memory, up to blocks of 32 MiB: else pages that come and go are most of some timings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _best(work: Callable[[], object], most: int) -> float:
    """Seconds of the fastest of ``most`` runs, of three if they are slow: some processors emulate bf16."""
    first = clock(work)
    runs = most if first < _SLOW_S else 3
    return min(clock(work) for _ in range(runs - 1))


def clock(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Work:
    """What is timed: a preparation, not timed, and ``run`` on what it returns; ``capturable``: by a CUDA graph, too."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]
    capturable: bool = False


def reading(count: int) -> Work | None:
    """To read ``count`` bytes in order, with torch's threads; None if they are so few that it would be something else.

    Others use a machine's memory, too, from one moment to the next: only what is timed in turns has the same share.
    """
    if count < _MANY_BYTES:
        return None
    block = torch.ones(count // 4)
    return Work(lambda: block, torch.Tensor.sum)


def interleaved(works: Sequence[Work], *, cold: bool) -> list[list[float]]:
    """Seconds of each work, taken in turns, so that a slow moment of the machine meets all of them.

    Warm: in its turn, a work runs unclocked first, and several times if it is quick. Cold: other memory is written
    right before each run.
    """
    spoil = torch.zeros(_COLD_BYTES // 4) if cold else None
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work.run(work.prepare())
    costs = [clock(lambda w=work: w.run(w.prepare())) for work in works]
    bursts = [1 if cold or cost > _QUICK_S else _BURST for cost in costs]
    most = _MOST_COLD if cold else _MOST
    rounds = int(max(_FEWEST, min(most, len(works) * _BUDGET_S / max(sum(costs), 1e-6))))
    gc.collect()
    gc.freeze()  # what is there now need not be looked at again
    gc.disable()
    try:
        for _ in range(rounds):
            for index, work in enumerate(works):
                for turn in range(-1 if not cold else 0, bursts[index]):
                    gc.collect()  # copies with cycles would stay, and their successors lie in fresh pages
                    argument = work.prepare()
                    if spoil is not None:
                        spoil.add_(1)
                    start = time.perf_counter()
                    work.run(argument)
                    if turn >= 0:
                        times[index].append(time.perf_counter() - start)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def median(times: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(times)


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the sources; "+" and their digest if they were changed since; the digest alone if git is not asked.

    So two runs of the same name are runs of the same sources.
    """
    package = Path(__file__).parent.parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=package, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "status", "--porcelain", "."], cwd=package, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"sources {_digest(package)}"
    return name.stdout.strip() + (f"+{_digest(package)}" if changed.stdout else "")


def _digest(package: Path) -> str:
    """Of all that the package's results can depend on."""
    found = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".json")):
        found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:8]
