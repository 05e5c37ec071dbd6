"""Run cases: compare everybody's rows, then time those that were right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvcondense.bench import device as gpu
from kvcondense.bench import measure, peer_cpp, peer_mlx, peers
from kvcondense.bench.cases import CONFIG, Case, Inputs, make_inputs
from kvcondense.bench.runners import (
    BARE,
    CHECKED,
    PREPARED,
    EmptyLaunch,
    Gemm,
    InCache,
    Kvcondense,
    Runner,
    gemm_names,
)
from kvcondense.layout.plan import Plan
from kvcondense.rope_table import RopeTable

CLOSE = 0.1
"""How far a peer's row may be from the reference's, in RMS of the row; chains in bf16 differ by up to 0.063."""
CONTEXTS = "token by context, ratio 4"
"""The series that is no case."""
STREAMS = "long prefill in chunks"
_STREAMS = (8192, 65536, 1 << 20)
_CHUNK, _STREAM_TURNS = 8192, 3
_CONTEXTS = (1024, 4096, 16384)
_STEPS = 8


def distance(runner: Runner, inputs: Inputs, expected: torch.Tensor) -> float:
    """Largest difference from the expected rows [B, windows, d], in RMS of a row; inf if there are others."""
    return off(rows_of(runner, inputs), expected, getattr(runner, "rounded", 0.0))


def off(rows: torch.Tensor, expected: torch.Tensor, rounded: float = 0.0) -> float:
    """The same for rows; ``rounded``: relative, of rows that can be read back only from a cache."""
    if rows.shape != expected.shape:
        return float("inf")
    rms = expected.square().mean(-1, keepdim=True).sqrt()
    worst = (((rows - expected).abs() - rounded * expected.abs()).clamp(min=0) / rms).max()
    return float("inf") if torch.isnan(worst) else float(worst)


def rows_of(runner: Runner, inputs: Inputs) -> torch.Tensor:
    """The rows of the case's tokens, after the timed step itself or, if it completes none, after the tokens that do."""
    state = runner.copy(runner.primed())
    if inputs.rest.shape[1] == 0:
        return runner.feed(state, inputs.new)
    runner.step(state)
    return runner.feed(state, inputs.rest)


def run_case(
    case: Case,
    backend: str,
    rates: measure.Rates,
    say: Callable[[str], None],
    *,
    device: str = "cpu",
    extra: Sequence[peers.Make] = (),
) -> Iterator[dict[str, Any]]:
    """Records of one case: for each implementation, warm and cold medians, or why there are none.

    On a GPU, state tags do not exist, bare steps and GEMMs are replayed as graphs, and an empty launch is timed, too.
    ``extra``: peers beside the installed ones.
    """
    inputs, on_cpu = make_inputs(case, device), device != gpu.home()
    reference = Kvcondense(inputs, "reference")
    expected = rows_of(reference, inputs)
    ours = [Kvcondense(inputs, backend)] if backend != "reference" else []
    if ours and on_cpu:
        ours.append(Kvcondense(inputs, backend, CHECKED))
        if case.start:
            ours.append(Kvcondense(inputs, backend, PREPARED))
    if ours and not (case.hidden and on_cpu):
        ours.append(Kvcondense(inputs, backend, BARE))
    compared: list[tuple[Any, float]] = [(r, distance(r, inputs, expected)) for r in (*ours, reference)]
    cpp = [peer_cpp.Vllm] if on_cpu and peer_cpp.there() else []
    mlx = [peer_mlx.MlxLm] if on_cpu and peers.takes(peer_mlx.MlxLm, case) and peer_mlx.there() else []
    for peer in (*peers.installed(), *cpp, *mlx, *extra):
        if peers.takes(peer, case):
            try:
                runner = peer(inputs)
                compared.append((runner, distance(runner, inputs, expected)))
            except Exception as error:  # of a version that this library does not know, say: nobody else's fault
                what = {"runner": getattr(peer, "name", str(peer)), "raised": f"{type(error).__name__}: {error}"}
                say(f"{case.name}: {what['runner']} is not timed, {what['raised']}")
                yield {"case": case.name, **what}
    timed: list[tuple[Any, float | None]] = []
    for runner, worst in compared:
        if worst <= CLOSE:
            timed.append((runner, worst))
        else:
            say(f"{case.name}: {runner.name} is not timed, its rows are off by {worst:.3g} of their RMS")
            yield {"case": case.name, "runner": runner.name, "wrong": worst}
    if on_cpu and ours and not case.hidden and not case.start:
        timed.append((InCache(inputs, backend), None))
    if case.hidden:
        timed += [(Gemm(inputs, name, backend), None) for name in gemm_names(device)]
    elif not on_cpu:
        timed.append((EmptyLaunch(inputs), None))
    primed = [runner.primed() for runner, _ in timed]
    works = [
        measure.Work(lambda r=runner, s=state: r.copy(s), runner.step, runner.capturable)
        for (runner, _), state in zip(timed, primed, strict=True)
    ]
    notes = [{"runner": runner.name, "off_by_rms": worst, "note": runner.note} for runner, worst in timed]
    yield from timings(case, works, notes, rates, device)


