"""Sources with the interface of engines' files, older and of today, and torch inside: engines' own are not here."""

COMMON = """
import torch
def save(kv, score, ape, positions, memory, slots, ratio):
    n, block = kv.shape[1], memory.shape[1]
    row = torch.cat([kv, score + ape[positions % ratio]], dim=1)
    memory[slots // block, slots % block] = row
def window(memory, table, request, position, ratio, overlap, d):
    block, out = memory.shape[1], []
    n = memory.shape[2] // 2
    first = position - (1 + overlap) * ratio + 1
    for p in range(max(first, 0), position + 1):
        half = d * int(overlap and p > position - ratio)
        row = memory[table[request, p // block], p % block]
        out.append(torch.stack([row[half : half + d], row[n + half : n + half + d]]))
    kv, z = torch.stack(out, dim=1)
    return (torch.softmax(z, dim=0) * kv).sum(0)
def finish(pooled, gamma, eps, cos_sin, position, ratio, rope):
    row = pooled * torch.rsqrt(pooled.square().mean() + eps) * gamma
    cos, sin = cos_sin[position // ratio * ratio].chunk(2)
    a, b = row[-rope::2].clone(), row[-rope + 1 :: 2].clone()
    row[-rope::2], row[-rope + 1 :: 2] = a * cos - b * sin, b * cos + a * sin
    return row
"""
RTP_BF16 = (
    COMMON
    + """
def run_save_partial_states(kv, score, ape, positions, state_cache, slot_mapping, compress_ratio):
    save(kv, score, ape, positions, state_cache, slot_mapping, compress_ratio)
def run_fused_compress_kv_write_bf16(state_cache, token_to_req_indices, positions, slot_mapping, block_table,
        rms_norm_weight, rms_norm_eps, cos_sin_cache, kv_cache, kv_slot_mapping, kv_raw, score_raw, ape, seq_start,
        disable_raw_path=False, boundary_token_indices=None, *, head_dim, rope_head_dim, compress_ratio, overlap):
    assert disable_raw_path == (block_table.shape[0] > 1) and int((block_table == 0).sum()) == 0
    for t in boundary_token_indices.tolist():
        p = int(positions[t])
        pooled = window(state_cache, block_table, token_to_req_indices[t], p, compress_ratio, overlap, head_dim)
        row = finish(pooled, rms_norm_weight, rms_norm_eps, cos_sin_cache, p, compress_ratio, rope_head_dim)
        kv_cache[kv_slot_mapping[t]] = row.bfloat16()
"""
)
RTP = (
    """
from __future__ import annotations
from rtp_llm.models_py.modules.dsv4.fp8._trap_utils import (
    invalid_kv_access_validation_enabled, trap_invalid_kv_access_enabled, validate_slot_mapping)
from kvcondense.layout.cache import PagedCache
"""
    + COMMON
    + """
def run_save_partial_states(kv, score, ape, positions, state_cache, slot_mapping, compress_ratio):
    assert not trap_invalid_kv_access_enabled()
    save(kv, score, ape, positions, state_cache, slot_mapping, compress_ratio)
def run_fused_compress_kv_write(state_cache, token_to_req_indices, positions, slot_mapping, block_table,
        rms_norm_weight, rms_norm_eps, cos_sin_cache, kv_cache, kv_slot_mapping, kv_raw, score_raw, ape, seq_start,
        disable_raw_path=False, *, head_dim, rope_head_dim, compress_ratio, overlap, seq_start_per_req=None,
        cu_seq_per_req=None, state_tokens_per_block):
    assert not invalid_kv_access_validation_enabled() and state_tokens_per_block == state_cache.shape[1]
    validate_slot_mapping("site", kv_slot_mapping, block_size=1, num_blocks=1, negative_mode="skip_any")
    assert kv_cache.shape[2] == 584 and int((block_table == 0).sum()) == 0
    batch, count = block_table.shape[0], len(positions) // block_table.shape[0]
    if not disable_raw_path:  # tokens are read as they were given: the state must not be needed for them
        starts = [seq_start] if seq_start_per_req is None else seq_start_per_req.tolist()
        ends = [0, len(positions)] if cu_seq_per_req is None else cu_seq_per_req.tolist()
        assert len(starts) == batch and len(ends) == batch + 1
        for request, start in enumerate(starts):
            for i in range(ends[request], ends[request + 1]):
                assert positions[i] == start + i - ends[request] and token_to_req_indices[i] == request
        state_cache = state_cache.clone()
        state_cache.flatten(0, 1)[slot_mapping] = 0
        save(kv_raw, score_raw, ape, positions, state_cache, slot_mapping, compress_ratio)
    assert disable_raw_path == (count == 1)
    cache = PagedCache.wrap(kv_cache, format="fp8_model1")
    for t, slot in enumerate(kv_slot_mapping.tolist()):
        if slot >= 0:
            p = int(positions[t])
            pooled = window(state_cache, block_table, token_to_req_indices[t], p, compress_ratio, overlap, head_dim)
            row = finish(pooled, rms_norm_weight, rms_norm_eps, cos_sin_cache, p, compress_ratio, rope_head_dim)
            cache.put(torch.tensor([slot]), cache.encode(row[None]))
"""
)
_KERNEL = """
def kernel(kv_ptr, kv_stride, score_ptr, score_stride, ape_ptr, ape_stride, positions_ptr, state_cache_ptr,
        state_cache_stride0, state_cache_stride1, slot_mapping_ptr, block_size, HEAD_SIZE, TRITON_BLOCK_SIZE,
        STATE_WIDTH, COMPRESS_RATIO):
    n, memory = HEAD_SIZE, state_cache_ptr
    assert block_size == memory.shape[1] and TRITON_BLOCK_SIZE == n == STATE_WIDTH
    assert (state_cache_stride0, state_cache_stride1) == memory.stride()[:2] and kv_stride == score_stride == 2 * n
    save(kv_ptr[:, :n], score_ptr[:, :n], ape_ptr, positions_ptr, memory, slot_mapping_ptr, COMPRESS_RATIO)
class Kernel:
    fn = staticmethod(kernel)
    def __getitem__(self, grid):
        return self.fn
"""
SAVE_OLD = (
    """
from vllm.triton_utils import tl, triton
"""
    + COMMON
    + _KERNEL
    + "_save_partial_states_kernel = Kernel()"
)
SAVE = (
    """
from dataclasses import dataclass
from vllm.model_executor.warmup.jit_warmup import kernel_launcher
from vllm.model_executor.warmup.jit_warmup_triton_helper import LaunchSpec, TritonWarmupTensor, VllmTritonJitKernel
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2
assert next_power_of_2(5) == 8
"""
    + COMMON
    + _KERNEL
    + """
class SavePartialStatesKernel(VllmTritonJitKernel["SavePartialStatesKernel.CompileKey"]):
    @dataclass(frozen=True)
    class CompileKey:
        head_size: int
    kernel = Kernel()
    @kernel_launcher
    def __call__(self, kv) -> LaunchSpec:
        raise NotImplementedError
_SAVE_PARTIAL_STATES_KERNEL = SavePartialStatesKernel()
"""
)
_STORE = """
from kvcondense.layout.cache import PagedCache
def compress_norm_rope_store_triton(state_cache, num_actual, token_to_req_indices, positions, slot_mapping, block_table,
        block_size, state_width, cos_sin_cache, kv_cache, k_cache_metadata, pdl_kwargs, head_dim, rope_head_dim,
        compress_ratio, overlap, use_fp4_cache, rms_norm_weight, rms_norm_eps, quant_block, token_stride, scale_dim):
    assert num_actual == len(positions) and not use_fp4_cache and quant_block == 64 and pdl_kwargs == {}
    pages, page_rows = kv_cache.shape[:2]
    data = kv_cache.as_strided((pages, page_rows, token_stride + scale_dim), (kv_cache.stride(0), 584, 1))
    cache = PagedCache.wrap(data, format="fp8_model1")
    for t, slot in enumerate(k_cache_metadata.slot_mapping.tolist()):
        if slot >= 0:
            p = int(positions[t])
            pooled = window(state_cache, block_table, token_to_req_indices[t], p, compress_ratio, overlap, head_dim)
            row = finish(pooled, rms_norm_weight, rms_norm_eps, cos_sin_cache, p, compress_ratio, rope_head_dim)
            cache.put(torch.tensor([slot]), cache.encode(row[None]))
"""
FUSED_OLD = (
    """
from vllm.platforms import current_platform
from .fused_indexer_q import _fp32x2_to_fp4x2
assert not current_platform.is_rocm()
"""
    + COMMON
    + _STORE
)
FUSED = (
    """
import vllm.envs as envs
from vllm.model_executor.warmup.jit_warmup import kernel_launcher
from vllm.model_executor.warmup.jit_warmup_triton_helper import LaunchSpec, TritonWarmupTensor, VllmTritonJitKernel
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.utils.deep_gemm import mqa_logits_use_mx_scales
from vllm.utils.math_utils import round_up
from vllm.v1.attention.ops.common import pack_ue8m0_x4
if current_platform.is_rocm():
    from vllm.platforms.rocm import _ON_GFX950
else:
    _ON_GFX950 = False
from .fused_indexer_q import _fp32x2_to_fp4x2
from ..one.level.up import Base, helper
assert round_up(5, 4) == 8 and not mqa_logits_use_mx_scales()
class Indexer(Base["Indexer.Key"]):
    def warm(self):
        from vllm.v1.attention.backends.mla.indexer import indexer_page
"""
    + COMMON
    + _STORE
)
