"""Small scenarios that a right compressor passes and every mutant fails at least one of.

Each runs a backend through the public API in hostile memory (NaN in the state, a pattern in the cache) and compares
with the token-by-token golden reference. One step from an empty state would pass almost any implementation: the
softmax is one-hot. So all of them go past the third window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from kvcondense.api import condense
from kvcondense.backends import Backend
from kvcondense.config import ModelConfig
from kvcondense.conformance import stored_bytes
from kvcondense.errors import KvCondenseError
from kvcondense.formats import FORMATS, get_format
from kvcondense.golden.compare import row_bounds
from kvcondense.golden.decode import DecodeCompressor, sylvester
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

# Flash with narrow heads: real theta, YaRN and eps; ratios 4 (overlapping) and 128.
_CONFIG = replace(ModelConfig.FLASH, name="small", hidden_size=64, head_dim=64, rope_dim=16, index_head_dim=32)
_SPECS = {
    "csa": CompressorSpec.csa(_CONFIG),
    "hca": CompressorSpec.hca(_CONFIG),
    "indexer": CompressorSpec.indexer(_CONFIG),
}
_FAR = 70_000
_PATTERN = 7.0
_MIN_EQUAL = 0.99


@dataclass(frozen=True)
class Scenario:
    """A named check; ``run`` returns None, or in a sentence what went wrong."""

    name: str
    run: Callable[[str | Backend], str | None]


class _Rig:
    """Several requests with random tokens, a poisoned ring, a patterned cache, and the rows that must come out."""

    def __init__(
        self,
        spec: CompressorSpec,
        impl: str | Backend,
        lengths: list[int],
        *,
        scale: float = 1.0,
        first: int = 0,
        max_draft: int = 0,
    ) -> None:
        self.spec, self.impl, self.first = spec, impl, first
        gen = torch.Generator().manual_seed(len(lengths) * 1000 + spec.ratio)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen)

        self.tokens = [randn(n, spec.projected) * scale for n in lengths]
        self.weights = CompressorWeights(
            norm=1 + 0.3 * randn(spec.head_dim), ape=0.5 * randn(spec.ratio, spec.width) * scale
        )
        self.rope = RopeTable.build(_CONFIG, first + max(lengths) + 1)
        requests = len(lengths)
        self.state = StatePool.ring(spec, requests + 2, spec.required_ring_rows(max_draft))
        self.state.data.fill_(float("nan"))
        self.slots = (torch.randperm(requests, generator=gen) + 1).tolist()
        page_rows, pages = 4, (first + max(lengths)) // spec.ratio // 4 + 1
        self.cache = PagedCache.allocate(spec.head_dim, requests * pages + 1, page_rows)
        self.cache.rows.fill_(_PATTERN)
        # Page 0 belongs to nobody: it guards cache row 0.
        self.table = (torch.randperm(requests * pages, generator=gen) + 1).view(requests, pages)
        self.done = [first] * requests

    def step(self, counts: list[int], *, drafts: int = 0, junk: float | None = None, padding: int = 0) -> None:
        """Feed the next ``counts`` tokens of each request; the last ``drafts`` hold ``junk`` and are taken back."""
        chunks = []
        for q, n in enumerate(counts):
            at = self.done[q] - self.first
            chunk = self.tokens[q][at : at + n].clone()
            if junk is not None and n:
                chunk = torch.cat([chunk[: n - drafts], torch.full((drafts, self.spec.projected), junk)])
            chunks.append(chunk)
        pad = torch.full((padding, self.spec.projected), float("nan"))
        batch = RaggedBatch.build(
            [0, *torch.tensor([c.shape[0] for c in chunks]).cumsum(0).tolist()],
            start_positions=self.done,
            state_slots=self.slots,
            block_table=self.table,
            draft_rows=drafts,
        )
        condense(
            self.spec,
            torch.cat([*chunks, pad]),
            self.weights,
            self.rope,
            batch,
            state=self.state,
            cache=self.cache,
            impl=self.impl,
        )
        for q, chunk in enumerate(chunks):
            self.done[q] += chunk.shape[0] - (drafts if junk is not None and chunk.shape[0] else 0)

    def verdict(self) -> str | None:
        """Compare the whole cache with the golden reference; rows that nobody should write must hold the pattern."""
        spec = self.spec
        expected = torch.full_like(self.cache.rows, _PATTERN)
        for q, tokens in enumerate(self.tokens):
            decode = DecodeCompressor(
                spec,
                self.weights.ape,
                self.weights.norm,
                self.rope.cos,
                self.rope.sin,
                sylvester(spec.head_dim) if spec.rotate else None,
            )
            for i in range(self.done[q] - self.first):
                kv, score = tokens[i].split(spec.width)
                row = decode.step(kv, score, self.first + i)
                if row is not None:
                    page, at = divmod((self.first + i) // spec.ratio, self.cache.page_rows)
                    expected[self.table[q, page], at] = row.to(expected.dtype)
        return _judge(spec, self.cache.rows, expected)


def _judge(spec: CompressorSpec, actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    written = (expected != _PATTERN).any(-1)
    if not torch.equal(actual[~written], expected[~written]):
        return "a cache row was written that no window of this step owns"
    if not bool(written.any()):
        return "no row was expected; the scenario checks nothing"
    result = row_bounds(spec, _MIN_EQUAL)(actual[written], expected[written])
    return None if result.passed else f"wrong rows: {result.detail}"


def _history(spec: CompressorSpec, scale: float) -> Callable[[str | Backend], str | None]:
    def run(impl: str | Backend) -> str | None:
        w, r = spec.window, spec.ratio
        rig = _Rig(spec, impl, [3 * w + r + 3, 4 * w, 2 * r + 1], scale=scale)
        rig.step([3 * w + 1, 1, r])  # a chunk longer than the ring, a first token, a whole window
        rig.step([0, 2 * w, 1])
        for _ in range(min(r + 2, 8)):
            rig.step([1, 1, 0])
        rig.step([t.shape[0] - n for t, n in zip(rig.tokens, rig.done, strict=True)])
        return rig.verdict()

    return run


def _rollback(spec: CompressorSpec, width: int) -> Callable[[str | Backend], str | None]:
    def run(impl: str | Backend) -> str | None:
        rig = _Rig(spec, impl, [4 * spec.window, 3 * spec.window], max_draft=width)
        rig.step([spec.window + 1, spec.window + spec.ratio - 1])
        while min(n - d for n, d in zip([4 * spec.window, 3 * spec.window], rig.done, strict=True)) > width + 1:
            for junk in (float("nan"), 1e4):
                rig.step([width + 1, width + 1], drafts=width, junk=junk)  # accepts one token, rejects the rest
            if rig.done[1] > 2 * spec.window:
                break
        # True tokens over the places of the rejected ones, then decode: what a draft left behind would show now.
        rig.step([width, width], drafts=width)
        for _ in range(min(spec.ratio + 1, 8)):
            rig.step([1, 1])
        rig.step([t.shape[0] - n for t, n in zip(rig.tokens, rig.done, strict=True)])
        # Rows that only rejected drafts completed are not visible; drop them before looking.
        for q in range(2):
            for c in range(spec.visible_rows(rig.done[q]), rig.table.shape[1] * rig.cache.page_rows):
                page, at = divmod(c, rig.cache.page_rows)
                rig.cache.rows[rig.table[q, page], at] = _PATTERN
        return rig.verdict()

    return run


def _inert(impl: str | Backend) -> str | None:
    """Padding rows, an inert request and slot -1 read nothing that matters and write nothing."""
    spec = _SPECS["csa"]
    rig = _Rig(spec, impl, [24])
    rig.step([13], padding=5)
    kv_score = torch.cat([rig.tokens[0][13:24], torch.full((9, spec.projected), float("nan"))])
    mapping = torch.full((20,), -1)
    for t in range(11):
        if (13 + t + 1) % 4 == 0 and t != 2:  # the window that ends at position 15 is not to be written
            page, at = divmod((13 + t) // 4, 4)
            mapping[t] = rig.table[0, page] * 4 + at
    batch = RaggedBatch.build(
        [0, 11, 16], start_positions=[13, 3], state_slots=[rig.slots[0], -1], slot_mapping=mapping
    )
    before = rig.state.data.clone()
    condense(spec, kv_score, rig.weights, rig.rope, batch, state=rig.state, cache=rig.cache, impl=impl)
    rig.done = [24]
    changed = ~torch.eq(rig.state.data.nan_to_num(0), before.nan_to_num(0)).all(-1)
    ring = rig.state.layout.num_rows // 3
    if bool(changed[: rig.slots[0] * ring].any()) or bool(changed[(rig.slots[0] + 1) * ring :].any()):
        return "a state row of another slot was written"
    page, at = divmod(3, 4)
    skipped = rig.cache.rows[rig.table[0, page], at]
    if not bool((skipped == _PATTERN).all()):
        return "a window with slot -1 was written"
    rig.cache.rows[rig.table[0, page], at] = condense(
        spec, rig.tokens[0][:16], rig.weights, rig.rope, RaggedBatch.build([0, 16], start_positions=[0]), impl=impl
    ).values[3]
    return rig.verdict()


def _recycled(spec: CompressorSpec) -> Callable[[str | Backend], str | None]:
    def run(impl: str | Backend) -> str | None:
        rig = _Rig(spec, impl, [2 * spec.window + spec.ratio])
        rig.step([spec.window + spec.ratio - 1])  # a first occupant
        rig.tokens[0] = rig.tokens[0].flip(0)
        rig.done = [0]
        rig.cache.rows.fill_(_PATTERN)
        for count in (1, spec.ratio, spec.window + 2):  # the next one starts over in the same slot
            rig.step([count])
        return rig.verdict()

    return run


def _far(spec: CompressorSpec) -> Callable[[str | Backend], str | None]:
    def run(impl: str | Backend) -> str | None:
        first = _FAR // spec.ratio * spec.ratio
        rig = _Rig(spec, impl, [2 * spec.window], first=first)
        seed = torch.zeros(first - spec.live_start(first), spec.state_dim)
        seed[:, spec.width :] = FP32_LOWEST
        import_live(spec, rig.state, RaggedBatch.build([0, 0], start_positions=[first], state_slots=rig.slots), seed)
        rig.step([2 * spec.window])
        return rig.verdict()

    return run


def _tiny(impl: str | Backend) -> str | None:
    """Inputs around the square root of eps, where a wrong eps shows."""
    rig = _Rig(_SPECS["csa"], impl, [40])
    rig.tokens[0][:, : rig.spec.width] *= 2e-3
    rig.step([40])
    return rig.verdict()


def _beyond_int32(impl: str | Backend) -> str | None:
    """A cache row whose byte offset needs more than 31 bits (untouched pages of the buffer cost no memory)."""
    spec = replace(_SPECS["hca"], ratio=2, head_dim=512, rope_dim=64)
    gen = torch.Generator().manual_seed(3)
    tokens = torch.randn(8, spec.projected, generator=gen)
    weights = CompressorWeights(norm=torch.ones(512), ape=torch.randn(2, 512, generator=gen))
    rope = RopeTable.build(ModelConfig.FLASH, 8)
    rows = (1 << 31) // 1024 + 8
    cache = PagedCache(torch.empty(rows // 8, 8 * 1024, dtype=torch.uint8), get_format("bf16"), 512, 8)
    wanted = torch.tensor([5, rows - 3, 6, rows - 1])
    cache.rows[(wanted - rows + 8).clamp(min=0) // 8] = 0
    mapping = torch.full((8,), -1)
    mapping[1::2] = wanted
    batch = RaggedBatch.build([0, 8], start_positions=[0], slot_mapping=mapping)
    condense(spec, tokens, weights, rope, batch, cache=cache, impl=impl)
    expected = condense(spec, tokens, weights, rope, RaggedBatch.build([0, 8], start_positions=[0]))
    if not torch.equal(cache.rows[wanted // 8, wanted % 8], expected.values.bfloat16()):
        return "a row beyond byte offset 2^31 is not where it belongs"
    return None


def scenarios() -> Iterator[Scenario]:
    """All scenarios, cheap ones first."""
    for kind in ("csa", "hca", "indexer"):
        for scale in (1.0, 0.1):
            yield Scenario(f"history-{kind}-x{scale:g}", _history(_SPECS[kind], scale))
    yield Scenario("tiny-inputs", _tiny)
    yield Scenario("inert", _inert)
    for kind in ("csa", "indexer"):
        yield Scenario(f"recycled-slot-{kind}", _recycled(_SPECS[kind]))
    for kind in ("csa", "hca"):
        yield Scenario(f"far-position-{kind}", _far(_SPECS[kind]))
    for width in (1, 3, 7):
        yield Scenario(f"rollback-csa-{width}", _rollback(_SPECS["csa"], width))
    yield Scenario("rollback-hca-5", _rollback(_SPECS["hca"], 5))
    for fmt in FORMATS.values():
        if fmt.scaled is not None:
            yield Scenario(f"bytes-{fmt.name}", stored_bytes.check(fmt))
    yield Scenario("beyond-int32", _beyond_int32)


def first_failure(impl: str | Backend) -> tuple[str, str] | None:
    """Name and detail of the first scenario that ``impl`` fails; errors it runs into count as failures."""
    for scenario in scenarios():
        try:
            detail = scenario.run(impl)
        except (KvCondenseError, RuntimeError, IndexError) as error:
            detail = f"{type(error).__name__}: {error}"
        if detail is not None:
            return scenario.name, detail
    return None
