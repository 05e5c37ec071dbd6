"""V4.1's compressors beside the plugin: histories of requests on rings, with metadata of vLLM's own builder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engines.judge import FAIL, PASS, SHARE, apart

from in_vllm import ground, tiny, world
from in_vllm.judge import Counts
from in_vllm.world import Turn

Say = Callable[[str], None]
# As in ``modules``; a request has one ring, the last free one.
HISTORY: tuple[Any, ...] = (
    ("prefill, which ends inside a window and at its end", (Turn("a", 37), Turn("b", 6)), 0),
    ("chunks that begin in a window, shorter and longer than a ring", (Turn("a", 4), Turn("b", 21), Turn("c", 1)), 0),
    ("decode", (Turn("c", 1), Turn("a", 1), Turn("b", 1)), 0),
    ("verify, drafts rejected", (Turn("a", 6, 4), Turn("b", 5, 2), Turn("c", 4, 3)), 0),
    ("verify over what was rejected, padded", (Turn("b", 5, 1), Turn("a", 7, 6)), 5),
    ("decode, padded", (Turn("c", 1), Turn("b", 1), Turn("a", 1)), 2),
    "end b",
    ("a new request on a recycled ring, one without tokens", (Turn("d", 9), Turn("a", 0), Turn("c", 2)), 0),
    ("a chunk of a ring's size, padded", (Turn("d", 8), Turn("a", 3), Turn("c", 16)), 3),
    ("decode", (Turn("a", 1), Turn("c", 1), Turn("d", 1)), 0),
)  # fmt: skip
MODULES = ((2, 8, False), (1, 0, False), (2, 16, False), (2, 8, True), (1, 0, True))
"""Ratio, rows of a ring, and whether plans and steps are those of a GPU: Triton's, interpreted."""
MUTANTS = ("a ring further", "tokens of others")
_RINGS, _PAGE, _LEAST = 6, 64, 2.0**-20
"""Rings of a module, rows of a page, and how far latents near zero, where sums cancel, may be apart."""


@dataclass
class Tally(Counts):
    """Bytes compared and those that differ: of latents, of rings, of pages that vLLM's own ``insert_cache`` fills."""

    kind: str = ""
    latent_bytes: int = 0
    latent_differ: int = 0
    ring_bytes: int = 0
    ring_differ: int = 0
    page_bytes: int = 0
    page_differ: int = 0


def run(folder: Path, say: Say) -> dict[str, Any]:
    """The part's result."""
    begun = time.monotonic()
    ground.before_vllm()
    import_module("vllm")
    ground.after_vllm()
    config = world.opened(folder)
    import kvcondense_vllm
    from kvcondense.bound import Bound

    kvcondense_vllm.register()
    counts: Counter[str] = Counter()
    condense = Bound.condense

    def counted(*given: Any) -> Any:
        counts["steps"] += 1
        return condense(*given)

    setattr(Bound, "condense", counted)  # noqa: B010
    played = []
    with import_module("vllm.config").set_current_vllm_config(config), torch.inference_mode():
        for layer, (ratio, rows, gpu) in enumerate(MODULES):
            with _as_on_a_gpu() if gpu else nullcontext():
                played.append(_Play(config, layer, ratio, rows, gpu).play(say))
    kinds = [asdict(tally) | {"apart": float(f"{tally.apart:.2e}")} for tally, _ in played]
    mutants = [mutant for _, found in played for mutant in found]
    every = PASS if counts["steps"] == sum(kind["steps"] for kind in kinds) + len(mutants) else FAIL
    wrong = [one for one in (*kinds, *mutants, {"status": every}) if one["status"] == FAIL]
    return {
        "status": FAIL if wrong else PASS,
        "history": [event[0] for event in HISTORY if not isinstance(event, str)],
        "kinds": kinds,
        "mutants": mutants,
        "checks": [{"check": "every step was the plugin's", "status": every}],
        "seconds": round(time.monotonic() - begun, 1),
    }


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Static plans by Triton's planner and steps by its kernels meanwhile, which ask for no value."""
    from kvcondense import planning
    from kvcondense.integrations.vllm_plugin import latents, steps

    places = ((steps, "on_host", lambda _: False), (planning, "_launches", lambda _: True),
              (latents, "bind", partial(latents.bind, impl="triton")))  # fmt: skip
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, other in places:
        setattr(owner, name, other)
    yield
    for (owner, name, _), own in zip(places, before, strict=True):
        setattr(owner, name, own)


