"""vLLM's tensors of a DeepSeek-V4 compressor: paged fp32 states, block tables, cache pages. Shared, never copied.

Names and layouts: vllm/models/deepseek_v4/compressor.py (``CompressorStateCache``, ``CompressorMetadata``) and
common/ops/fused_compress_quant_cache.py. vLLM's chain rounds nothing before the cache: ``Rounding.FUSED``.
"""

from __future__ import annotations

import torch

from kvcondense.errors import DtypeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable

_BYTES = {584: "fp8_model1", 132: "fp8_indexer_pow2", 68: "mxfp4_indexer"}


def state(kv_cache: torch.Tensor, *, prefix_caching: bool = True) -> StatePool:
    """``CompressorStateCache.kv_cache`` [num_blocks, block_size, 2 N] fp32, of rows [kv | score + ape].

    vLLM stores the rows of all tokens. With ``prefix_caching`` so does a step here, since another request may go on
    from any block; without, only rows that the request itself can read again are written.
    """
    require("kv_cache", kv_cache, torch.Tensor)
    if kv_cache.dtype != torch.float32:
        raise DtypeError("kv_cache", "fp32 states", kv_cache.dtype)
    return StatePool.wrap(kv_cache, paged=True, keep_all=prefix_caching)


def cache(kv_cache: torch.Tensor, *, scale: torch.Tensor | None = None) -> PagedCache:
    """A layer's compressed cache [num_blocks, rows of a block, n] as pages: the format follows from dtype and n.

    uint8 rows of 584 bytes are ``fp8_ds_mla`` (fp8_model1), of 132 and 68 bytes the indexer's FP8 and MXFP4; bf16 rows
    are plain; e4m3 rows take ``scale``, fp32 [], of the whole cache. Raises ShapeError or DtypeError for others.
    """
    require("kv_cache", kv_cache, torch.Tensor)
    if kv_cache.dtype == torch.float8_e4m3fn:
        return PagedCache.wrap(kv_cache, format="fp8_tensor", scales=scale)
    if kv_cache.dtype != torch.uint8:
        return PagedCache.wrap(kv_cache)
    if kv_cache.shape[-1] not in _BYTES:
        raise ShapeError("kv_cache", f"rows of {', '.join(map(str, _BYTES))} bytes", f"{kv_cache.shape[-1]}")
    return PagedCache.wrap(kv_cache, format=_BYTES[kv_cache.shape[-1]])


def batch(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    state_block_table: torch.Tensor,
    slot_mapping: torch.Tensor | None = None,
    draft_rows: torch.Tensor | int = 0,
) -> RaggedBatch:
    """A step from ``CommonAttentionMetadata``: query_start_loc [R+1], seq_lens [R] with the step's tokens.

    state_block_table [R, blocks] is that of the states, slot_mapping [T] that of the compressed cache, whose entry at a
    window's last token is its row (-1: none). draft_rows: how many of a request's last tokens may be rejected.
    """
    starts = seq_lens.to(torch.int64) - query_start_loc.diff().to(torch.int64)
    return RaggedBatch.build(
        query_start_loc,
        start_positions=starts,
        draft_rows=draft_rows,
        state_block_table=state_block_table,
        slot_mapping=slot_mapping,
    )


def rope(cos_sin_cache: torch.Tensor) -> RopeTable:
    """``rotary_emb.cos_sin_cache`` [positions, rope_dim], cos in the first half, sin in the second. Copied, once."""
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] % 2:
        raise ShapeError("cos_sin_cache", "[positions, rope_dim]", list(cos_sin_cache.shape))
    cos, sin = cos_sin_cache.float().chunk(2, dim=1)
    return RopeTable(cos.contiguous(), sin.contiguous())
