"""SGLang's tensors of a DeepSeek-V4 compressor: rings with raw scores, its order of the ape, cache pages.

As of 0.5.23. Names and layouts: sglang/srt/mem_cache/deepseek_v4_compress_state.py (``CompressStatePool``),
deepseek_v4_memory_pool.py, srt/layers/attention/dsv4, kernels/ops/attention/dsv4/kv_layout.py (``KVLayout``). States
and pages are shared, never copied. SGLang's chain rounds nothing before the cache for V4, ``Rounding.FUSED``; for V4.1
it rounds as DeepSeek's code does, ``Rounding.REFERENCE``.
"""

from __future__ import annotations

import torch

from kvcondense.errors import RangeError, ShapeError, require
from kvcondense.formats.catalog import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable

LAYOUTS = {
    "v4": "fp8_model1_via_fp4_v41_times",
    "v41": "mxfp8_v41_window_scale_floor_via_fp4_v41_times",
    "v41_new": "mxfp8_v41_window_interleaved_scale_floor_via_fp4_v41_times",
    "v41_fp4": "fp4_v41",
    "v41_fp4_new": "fp4_v41_interleaved",
}
"""``KVLayout`` of V4.1's compressed rows -> format. FP8 pages hold what FP4 rows would give back."""


def state(kv_score_buffer: torch.Tensor, ring_size: int, *, swa_page_size: int | None = None) -> StatePool:
    """``kv_score_buffer.kv_score`` [size, 2 N], fp32 or bf16, rows [kv | score] without ape.

    With ``swa_page_size``, a ring of ``ring_size`` rows for each page of that many positions, as SGLang finds a row:
    swa_page * ring_size + position mod ring_size; else one for each request slot, as V4.1's ratio 2 has them (of 2
    rows, or the next power of two above drafts + 1). A remainder of rows at the end (it has some to spare) is left
    alone.
    """
    require("kv_score_buffer", kv_score_buffer, torch.Tensor)
    if kv_score_buffer.dim() != 2 or not 1 <= ring_size <= kv_score_buffer.shape[0]:
        raise ShapeError("kv_score_buffer", f"[at least ring_size {ring_size}, 2 N]", list(kv_score_buffer.shape))
    rings = kv_score_buffer.shape[0] // ring_size
    rows = kv_score_buffer[: rings * ring_size].unflatten(0, (rings, ring_size))
    return StatePool.wrap(rows, paged=swa_page_size is not None, page_tokens=swa_page_size or 0, raw_scores=True)


def cache(
    buffer: torch.Tensor, page_rows: int, *, format: str = "fp8_model1", head_dim: int | None = None
) -> PagedCache:
    """A layer's pages, uint8 [num_pages, bytes of a page], of ``page_rows`` compressed rows each.

    Main rows are ``fp8_model1``; the indexer's are ``fp8_indexer_plain`` or ``mxfp4_indexer_ties_down``. V4.1's layouts
    have a format each, ``LAYOUTS``; block-split and interleaved pages may have one size, so name it. ``head_dim`` is
    needed only where the format leaves it open. Raises ShapeError for pages of another size.
    """
    form = get_format(format)
    d = head_dim or form.head_dim
    if d is None:
        raise RangeError("head_dim", f"a number ({form.name} takes any)", "None")
    return PagedCache(buffer, form, d, page_rows)


def ape(converted: torch.Tensor, overlap: bool) -> torch.Tensor:
    """The ape [r, N] from what ``apply_ape_hotfix`` made of it: with overlap, both channel halves one after the other.

    SGLang reads [2 r, d], r rows of the first half, then r of the second, in the storage of [r, 2 d]. Copied, once.
    """
    if not overlap:
        return converted
    r, n = converted.shape
    return converted.reshape(2, r, n // 2).transpose(0, 1).reshape(r, n)


def to_ape(weight: torch.Tensor, overlap: bool) -> torch.Tensor:
    """The inverse of ``ape``: the checkpoint's ape as SGLang's kernels read it."""
    if not overlap:
        return weight
    r, n = weight.shape
    return weight.reshape(r, 2, n // 2).transpose(0, 1).reshape(r, n)


def state_pages(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, full_to_swa: torch.Tensor, swa_page_size: int
) -> torch.Tensor:
    """The states' block table [R, pages]: the SWA page of positions j * swa_page_size .. of each request.

    req_to_token [requests, positions] and full_to_swa [locations] map a position to its location and that to the
    sliding-window pool's. Pages that are gone (a location that maps to less than 0) are -1.
    """
    first = req_to_token[req_pool_indices.to(torch.int64)][:, ::swa_page_size].to(torch.int64)
    location = full_to_swa.to(torch.int64)[first.clamp(min=0)]
    return torch.where((first < 0) | (location < 0), -1, location // swa_page_size)


def batch(
    extend_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    ratio: int,
    out_cache_loc: torch.Tensor | None = None,
    state_slots: torch.Tensor | None = None,
    state_block_table: torch.Tensor | None = None,
    draft_rows: torch.Tensor | int = 0,
) -> RaggedBatch:
    """A step: extend_start_loc [R+1] (0 first, the number of tokens last), seq_lens [R] with the step's tokens.

    out_cache_loc [T] are the tokens' locations; a window's row is that of its last token, divided by ``ratio``.
    state_slots: ``req_pool_indices``, or state_block_table: ``state_pages``.
    """
    slots = None if out_cache_loc is None else torch.div(out_cache_loc.to(torch.int64), ratio, rounding_mode="floor")
    return RaggedBatch.build(
        extend_start_loc,
        start_positions=seq_lens.to(torch.int64) - extend_start_loc.diff().to(torch.int64),
        draft_rows=draft_rows,
        state_slots=state_slots,
        state_block_table=state_block_table,
        slot_mapping=slots,
    )


def rope(freqs_cis: torch.Tensor) -> RopeTable:
    """``freqs_cis`` [positions, rope_dim / 2] complex, cos + i sin. A copy, as ``vllm.rope``."""
    if not freqs_cis.is_complex() or freqs_cis.dim() != 2:
        raise ShapeError("freqs_cis", "complex [positions, rope_dim / 2]", f"{freqs_cis.dtype} {list(freqs_cis.shape)}")
    return RopeTable(freqs_cis.real.float().contiguous(), freqs_cis.imag.float().contiguous())
