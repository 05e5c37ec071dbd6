"""ROCm ATOM's tensors of a DeepSeek-V4 compressor: states in two tensors, main pages in one buffer or two. Shared.

As of ffdf3bb5. Names and layouts: atom/model_ops/v4_kernels/fused_compress.py (``fused_compress_attn``),
state_writes.py (``update_compressor_states``), v4_quant.py. Its chain rounds nothing before the cache:
``Rounding.FUSED``. Its own kernels write FP4 indexer pages in tiles, which is no format here.
"""

from __future__ import annotations

import torch

from kvcondense.errors import DtypeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable

_MAIN = {
    torch.float8_e4m3fn: "fp8_model1_two_buffers",
    torch.float8_e4m3fnuz: "fp8_model1_two_buffers_fnuz",
}
_INDEXER = {
    torch.float8_e4m3fn: "fp8_indexer_pow2_16x16",
    torch.float8_e4m3fnuz: "fp8_indexer_fnuz_16x16",
}


def state(kv_state: torch.Tensor, score_state: torch.Tensor) -> StatePool:
    """Rings [num_slots, STATE_SIZE, N] fp32 of kv and of score + ape: row p mod STATE_SIZE of a request's slot.

    ATOM keeps the last STATE_SIZE rows of a step, whatever was drafted; here, those that can be read again are kept.
    """
    return StatePool.wrap(kv_state, paged=False, score=score_state)


def cache(kv_cache: torch.Tensor, kv_cache_rope: torch.Tensor | None = None) -> PagedCache:
    """Main rows: ``kv_cache`` [num_blocks, k_per_block, 512], bf16, or FP8 beside bf16 ``kv_cache_rope`` [.., 64].

    FP8 is e4m3fn (gfx950) or e4m3fnuz (gfx942), as the tensor says: 448 codes, 14 bytes of scales, 50 of padding.
    """
    require("kv_cache", kv_cache, torch.Tensor)
    if kv_cache_rope is None:
        return PagedCache.wrap(kv_cache, format="bf16")
    if kv_cache.dtype not in _MAIN:
        raise DtypeError("kv_cache", f"{' or '.join(map(str, _MAIN))} beside kv_cache_rope", kv_cache.dtype)
    return PagedCache.wrap(kv_cache, format=_MAIN[kv_cache.dtype], second=kv_cache_rope)


def indexer_cache(kv_cache: torch.Tensor, cache_scale: torch.Tensor) -> PagedCache:
    """The indexer's FP8 keys in 16 x 16 tiles [num_blocks, k, 128], fp32 scales [num_blocks, k] behind them in memory.

    Raises ShapeError unless ``cache_scale`` is what follows the keys of each block in one allocation.
    """
    require("kv_cache", kv_cache, torch.Tensor)
    require("cache_scale", cache_scale, torch.Tensor)
    if kv_cache.dtype not in _INDEXER:
        raise DtypeError("kv_cache", " or ".join(map(str, _INDEXER)), kv_cache.dtype)
    blocks, rows, d = kv_cache.shape
    behind = kv_cache.data_ptr() + rows * d
    stride = kv_cache.stride(0)
    if cache_scale.dtype != torch.float32 or cache_scale.data_ptr() != behind or 4 * cache_scale.stride(0) != stride:
        raise ShapeError("cache_scale", "fp32, behind the keys of each block", "another type, or other memory")
    data = kv_cache.view(torch.uint8).as_strided((blocks, rows, d + 4), (stride, d + 4, 1))
    return PagedCache.wrap(data, format=_INDEXER[kv_cache.dtype])


def batch(
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    state_slot_mapping: torch.Tensor,
    block_tables: torch.Tensor | None = None,
    draft_rows: torch.Tensor | int = 0,
) -> RaggedBatch:
    """A step: context_lens [R] with the step's tokens, state slots [R], block tables [R, blocks] of compressed rows."""
    return RaggedBatch.build(
        query_start_loc,
        start_positions=context_lens.to(torch.int64) - query_start_loc.diff().to(torch.int64),
        draft_rows=draft_rows,
        state_slots=state_slot_mapping,
        block_table=block_tables,
    )


def rope(cos_cache: torch.Tensor, sin_cache: torch.Tensor) -> RopeTable:
    """cos and sin [positions, (1, 1,) rope_dim / 2], bf16 or fp16 as ATOM has them. A copy, as ``vllm.rope``."""
    if cos_cache.shape != sin_cache.shape or cos_cache.dim() < 2:
        raise ShapeError("cos_cache, sin_cache", "[positions, rope_dim / 2] both", f"{list(cos_cache.shape)}")
    cos, sin = (t.float().reshape(t.shape[0], -1).contiguous() for t in (cos_cache, sin_cache))
    return RopeTable(cos, sin)
