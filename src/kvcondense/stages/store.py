"""Stage 7: encode rows in the cache's format and scatter them to their slots."""

from __future__ import annotations

import torch

from kvcondense.layout.cache import PagedCache


def scatter(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    """Write row e to cache slot slot[e]; -1 writes nothing (0 is a legal slot). exact: quantised without bf16 first."""
    write = slot >= 0
    cache.put(slot[write], cache.encode(rows[write], exact))
