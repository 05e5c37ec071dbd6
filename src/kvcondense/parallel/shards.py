"""Where sequences and their states lie on ranks, which all agree upon, and what each rank must read of others."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from kvcondense.errors import RangeError, RankError, require, require_int
from kvcondense.parallel.exchange import tell
from kvcondense.spec import CompressorSpec


class Segment(NamedTuple):
    """Positions start .. start + length - 1 of a sequence."""

    sequence: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Hold(NamedTuple):
    """``rank`` has the state of a sequence at ``position``, where the sequence's first segment begins."""

    sequence: int
    position: int
    rank: int
    rows: int = 0
    """Of the state: positions position - rows .. position - 1. How many they are, a spec says (``with_states``)."""


class Piece(NamedTuple):
    """Positions first .. last - 1 of a sequence, which lie with ``rank`` from its token ``offset`` on.

    Rows of states that a rank holds lie behind its tokens, and are numbered on.
    """

    first: int
    last: int
    rank: int
    offset: int


class Wanted(NamedTuple):
    """Rows of positions first .. last - 1 of a sequence that a rank reads; all ranks know all of them, in one order."""

    reader: int
    segment: int
    """Of the reader's, for which they are; -1: for none."""
    sequence: int
    first: int
    last: int


@dataclass(frozen=True)
class Shards:
    """Where sequences lie: rank k of ``group`` has segments[k], one behind the other; this one is ``rank``.

    timeout: how long another rank may take to answer. holds: of all ranks, one for each sequence that goes on from a
    state. decode_ranks: (sequence, rank) of each state that another rank than the last token's is to get.
    """

    segments: tuple[tuple[Segment, ...], ...]
    rank: int
    group: Any
    timeout: timedelta
    holds: tuple[Hold, ...] = ()
    decode_ranks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def agree(cls, start: int, length: int, *, group: Any = None, timeout: timedelta | float = 60.0) -> Shards:
        """``agree_on`` one sequence from 0 on, of which this rank has ``length`` tokens from position ``start``."""
        require_int("start", start, 0)
        require_int("length", length, 0)
        return cls.agree_on([(0, start, length)], group=group, timeout=timeout)

    @classmethod
    def agree_on(
        cls,
        segments: Sequence[tuple[int, int, int]],
        *,
        holds: Mapping[int, int] | None = None,
        decode_ranks: Mapping[int, int] | None = None,
        group: Any = None,
        timeout: timedelta | float = 60.0,
    ) -> Shards:
        """Tell all ranks of the group which segments (sequence, start, length) this one has, and hear of theirs.

        All ranks call it. Each sequence must lie on the ranks without gaps, nothing twice, from position 0 on, or from
        where its state is; a rank may have any number of segments of any sequences, or none.

        ``holds``: position by sequence, of the states that this rank has of sequences that go on from there; one rank
        holds each. A sequence may be held without having tokens: its state stays, or moves to another rank.
        ``decode_ranks``: rank by sequence, which gets the state at the sequence's end (the one with its last token, or
        without tokens its holder, unless another is named). All ranks name the same.

        The group must take CPU tensors (gloo, or ``init_process_group()`` with both). ``timeout``: in seconds, unless
        it is a timedelta. Raises RangeError for a negative number or for a sequence or rank of ``decode_ranks`` that
        is none, RankError that names a rank that is silent, whose segment does not follow what is before it, or whose
        state is not where its sequence begins, or held by another rank, too.
        """
        mine: list[list[tuple[int, int, int]]] = [
            [Segment(*(require_int("segments", value, 0) for value in one)) for one in segments],
            [(q, p, 0) for q, p in _pairs("holds", holds)],
            [(q, k, 0) for q, k in _pairs("decode_ranks", decode_ranks)],
        ]
        patience = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        counts = tell(torch.tensor([len(rows) for rows in mine]), rank, ranks, group, patience)
        table = torch.zeros(max(int(count.sum()) for count in counts), 3, dtype=torch.int64)
        flat = list(chain.from_iterable(mine))
        table[: len(flat)] = torch.tensor(flat, dtype=torch.int64).view(-1, 3)
        told = [
            [rows.tolist() for rows in theirs[: int(count.sum())].split(count.tolist())]
            for theirs, count in zip(tell(table, rank, ranks, group, patience), counts, strict=True)
        ]
        decoders = [tuple((q, k) for q, k, _ in named) for _, _, named in told]
        for k, named in enumerate(decoders):
            if named != decoders[0]:
                raise RankError(f"rank {k}", f"decode_ranks of rank 0, {dict(decoders[0])}", dict(named))
        return cls(
            tuple(tuple(Segment(*row) for row in rows) for rows, _, _ in told),
            rank, group, patience,
            holds=tuple(Hold(q, p, k) for k, (_, held, _) in enumerate(told) for q, p, _ in held),
            decode_ranks=decoders[0],
        ).checked()  # fmt: skip

    def checked(self) -> Shards:
        """Itself, if every sequence is whole. Raises as ``agree_on``, on all ranks alike."""
        held: dict[int, Hold] = {}
        for hold in self.holds:
            other = held.setdefault(hold.sequence, hold)
            if other is not hold:
                raise RankError(
                    f"rank {hold.rank}", f"one rank that holds sequence {hold.sequence}",
                    f"its state at {hold.position}, and rank {other.rank}'s at {other.position}",
                )  # fmt: skip
        for sequence, pieces in self._pieces.items():
            first, begun = pieces[0], held.get(sequence)
            if begun is not None and begun.position != first.first:
                where = f"the state of sequence {sequence} at position {first.first}, where its tokens begin"
                raise RankError(f"rank {begun.rank}", where, f"its state at position {begun.position}")
            reached = 0 if begun is None else begun.position
            for piece in pieces:
                if piece.first != reached:
                    state = "" if reached else f", or a rank that holds its state at {piece.first}"
                    raise RankError(
                        f"rank {piece.rank}", f"a segment of sequence {sequence} from position {reached} on{state}",
                        f"one from {piece.first} on",
                    )  # fmt: skip
                reached = piece.last
        for sequence, rank in self.decode_ranks:
            if sequence not in self.lengths:
                raise RangeError("decode_ranks", f"sequences {sorted(self.lengths)}", sequence)
            if not 0 <= rank < self.ranks:
                raise RangeError("decode_ranks", f"ranks 0..{self.ranks - 1}", rank)
        return self

    def with_states(self, spec: CompressorSpec) -> Shards:
        """Itself, where what ranks hold are pieces, too: of each state, the rows of live_start(p) .. p - 1."""
        if not self.holds:
            return self
        return replace(self, holds=tuple(h._replace(rows=spec.seed_rows(h.position)) for h in self.holds))

    @property
    def ranks(self) -> int:
        return len(self.segments)

    @property
    def own(self) -> tuple[Segment, ...]:
        """This rank's."""
        return self.segments[self.rank]

    @property
    def own_holds(self) -> tuple[Hold, ...]:
        """This rank's."""
        return tuple(h for h in self.holds if h.rank == self.rank)

    @property
    def tokens(self) -> int:
        """This rank's, of all its segments."""
        return sum(s.length for s in self.own)

    @property
    def total(self) -> int:
        """Tokens of all ranks."""
        return sum(s.length for segments in self.segments for s in segments)

    @cached_property
    def _pieces(self) -> dict[int, list[Piece]]:
        """By sequence, in order of positions; segments without tokens are none."""
        found: dict[int, list[Piece]] = {}
        lying = [list(segments) for segments in self.segments]
        for h in self.holds:
            lying[h.rank].append(Segment(h.sequence, h.position - h.rows, h.rows))
        for rank, segments in enumerate(lying):
            offset = 0
            for s in segments:
                if s.length:
                    found.setdefault(s.sequence, []).append(Piece(s.start, s.end, rank, offset))
                offset += s.length
        return {sequence: sorted(found[sequence]) for sequence in sorted(found)}

    @cached_property
    def lengths(self) -> dict[int, int]:
        """Where each sequence ends: its tokens, those before its first segment among them."""
        held = {h.sequence: h.position for h in self.holds}
        return held | {sequence: pieces[-1].last for sequence, pieces in self._pieces.items()}

    @property
    def last_ranks(self) -> dict[int, int]:
        """The rank that has each sequence's last token, or, without tokens, its state."""
        held = {h.sequence: h.rank for h in self.holds}
        return held | {sequence: pieces[-1].rank for sequence, pieces in self._pieces.items()}

    @property
    def decoders(self) -> dict[int, int]:
        """The rank that gets the state at the end of each sequence."""
        return self.last_ranks | dict(self.decode_ranks)

    @property
    def held_after(self) -> dict[int, int]:
        """Position by sequence, of the states that this rank gets: ``holds`` of a call that goes on from there."""
        return {sequence: self.lengths[sequence] for sequence, rank in self.decoders.items() if rank == self.rank}

    def pieces(self, sequence: int, first: int, last: int) -> list[Piece]:
        """Where positions first .. last - 1 of a sequence lie, in order."""
        every, found = self._pieces.get(sequence, []), []
        at = max(bisect_right(every, first, key=lambda piece: piece.first) - 1, 0)
        while first < last and at < len(every) and every[at].first < last:
            begin, end, rank, offset = every[at]
            cut = Piece(max(first, begin), min(last, end), rank, offset + max(first - begin, 0))
            if cut.first < cut.last:
                found.append(cut)
            at += 1
        return found

    def positions(self, device: torch.device | None = None) -> torch.Tensor:
        """Of each of this rank's tokens in its sequence, int64 [tokens]."""
        parts = [torch.arange(s.start, s.end, device=device) for s in self.own]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def emits(spec: CompressorSpec, segment: Segment) -> bool:
    """True if a window's last token is in the segment."""
    return segment.end // spec.ratio > segment.start // spec.ratio


def halos(spec: CompressorSpec, shards: Shards) -> list[Wanted]:
    """What ranks need to go on at the first position of each segment; one that no window ends in needs nothing."""
    return [
        Wanted(rank, index, s.sequence, spec.live_start(s.start), s.start)
        for rank, segments in enumerate(shards.segments)
        for index, s in enumerate(segments)
        if emits(spec, s) and spec.live_start(s.start) < s.start
    ]


def _pairs(name: str, given: Mapping[int, int] | None) -> list[tuple[int, int]]:
    """Of a mapping from sequences to positions or ranks, in the order of sequences."""
    pairs = {} if given is None else given
    require(name, pairs, Mapping)
    return sorted((require_int(name, q, 0), require_int(f"{name}[{q}]", value, 0)) for q, value in pairs.items())
