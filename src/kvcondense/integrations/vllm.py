"""vLLM's tensors of a DeepSeek-V4 compressor: paged fp32 states, block tables, cache pages. Shared, never copied.

As of 0.32 (whose C++ operators ``bench/peer_cpp.py`` compares with) and 0.33. An indexer's keys are not rotated there,
nor are its queries: ``CompressorSpec.indexer(..., rotate=False)``.

Names and layouts: vllm/models/deepseek_v4/compressor.py (``CompressorStateCache``, ``CompressorMetadata``) and
common/ops/fused_compress_quant_cache.py, and the same files of deepseek_v41. vLLM's chain rounds nothing before the
cache for V4, ``Rounding.FUSED``, and the norm's result alone for V4.1, ``Rounding.LATENT``.
"""

from __future__ import annotations

import torch

from kvcondense.errors import DtypeError, KvCondenseError, ShapeError, require
from kvcondense.layout.batch import MOST_POSITIONS, RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable

_BYTES = {584: "fp8_model1", 68: "mxfp4_indexer"}
_TO_NAME = {
    132: ("fp8_indexer_pow2", "fp8_indexer_ue8m0 (0.33 on SM100)", "fp8_indexer_pow2_16x16 (ROCm)"),
    288: ("fp4_v41_times (up to 0.32)", "fp4_v41_times_interleaved (0.33)"),
    528: ("mxfp8_v41_window (up to 0.32)", "mxfp8_v41_window_interleaved (0.33)"),
}


def state(kv_cache: torch.Tensor, *, prefix_caching: bool = True) -> StatePool:
    """``CompressorStateCache.kv_cache`` [num_blocks, block_size, 2 N] fp32, of rows [kv | score + ape].

    0.33 has them as [num_blocks, 1, block_size, 2 N], which is taken too.

    vLLM stores the rows of all tokens. With ``prefix_caching`` so does a step here, since another request may go on
    from any block; without, only rows that the request itself can read again are written.
    """
    return StatePool.wrap(_blocks(kv_cache), paged=True, keep_all=prefix_caching)


def ring_state(kv_cache: torch.Tensor, *, paged: bool = False) -> StatePool:
    """V4.1's ``CompressorStateCache.kv_cache`` of 0.33, fp32 [num_blocks, (1,) capacity, 2 N]: a ring for each request.

    Row p mod capacity of a request's block holds [kv | score] of position p; V4.1 has no ape. capacity is max(8, next
    power of two of drafts + 2). Ratio 1 has no state. vLLM keeps the last ``capacity`` rows of a step; here, those that
    can be read again are kept.

    ``paged``: rings are pages of all positions, named by a state block table [R, 1] in the place of slots. Static plans
    then have no memory for every block there is, which vLLM's memory has many of.
    """
    blocks = _blocks(kv_cache)
    rows = max(1, blocks.shape[1]) if blocks.dim() == 3 else 1
    return StatePool.wrap(blocks, paged=paged, page_tokens=MOST_POSITIONS // 2 // rows * rows if paged else 0)


def _blocks(kv_cache: torch.Tensor) -> torch.Tensor:
    """fp32 states [num_blocks, rows, 2 N], without 0.33's head of one."""
    require("kv_cache", kv_cache, torch.Tensor)
    if kv_cache.dtype != torch.float32:
        raise DtypeError("kv_cache", "fp32 states", kv_cache.dtype)
    return kv_cache[:, 0] if kv_cache.dim() == 4 and kv_cache.shape[1] == 1 else kv_cache


def cache(kv_cache: torch.Tensor, *, scale: torch.Tensor | None = None, format: str | None = None) -> PagedCache:
    """A layer's compressed cache [num_blocks, rows of a block, n] as pages: dtype and n say the format where they can.

    uint8 rows of 584 bytes are ``fp8_ds_mla`` as vLLM's Triton kernels write it (fp8_model1). Its C++ and CuTe kernels
    have the floor on the scale: ``format="fp8_model1_scale_floor"``, other bytes where a block's largest value is below
    0.0448, and read alike. Rows of 68 bytes are the indexer's MXFP4; bf16 rows are plain; e4m3 rows take ``scale``,
    fp32 [], of the whole cache. Rows of 132, 288 and 528 bytes lie in more than one way, which nothing in the buffer
    tells apart: ``format`` names one. Raises KvCondenseError without it, ShapeError for rows of other sizes, DtypeError
    for other types.
    """
    require("kv_cache", kv_cache, torch.Tensor)
    if format is not None:
        return PagedCache.wrap(kv_cache, format=format, scales=scale)
    if kv_cache.dtype == torch.float8_e4m3fn:
        return PagedCache.wrap(kv_cache, format="fp8_tensor", scales=scale)
    if kv_cache.dtype != torch.uint8:
        return PagedCache.wrap(kv_cache)
    size = kv_cache.shape[-1]
    if size in _TO_NAME:
        raise KvCondenseError("format", f"one of {', '.join(_TO_NAME[size])} for rows of {size} bytes", None)
    if size not in _BYTES:
        known = ", ".join(map(str, sorted({*_BYTES, *_TO_NAME})))
        raise ShapeError("kv_cache", f"rows of {known} bytes", f"{size}")
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


def ring_batch(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    draft_rows: torch.Tensor | int = 0,
) -> RaggedBatch:
    """A step of V4.1: as ``batch``, with the states' block table [R, 1 or more], whose first column names the rings.

    Block 0 is vLLM's null block: such requests (padding, dummies) are inert, neither read nor written. Without a block
    table (ratio 1, which has no state) every request is live.
    """
    slots = None
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[1] < 1:
            raise ShapeError("block_table", "[R, at least 1]", list(block_table.shape))
        ring = block_table[:, 0].to(torch.int64)
        slots = torch.where(ring == 0, -1, ring)
    return RaggedBatch.build(
        query_start_loc,
        start_positions=seq_lens.to(torch.int64) - query_start_loc.diff().to(torch.int64),
        draft_rows=draft_rows,
        state_slots=slots,
        slot_mapping=slot_mapping,
    )


def rope(cos_sin_cache: torch.Tensor) -> RopeTable:
    """``rotary_emb.cos_sin_cache`` [positions, rope_dim], cos in the first half, sin in the second.

    A copy, which does not see what becomes of vLLM's: make it anew where that is replaced or written to
    (``layout.memory.version`` tells), as the plugin does.
    """
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] % 2:
        raise ShapeError("cos_sin_cache", "[positions, rope_dim]", list(cos_sin_cache.shape))
    cos, sin = cos_sin_cache.float().chunk(2, dim=1)
    return RopeTable(cos.contiguous(), sin.contiguous())
