"""Context parallel: a sequence that lies on several ranks, cut at any token, condensed where its tokens are.

A rank needs what a state would hold at its first position, and nothing else: no row at a window boundary without
overlap, the previous window with overlap, else the tokens of the open window. Those rows travel, never the whole
kv_score; then every rank goes on from them as from a state, so that each window is emitted once, by the rank that has
its last token, with the bits of a single rank.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvcondense.api import CondensedRows, condense
from kvcondense.backends import Backend
from kvcondense.errors import RangeError, RankError, ShapeError, require, require_int
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages.window import state_rows
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class Shards:
    """Where a sequence lies: rank k of ``group`` has positions starts[k] .. starts[k + 1] - 1, this one is ``rank``.

    timeout: how long another rank may take to answer.
    """

    starts: tuple[int, ...]
    rank: int
    group: Any
    timeout: timedelta

    @classmethod
    def agree(cls, start: int, length: int, *, group: Any = None, timeout: timedelta | float = 60.0) -> Shards:
        """Tell all ranks of the group that this one has ``length`` tokens from position ``start``, and hear of theirs.

        All ranks call it. Shards lie in the order of ranks, without gaps; a rank may have none. The group must take
        CPU tensors (gloo, or ``init_process_group()`` with both). ``timeout``: in seconds, unless it is a timedelta.
        Raises RankError that names a rank that is silent, or whose shard does not follow the one before it.
        """
        require_int("start", start, 0)
        require_int("length", length, 0)
        patience = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        found = _tell(torch.tensor([start, length]), rank, ranks, group, patience)
        starts = [0]
        for k, (begin, count) in enumerate(t.tolist() for t in found):
            if begin != starts[-1]:
                raise RankError(f"rank {k}", f"a shard from position {starts[-1]} on", f"one from {begin} on")
            starts.append(begin + count)
        return cls(tuple(starts), rank, group, patience)

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.starts[-1]

    def pieces(self, first: int, last: int) -> dict[int, tuple[int, int]]:
        """The ranks that have some of positions first .. last - 1, and which."""
        bounds = zip(self.starts, self.starts[1:], strict=False)
        cut = {k: (max(first, a), min(last, b)) for k, (a, b) in enumerate(bounds)}
        return {k: (a, b) for k, (a, b) in cut.items() if a < b}


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
    _same(spec, weights, kv_score.dtype, shards)
    halo, sent, received = _fetch(spec, kv_score, weights, shards, decoder)
    pool = StatePool.ring(spec, 1, dtype=compute_dtype(kv_score.dtype), device=kv_score.device)
    # Nothing to go on from where nothing is to come.
    if halo[0] is not None and end > begin:
        import_live(spec, pool, RaggedBatch.at(begin, state_slot=0, device=kv_score.device), halo[0])
    batch = RaggedBatch.build(
        torch.tensor([0, end - begin], device=kv_score.device), start_positions=[begin], state_slots=[0],
        slot_mapping=slot_mapping,
    )  # fmt: skip
    rows = condense(spec, kv_score, weights, rope, batch, state=pool, cache=cache, impl=impl)
    return ShardedRows(
        rows=rows,
        live=halo[1],
        sent=sent,
        received=received,
        all_gather=(shards.tokens - (end - begin)) * spec.projected * kv_score.element_size(),
    )


def _fetch(
    spec: CompressorSpec, kv_score: torch.Tensor, weights: CompressorWeights, shards: Shards, decoder: int
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], int, int]:
    """(this rank's halo, what the decode rank's state holds at the end), bytes sent, bytes received.

    A rank sends state rows of its own tokens to those that begin behind them. A rank with no tokens needs no halo.
    """
    rank, starts = shards.rank, shards.starts
    begin, end = starts[rank], starts[rank + 1]
    # (receiver, first position, position behind the last): halos of all ranks, then the state at the end.
    wanted = [(k, spec.live_start(starts[k]), starts[k]) for k in range(len(starts) - 1) if starts[k + 1] > starts[k]]
    wanted.append((decoder, spec.live_start(shards.tokens), shards.tokens))
    first = min([a for _, a, b in wanted if b > begin and a < end], default=end)
    low = max(first, begin)
    positions = torch.arange(low, end, device=kv_score.device)
    ape = weights.ape
    dtype = compute_dtype(kv_score.dtype)
    own = state_rows(spec, kv_score[low - begin :], ape, positions, None).to(dtype)  # [end - low, state_dim]
    sent = received = 0
    found: list[torch.Tensor | None] = [None, None]
    for index, (receiver, a, b) in enumerate(wanted):
        pieces = shards.pieces(a, b)
        kind = int(index == len(wanted) - 1)
        if receiver != rank:
            if rank in pieces:
                lo, hi = pieces[rank]
                part = own[lo - low : hi - low].contiguous()
                _exchange({receiver: part}, {}, shards.group, shards.timeout)
                sent += part.numel() * part.element_size()
            continue
        parts = {k: own.new_empty(hi - lo, spec.state_dim) for k, (lo, hi) in pieces.items() if k != rank}
        _exchange({}, parts, shards.group, shards.timeout)
        received += sum(p.numel() * p.element_size() for p in parts.values())
        if rank in pieces:
            lo, hi = pieces[rank]
            parts[rank] = own[lo - low : hi - low]
        found[kind] = torch.cat([parts[k] for k in sorted(parts)]) if parts else own[:0]
    return (found[0], found[1]), sent, received


def _same(spec: CompressorSpec, weights: CompressorWeights, dtype: torch.dtype, shards: Shards) -> None:
    """Raise RankError unless all ranks have this spec, these weights and this type of tokens."""
    digest = hashlib.sha256(repr((spec, str(dtype))).encode())
    for t in (weights.ape, weights.norm):
        digest.update(b"none" if t is None else t.detach().float().cpu().contiguous().numpy().tobytes())
    mine = torch.frombuffer(bytearray(digest.digest()[:8]), dtype=torch.int64).clone()
    theirs = _tell(mine, shards.rank, len(shards.starts) - 1, shards.group, shards.timeout)
    for k, value in enumerate(theirs):
        if int(value) != int(mine):
            raise RankError(f"rank {k}", f"spec, ape, norm and {dtype} tokens of rank {shards.rank}", "others")


def _tell(mine: torch.Tensor, rank: int, ranks: int, group: Any, timeout: timedelta) -> list[torch.Tensor]:
    """What every rank tells all others: tensors of one shape, this rank's own among them."""
    theirs = {k: torch.zeros_like(mine) for k in range(ranks) if k != rank}
    _exchange(dict.fromkeys(theirs, mine), theirs, group, timeout)
    return [theirs.get(k, mine) for k in range(ranks)]


def _exchange(
    sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], group: Any, timeout: timedelta
) -> None:
    """Send to and receive from ranks of the group; raise RankError that names the one that does not answer in time."""

    def world(k: int) -> int:
        return k if group is None else dist.get_global_rank(group, k)

    works: list[tuple[int, Any]] = []
    for k, tensor in sends.items():
        works.append((k, _started(k, dist.isend, tensor, world(k), group)))
    for k, tensor in receives.items():
        works.append((k, _started(k, dist.irecv, tensor, world(k), group)))
    for k, work in works:
        try:
            work.wait(timeout)
        except RuntimeError as error:
            raise RankError(f"rank {k}", f"an answer within {timeout.total_seconds():g} s", error) from error


def _started(k: int, start: Any, tensor: torch.Tensor, peer: int, group: Any) -> Any:
    try:
        return start(tensor, peer, group=group)
    except RuntimeError as error:
        raise RankError(f"rank {k}", "a connection", error) from error
