"""``kvcondense bench``: one decode step of all of Flash's compressors, part by part, beside what else is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvcondense.bench import measure, peer_cpp, peers
from kvcondense.bench.cases import FORMAT, PAGE_ROWS, Case, Inputs, make_inputs
from kvcondense.bench.run import CLOSE, distance, rows_of
from kvcondense.bench.runners import CHECKED, PREPARED, Kvcondense
from kvcondense.config import ModelConfig
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner

DECODE_STEP = "decode step of Flash, 16 requests"
"""The series that is no case."""
PLANS = "batch and plans"
_REQUESTS, _START, _STEPS = 16, 1000, 4
_FORMATS = {"indexer": "fp8_indexer_plain"}


@dataclass(frozen=True)
class Part:
    """``layers`` compressors of one kind."""

    kind: str
    layers: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.layers} {'indexers' if self.kind == 'indexer' else self.kind.upper()}"

    @property
    def case(self) -> Case:
        """A token for each request."""
        form = _FORMATS.get(self.kind, FORMAT)
        return Case(f"{DECODE_STEP}, {self.name}", self.kind, 1, _REQUESTS, _START, format=form)


def parts(config: ModelConfig = ModelConfig.FLASH) -> list[Part]:
    """The compressors of a model."""
    ratios = [config.compress_ratios[layer] for layer in config.compressor_layers]
    return [Part("hca", ratios.count(128)), Part("csa", ratios.count(4)), Part("indexer", ratios.count(4))]


def decode_step(backend: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Microseconds of each part and implementation: the mean of four tokens, of which the last one ends a window of 4.

    Every layer has its own state and cache. Ours are bound and share the plans of a step, whose making is a part of
    its own; for ``checked`` and ``prepared`` see ``runners.Kvcondense``. Rows are compared with the reference's first.
    """
    totals: dict[str, float] = {}
    for part in parts():
        inputs = make_inputs(part.case)
        expected = rows_of(Kvcondense(inputs, "reference"), inputs)
        runners: list[Any] = [_Layers(inputs, backend, part.layers, way) for way in ("", CHECKED, PREPARED)]
        for peer in _peers():
            try:
                runner = _Copies(peer(inputs), part.layers)
                worst = distance(runner.runner, inputs, expected)
            except Exception as error:  # of a version that this library does not know, say: nobody else's fault
                say(f"{part.name}: {getattr(peer, 'name', peer)} is not timed, {type(error).__name__}: {error}")
                continue
            if worst <= CLOSE:
                runners.append(runner)
            else:
                say(f"{part.name}: {runner.name} is not timed, its rows are off by {worst:.3g} of their RMS")
        mine = distance(Kvcondense(inputs, backend), inputs, expected)
        if mine > CLOSE:
            yield {"step": DECODE_STEP, "part": part.name, "runner": backend, "wrong": mine}
            continue
        for name, us in _timed(runners):
            totals[name] = totals.get(name, 0.0) + us
            say(f"{DECODE_STEP}: {part.name:<12} {name:<14} {us:9.1f} us")
            yield {"step": DECODE_STEP, "part": part.name, "runner": name, "us": round(us, 1)}
    ((_, us),) = _timed([_Planning()])
    for name in [name for name in totals if name.startswith(backend)] or [backend]:
        totals[name] = totals.get(name, 0.0) + us
        yield {"step": DECODE_STEP, "part": PLANS, "runner": name, "us": round(us, 1)}
    for name, us in totals.items():
        say(f"{DECODE_STEP}: {'all':<12} {name:<14} {us:9.1f} us")
        yield {"step": DECODE_STEP, "part": "all", "runner": name, "us": round(us, 1)}


def _peers() -> list[peers.Make]:
    """Those that have all of a model's compressors: transformers' and vLLM's C++."""
    found: list[peers.Make] = [peer for peer in peers.installed() if peer is peers.Transformers]
    return [*found, _Cpp] if peer_cpp.there() else found


def _timed(runners: list[Any]) -> list[tuple[str, float]]:
    """Name and microseconds of a token."""
    works = [measure.Work(r.prepare, r.run) for r in runners]
    times = measure.interleaved(works, cold=False)
    return [(r.name, 1e6 * measure.median(t) / _STEPS) for r, t in zip(runners, times, strict=True)]


class _Layers:
    """Bound compressors of one kind; the same four tokens may come again and again."""

    def __init__(self, inputs: Inputs, backend: str, layers: int, way: str) -> None:
        self.runner = Kvcondense(inputs, backend, way, steps=_STEPS)
        self.name = self.runner.name
        self.layers: list[Callable[[Plan], object]] = []
        for _ in range(layers):
            state = self.runner.primed()
            bound = self.runner.bound(state)
            self.layers.append(state["prepared"].run if way == PREPARED else partial(bound.condense, self.runner.new))
        made = (self.runner.planner.step(**self.runner.metadata(_START + i, 1)) for i in range(_STEPS))
        self.plans: list[Plan] = [plan for _, (plan,) in made]

    def prepare(self) -> None:
        """Nothing: a step writes the same rows again."""

    def run(self, _: None) -> None:
        """Four tokens through all layers."""
        for plan in self.plans:
            for layer in self.layers:
                layer(plan)


class _Copies:
    """A peer's compressor, with a state for each layer."""

    def __init__(self, runner: Any, layers: int) -> None:
        self.name, self.runner = runner.name, runner
        state = runner.primed()
        self.states = [copy.deepcopy(state) for _ in range(layers)]

    def prepare(self) -> list[Any]:
        """What the four tokens may change."""
        return [self.runner.copy(state) for state in self.states]

    def run(self, states: list[Any]) -> None:
        """Four tokens through all layers."""
        for _ in range(_STEPS):
            for state in states:
                self.runner.step(state)


class _Cpp(peer_cpp.Vllm):
    """vLLM's operators, with the metadata of four steps made beforehand."""

    def primed(self) -> dict[str, Any]:
        """A state that has read the history."""
        return {**super().primed(), "steps": [self.prepare(_START + i, 1) for i in range(_STEPS)]}

    def step(self, state: dict[str, Any]) -> None:
        """The next token."""
        self.call(state["new"], state, state["steps"][state["position"] - _START])
        state["position"] += 1


class _Planning:
    """The batch and the plans of four steps, for all compressors at once."""

    name = PLANS

    def __init__(self) -> None:
        kinds = [Kvcondense(make_inputs(p.case), "reference", steps=_STEPS) for p in parts()[:2]]
        most = max(kinds, key=lambda kind: kind.pages)  # of ratio 4, a table of which ratio 128 needs less
        self.steps = [most.metadata(_START + i, 1) for i in range(_STEPS)]
        self.planner = Planner([(kind.spec, kind.layout, PAGE_ROWS) for kind in kinds])

    def prepare(self) -> None:
        """Nothing."""

    def run(self, _: None) -> None:
        """Four steps' metadata."""
        for step in self.steps:
            self.planner.step(**step)
