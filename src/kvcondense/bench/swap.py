"""``kvcondense bench --swap``: states of requests of DeepSeek-V4-Flash to host memory and back, beside plain copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvcondense.bench import measure
from kvcondense.config import ModelConfig
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.hosted import HostedStates
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec

_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """States of ``requests`` requests of ``tokens`` tokens, all compressors of the model; whole: slots, not rows."""

    name: str
    requests: int
    tokens: int
    whole: bool
    flops: int = 0

    @property
    def compressors(self) -> dict[str, CompressorSpec]:
        """By layer and part."""
        flash = ModelConfig.FLASH
        return {
            f"{layer} {part}": CompressorSpec.for_layer(flash, layer, part)
            for layer in flash.compressor_layers
            for part in CompressorSpec.parts_of_layer(flash, layer)
        }

    @property
    def bytes(self) -> int:
        """That move, one way."""
        rows = [
            (spec.required_ring_rows(0) if self.whole else spec.seed_rows(self.tokens)) * spec.state_dim
            for spec in self.compressors.values()
        ]
        return 4 * self.requests * sum(rows)


CASES = {
    case.name: case
    for case in (
        Case("swap 8 requests, whole slots", 8, 100_032, True),
        Case("swap 8 requests, live rows", 8, 100_032, False),  # half a window of ratio 128
    )
}


def run_case(
    case: Case, rates: measure.Rates, say: Callable[[str], None], *, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Records: all requests out, and in again, into other slots; and a copy of as many bytes in one piece."""
    del rates, say
    many, tokens = case.requests, case.tokens
    pools = {k: (spec, StatePool.ring(spec, many, device=device)) for k, spec in case.compressors.items()}
    rows = {k: torch.randn(many, spec.seed_rows(tokens), spec.state_dim) for k, (spec, _) in pools.items()}
    hosted, slots = HostedStates(pools, many), list(range(many))
    for k, (spec, pool) in pools.items():
        pool.data.fill_(0)  # so that every page is there
        for request, slot in enumerate(slots):
            import_live(spec, pool, RaggedBatch.at(tokens, state_slot=slot), rows[k][request])
    here, there = torch.ones(case.bytes, dtype=torch.uint8), torch.ones(case.bytes, dtype=torch.uint8)

    def out() -> None:
        for request, slot in enumerate(slots):
            hosted.swap_out(request, slot, None if case.whole else tokens)

    def back() -> None:
        slots.append(slots.pop(0))
        for request, slot in enumerate(slots):
            hosted.swap_in(request, slot)

    ways = {"out": out, "in": back, "plain copy": lambda: there.copy_(here)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            times[name].append(measure.clock(way))
    for k, (spec, pool) in pools.items():
        for request, slot in enumerate(slots):
            if not torch.equal(export_live(spec, pool, RaggedBatch.at(tokens, state_slot=slot)), rows[k][request]):
                yield {"case": case.name, "runner": "kvcondense", "wrong": float("inf")}
                return
    plain = measure.median(times["plain copy"])
    for name, seconds in times.items():
        us = 1e6 * measure.median(seconds)
        yield {
            "case": case.name,
            "runner": name,
            "us": round(us, 2),
            "swapped_bytes": case.bytes,
            "gb_per_s": round(case.bytes / us / 1e3, 2),
            "of_plain": round(us / 1e6 / plain, 3),
        }
