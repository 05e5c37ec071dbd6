"""All bytes of vLLM's page memory after a step on either side: equal, but for roundings in the rows that it writes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from engines.judge import FAIL, PASS, apart, beyond

from kvcondense import PagedCache


@dataclass
class Counts:
    """Of steps: what was compared and what differs, in fields that are counted together."""

    status: str = PASS
    steps: int = 0
    apart: float = 0.0
    why: str = ""

    def add(self, other: Counts) -> None:
        """One step more; the first reason stays."""
        self.status = FAIL if FAIL in (self.status, other.status) else PASS
        for field in fields(self):
            if isinstance(mine := getattr(self, field.name), int):
                setattr(self, field.name, mine + getattr(other, field.name))
        self.apart, self.why = max(self.apart, other.apart), self.why or other.why


@dataclass
class Tally(Counts):
    """row: bytes of rows that steps wrote; elsewhere: all others, at each step."""

    elsewhere_bytes: int = 0
    elsewhere_differ: int = 0
    row_bytes: int = 0
    row_differ: int = 0


def judge(mine: torch.Tensor, theirs: torch.Tensor, pages: PagedCache, slots: torch.Tensor) -> Tally:
    """Two memories [N] of bytes after a step that wrote rows at ``slots`` of ``pages``, which lie in such a memory."""
    slots = slots[slots >= 0]
    rows = _bytes_of(pages, slots, mine.shape[0])
    differ = mine != theirs
    inside, outside = int((differ & rows).sum()), int((differ & ~rows).sum())
    size, far, why = int(rows.sum()), 0.0, f"{outside} bytes elsewhere than in rows" if outside else ""
    if inside and not why:
        values = [_at(pages, memory).decode_rows(slots) for memory in (mine, theirs)]
        far = apart(*values)
        why = beyond(pages.format.name, values[0], values[1], inside, size)
    return Tally(FAIL if why else PASS, 1, far, why, mine.shape[0] - size, outside, size, inside)


def _at(pages: PagedCache, memory: torch.Tensor) -> PagedCache:
    """The same pages in another memory."""
    data = pages.data
    moved = memory.as_strided(data.shape, data.stride(), data.storage_offset())
    return PagedCache(moved, pages.format, pages.head_dim, pages.page_rows)


def _bytes_of(pages: PagedCache, slots: torch.Tensor, size: int) -> torch.Tensor:
    """Which bytes of the memory are those of rows, bool [size]."""
    mark = torch.zeros(size, dtype=torch.uint8)
    marked = _at(pages, mark)
    for field in pages.format.fields(pages.head_dim):
        marked.field(field.name).view(torch.uint8)[slots // pages.page_rows, slots % pages.page_rows] = 1
    return mark.bool()
