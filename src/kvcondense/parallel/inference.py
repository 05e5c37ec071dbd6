"""Rows, bytes and states of a rank's segments with the bits of a single rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from kvcondense.api import CondensedRows, condense
from kvcondense.backends import Backend
from kvcondense.bound import bind
from kvcondense.errors import RangeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.parallel import merge
from kvcondense.parallel.exchange import crossing, deliver, same
from kvcondense.parallel.shards import Segment, Shards, Wanted, emits, halos
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages.window import state_rows
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class ShardedRows:
    """rows: of the windows that end in this rank's segments; ``rows.request``: the segment, ``rows.window``: the index
    in its sequence. sequence [E]: which one that is. live: of each sequence that this rank decodes, what a state holds
    at its end, [length - live_start, state_dim]. sent, received: bytes of rows and statistics; all_gather: bytes that
    this rank would have received had all kv_score been gathered.
    """

    rows: CondensedRows
    sequence: torch.Tensor
    live: dict[int, torch.Tensor]
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
    decode_ranks: Mapping[int, int] | None = None,
    statistics: bool = False,
    impl: str | Backend = "auto",
) -> ShardedRows:
    """``condense`` for this rank's tokens kv_score [tokens, projected], segment by segment. All ranks call it.

    Rows go to ``cache`` at ``slot_mapping`` [tokens] as in ``condense``, if both are given. ``decode_ranks``: by
    sequence, the rank that gets the state's rows at its end (the one with its last token, unless another is named);
    ``layout.snapshot.import_live`` puts them into a pool. All ranks name the same. Raises RankError if a rank is silent
    or has other weights or another spec, KvCondenseError for bad input.

    ``statistics``: of a window whose tokens lie on several ranks, each rank sends (m, l, o), 3 head_dim numbers, rather
    than its rows. They are merged in the order of ranks. Its P is then not one rank's to the bit, but within 2^-15 of
    the largest |K| of the window: n numbers are added in another order, with 2^-24 of rounding each, n up to 256.
    """
    require("shards", shards, Shards)
    decoders = _decoders(shards, decode_ranks)
    check_tokens(spec, kv_score, shards)
    facts = (spec, kv_score.dtype, sorted(decoders.items()), statistics, weights.ape, weights.norm)
    same(shards, f"spec, decode_ranks, statistics, ape, norm and {kv_score.dtype} tokens", *facts)
    wanted = _wanted(spec, shards, decoders, statistics)
    device, dtype = kv_score.device, compute_dtype(kv_score.dtype)
    positions = shards.positions(device)

    def stored(numbers: torch.Tensor) -> torch.Tensor:  # [n] -> [n, state_dim]
        numbers = numbers.to(device)
        return state_rows(spec, kv_score[numbers], weights.ape, positions[numbers], None).to(dtype)

    found = deliver(shards, wanted, stored)
    pool = StatePool.ring(spec, max(len(shards.own), 1), dtype=dtype, device=device)
    nothing = kv_score.new_empty(0, spec.state_dim, dtype=dtype)
    live = {sequence: nothing for sequence, rank in decoders.items() if rank == shards.rank}
    for index, rows in found.items():
        want = wanted[index]
        if want.segment < 0:
            live[want.sequence] = rows
        else:
            import_live(spec, pool, RaggedBatch.at(want.last, state_slot=want.segment, device=device), rows)
    merged = None
    if statistics:
        merged = merge.merge(spec, shards, stored(torch.arange(shards.tokens)), weights.ape)
        merged.stand_in(pool)
    lengths = torch.tensor([0, *(s.length for s in shards.own)], device=device)
    # A segment that no window ends in was told nothing of what is before it, and has nothing to do.
    starts = [s.start if emits(spec, s) else -1 for s in shards.own]
    batch = RaggedBatch.build(
        lengths.cumsum(0), start_positions=starts, state_slots=list(range(len(starts))), slot_mapping=slot_mapping
    )
    if merged is None:
        rows = condense(spec, kv_score, weights, rope, batch, state=pool, cache=cache, impl=impl)
    else:
        # Rows of merged windows are written behind the others: what may be wrong with them is found out before.
        bound, slots = bind(spec, weights, rope, state=pool, cache=cache), batch.slot_mapping
        bound.admit(bound.plan(batch), kv_score.shape[0])
        finished = merged.row(weights, rope)
        if slots is not None:
            if cache is not None:
                cache.encode(finished, not spec.rounding.row)
            batch = replace(batch, slot_mapping=slots.index_fill(0, merged.last, -1))
        rows = condense(spec, kv_score, weights, rope, batch, state=pool, cache=cache, impl=impl)
        merged.put(finished, rows, slots, cache)
    crossed = list(_crossing(spec, shards, wanted, statistics))
    return ShardedRows(
        rows=rows,
        sequence=torch.tensor([s.sequence for s in shards.own], dtype=torch.int64, device=device)[rows.request],
        live=live,
        sent=dtype.itemsize * sum(many for sender, _, many in crossed if sender == shards.rank),
        received=dtype.itemsize * sum(many for _, reader, many in crossed if reader == shards.rank),
        all_gather=(shards.total - shards.tokens) * spec.projected * kv_score.element_size(),
    )


def traffic(
    spec: CompressorSpec,
    segments: Sequence[Sequence[Segment]],
    decode_ranks: Mapping[int, int] | None = None,
    *,
    statistics: bool = False,
) -> tuple[int, int]:
    """Bytes of fp32 that ``condense_shard`` sends between ranks with these segments, and that an all-gather of
    kv_score would: no process is asked, so that any number of ranks can be counted. Raises as ``condense_shard``.
    """
    shards = Shards(tuple(map(tuple, segments)), 0, None, timedelta(0)).checked()
    wanted = _wanted(spec, shards, _decoders(shards, decode_ranks), statistics)
    values = sum(many for _, _, many in _crossing(spec, shards, wanted, statistics))
    return 4 * values, 4 * (shards.ranks - 1) * shards.total * spec.projected


def _crossing(
    spec: CompressorSpec, shards: Shards, wanted: Sequence[Wanted], statistics: bool
) -> Iterator[tuple[int, int, int]]:
    """(sender, reader, values) of all that goes from one rank to another."""
    for sender, reader, rows in crossing(shards, wanted):
        yield sender, reader, rows * spec.state_dim
    if statistics:
        yield from merge.crossing(spec, shards)


def _decoders(shards: Shards, decode_ranks: Mapping[int, int] | None) -> dict[int, int]:
    """The rank that gets the state at the end of each sequence."""
    found, lengths = shards.last_ranks | dict(decode_ranks or {}), shards.lengths
    for sequence, rank in found.items():
        if sequence not in lengths:
            raise RangeError("decode_ranks", f"sequences {sorted(lengths)}", sequence)
        if not 0 <= rank < shards.ranks:
            raise RangeError("decode_ranks", f"0..{shards.ranks - 1}", rank)
    return found


def _wanted(spec: CompressorSpec, shards: Shards, decoders: Mapping[int, int], statistics: bool) -> list[Wanted]:
    """Halos of all segments, unless statistics stand for them; then the state at the end of each sequence."""
    ends = [Wanted(decoders[s], -1, s, spec.live_start(n), n) for s, n in shards.lengths.items()]
    return ends if statistics else [*halos(spec, shards), *ends]


def check_tokens(spec: CompressorSpec, kv_score: torch.Tensor, shards: Shards) -> None:
    """Raise ShapeError unless kv_score has a row for each of this rank's tokens."""
    if kv_score.dim() != 2 or kv_score.shape != (shards.tokens, spec.projected):
        raise ShapeError("kv_score", f"[{shards.tokens}, {spec.projected}]", list(kv_score.shape))
