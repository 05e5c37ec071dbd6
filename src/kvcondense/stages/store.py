"""Stage 7: encode rows in the cache's format and scatter them to their slots."""

from __future__ import annotations

import torch

from kvcondense.layout.cache import PagedCache


def encode(rows: torch.Tensor, cache: PagedCache) -> torch.Tensor:
    """rows [E, d] -> [E, d] in the element type of the format, rounded to nearest, ties to even."""
    return rows.to(cache.format.element)


def scatter(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache) -> None:
    """Write row e to cache slot slot[e]; -1 writes nothing (0 is a legal slot)."""
    write = slot >= 0
    target = slot[write]
    cache.rows[target // cache.page_rows, target % cache.page_rows] = encode(rows[write], cache)
