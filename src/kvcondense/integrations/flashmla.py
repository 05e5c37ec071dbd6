"""FlashMLA's caches: [num_blocks, block_size, 1, bytes of a row], as its kernels take them, written in place.

Layout of a MODEL1 page: FlashMLA, tests/quant.py (``quantize_k_cache``): 576 bytes of each row, then 8 bytes of scales
of each row, the whole rounded up to a multiple of 576.
"""

from __future__ import annotations

import torch

from kvcondense.errors import RangeError, ShapeError, require
from kvcondense.layout.cache import PagedCache

_ROW_BYTES = {584: "fp8_model1", 1024: "bf16"}


def cache(k_cache: torch.Tensor, *, format: str | None = None) -> PagedCache:
    """The cache of FlashMLA's ``flash_mla_with_kvcache``, [num_blocks, block_size, 1, n], as pages; bytes are shared.

    n elements of any dtype: 584 bytes are ``fp8_model1``, 512 bf16 values ``bf16``; ``format`` names another one, such
    as ``fp8_model1_scale_floor``, whose scales are those of FlashMLA's own test quantiser. Raises ShapeError.
    """
    require("k_cache", k_cache, torch.Tensor)
    if k_cache.dim() != 4 or k_cache.shape[2] != 1:
        raise ShapeError("k_cache", "[num_blocks, block_size, 1, n]", list(k_cache.shape))
    rows = k_cache[:, :, 0]
    size = rows.shape[2] * rows.element_size()
    if format is None and size not in _ROW_BYTES:
        wanted = ", ".join(f"{n} ({name})" for n, name in _ROW_BYTES.items())
        raise ShapeError("k_cache", f"rows of {wanted} bytes, or a format", f"{size} bytes")
    return PagedCache.wrap(rows, format=format or _ROW_BYTES[size])


def indices(rows: torch.Tensor, block_table: torch.Tensor, page_rows: int) -> torch.Tensor:
    """Where FlashMLA finds compressed rows: rows [R, q, k] of each request (-1: none) -> its ``indices``, int32.

    block_table[q, w // page_rows] * page_rows + w mod page_rows, which is the slot that ``condense`` writes window w
    to. block_table [R, pages]. Raises RangeError for a row beyond its table.
    """
    if rows.dim() != 3 or block_table.dim() != 2 or rows.shape[0] != block_table.shape[0]:
        raise ShapeError(
            "rows", "[R, q, k] for block_table [R, pages]", f"{list(rows.shape)}, {list(block_table.shape)}"
        )
    limit = block_table.shape[1] * page_rows
    if bool(((rows < -1) | (rows >= limit)).any()):
        raise RangeError("rows", f"-1 or a row below {limit}", int(rows.min() if rows.min() < -1 else rows.max()))
    live = rows.clamp(min=0).to(torch.int64)
    page = block_table.to(torch.int64).gather(1, (live // page_rows).flatten(1)).view_as(live)
    return torch.where(rows < 0, -1, page * page_rows + live % page_rows).to(torch.int32)
