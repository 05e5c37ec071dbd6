"""What a backend leaves in a quantised cache, byte by byte, against the golden pages of the rows that it returned."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from kvcondense.api import condense
from kvcondense.backends import Backend
from kvcondense.config import ModelConfig
from kvcondense.formats import CacheFormat
from kvcondense.golden.compare import same_bytes
from kvcondense.golden.run import CANARY, TENSOR_SCALE, all_bytes, golden_bytes, name_byte
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

_PAGE_ROWS = 3
_DECADES = 7.0
"""The norm's weight falls by this many powers of ten over a row, so that floors of scales are reached."""


def check(fmt: CacheFormat) -> Callable[[str | Backend], str | None]:
    """A run that fills a cache in ``fmt`` in hostile surroundings; it returns None, or the first wrong byte."""

    def run(impl: str | Backend) -> str | None:
        config = ModelConfig.FLASH
        spec = CompressorSpec.indexer(config) if fmt.head_dim == config.index_head_dim else CompressorSpec.csa(config)
        # Fewer tokens per row cost less, and how a row is stored does not depend on its ratio.
        spec = replace(spec, ratio=2)
        d, gen = spec.head_dim, torch.Generator().manual_seed(5)
        tokens = torch.randn(20, spec.projected, generator=gen)
        tokens[15] = float("nan")  # one row of NaN, and what the next row makes of it
        falling = 10 ** -(_DECADES * torch.arange(d) / d)
        weights = CompressorWeights(
            norm=falling * (1 + 0.3 * torch.randn(d, generator=gen)), ape=torch.randn(2, spec.width, generator=gen)
        )
        scale = TENSOR_SCALE if fmt.tensor_scale else None
        page_rows = max(_PAGE_ROWS, fmt.tile)
        cache = PagedCache.allocate(d, 5, page_rows, format=fmt, tensor_scale=scale)
        cache.fill(CANARY)
        before = cache.copy()
        # Request 0 completes six windows, one of them for nobody; request 1 four; slots in no order.
        slots = torch.full((20,), -1)
        slots[1::2] = torch.tensor([7, 0, 14, 3, -1, 5, 9, 1, 12, 10])
        batch = RaggedBatch.build([0, 12, 20], start_positions=[0, 0], state_slots=[0, 1], slot_mapping=slots)
        rope = RopeTable.build(config, 20)
        rows = condense(spec, tokens, weights, rope, batch, state=StatePool.ring(spec, 2), cache=cache, impl=impl)
        written = {s: row for s, row in zip(rows.slot.tolist(), rows.values, strict=True) if s >= 0}
        if len(written) != 9:
            return f"{len(written)} rows were returned for the cache instead of 9"
        name = functools.partial(name_byte, fmt, d, page_rows, cache.data.shape[0])
        result = same_bytes(name)(all_bytes(cache), golden_bytes(before, written))
        return None if result.passed else f"{fmt.name}: {result.detail}"

    return run
