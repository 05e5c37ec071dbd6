"""Rows of a rank's segments with gradients: tokens of halos come forward, their gradients go back to who sent them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcondense import training
from kvcondense.api import CondensedRows
from kvcondense.errors import UnsupportedError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.parallel.exchange import deliver, hand_back, same
from kvcondense.parallel.inference import check_tokens
from kvcondense.parallel.shards import Shards, Wanted, halos
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights


def train_shard(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    shards: Shards,
    *,
    format: str | None = None,
) -> CondensedRows:
    """``training.condense`` for this rank's tokens kv_score [tokens, projected], segment by segment. All ranks call it.

    All ranks also call backward, since gradients of a halo go back to the ranks that sent it; a rank that emits no row
    calls it on its empty rows. kv_score gets its whole gradient, ape and norm that of this rank's windows: the sum over
    ranks (DDP and FSDP take the mean) is that of the sequences. ``request``: the segment, ``window``: the index in its
    sequence. Raises as ``condense_shard``; in backward, too, RankError names a rank that is silent. Sequences begin at
    position 0, since no gradient goes through a state: UnsupportedError for others.
    """
    require("shards", shards, Shards)
    for hold in shards.holds:
        if hold.position:
            others = f"sequence {hold.sequence} from position {hold.position} on"
            raise UnsupportedError("shards", "sequences that begin at position 0", others)
    check_tokens(spec, kv_score, shards)
    same(shards, f"spec and {kv_score.dtype} tokens", spec, kv_score.dtype)
    wanted = halos(spec, shards)
    before = {w.segment: w.last - w.first for w in wanted if w.reader == shards.rank}
    tokens: torch.Tensor = _WithHalos.apply(kv_score, shards, wanted)
    sizes = [before.get(i, 0) + s.length for i, s in enumerate(shards.own)]
    # A segment begins behind its halo, at a window's first position; one without is at one, or no window ends in it.
    first = [s.start - before.get(i, 0) for i, s in enumerate(shards.own)]
    device = kv_score.device
    lows, starts = (torch.tensor(t, dtype=torch.int64, device=device) for t in (first, [s.start for s in shards.own]))
    query_start_loc = torch.tensor([0, *sizes], device=device).cumsum(0)
    batch = RaggedBatch.build(query_start_loc, start_positions=[0] * len(sizes))
    rows = training.condense_from(spec, tokens, weights, rope, batch, lows, format=format)
    window = rows.window + lows[rows.request] // spec.ratio
    ours = window >= starts[rows.request] // spec.ratio  # windows of a halo are others' to emit
    return CondensedRows(rows.values[ours], rows.request[ours], window[ours], rows.slot[ours])


class _WithHalos(torch.autograd.Function):
    """kv_score [tokens, n], each segment behind the tokens that its windows read of others."""

    @staticmethod
    def forward(ctx: Any, kv_score: torch.Tensor, shards: Shards, wanted: Sequence[Wanted]) -> torch.Tensor:
        found = deliver(shards, wanted, lambda numbers: kv_score[numbers.to(kv_score.device)])
        by_segment = {wanted[index].segment: rows for index, rows in found.items()}
        ctx.shards, ctx.wanted, ctx.sizes = shards, wanted, []
        parts = []
        for i, own in enumerate(kv_score.split([s.length for s in shards.own])):
            halo = by_segment.get(i, own[:0])
            parts += [halo, own]
            ctx.sizes += [halo.shape[0], own.shape[0]]
        return torch.cat(parts) if parts else kv_score.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (given,) = gradients
        parts = given.split(ctx.sizes)
        own = torch.cat(parts[1::2]) if parts else given.clone()
        mine = {index: w for index, w in enumerate(ctx.wanted) if w.reader == ctx.shards.rank}
        hand_back(ctx.shards, ctx.wanted, {index: parts[2 * w.segment] for index, w in mine.items()}, own)
        return own, None, None