class _Play:
    """A module on rings of its own; every step starts on both sides from what the plugin's last one left."""

    def __init__(self, config: Any, layer: int, ratio: int, rows: int, gpu: bool) -> None:
        v41 = import_module("vllm.models.deepseek_v41.compressor")
        prefix = f"model.layers.{layer}.v41"
        self.config = config
        self.kind = f"ratio {ratio}{f', rings of {rows} rows' if rows else ''}{', as on a GPU' if gpu else ''}"
        self.module = v41.DeepseekCompressor(config, ratio, 256, 512, prefix=prefix, k_cache_prefix=f"{prefix}.k_cache")
        tiny.randomise(None, self.module)
        self.gen = torch.Generator().manual_seed(layer)
        self.rings, state = torch.zeros(0), self.module.state_cache
        if state is not None:
            state.block_size = rows
            self.rings = torch.randn(_RINGS, rows * 1024 + 64, generator=self.gen)
            state.bind_kv_cache(self.rings.as_strided((_RINGS, 1, rows, 1024), (rows * 1024 + 64, 0, 1024, 1)))
            spec = state.get_kv_cache_spec(config)
            self.builder = v41.CompressorMetadataBuilder(spec, [state.prefix], config, torch.device("cpu"))
        self.pages = torch.randn(8, _PAGE, 512, generator=self.gen).bfloat16()
        config.compilation_config.static_forward_context[f"{prefix}.k_cache"] = SimpleNamespace(kv_cache=self.pages)
        self.rope = SimpleNamespace(cos_sin_cache=torch.randn(1024, 64, generator=self.gen))
        self.free, self.ring, self.length = list(range(1, _RINGS)), {}, Counter()

    def play(self, say: Say) -> tuple[Tally, list[dict[str, str]]]:
        """The whole history, and what deliberate errors in its first step came to."""
        sums, mutants = Tally(kind=self.kind), []
        for event in HISTORY:
            if isinstance(event, str):
                self.free.append(self.ring.pop(name := event.split()[1]))
                del self.length[name]
                continue
            what, turns, padding = event
            told, positions = self._metadata(list(turns), padding)
            x = torch.randn(positions.shape[0], 512 * self.module.compress_ratio, generator=self.gen)
            if not sums.steps:
                mutants = [self._mutant(mutant, told, x, positions) for mutant in MUTANTS[self.rings.numel() == 0 :]]
            tally = self._compared(told, x, told, x, positions)
            say(f"{self.kind}: {what}: {tally.status}{tally.why and f' ({tally.why})'}")
            sums.add(tally)
            for turn in turns:
                self.length[turn.request] += turn.tokens - turn.rejected
        if sums.latent_differ > max(1.0, SHARE * sums.latent_bytes):
            sums.status, sums.why = FAIL, sums.why or "too many bytes of latents"
        return sums, mutants

    def _metadata(self, turns: list[Turn], padding: int) -> tuple[dict[str, Any], torch.Tensor]:
        """Metadata by layer and positions; vLLM's builder gives padding slots of the first request's ring."""
        for turn in turns:
            if turn.request not in self.ring:
                self.ring[turn.request] = self.free.pop()
        lengths = torch.tensor([turn.tokens for turn in turns], dtype=torch.int32)
        begins = [self.length[turn.request] for turn in turns]
        runs = [torch.arange(begin, begin + turn.tokens) for begin, turn in zip(begins, turns, strict=True)]
        positions = torch.cat([*runs, torch.zeros(padding, dtype=torch.int64)])
        owner = torch.arange(len(turns)).repeat_interleave(lengths)
        ratio, at = self.module.compress_ratio, positions[: owner.shape[0]]
        rings = torch.tensor([[self.ring[turn.request]] for turn in turns], dtype=torch.int32)
        slots = torch.where((at + 1) % ratio == 0, rings[owner, 0] * _PAGE + at // ratio, -1)
        slots = torch.cat([slots, torch.full((padding,), -1)])
        told: dict[str, Any] = {self.module.k_cache_prefix: SimpleNamespace(slot_mapping=slots)}
        if self.module.state_cache is not None:
            ends = torch.tensor(begins, dtype=torch.int32) + lengths
            common = world.common(lengths, ends, rings, slots, positions)
            told[self.module.state_cache.prefix] = self.builder.build(0, common)
        return told, positions

    def _step(
        self, told: dict[str, Any], x: torch.Tensor, positions: torch.Tensor, own: bool
    ) -> tuple[torch.Tensor, ...]:
        """Latents, rings and pages behind a step of vLLM's own forward, or the plugin's; the memory stays as it was."""
        forward = type(self.module).forward
        before = self.rings.clone(), self.pages.clone()
        context = import_module("vllm.forward_context")
        with context.set_forward_context(told, self.config, num_tokens=positions.shape[0]):
            latent = (forward.__wrapped__ if own else forward)(self.module, x, positions)
            self.module.insert_cache(latent, positions, self.rope)
        after = latent, self.rings.clone(), self.pages.clone()
        self.rings.copy_(before[0])
        self.pages.copy_(before[1])
        return after

    def _compared(
        self, told: dict[str, Any], x: torch.Tensor, wrong: dict[str, Any], other: torch.Tensor, positions: torch.Tensor
    ) -> Tally:
        """vLLM's own step beside the plugin's, of what is ``wrong`` there on purpose; memory is then the plugin's."""
        theirs, mine = self._step(told, x, positions, True), self._step(wrong, other, positions, False)
        self.rings.copy_(mine[1])
        self.pages.copy_(mine[2])
        ends = torch.nonzero(told[self.module.k_cache_prefix].slot_mapping >= 0)[:, 0]
        rings = [one.clone() for one in (mine[1], theirs[1])]
        if rings[0].numel():
            self._forget(rings, told)
        latents = [one[ends].view(torch.int16) for one in (mine[0], theirs[0])]
        found = Tally(kind=self.kind, steps=1)
        for name, pair in (("latent", latents), ("ring", rings), ("page", [mine[2], theirs[2]])):
            one, two = (t.contiguous().view(torch.uint8) for t in pair)
            setattr(found, f"{name}_bytes", one.numel())
            setattr(found, f"{name}_differ", int((one != two).sum()))
        one, two = (t[ends].float() for t in (mine[0], theirs[0]))
        found.apart = apart(one, two) if found.latent_differ else 0.0
        for why, bad in (
            (f"{found.ring_differ} bytes of rings", found.ring_differ),
            ("latents by more than one step", not torch.allclose(one, two, rtol=2.0**-7, atol=_LEAST)),
            (f"{found.page_differ} bytes of pages", found.page_differ and not found.latent_differ),
        ):
            found.why = found.why or (why if bad else "")
        found.status = FAIL if found.why else PASS
        return found

    def _forget(self, rings: list[torch.Tensor], told: dict[str, Any]) -> None:
        """The one row that is not kept here: the oldest of a whole ring, if it ends its window."""
        state = self.module.state_cache
        bounds = told[state.prefix].query_start_loc.tolist()
        slots = told[state.prefix].slot_mapping
        for first, end in pairwise(bounds):
            oldest = int(slots[end - state.block_size]) if end - first >= state.block_size else 0
            if oldest % 2:
                block, row = divmod(oldest, state.block_size)
                for one in rings:
                    one[block, 1024 * row : 1024 * (row + 1)] = 0

    def _mutant(self, mutant: str, told: dict[str, Any], x: torch.Tensor, positions: torch.Tensor) -> dict[str, str]:
        """A deliberate error on the plugin's side, which must be seen; memory is then as before."""
        before, wrong, state = (self.rings.clone(), self.pages.clone()), dict(told), self.module.state_cache
        if mutant == "tokens of others":
            tally = self._compared(told, x, wrong, x.roll(1, 0), positions)
        else:
            one = told[state.prefix]
            further = torch.where(one.slot_mapping >= 0, one.slot_mapping - state.block_size, -1)
            wrong[state.prefix] = SimpleNamespace(slot_mapping=further, query_start_loc=one.query_start_loc)
            tally = self._compared(told, x, wrong, x, positions)
        self.rings.copy_(before[0])
        self.pages.copy_(before[1])
        status, why = (PASS, tally.why) if tally.status == FAIL else (FAIL, "not seen")
        return {"kind": self.kind, "mutant": mutant, "status": status, "why": why}
