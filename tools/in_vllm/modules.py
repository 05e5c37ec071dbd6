"""Layers of all kinds beside the plugin: histories of requests on vLLM's pages, all bytes compared after every step."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engines.judge import FAIL, PASS

from in_vllm import ground, world
from in_vllm.judge import Tally, judge
from in_vllm.world import Module, Turn, World

Say = Callable[[str], None]
# What a step is about, who goes on, and how many tokens of padding follow. Strings between them: "c of a, 256" is a new
# request behind another one's first tokens, "end a" gives its blocks back.
HISTORY: tuple[Any, ...] = (
    ("prefill over windows of both ratios", (Turn("a", 262), Turn("b", 130)), 0),
    "c of a, 256",
    ("behind another's prefix; chunks end inside windows", (Turn("c", 5), Turn("a", 7), Turn("b", 125)), 0),
    ("decode over a boundary of both ratios", (Turn("a", 1), Turn("b", 1), Turn("c", 1)), 0),
    ("verify, drafts rejected", (Turn("a", 6, 4), Turn("b", 5, 2), Turn("c", 4, 3)), 0),
    ("verify over what was rejected, padded", (Turn("b", 5, 1), Turn("a", 6, 1)), 6),
    ("decode, padded", (Turn("c", 1), Turn("b", 1), Turn("a", 1)), 2),
    "end b",
    ("a new request on recycled blocks", (Turn("d", 141), Turn("a", 1)), 0),
    ("a long chunk over a boundary; one without tokens", (Turn("c", 123), Turn("d", 3), Turn("a", 0)), 5),
    ("decode", (Turn("c", 1), Turn("d", 1), Turn("a", 1)), 0),
)
MUTANTS = ("a row further", "without ape", "RoPE a window late", "states a block further")


def run(folder: Path, say: Say) -> dict[str, Any]:
    """The part's result."""
    begun = time.monotonic()
    ground.before_vllm()
    import_module("vllm")
    found = ground.after_vllm()
    own = ground.own_forward(found)
    counts = _count(own)
    say(f"vLLM's own compressor: {found['compressor']}")
    config = world.opened(folder)
    with import_module("vllm.config").set_current_vllm_config(config), torch.inference_mode():
        made = World(config)
        play = _Play(made, own, counts)
        say(f"{len(made.modules)} compressors on {made.memory.shape[0]:,} bytes of pages")
        play.nothing_without_metadata()
        for event in HISTORY:
            play.event(event, say)
        result = play.result()
    return {**found, **result, "seconds": round(time.monotonic() - begun, 1)}


