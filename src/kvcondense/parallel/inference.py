"""Rows, bytes and states of a rank's segments with the bits of a single rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch

from kvcondense.api import CondensedRows, condense
from kvcondense.backends import Backend
from kvcondense.bound import bind
from kvcondense.errors import DeviceError, DtypeError, RangeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.memory import check_plain
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.parallel import merge
from kvcondense.parallel.exchange import crossing, deliver, same
from kvcondense.parallel.shards import Hold, Segment, Shards, Wanted, emits, halos
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages.window import state_rows
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class ShardedRows:
    """rows: of the windows that end in this rank's segments; ``rows.request``: the segment, ``rows.window``: the index
    in its sequence. sequence [E]: which one that is. live: of each sequence that this rank decodes, what a state holds
    at its end, [end - live_start(end), state_dim]: ``held`` of the call that goes on from there. sent, received: bytes
    of rows and statistics; all_gather: bytes that this rank would have received had all kv_score been gathered.
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
    held: Mapping[int, torch.Tensor] | None = None,
    statistics: bool = False,
    impl: str | Backend = "auto",
) -> ShardedRows:
    """``condense`` for this rank's tokens kv_score [tokens, projected], segment by segment. All ranks call it.

    Rows go to ``cache`` at ``slot_mapping`` [tokens] as in ``condense``, if both are given. The state's rows at the end
    of a sequence are in ``live`` of its decode rank; ``layout.snapshot.import_live`` puts them into a pool.

    ``held``: of each sequence that this rank ``holds`` in ``shards``, the state's rows at its position p,
    [p - live_start(p), state_dim], fp32 (fp64 for tokens of fp64), with the ape: ``live`` of the call before, or
    ``layout.snapshot.export_live``. They are read, not kept. Raises RankError if a rank is silent or has other weights
    or another spec, KvCondenseError for bad input: RangeError, ShapeError, DtypeError or DeviceError for ``held``.

    ``statistics``: of a window whose tokens lie on several ranks, each rank sends (m, l, o), 3 head_dim numbers, rather
    than its rows. They are merged in the order of ranks. Its P is then not one rank's to the bit, but within 2^-15 of
    the largest |K| of the window: n numbers are added in another order, with 2^-24 of rounding each, n up to 256.
    """
    require("shards", shards, Shards)
    shards = shards.with_states(spec)
    check_tokens(spec, kv_score, shards)
    kept = _held_rows(spec, kv_score, shards.own_holds, {} if held is None else held)
    facts = (spec, kv_score.dtype, statistics, weights.ape, weights.norm)
    same(shards, f"spec, statistics, ape, norm and {kv_score.dtype} tokens", *facts)
    wanted = _wanted(spec, shards, statistics)
    device, dtype = kv_score.device, compute_dtype(kv_score.dtype)
    positions = shards.positions(device)

    def stored(numbers: torch.Tensor) -> torch.Tensor:  # [n] -> [n, state_dim]
        old = numbers >= shards.tokens  # behind the tokens, rows that are held
        new = numbers[~old].to(device)
        rows = kept.new_empty(numbers.shape[0], spec.state_dim)
        rows[~old.to(device)] = state_rows(spec, kv_score[new], weights.ape, positions[new], None).to(dtype)
        rows[old.to(device)] = kept[(numbers[old] - shards.tokens).to(device)]
        return rows

    found = deliver(shards, wanted, stored)
    pool = StatePool.ring(spec, max(len(shards.own), 1), dtype=dtype, device=device)
    nothing = kv_score.new_empty(0, spec.state_dim, dtype=dtype)
    live = dict.fromkeys(shards.held_after, nothing)
    for index, rows in found.items():
        want = wanted[index]
        if want.segment < 0:
            live[want.sequence] = rows
        else:
            import_live(spec, pool, RaggedBatch.at(want.last, state_slot=want.segment, device=device), rows)
    merged = None
    if statistics:
        merged = merge.merge(spec, shards, stored(torch.arange(shards.tokens + kept.shape[0])), weights.ape)
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
    holds: Sequence[Mapping[int, int]] = (),
    statistics: bool = False,
) -> tuple[int, int]:
    """Bytes of fp32 that ``condense_shard`` sends between ranks with these segments, and that an all-gather of
    kv_score would: no process is asked, so that any number of ranks can be counted. ``segments`` and ``holds`` by rank.
    Raises as ``Shards.agree_on``.
    """
    if len(holds) > len(segments):
        raise ShapeError("holds", f"{len(segments)} ranks at most", len(holds))
    states = tuple(Hold(q, p, rank) for rank, held in enumerate(holds) for q, p in held.items())
    decoders = tuple((decode_ranks or {}).items())
    shards = Shards(tuple(map(tuple, segments)), 0, None, timedelta(0), states, decoders).checked().with_states(spec)
    wanted = _wanted(spec, shards, statistics)
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


def _wanted(spec: CompressorSpec, shards: Shards, statistics: bool) -> list[Wanted]:
    """Halos of all segments, unless statistics stand for them; then the state at the end of each sequence."""
    decoders = shards.decoders
    ends = [Wanted(decoders[s], -1, s, spec.live_start(n), n) for s, n in shards.lengths.items()]
    return ends if statistics else [*halos(spec, shards), *ends]


def _held_rows(
    spec: CompressorSpec, kv_score: torch.Tensor, holds: Sequence[Hold], held: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """Rows [n, state_dim] of the states that this rank holds, one behind the other; raises unless ``held`` has them."""
    require("held", held, Mapping)
    dtype, device = compute_dtype(kv_score.dtype), kv_score.device
    if set(held) != {h.sequence for h in holds}:
        raise RangeError("held", f"rows of the sequences that this rank holds, {[h.sequence for h in holds]}", [*held])
    parts = [torch.empty(0, spec.state_dim, dtype=dtype, device=device)]
    for h in holds:
        name, rows = f"held[{h.sequence}]", held[h.sequence]
        require(name, rows, torch.Tensor)
        if rows.shape != (h.rows, spec.state_dim):
            raise ShapeError(name, f"[{h.rows}, {spec.state_dim}] at position {h.position}", list(rows.shape))
        if rows.dtype != dtype:
            raise DtypeError(name, f"{dtype} for {kv_score.dtype} tokens", rows.dtype)
        if rows.device != device:
            raise DeviceError(name, f"device {device} as kv_score", rows.device)
        check_plain(name, rows)
        parts.append(rows.detach())
    return torch.cat(parts)


def check_tokens(spec: CompressorSpec, kv_score: torch.Tensor, shards: Shards) -> None:
    """Raise ShapeError unless kv_score has a row for each of this rank's tokens."""
    if kv_score.dim() != 2 or kv_score.shape != (shards.tokens, spec.projected):
        raise ShapeError("kv_score", f"[{shards.tokens}, {spec.projected}]", list(kv_score.shape))
