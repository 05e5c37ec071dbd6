"""The clock of a GPU: CUDA events, graphs of repeated work, caches flushed in between; rates taken the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvcondense.bench.measure import Rates, Work

_FLUSH_BYTES = 1 << 28
"""Memory that is written between cold runs: several times any GPU's last cache."""
_LARGE_BYTES, _SMALL_BYTES = 1 << 30, 1 << 23
_GEMM = (8192, 4096, 8192)
_ROUNDS = 15
_CALLS, _FEW_CALLS, _SLOW_S = 20, 3, 1e-3


def rates() -> Rates:
    """Best of several: a copy counts as read and written; operands are random, as zeros draw less power."""
    device = home()
    large, small = (torch.randn(2, n // 4, device=device) for n in (_LARGE_BYTES, _SMALL_BYTES))
    m, k, n = _GEMM
    x, w = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))

    def least(run: Callable[[], object], calls: int) -> float:
        once = _replayed(run, calls, None)
        return min(once() for _ in range(_ROUNDS))

    return Rates(
        memory=2 * _LARGE_BYTES / least(lambda: large[0].copy_(large[1]), _FEW_CALLS),
        cache=2 * _SMALL_BYTES / least(lambda: small[0].copy_(small[1]), _CALLS),
        gemm=2 * m * k * n / least(lambda: torch.mm(x, w.T), _FEW_CALLS),
        cached=_cache_bytes(),
    )


def interleaved(works: Sequence[Work], *, cold: bool) -> list[list[float]]:
    """Seconds of each work, taken in turns.

    Work that a graph can capture is replayed, several calls to a graph, so that the host is not in it; cold, the graph
    flushes the cache before each call, and a graph of flushes alone is subtracted. Other work is timed from its first
    launch to its end with an idle device before it, so that the host's time is part of it.
    """
    spoil = torch.ones(_FLUSH_BYTES // 4, device=home()) if cold else None
    flush = None if spoil is None else lambda: spoil.add_(1)
    timers: list[Callable[[], float]] = []
    for work in works:
        if work.capturable:
            argument = work.prepare()
            slow = _warm_up(lambda w=work, a=argument: w.run(a)) > _SLOW_S
            timers.append(_replayed(lambda w=work, a=argument: w.run(a), _FEW_CALLS if slow else _CALLS, flush))
        else:
            work.run(work.prepare())
            timers.append(lambda w=work: _eager(w, flush))
    times: list[list[float]] = [[] for _ in works]
    for _ in range(_ROUNDS):
        for index, once in enumerate(timers):
            times[index].append(once())
    return times


def _warm_up(run: Callable[[], object]) -> float:
    """Compile and load what ``run`` needs, which a capture must not; its seconds afterwards."""
    for _ in range(3):
        run()
    return elapsed(run)


def _replayed(run: Callable[[], object], calls: int, flush: Callable[[], object] | None) -> Callable[[], float]:
    """A timer: seconds per call of a graph of ``calls`` calls."""

    def repeat(parts: Sequence[Callable[[], object]]) -> Any:
        def body() -> None:
            for _ in range(calls):
                for part in parts:
                    part()

        return capture(body)

    _warm_up(run)
    if flush is None:
        graph = repeat([run])
        return lambda: elapsed(graph.replay) / calls
    graph, blank = repeat([flush, run]), repeat([flush])
    return lambda: (elapsed(graph.replay) - elapsed(blank.replay)) / calls


def _eager(work: Work, flush: Callable[[], object] | None) -> float:
    argument = work.prepare()
    if flush is not None:
        flush()
    return elapsed(lambda: work.run(argument))


def elapsed(run: Callable[[], object]) -> float:
    """Seconds by events around ``run`` on the current stream, the device idle before."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(body: Callable[[], None]) -> Any:
    """A CUDA graph of ``body``, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def machine() -> dict[str, Any]:
    """What GPU figures were measured on."""
    from triton import __version__ as triton

    properties = torch.cuda.get_device_properties(home())
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"HIP {torch.version.hip}"
    return {"device": properties.name, "toolkit": toolkit, "triton": triton}


def _cache_bytes() -> int:
    return torch.cuda.get_device_properties(home()).L2_cache_size


def home() -> str:
    """Where tensors of the GPU's bench lie."""
    return "cuda"


def available() -> bool:
    """True if there is a GPU to time."""
    return torch.cuda.is_available()
