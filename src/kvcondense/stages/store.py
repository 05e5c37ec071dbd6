"""Stage 7: encode rows in the cache's format and scatter them to their slots."""

from __future__ import annotations

import torch

from kvcondense.errors import RangeError
from kvcondense.layout.cache import PagedCache


def encode(rows: torch.Tensor, cache: PagedCache) -> dict[str, torch.Tensor]:
    """rows [E, d] -> stored values of each field [E, count]; raises RangeError in validation mode if one is lost."""
    stored = cache.format.encode(rows, cache.tensor_scale)
    if cache.strict:
        lost = cache.format.lost(rows, stored, cache.tensor_scale).nonzero()
        if lost.shape[0]:
            row, channel = lost[0].tolist()
            got = f"{rows[row, channel].item()!r} in channel {channel}, and {lost.shape[0] - 1} more"
            raise RangeError(f"row {row}", f"values that {cache.format.name} can hold", got)
    return stored


def scatter(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache) -> None:
    """Write row e to cache slot slot[e]; -1 writes nothing (0 is a legal slot)."""
    write = slot >= 0
    cache.put(slot[write], encode(rows[write], cache))
