"""How engines deal sequences, or chunks of them, out to ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

from kvcondense.errors import RangeError, ShapeError, require_int
from kvcondense.parallel.shards import Segment


def zigzag(lengths: Sequence[int], ranks: int, *, starts: Sequence[int] | None = None) -> list[list[Segment]]:
    """Segments by rank: each sequence in 2 ``ranks`` parts of about one size, of which rank k gets the k-th and the
    k-th from the end, so that attention to all that is before costs every rank the same.

    ``starts``: where sequences begin (default: at 0); ``lengths`` are then those of their chunks, which are cut so.
    """
    parts = 2 * ranks

    def cuts(start: int, length: int) -> Iterable[int]:
        return (start + length * k // parts for k in range(parts + 1))

    return _dealt(lengths, ranks, starts, cuts, lambda k, _: min(k, parts - 1 - k))


def round_robin(
    lengths: Sequence[int], ranks: int, block: int = 1, *, starts: Sequence[int] | None = None
) -> list[list[Segment]]:
    """Segments by rank: each sequence in blocks of ``block`` tokens, dealt to the ranks in turn.

    ``starts``: where sequences begin (default: at 0); ``lengths`` are then those of their chunks. Position p lies with
    rank p // block mod ranks, however a sequence is cut into chunks.
    """
    require_int("block", block, 1)

    def cuts(start: int, length: int) -> Iterable[int]:
        return (start, *range((start // block + 1) * block, start + length, block), start + length)

    return _dealt(lengths, ranks, starts, cuts, lambda _, position: position // block % ranks)


def _dealt(
    lengths: Sequence[int],
    ranks: int,
    starts: Sequence[int] | None,
    cuts: Callable[[int, int], Iterable[int]],
    owner: Callable[[int, int], int],
) -> list[list[Segment]]:
    """Sequences cut at ``cuts`` (start, length), with ``owner`` of the k-th part, which begins at a position.

    Parts of one owner that follow one another are one segment.
    """
    require_int("ranks", ranks, 1)
    begun = [0] * len(lengths) if starts is None else [require_int("starts", start, 0) for start in starts]
    if len(begun) != len(lengths):
        raise ShapeError("starts", f"{len(lengths)} positions as lengths", f"{len(begun)}")
    found: list[list[Segment]] = [[] for _ in range(ranks)]
    for sequence, (start, length) in enumerate(zip(begun, lengths, strict=True)):
        if length < 0:
            raise RangeError("lengths", "0 or more tokens", length)
        parts = [(owner(k, a), a, b) for k, (a, b) in enumerate(pairwise(cuts(start, length))) if a < b]
        for rank, group in groupby(parts, key=lambda part: part[0]):
            _, firsts, ends = zip(*group, strict=True)
            found[rank].append(Segment(sequence, firsts[0], ends[-1] - firsts[0]))
    return found
