"""A shard's rows, bytes and state with the bits of a single rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.api import CondensedRows, condense
from kvcondense.backends import Backend
from kvcondense.errors import RangeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.parallel.shards import Shards, deliver, halos, moved, same
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages.window import state_rows
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class ShardedRows:
    """rows: of the windows that end in this rank's shard (``rows.window``: their indices in the sequence). live: on the
    decode rank, what a state holds at the sequence's end, [tokens - live_start, state_dim], else None. sent, received:
    bytes of rows; all_gather: bytes that this rank would have received had all kv_score been gathered.
    """

    rows: CondensedRows
    live: torch.Tensor | None
    sent: int
    received: int
    all_gather: int


def condense_shard(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    shards: Shards,
    *,
    cache: PagedCache | None = None,
    slot_mapping: torch.Tensor | None = None,
    decode_rank: int | None = None,
    impl: str | Backend = "auto",
) -> ShardedRows:
    """``condense`` for this rank's tokens kv_score [length, projected] of one sequence. All ranks call it.

    Rows go to ``cache`` at ``slot_mapping`` [length] as in ``condense``, if both are given. ``decode_rank`` (default:
    the last) gets the state's rows at the end of the sequence; ``layout.snapshot.import_live`` puts them into a pool.
    Raises RankError if a rank is silent or has other weights or another spec, KvCondenseError for bad input.
    """
    require("shards", shards, Shards)
    begin, end = shards.starts[shards.rank], shards.starts[shards.rank + 1]
    ranks = len(shards.starts) - 1
    decoder = ranks - 1 if decode_rank is None else decode_rank
    if not 0 <= decoder < ranks:
        raise RangeError("decode_rank", f"0..{ranks - 1}", decode_rank)
    if kv_score.dim() != 2 or kv_score.shape != (end - begin, spec.projected):
        raise ShapeError("kv_score", f"[{end - begin}, {spec.projected}]", list(kv_score.shape))
    same(shards, f"spec, ape, norm and {kv_score.dtype} tokens", spec, kv_score.dtype, weights.ape, weights.norm)
    # Halos of all ranks, then the state at the end.
    wanted = [*halos(spec, shards), (decoder, spec.live_start(shards.tokens), shards.tokens)]
    low = max(begin, min([a for _, a, b in wanted if b > begin and a < end], default=end))
    positions = torch.arange(low, end, device=kv_score.device)
    dtype = compute_dtype(kv_score.dtype)
    own = state_rows(spec, kv_score[low - begin :], weights.ape, positions, None).to(dtype)  # [end - low, state_dim]
    found = deliver(shards, wanted, own, low)
    live = found.pop(len(wanted) - 1, None)
    sent, received = moved(shards, wanted)
    row_bytes = spec.state_dim * own.element_size()
    pool = StatePool.ring(spec, 1, dtype=dtype, device=kv_score.device)
    for halo in found.values():
        import_live(spec, pool, RaggedBatch.at(begin, state_slot=0, device=kv_score.device), halo)
    batch = RaggedBatch.build(
        torch.tensor([0, end - begin], device=kv_score.device), start_positions=[begin], state_slots=[0],
        slot_mapping=slot_mapping,
    )  # fmt: skip
    rows = condense(spec, kv_score, weights, rope, batch, state=pool, cache=cache, impl=impl)
    return ShardedRows(
        rows=rows,
        live=live,
        sent=sent * row_bytes,
        received=received * row_bytes,
        all_gather=(shards.tokens - (end - begin)) * spec.projected * kv_score.element_size(),
    )
