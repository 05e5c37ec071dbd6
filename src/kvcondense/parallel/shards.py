"""Where sequences lie on ranks: segments that all agree upon, how engines deal them, and what each rank must read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from kvcondense.errors import RangeError, RankError, require_int
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


class Piece(NamedTuple):
    """Positions first .. last - 1 of a sequence, which lie with ``rank`` from its token ``offset`` on."""

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

    timeout: how long another rank may take to answer.
    """

    segments: tuple[tuple[Segment, ...], ...]
    rank: int
    group: Any
    timeout: timedelta

    @classmethod
    def agree(cls, start: int, length: int, *, group: Any = None, timeout: timedelta | float = 60.0) -> Shards:
        """``agree_on`` one sequence, of which this rank has ``length`` tokens from position ``start``."""
        require_int("start", start, 0)
        require_int("length", length, 0)
        return cls.agree_on([(0, start, length)], group=group, timeout=timeout)

    @classmethod
    def agree_on(
        cls, segments: Sequence[tuple[int, int, int]], *, group: Any = None, timeout: timedelta | float = 60.0
    ) -> Shards:
        """Tell all ranks of the group which segments (sequence, start, length) this one has, and hear of theirs.

        All ranks call it. Each sequence must lie on the ranks from position 0 on, without gaps, nothing twice; a rank
        may have any number of segments of any sequences, or none. The group must take CPU tensors (gloo, or
        ``init_process_group()`` with both). ``timeout``: in seconds, unless it is a timedelta. Raises RangeError for a
        negative number, RankError that names a rank that is silent, or whose segment does not follow what is before it.
        """
        mine = [Segment(*(require_int("segments", value, 0) for value in one)) for one in segments]
        patience = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        counts = [int(t) for t in tell(torch.tensor([len(mine)]), rank, ranks, group, patience)]
        table = torch.zeros(max(counts), len(Segment._fields), dtype=torch.int64)
        table[: len(mine)] = torch.tensor(mine, dtype=torch.int64).view(-1, table.shape[1])
        told = tell(table, rank, ranks, group, patience)
        return cls(
            tuple(tuple(Segment(*row) for row in t[:count].tolist()) for t, count in zip(told, counts, strict=True)),
            rank, group, patience,
        ).checked()  # fmt: skip

    def checked(self) -> Shards:
        """Itself, if every sequence is whole. Raises RankError that names the rank of the first piece that is not."""
        for sequence, pieces in self._pieces.items():
            reached = 0
            for piece in pieces:
                if piece.first != reached:
                    raise RankError(
                        f"rank {piece.rank}", f"a segment of sequence {sequence} from position {reached} on",
                        f"one from {piece.first} on",
                    )  # fmt: skip
                reached = piece.last
        return self

    @property
    def ranks(self) -> int:
        return len(self.segments)

    @property
    def own(self) -> tuple[Segment, ...]:
        """This rank's."""
        return self.segments[self.rank]

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
        for rank, segments in enumerate(self.segments):
            offset = 0
            for s in segments:
                if s.length:
                    found.setdefault(s.sequence, []).append(Piece(s.start, s.end, rank, offset))
                offset += s.length
        return {sequence: sorted(found[sequence]) for sequence in sorted(found)}

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each sequence."""
        return {sequence: pieces[-1].last for sequence, pieces in self._pieces.items()}

    @property
    def last_ranks(self) -> dict[int, int]:
        """The rank that has each sequence's last token."""
        return {sequence: pieces[-1].rank for sequence, pieces in self._pieces.items()}

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


def zigzag(lengths: Sequence[int], ranks: int) -> list[list[Segment]]:
    """Segments by rank: each sequence in 2 ``ranks`` parts of about one size, of which rank k gets the k-th and the
    k-th from the end, so that attention to all that is before costs every rank the same.
    """
    parts = 2 * ranks
    owner = [min(k, parts - 1 - k) for k in range(parts)]
    return _dealt(lengths, ranks, lambda n: [n * k // parts for k in range(parts + 1)], owner)


def round_robin(lengths: Sequence[int], ranks: int, block: int = 1) -> list[list[Segment]]:
    """Segments by rank: each sequence in blocks of ``block`` tokens, dealt to the ranks in turn."""
    require_int("block", block, 1)
    longest = -(-max(lengths, default=0) // block)
    owner = [k % ranks for k in range(longest)]
    return _dealt(lengths, ranks, lambda n: [*range(0, n, block), n], owner)


def _dealt(lengths: Sequence[int], ranks: int, cuts: Any, owner: Sequence[int]) -> list[list[Segment]]:
    """Sequences cut at ``cuts`` of their lengths; parts of one owner that follow one another are one segment."""
    require_int("ranks", ranks, 1)
    found: list[list[Segment]] = [[] for _ in range(ranks)]
    for sequence, length in enumerate(lengths):
        if length < 0:
            raise RangeError("lengths", "0 or more tokens", length)
        bounds = cuts(length)
        parts = [(k, a, b) for k, a, b in zip(owner, bounds, bounds[1:], strict=False) if a < b]
        for rank, group in groupby(parts, key=lambda part: part[0]):
            _, starts, ends = zip(*group, strict=True)
            found[rank].append(Segment(sequence, starts[0], ends[-1] - starts[0]))
    return found
