"""What position_ids say of a call: one sequence in each row, padded at the left or not, or something else."""

from __future__ import annotations

import torch

from kvcondense.errors import KvCondenseError
from kvcondense.integrations.memory import Tokens

_Row = tuple[int, int, int]


def read(position_ids: torch.Tensor, sequences: int, *, fresh: bool, cached: bool) -> Tokens | None:
    """The tokens of a call, from its positions [B or 1, S]; asks a GPU for values.

    A fresh sequence begins at 0, after padding: positions that are all 0, all 1 or all negative. None where a fresh
    call brings anything else: documents one after the other, padding at the right, jumps, and without a cache
    sequences that begin elsewhere. Raises KvCondenseError for sequences that begin elsewhere in a new cache, and for
    positions that go on in an old one and do not follow one another.
    """
    rows = position_ids.expand(sequences, -1).tolist()
    found: list[_Row] = []
    for row in rows:
        one = _fresh(row) if fresh else _run(row, 0)
        if one is None and not fresh:
            raise KvCondenseError("position_ids", "positions that follow one another", row[:8])
        if one is None:
            return None
        found.append(one)
    if fresh and any(start for start, _, _ in found):
        if not cached:
            return None
        raise KvCondenseError("position_ids", "a 0 where a sequence begins", [row[:8] for row in rows[:4]])
    return Tokens(*(tuple(column) for column in zip(*found, strict=True)))


def _fresh(row: list[int]) -> _Row | None:
    skip = len(row) - 1 - row[::-1].index(0) if 0 in row else 0
    padding = set(row[:skip])
    if padding <= {0} or padding <= {1} or all(p < 0 for p in padding):
        return _run(row, skip)
    return None


def _run(row: list[int], skip: int) -> _Row | None:
    """(start, length, skip) of the positions after ``skip`` others, if they follow one another."""
    if not row or row[skip] < 0 or row[skip:] != list(range(row[skip], row[skip] + len(row) - skip)):
        return None
    return row[skip], len(row) - skip, skip
