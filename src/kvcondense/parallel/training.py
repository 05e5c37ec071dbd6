"""A shard's rows with gradients: tokens of the halo come forward, their gradients go back to who sent them."""

from __future__ import annotations

from typing import Any

import torch

from kvcondense import training
from kvcondense.api import CondensedRows
from kvcondense.errors import ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.parallel.shards import Shards, deliver, halos, hand_back, same
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
    """``training.condense`` for this rank's tokens kv_score [length, projected] of one sequence. All ranks call it.

    All ranks also call backward, since gradients of a halo go back to the ranks that sent it; a rank that emits no row
    calls it on its empty rows. kv_score gets its whole gradient, ape and norm that of this rank's windows: the sum over
    ranks (DDP and FSDP take the mean) is that of the sequence. ``window``: indices in the sequence. Raises as
    ``condense_shard``; in backward, too, RankError names a rank that is silent.
    """
    require("shards", shards, Shards)
    begin, end = shards.starts[shards.rank], shards.starts[shards.rank + 1]
    if kv_score.dim() != 2 or kv_score.shape != (end - begin, spec.projected):
        raise ShapeError("kv_score", f"[{end - begin}, {spec.projected}]", list(kv_score.shape))
    same(shards, f"spec and {kv_score.dtype} tokens", spec, kv_score.dtype)
    tokens: torch.Tensor = _WithHalo.apply(kv_score, shards, halos(spec, shards))
    low = end - tokens.shape[0]  # a window's first position, or that of no token
    table = None if rope is None else RopeTable(rope.cos[low:], rope.sin[low:])
    batch = RaggedBatch.build(torch.tensor([0, tokens.shape[0]], device=kv_score.device), start_positions=[0])
    rows = training.condense(spec, tokens, weights, table, batch, format=format)
    first = begin // spec.ratio - low // spec.ratio  # windows of the halo are others' to emit
    return CondensedRows(
        rows.values[first:], rows.request[first:], rows.window[first:] + low // spec.ratio, rows.slot[first:]
    )


class _WithHalo(torch.autograd.Function):
    """kv_score [length, n] behind the tokens that windows of this rank read of others."""

    @staticmethod
    def forward(ctx: Any, kv_score: torch.Tensor, shards: Shards, wanted: list[tuple[int, int, int]]) -> torch.Tensor:
        found = deliver(shards, wanted, kv_score, shards.starts[shards.rank])
        ctx.shards, ctx.wanted = shards, wanted
        ctx.sizes = {index: rows.shape[0] for index, rows in found.items()}
        return torch.cat([*found.values(), kv_score])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (given,) = gradients
        begin = ctx.shards.starts[ctx.shards.rank]
        size = sum(ctx.sizes.values())
        own = given[size:].clone()
        hand_back(ctx.shards, ctx.wanted, dict.fromkeys(ctx.sizes, given[:size]), own, begin)
        return own, None, None
