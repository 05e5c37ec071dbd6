"""Where a sequence lies on ranks, and how rows get from those that have them to those that read them, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kvcondense.errors import RankError, require_int
from kvcondense.spec import CompressorSpec

Wanted = Sequence[tuple[int, int, int]]
"""Who reads rows of others: (rank, first position, position behind the last), known to all ranks in one order."""


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
        found = tell(torch.tensor([start, length]), rank, ranks, group, patience)
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


def halos(spec: CompressorSpec, shards: Shards) -> list[tuple[int, int, int]]:
    """What ranks need to go on at their first positions; one without tokens needs nothing."""
    starts = shards.starts
    return [(k, spec.live_start(starts[k]), starts[k]) for k in range(len(starts) - 1) if starts[k + 1] > starts[k]]


def deliver(shards: Shards, wanted: Wanted, own: torch.Tensor, low: int) -> dict[int, torch.Tensor]:
    """The rows [b - a, n] that this rank reads, by index in ``wanted``. All ranks call it.

    own: this rank's rows from position ``low`` on, of which it sends what others read.
    """
    found: dict[int, torch.Tensor] = {}
    for index, (receiver, a, b) in enumerate(wanted):
        pieces = shards.pieces(a, b)
        if receiver != shards.rank:
            if shards.rank in pieces:
                lo, hi = pieces[shards.rank]
                exchange({receiver: own[lo - low : hi - low].contiguous()}, {}, shards.group, shards.timeout)
            continue
        parts = {k: own.new_empty(hi - lo, own.shape[1]) for k, (lo, hi) in pieces.items() if k != shards.rank}
        exchange({}, parts, shards.group, shards.timeout)
        if shards.rank in pieces:
            lo, hi = pieces[shards.rank]
            parts[shards.rank] = own[lo - low : hi - low]
        found[index] = torch.cat([parts[k] for k in sorted(parts)]) if parts else own[:0]
    return found


def hand_back(shards: Shards, wanted: Wanted, given: dict[int, torch.Tensor], own: torch.Tensor, low: int) -> None:
    """The reverse of ``deliver``: add what was made of delivered rows to ``own`` of the ranks that sent them."""
    for index, (receiver, a, b) in enumerate(wanted):
        for k, (lo, hi) in shards.pieces(a, b).items():
            if shards.rank not in (k, receiver):
                continue
            part = (
                given[index][lo - a : hi - a].contiguous() if index in given else own.new_empty(hi - lo, own.shape[1])
            )
            if k != receiver:
                sends, receives = ({k: part}, {}) if shards.rank == receiver else ({}, {receiver: part})
                exchange(sends, receives, shards.group, shards.timeout)
            if shards.rank == k:
                own[lo - low : hi - low] += part


def moved(shards: Shards, wanted: Wanted) -> tuple[int, int]:
    """Rows that this rank sends to others and receives from them."""
    sent = received = 0
    for receiver, a, b in wanted:
        for k, (lo, hi) in shards.pieces(a, b).items():
            if k != receiver:
                sent += (hi - lo) * (k == shards.rank)
                received += (hi - lo) * (receiver == shards.rank)
    return sent, received


def same(shards: Shards, what: str, *facts: Any) -> None:
    """Raise RankError unless all ranks have these facts: tensors by value, others as they print."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(
            fact.detach().float().cpu().contiguous().numpy().tobytes()
            if isinstance(fact, torch.Tensor)
            else repr(fact).encode()
        )
    mine = torch.frombuffer(bytearray(digest.digest()[:8]), dtype=torch.int64).clone()
    theirs = tell(mine, shards.rank, len(shards.starts) - 1, shards.group, shards.timeout)
    for k, value in enumerate(theirs):
        if int(value) != int(mine):
            raise RankError(f"rank {k}", f"{what} of rank {shards.rank}", "others")


def tell(mine: torch.Tensor, rank: int, ranks: int, group: Any, timeout: timedelta) -> list[torch.Tensor]:
    """What every rank tells all others: tensors of one shape, this rank's own among them."""
    theirs = {k: torch.zeros_like(mine) for k in range(ranks) if k != rank}
    exchange(dict.fromkeys(theirs, mine), theirs, group, timeout)
    return [theirs.get(k, mine) for k in range(ranks)]


def exchange(sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], group: Any, timeout: timedelta) -> None:
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