def timings(
    case: Case | Any, works: Sequence[measure.Work], notes: Sequence[dict[str, Any]], rates: measure.Rates, device: str
) -> Iterator[dict[str, Any]]:
    """A record of each work, warm and cold, with what ``notes`` say of it; case: its name, bytes and flops.

    A CPU's bandwidths are measured right before; of many bytes, reading is timed in turns with the works.
    """
    on_gpu = device == gpu.home()
    rates, read = (rates, None) if on_gpu else (rates.now(), measure.reading(case.bytes))
    for cold in (False, True):
        times = (gpu if on_gpu else measure).interleaved([*works, read] if read else works, cold=cold)
        floor = rates.floor(case, cold, measure.median(times.pop()) if read else None)
        for note, seconds in zip(notes, times, strict=True):
            yield {
                "case": case.name,
                "runner": note["runner"],
                "cache": "cold" if cold else "warm",
                "us": round(1e6 * measure.median(seconds), 2),
                "floor_us": round(1e6 * floor, 2),
                "rounds": len(seconds),
                **note,
            }


def context_series(backend: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Time per token of a request at growing contexts, ratio 4, mean over two windows: who copies, and who does not.

    All layers of a ratio share the plan of a step, so it is made beforehand, and its own time is a line.
    """
    for length in _CONTEXTS:
        inputs = make_inputs(Case(f"token at context {length}, ratio 4", "csa", 1, 1, length))
        ours = _Stepping(inputs, backend)
        runners: list[Any] = [ours, *(peer(inputs) for peer in peers.installed())]
        works: list[measure.Work] = []
        for runner in runners:
            state = runner.primed()

            def steps(state: Any, runner: Any = runner) -> None:
                for _ in range(_STEPS):
                    runner.step(state)

            works.append(measure.Work(lambda r=runner, s=state: r.copy(s), steps))
        works.append(measure.Work(lambda: None, lambda _, ours=ours: ours.plans()))
        times = measure.interleaved(works, cold=False)
        names = [*(r.name for r in runners), "plan of a step"]
        for name, seconds in zip(names, times, strict=True):
            us = 1e6 * measure.median(seconds) / _STEPS
            say(f"context {length:>6}: {name:<18} {us:8.1f} us a token")
            yield {"context": length, "runner": name, "us": round(us, 2)}


def stream_series(backend: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Time per token of one sequence in chunks, up to a million tokens, and by how much the process grows meanwhile.

    Chunks bring the same tokens; pages of the cache are used again, as a window of attention that moves on would.
    """
    for kind in ("hca", "csa"):
        inputs = make_inputs(Case("chunk", kind, _CHUNK, 1, 0))
        runners = [_Streaming(inputs, backend, tokens) for tokens in _STREAMS]
        states = [runner.primed() for runner in runners]
        for runner, state in zip(runners, states, strict=True):
            runner.stream(state, _CHUNK)
        seconds: list[list[float]] = [[] for _ in _STREAMS]
        grown = [0 for _ in _STREAMS]
        for _ in range(_STREAM_TURNS):  # by turns, since a machine's speed changes
            for i, (tokens, runner, state) in enumerate(zip(_STREAMS, runners, states, strict=True)):
                before = measure.resident()
                for _ in range(max(1, _STREAMS[1] // tokens)):
                    seconds[i].append(measure.clock(lambda r=runner, s=state, n=tokens: r.stream(s, n)))
                grown[i] += measure.resident() - before
        ratio = inputs.case.spec.ratio
        for tokens, all_seconds, more in zip(_STREAMS, seconds, grown, strict=True):
            us = 1e6 * measure.median(all_seconds) / tokens
            say(f"ratio {ratio:>3}, {tokens:>8} tokens: {us:7.3f} us a token, {more / 1e6:.1f} MB more")
            yield {"streamed": tokens, "ratio": ratio, "runner": backend, "us": round(us, 4), "grown_bytes": more}


class _Streaming(Kvcondense):
    """A request that brings the same chunk again and again, each at its own position."""

    def __init__(self, inputs: Inputs, backend: str, tokens: int) -> None:
        super().__init__(inputs, backend)
        self.rope = RopeTable.build(CONFIG, tokens + self.spec.ratio, device=self.device)

    def stream(self, state: dict[str, Any], tokens: int) -> None:
        """``tokens`` of them from position 0 on."""
        state["pool"].reset([0])
        rows = _CHUNK // self.spec.ratio
        slots = torch.full((_CHUNK,), -1)
        slots[self.spec.ratio - 1 :: self.spec.ratio] = torch.arange(rows)
        for start in range(0, tokens, _CHUNK):
            _, (plan,) = self.planner.step([0, _CHUNK], start_positions=[start], state_slots=[0], slot_mapping=slots)
            state["plan"] = plan
            self.step(state)


class _Stepping(Kvcondense):
    """A request that goes on from step to step."""

    def __init__(self, inputs: Inputs, backend: str) -> None:
        super().__init__(inputs, backend, steps=_STEPS)

    def primed(self) -> dict[str, Any]:
        return {**super().primed(), "plans": self.plans()}

    def plans(self) -> list[Plan]:
        start = self.inputs.case.start
        return [self._plan(start + i, 1) for i in range(_STEPS)]

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "plans": list(state["plans"])}

    def step(self, state: dict[str, Any]) -> None:
        state["plan"] = state["plans"].pop(0)
        super().step(state)
