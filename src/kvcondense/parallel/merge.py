"""Windows whose tokens lie on several ranks, pooled where their tokens are: (m, l, o) travel instead of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcondense.api import CondensedRows
from kvcondense.backends.reference import Stages
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.parallel.exchange import swap
from kvcondense.parallel.shards import Segment, Shards
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages import pool, store, window
from kvcondense.weights import CompressorWeights

STATISTICS = 3
"""m, l and o of each channel."""


class Spread(NamedTuple):
    """A window of a sequence that the reader's segment ends, and that reads tokens before that segment."""

    reader: int
    segment: int
    sequence: int
    window: int

    def span(self, spec: CompressorSpec) -> tuple[int, int]:
        """Its first position, and the one behind its last."""
        end = (self.window + 1) * spec.ratio
        return max(0, end - spec.window), end


def spread(spec: CompressorSpec, shards: Shards) -> list[Spread]:
    """Of all ranks; each knows all of them, in one order."""
    return [
        Spread(rank, index, s.sequence, ended)
        for rank, segments in enumerate(shards.segments)
        for index, s in enumerate(segments)
        for ended in _early(spec, s)
    ]


def _early(spec: CompressorSpec, s: Segment) -> range:
    """Windows that end in a segment and begin before it: as many as ``spec.halves`` at most."""
    first, beyond = s.start // spec.ratio, s.end // spec.ratio
    whole = -(-s.start // spec.ratio) + spec.halves - 1 if s.start else 0  # the first that begins in the segment
    return range(first, min(whole, beyond))


def crossing(spec: CompressorSpec, shards: Shards) -> Iterator[tuple[int, int, int]]:
    """(sender, reader, values of fp32) of the statistics that go from one rank to another."""
    for one in spread(spec, shards):
        for rank in _ranks(shards, one, spec):
            if rank != one.reader:
                yield rank, one.reader, STATISTICS * spec.head_dim


def _ranks(shards: Shards, one: Spread, spec: CompressorSpec) -> list[int]:
    """Who has tokens of a window, or holds them as rows of a state, in the order in which they are merged."""
    return sorted({piece.rank for piece in shards.pieces(one.sequence, *one.span(spec))})


@dataclass(frozen=True)
class Merged:
    """This rank's spread windows. pooled [n, d]: their P; last [n]: the numbers of their last tokens, int64."""

    spec: CompressorSpec
    shards: Shards
    windows: list[Spread]
    pooled: torch.Tensor
    last: torch.Tensor

    def stand_in(self, state: StatePool) -> None:
        """Zeros for the rows before segments, which lie elsewhere: what is made of them, ``put`` replaces."""
        for index in {one.segment for one in self.windows}:
            start = self.shards.own[index].start
            rows = state.data.new_zeros(self.spec.seed_rows(start), self.spec.state_dim)
            import_live(self.spec, state, RaggedBatch.at(start, state_slot=index, device=state.device), rows)

    def row(self, weights: CompressorWeights, rope: RopeTable | None) -> torch.Tensor:
        """Finished rows [n, d] of P: norm, RoPE at the window's first position, Hadamard."""
        index = torch.tensor([one.window for one in self.windows], dtype=torch.int64, device=self.pooled.device)
        return Stages().finish(self.spec, self.pooled, weights.norm, rope, index * self.spec.ratio)[1]

    def put(
        self, row: torch.Tensor, rows: CondensedRows, slot_mapping: torch.Tensor | None, cache: PagedCache | None
    ) -> None:
        """``row`` [n, d] of these windows in place of theirs in ``rows``, and to the cache at last tokens' slots."""
        if not self.windows:
            return
        place = {key: e for e, key in enumerate(zip(rows.request.tolist(), rows.window.tolist(), strict=True))}
        at = torch.tensor([place[one.segment, one.window] for one in self.windows], device=rows.values.device)
        rows.values[at] = row.to(rows.values.dtype)
        if slot_mapping is not None:
            rows.slot[at] = slot_mapping[self.last].to(rows.slot)
            if cache is not None:
                store.scatter(row, rows.slot[at], cache, not self.spec.rounding.row)


def merge(spec: CompressorSpec, shards: Shards, rows: torch.Tensor, ape: torch.Tensor | None) -> Merged:
    """P of this rank's spread windows, merged by rank. All ranks call it.

    rows [tokens + held, state_dim]: ``state_rows`` of this rank's tokens, and the rows of states that it holds.
    M = max_k m_k, l = sum_k l_k e^(m_k - M), o likewise, P = o / l, over ranks k in ascending order, whoever answers
    first.
    """
    windows = spread(spec, shards)
    parts = [_ranks(shards, one, spec) for one in windows]
    given: dict[int, list[Spread]] = {}
    for one, ranks in zip(windows, parts, strict=True):
        if shards.rank in ranks:
            given.setdefault(one.reader, []).append(one)
    sends = {reader: _statistics(spec, shards, some, rows, ape).flatten(1) for reader, some in given.items()}
    mine = [(one, ranks) for one, ranks in zip(windows, parts, strict=True) if one.reader == shards.rank]
    counts = Counter(rank for _, ranks in mine for rank in ranks)
    sizes = {rank: [count] for rank, count in counts.items()}
    told = swap(shards, sends, sizes, like=rows.new_empty(0, STATISTICS * spec.head_dim))
    coming = {rank: iter(found.view(-1, STATISTICS, spec.head_dim)) for rank, found in told.items()}
    merged = [_merged(torch.stack([next(coming[rank]) for rank in ranks])) for _, ranks in mine]  # [d] each
    own = [one for one, _ in mine]
    return Merged(
        spec=spec,
        shards=shards,
        windows=own,
        pooled=torch.stack(merged) if merged else rows.new_empty(0, spec.head_dim),
        last=torch.tensor([_last(spec, shards, one) for one in own], dtype=torch.int64, device=rows.device),
    )


def _last(spec: CompressorSpec, shards: Shards, one: Spread) -> int:
    """Number of a window's last token with its reader."""
    end = one.span(spec)[1]
    return shards.pieces(one.sequence, end - 1, end)[0].offset


def _merged(parts: torch.Tensor) -> torch.Tensor:
    """P [d] of (m, l, o) [n, 3, d], the first one first. A part without weight has m = -inf and counts for nothing."""
    m, l, o = parts.unbind(1)  # noqa: E741 - the names of the literature; [n, d] each
    factor = torch.where(torch.isneginf(m), 0.0, torch.exp(m - m.amax(0)))
    total, weighted = torch.zeros_like(m[0]), torch.zeros_like(m[0])
    for k in range(parts.shape[0]):
        total, weighted = total + l[k] * factor[k], weighted + o[k] * factor[k]
    return weighted / total


def _statistics(
    spec: CompressorSpec, shards: Shards, windows: list[Spread], rows: torch.Tensor, ape: torch.Tensor | None
) -> torch.Tensor:
    """(m, l, o) [n, 3, d] of what this rank has of each window, oldest to newest."""
    number = torch.full((len(windows), spec.window), -1)  # of the row, by its place in the window: [n, W]
    for n, one in enumerate(windows):
        first, end = one.span(spec)
        place = spec.window - (end - first)
        for piece in shards.pieces(one.sequence, first, end):
            if piece.rank == shards.rank:
                at = place + piece.first - first
                many = piece.last - piece.first
                number[n, at : at + many] = torch.arange(piece.offset, piece.offset + many)
    number = number.to(rows.device)
    there = (number >= 0)[:, :, None]
    parts = spec.state_dim // spec.width
    step = torch.arange(spec.window, device=rows.device)
    half = window.halves_of(spec, step)
    picked = rows.view(-1, parts, spec.halves, spec.head_dim)[number.clamp(min=0), :, half]  # [n, W, parts, d]
    # Windows end at a multiple of the ratio: a candidate's place has the phase of its position.
    score = torch.where(there, window.scores(spec, picked, step, half, ape, raw=False), float("-inf"))
    m, total, weighted = pool.statistics(torch.where(there, picked[:, :, 0], 0.0), score)
    empty = torch.isneginf(m)  # no token of this rank's has weight
    return torch.stack([m, total.masked_fill(empty, 0.0), weighted.masked_fill(empty, 0.0)], 1)
