"""``kvcondense bench --bundle``: a request of DeepSeek-V4-Flash to a file and back, beside plain copies."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcondense.bench import measure
from kvcondense.bundle import Bundle, Held, create
from kvcondense.bundle.held import row_bytes
from kvcondense.config import ModelConfig
from kvcondense.files import replacing
from kvcondense.formats import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec

_ROUNDS = 5
_FORMATS = {"main": "fp8_model1", "indexer": "fp8_indexer_pow2"}
_PAGE_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A request of ``tokens`` tokens, all compressors of the model."""

    name: str
    tokens: int
    flops: int = 0

    @property
    def compressors(self) -> list[tuple[int, str, CompressorSpec]]:
        """Layer, part and spec of each."""
        flash = ModelConfig.FLASH
        return [
            (layer, part, CompressorSpec.for_layer(flash, layer, part))
            for layer in flash.compressor_layers
            for part in CompressorSpec.parts_of_layer(flash, layer)
        ]

    @property
    def bytes(self) -> int:
        """Of rows and live state."""
        total = 0
        for _, part, spec in self.compressors:
            total += spec.visible_rows(self.tokens) * row_bytes(get_format(_FORMATS[part]), spec.head_dim)
            total += 4 * spec.seed_rows(self.tokens) * spec.state_dim
        return total


CASES = {case.name: case for case in (Case("bundle 100000, Flash", 100_000),)}


def run_case(
    case: Case, rates: measure.Rates, say: Callable[[str], None], *, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Records: written, read back and checked, each beside a copy of as many bytes to or from a file, warm."""
    del rates, say
    kinds: dict[CompressorSpec, Held] = {}
    for _, part, spec in case.compressors:
        if spec not in kinds:  # layers of a kind share memory here
            kinds[spec] = _held(spec, _FORMATS[part], case.tokens, device)
    targets = {spec: _held(spec, h.cache.format.name, case.tokens, device) for spec, h in kinds.items()}
    sizes = [
        kinds[s].spec.visible_rows(case.tokens) * row_bytes(kinds[s].cache.format, s.head_dim)
        + 4 * s.seed_rows(case.tokens) * s.state_dim
        for _, _, s in case.compressors
    ]
    buffer = torch.zeros(max(sizes), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = Path(folder) / "all.bundle", Path(folder) / "plain"

        def write() -> None:
            with create(path) as file:
                for layer, part, spec in case.compressors:
                    file.add(layer, part, kinds[spec])

        def restore() -> None:
            with Bundle(path) as bundle:
                for layer, part, spec in case.compressors:
                    bundle.restore(layer, part, targets[spec])

        def check() -> None:
            with Bundle(path) as bundle:
                bundle.check()

        def copy_out() -> None:
            with replacing(plain) as made, made.open("wb", buffering=0) as file:  # as safe, and a new file, too
                for size in sizes:
                    file.write(buffer[:size].numpy().data)

        def copy_in() -> None:
            with plain.open("rb", buffering=0) as file:
                for size in sizes:
                    file.readinto(buffer[:size].numpy().data)

        ways = {"write": write, "plain copy to a file": copy_out, "restore": restore,
                "plain copy from a file": copy_in, "check": check}  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - begun)
        size = path.stat().st_size
    for spec, one in kinds.items():
        a, b = (h.cache.get(h.slots(0, spec.visible_rows(case.tokens))) for h in (one, targets[spec]))
        if not all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a):
            yield {"case": case.name, "runner": "restore", "wrong": 1.0}
            return
    for name, seconds in times.items():
        yield {"case": case.name, "runner": name, "us": round(1e6 * measure.median(seconds), 2), "file_bytes": size}


def _held(spec: CompressorSpec, fmt: str, tokens: int, device: str) -> Held:
    page_rows = max(1, _PAGE_TOKENS // spec.ratio)
    pages = -(-spec.visible_rows(tokens) // page_rows)
    cache = PagedCache.allocate(spec.head_dim, pages, page_rows, format=fmt, device=device)
    cache.data.random_(256)
    rows = torch.randn(1, spec.required_ring_rows(0), spec.state_dim, device=device)
    batch = RaggedBatch.at(tokens, state_slot=0, device=device)
    return Held(spec, StatePool.wrap(rows, paged=False), batch, cache, torch.randperm(pages, device=device))