def _count(own: Callable[..., None]) -> Counter[str]:
    """Install the plugin, as its entry point does, and count who runs; vLLM's own forward is one that can run here."""
    counts: Counter[str] = Counter()
    cpu, _ = ground.compressors()

    def counted(self: Any, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
        counts["own"] += 1
        own(self, kv_score, positions, rotary_emb)

    cpu.forward = counted  # type: ignore[attr-defined]
    import kvcondense_vllm
    from kvcondense.bound import Bound
    from kvcondense.integrations.vllm_plugin import steps

    kvcondense_vllm.register()
    for owner, name, key in ((Bound, "condense", "steps"), (steps, "_plan", "plans"), (steps, "requests", "batches")):
        setattr(owner, name, _counted(getattr(owner, name), counts, key))
    return counts


def _counted(function: Callable[..., Any], counts: Counter[str], key: str) -> Callable[..., Any]:
    def wrapper(*given: Any, **named: Any) -> Any:
        counts[key] += 1
        return function(*given, **named)

    return wrapper


class _Play:
    """A history on the world's memory. Every step starts on both sides from what the plugin's last one left."""

    def __init__(self, made: World, own: Callable[..., None], counts: Counter[str]) -> None:
        self.world, self.own, self.counts = made, own, counts
        self.gen = torch.Generator().manual_seed(2)
        self.compared = made.modules[:3]  # one of each kind; the others are there for plans that layers share
        self.kinds = {module.kind: Tally() for module in self.compared}
        self.checks: list[dict[str, str]] = []
        self.mutants: list[dict[str, str]] = []
        self.passes, self.calls = 0, 0

    def event(self, event: Any, say: Say) -> None:
        """One entry of a history."""
        if isinstance(event, str):
            self._requests(event)
            return
        what, turns, padding = event
        metadata, positions = self.world.metadata(list(turns), padding)
        tallies = self._step(metadata, positions)
        self.passes += 1
        say(f"{what}: " + "; ".join(f"{kind} {t.status}{t.why and f' ({t.why})'}" for kind, t in tallies.items()))
        for kind, tally in tallies.items():
            self.kinds[kind].add(tally)

    def _requests(self, event: str) -> None:
        words = event.replace(",", "").split()
        if words[0] == "end":
            self.world.end(words[1])
        else:
            self.world.prefix(words[0], words[2], int(words[3]))

    def _step(self, metadata: dict[str, Any], positions: torch.Tensor) -> dict[str, Tally]:
        tokens = {module: self._tokens(module, positions) for module in self.world.modules}
        first = not self.passes
        if first:  # in passes of their own, before the plans of the right one are made
            for module in self.compared:
                self._mutants(module, tokens[module], metadata, positions)
        found = {}
        self.calls += len(self.world.modules)
        with self._forward(metadata, positions):
            for module, given in tokens.items():
                if module in self.compared:
                    theirs = self._theirs(module, given, positions)
                    module.compressor(given, positions, module.rope)
                    found[module.kind] = self._judge(module, theirs, metadata)
                else:
                    module.compressor(given, positions, module.rope)
        return found

    def _tokens(self, module: Module, positions: torch.Tensor) -> torch.Tensor:
        compressor = module.compressor
        width = 2 * compressor.coff * compressor.head_dim
        return torch.randn(positions.shape[0], width, generator=self.gen)

    def _forward(self, metadata: dict[str, Any] | None, positions: torch.Tensor) -> Any:
        context = import_module("vllm.forward_context")
        return context.set_forward_context(metadata, self.world.config, num_tokens=positions.shape[0])

    def _theirs(self, module: Module, given: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Memory after vLLM's own step, which is taken back."""
        memory, before = self.world.memory, self.world.memory.clone()
        self.own(module.compressor, given, positions, module.rope)
        after = memory.clone()
        memory.copy_(before)
        return after

    def _judge(self, module: Module, theirs: torch.Tensor, metadata: dict[str, Any]) -> Tally:
        from kvcondense.integrations.vllm_plugin.compressor import cache_of

        name = module.compressor.k_cache_prefix
        return judge(self.world.memory, theirs, cache_of(self.world.context[name]), metadata[name].slot_mapping)

    def _mutants(self, module: Module, given: torch.Tensor, metadata: dict[str, Any], positions: torch.Tensor) -> None:
        """Deliberate errors of the plugin, each of which must be seen."""
        memory, before, counts = self.world.memory, self.world.memory.clone(), self.counts.copy()
        with self._forward(metadata, positions):
            theirs = self._theirs(module, given, positions)
        for mutant in MUTANTS:
            with _wrong(mutant, module, metadata) as (told, rope), self._forward(told, positions):
                module.compressor(given, positions, rope)
            tally = self._judge(module, theirs, metadata)
            memory.copy_(before)
            status, why = (PASS, tally.why) if tally.status == FAIL else (FAIL, "not seen")
            self.mutants.append({"kind": module.kind, "mutant": mutant, "status": status, "why": why})
        self._check(f"{module.kind}: deliberate errors ran in the plugin", self.counts["own"] == counts["own"])
        self.counts.clear()
        self.counts.update(counts)

    def nothing_without_metadata(self) -> None:
        """A profile run writes nothing."""
        before, positions = self.world.memory.clone(), torch.zeros(4, dtype=torch.int64)
        with self._forward(None, positions):
            for module in self.world.modules:
                module.compressor(self._tokens(module, positions), positions, module.rope)
        self._check("a profile run writes nothing", torch.equal(before, self.world.memory))

    def padding_alone(self) -> None:
        """A batch without a token of anybody's, as a dummy run has it, writes nothing."""
        metadata, positions = self.world.metadata([Turn("c", 3, 3), Turn("d", 3, 3)], 2)
        told = {name: copy.copy(one) for name, one in metadata.items()}
        for one in told.values():
            one.slot_mapping = torch.full_like(one.slot_mapping, -1)
        before = self.world.memory.clone()
        with self._forward(told, positions):
            for module in self.world.modules:
                module.compressor(self._tokens(module, positions), positions, module.rope)
        self._check("padding alone writes nothing", torch.equal(before, self.world.memory))

    def tokens_in_no_order(self) -> None:
        """Tokens that are none of a request's next ones go to vLLM's own forward: the last two requests take turns."""
        metadata, positions = self.world.metadata([Turn("c", 2), Turn("d", 2)], 0)
        module = self.compared[-1]
        told = dict(metadata)
        name = module.compressor.state_cache.prefix
        told[name] = copy.copy(metadata[name])
        told[name].token_to_req_indices = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
        own = self.counts["own"]
        with self._forward(told, positions):
            module.compressor(self._tokens(module, positions), positions, module.rope)
        self._check("tokens in no order are left to vLLM's own forward", self.counts["own"] == own + 1)

    def _check(self, what: str, right: bool) -> None:
        self.checks.append({"check": what, "status": PASS if right else FAIL})

    def result(self) -> dict[str, Any]:
        """What was found, with what is looked at when all is counted, and the status of the whole."""
        counted = self.counts.copy()
        self._check("every step was the plugin's", counted["steps"] == self.calls and not counted["own"])
        self.padding_alone()
        self.tokens_in_no_order()
        kinds = [{"kind": kind, **asdict(tally)} for kind, tally in self.kinds.items()]
        for kind in kinds:
            kind["apart"] = float(f"{kind['apart']:.2e}")
        wrong = [one for one in (*kinds, *self.mutants, *self.checks) if one["status"] == FAIL]
        return {
            "status": FAIL if wrong else PASS,
            "memory": self.world.memory.shape[0],
            "history": [event[0] for event in HISTORY if not isinstance(event, str)],
            "kinds": kinds,
            "mutants": self.mutants,
            "checks": self.checks,
            "compressors": len(self.world.modules),
            "passes": self.passes,
            "plugin_steps": counted["steps"],
            "own_forwards": counted["own"],
            "plans_of_a_pass": counted["plans"] / self.passes,
        }


@contextmanager
def _wrong(mutant: str, module: Module, metadata: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Metadata and RoPE with a deliberate error, or weights with one meanwhile."""
    compressor, told, rope = module.compressor, dict(metadata), module.rope
    ape = compressor.ape.clone()
    if mutant == "a row further":
        other = told[compressor.k_cache_prefix] = copy.copy(told[compressor.k_cache_prefix])
        other.slot_mapping = torch.where(other.slot_mapping >= 0, other.slot_mapping + 1, -1)
    elif mutant == "without ape":
        compressor.ape.zero_()
    elif mutant == "RoPE a window late":
        rope = SimpleNamespace(cos_sin_cache=rope.cos_sin_cache.roll(-compressor.compress_ratio, 0))
    else:
        other = told[compressor.state_cache.prefix] = copy.copy(told[compressor.state_cache.prefix])
        other.block_table = torch.where(other.block_table > 0, other.block_table + 1, 0)
    yield told, rope
    compressor.ape.copy_(ape)
