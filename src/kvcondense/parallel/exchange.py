"""How rows get from ranks that have them to those that read them, and back: one message for each pair of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from kvcondense.errors import RankError

if TYPE_CHECKING:
    from kvcondense.parallel.shards import Piece, Shards, Wanted


def deliver(
    shards: Shards, wanted: Sequence[Wanted], rows_of: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The rows [last - first, width] that this rank reads, by index in ``wanted``. All ranks call it.

    rows_of: rows [n, width] of this rank's tokens, and of states that it holds, by their numbers int64 [n] on the CPU;
    asked for what others read, and itself.
    """
    given, read = _traffic(shards, wanted)
    sends = {reader: rows_of(_numbers(pieces)).contiguous() for reader, pieces in given.items()}
    sizes = {sender: [p.last - p.first for _, p in pieces] for sender, pieces in read.items()}
    told = swap(shards, sends, sizes, like=rows_of(torch.zeros(0, dtype=torch.int64)))
    parts: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for sender, pieces in read.items():
        for (index, piece), rows in zip(pieces, told[sender].split(sizes[sender]), strict=True):
            parts.setdefault(index, []).append((piece.first, rows))
    return {index: torch.cat([rows for _, rows in sorted(found, key=lambda f: f[0])]) for index, found in parts.items()}


def hand_back(shards: Shards, wanted: Sequence[Wanted], made: dict[int, torch.Tensor], own: torch.Tensor) -> None:
    """``deliver`` in reverse: add what was ``made`` of delivered rows to ``own`` [tokens, width] of who sent them."""
    given, read = _traffic(shards, wanted)
    sends = {
        sender: torch.cat([made[i][p.first - wanted[i].first : p.last - wanted[i].first] for i, p in pieces])
        for sender, pieces in read.items()
    }
    sizes = {reader: [p.last - p.first for p in pieces] for reader, pieces in given.items()}
    told = swap(shards, sends, sizes, like=own)
    for reader in sorted(told):  # in one order, whoever answered first
        own.index_add_(0, _numbers(given[reader]).to(own.device), told[reader])


def crossing(shards: Shards, wanted: Sequence[Wanted]) -> Iterator[tuple[int, int, int]]:
    """(sender, reader, rows) of all that goes from one rank to another."""
    for want in wanted:
        for piece in shards.pieces(want.sequence, want.first, want.last):
            if piece.rank != want.reader:
                yield piece.rank, want.reader, piece.last - piece.first


def _traffic(
    shards: Shards, wanted: Sequence[Wanted]
) -> tuple[dict[int, list[Piece]], dict[int, list[tuple[int, Piece]]]]:
    """What this rank gives to each reader, and reads, with the index in ``wanted``, of each sender; in one order."""
    given: dict[int, list[Piece]] = {}
    read: dict[int, list[tuple[int, Piece]]] = {}
    for index, want in enumerate(wanted):
        for piece in shards.pieces(want.sequence, want.first, want.last):
            if piece.rank == shards.rank:
                given.setdefault(want.reader, []).append(piece)
            if want.reader == shards.rank:
                read.setdefault(piece.rank, []).append((index, piece))
    return given, read


def _numbers(pieces: Sequence[Piece]) -> torch.Tensor:
    """Of the tokens, or rows, of this rank's pieces, int64 [n]."""
    return torch.cat([torch.arange(p.offset, p.offset + p.last - p.first) for p in pieces])


def swap(
    shards: Shards, sends: dict[int, torch.Tensor], sizes: dict[int, list[int]], like: torch.Tensor
) -> dict[int, torch.Tensor]:
    """What ranks send to this one, as many rows of ``like`` as ``sizes`` add up to; what it sends to itself stays."""
    mine = {k: rows for k, rows in sends.items() if k == shards.rank}
    told = {k: like.new_empty(sum(many), like.shape[1]) for k, many in sizes.items() if k != shards.rank}
    exchange({k: rows for k, rows in sends.items() if k != shards.rank}, told, shards.group, shards.timeout)
    return told | mine


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
    for k, value in enumerate(tell(mine, shards.rank, shards.ranks, shards.group, shards.timeout)):
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
