"""SGLang's compressor step on kvcondense: what takes the place of ``CompressorBackendMixin.forward_unified`` (0.5.23).

    from sglang.srt.layers.attention.dsv4.compressor_v2 import CompressorBackendMixin
    from kvcondense.integrations.sglang_forward import forward_unified

    CompressorBackendMixin.forward_unified = forward_unified
    CompressorBackendMixin.forward_indexer_compressor = CompressorBackendMixin.forward_core_compressor = forward_unified

Written after SGLang's sources, whose package needs a GPU; it was run beside stand-ins of its classes, not inside it. V4
alone, eager steps alone (values are looked at: no graph), rings of the paged pool. What it does not do raises.
"""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import Any

import torch

from kvcondense.bound import Bound, bind
from kvcondense.errors import ShapeError, UnsupportedError
from kvcondense.integrations import sglang
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.memory import version
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

_bound: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], torch.Tensor, Bound]] = weakref.WeakKeyDictionary()


def forward_unified(self: Any, x: torch.Tensor, forward_batch: Any, layer_id: int, compressor: Any) -> None:
    """A step of one compressor, from hidden states x to rows in the cache, on SGLang's own states and pages.

    self: the attention backend. kv_score comes from SGLang's own projection. Raises KvCondenseError for metadata or
    memory that is none of a compressor's.
    """
    if forward_batch.forward_mode.is_idle():
        return
    pool, requests = self.token_to_kv_pool, forward_batch.req_pool_indices
    kv_score = compressor.compute_kv_score(x, forward_batch)
    lengths, positions = forward_batch.extend_seq_lens, forward_batch.positions
    if lengths is None:  # decode and verify: as many tokens for each request
        each, over = divmod(positions.shape[0], max(requests.shape[0], 1))
        if over:
            raise ShapeError("positions", f"as many for each of {requests.shape[0]} requests", positions.shape[0])
        lengths = torch.full_like(requests, each)
    batch = RaggedBatch.build(
        torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0)),
        positions=positions,
        state_block_table=sglang.state_pages(
            self.req_to_token, requests, pool.full_to_swa_index_mapping, pool.swa_page_size
        ),
        slot_mapping=getattr(self.forward_metadata.core_metadata, f"c{compressor.ratio}_out_loc"),
    )
    layer = _layer(self, compressor, layer_id)
    known = vars(forward_batch).setdefault("kvcondense", {})
    key = layer.spec, layer.state and layer.state.layout, layer.cache and layer.cache.page_rows
    told, plan = known.get(key, (None, None))
    if plan is None or not _same(told, batch):
        known[key] = _, plan = batch, layer.plan(batch)
    layer.condense(kv_score, plan)


def _same(one: RaggedBatch, other: RaggedBatch) -> bool:
    """Whether two batches say the same: SGLang's may be filled anew for another pass."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(RaggedBatch)]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def _layer(backend: Any, compressor: Any, layer_id: int) -> Bound:
    """A module's compressor, bound anew if SGLang has moved its memory."""
    pool, ratio = backend.token_to_kv_pool, compressor.ratio
    if pool.uniform_fp8 or getattr(pool, "_unified_kv", False):
        raise UnsupportedError("token_to_kv_pool", "pages of rows of 584 bytes, and states in rings by page", "others")
    indexer, overlap = compressor.is_in_indexer, ratio == 4
    states = compressor.get_state_pool(backend).kv_score_buffer.kv_score
    pages = (pool.get_index_k_with_scale_buffer if indexer else pool.get_extra_key_buffer)(layer_id)
    norm, ape, angles = compressor.norm.weight.detach(), compressor.ape.detach(), compressor.freqs_cis
    places = tuple((t.data_ptr(), t.shape) for t in (states, pages, norm, ape, angles))
    places += (version(angles),)  # which are copied
    found = _bound.get(compressor)
    if found is None or found[0] != places or found[1] is not angles:
        rows = pool.get_index_k_page_size(ratio) if indexer else pool.get_extra_key_page_size(layer_id)
        ring = pool.get_ring_size(compress_ratio=ratio)
        spec = CompressorSpec(
            ratio=ratio,
            head_dim=compressor.head_dim,
            eps=compressor.norm.variance_epsilon,
            rope_dim=2 * angles.shape[-1],
            overlap=overlap,
            rotate=indexer,
            rounding=Rounding.FUSED,
        )
        made = bind(
            spec,
            CompressorWeights(norm=norm, ape=sglang.ape(ape, overlap)),
            sglang.rope(angles),
            state=sglang.state(states, ring, swa_page_size=pool.swa_page_size),
            cache=sglang.cache(pages, rows, format="fp8_indexer_plain" if indexer else "fp8_model1"),
        )
        found = _bound[compressor] = places, angles, made
    weights = found[2].weights
    for mine, theirs in ((weights.norm, norm), (weights.ape, sglang.ape(ape, overlap))):
        if mine is not None and mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)  # weights can be loaded anew in place
    return found[2]
