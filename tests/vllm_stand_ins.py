"""vLLM's classes that the plugin meets, by their published signatures, and pages as vLLM lays them over one another."""

import inspect
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from engine_tensors import ROPE, weights
from kvcondense.integrations.vllm_plugin import steps

PAGE, BLOCKS = 47808, 400
"""Bytes from block to block, as vLLM 0.32 has them for layers of all three kinds; blocks of a memory."""


@dataclass
class Metadata:
    """Of ``vllm.models.deepseek_v4.compressor.CompressorMetadata``."""

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    token_to_req_indices: torch.Tensor | None = None
    num_decode_tokens: int | None = None
    c128_boundary: bool | None = None


@dataclass
class RingMetadata:
    """Of ``vllm.models.deepseek_v41.compressor.CompressorMetadata``."""

    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    token_to_req_indices: torch.Tensor


@dataclass
class Context:
    """Of ``vllm.forward_context.ForwardContext``."""

    attn_metadata: object
    seen: list = field(default_factory=list)


def install(monkeypatch, version="0.32.0", device="cpu", ranks=1):
    """A package ``vllm`` of stand-ins; returns it, with ``context`` to be set and ``asked`` of vLLM's own forward."""
    vllm = _module(monkeypatch, "vllm", __version__=version, context=Context(None), asked=[])

    class DeepseekCompressor(nn.Module):
        def forward(self, kv_score, positions, rotary_emb):
            vllm.asked.append((self, kv_score, positions, rotary_emb))

    class DeepseekV4CPUCompressor(DeepseekCompressor):
        def forward(self, kv_score, positions, rotary_emb):
            vllm.asked.append((self, kv_score, positions, rotary_emb))

    _module(monkeypatch, "vllm.platforms", current_platform=SimpleNamespace(device_type=device))
    _module(monkeypatch, "vllm.forward_context", get_forward_context=lambda: vllm.context)
    _module(monkeypatch, "vllm.distributed", get_dcp_group=lambda: SimpleNamespace(world_size=ranks))
    for name in ("vllm.models", "vllm.models.deepseek_v4", "vllm.models.deepseek_v4.cpu", "vllm.models.deepseek_v41"):
        _module(monkeypatch, name)
    base = "vllm.models.deepseek_v4.compressor"
    vllm.compressor = _module(monkeypatch, base, DeepseekCompressor=DeepseekCompressor, CompressorMetadata=Metadata)
    ring = "vllm.models.deepseek_v41.compressor"
    vllm.v41 = _module(monkeypatch, ring, DeepseekCompressor=_of_v41(vllm), CompressorMetadata=RingMetadata)
    cpu = "vllm.models.deepseek_v4.cpu.cpu_compressor"
    vllm.cpu = _module(monkeypatch, cpu, DeepseekV4CPUCompressor=DeepseekV4CPUCompressor)
    for module in (vllm.compressor, vllm.v41, vllm.cpu):
        for one in filter(inspect.isclass, list(vars(module).values())):
            if one not in (Metadata, RingMetadata):
                one.__module__, one.__qualname__ = module.__name__, one.__name__
    vllm.kernels = _module(monkeypatch, "vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache")
    return vllm


def _of_v41(vllm):
    class DeepseekCompressor(nn.Module):
        def forward(self, kv_score, positions):
            vllm.asked.append((self, kv_score, positions))

    return DeepseekCompressor


def as_on_a_gpu(monkeypatch):
    """Steps of the plugin for which no value is asked, with one static plan for all of a shape."""
    monkeypatch.setattr(steps, "on_host", lambda device: False)


def _module(monkeypatch, name, **contents):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def layer(vllm, spec, memory, prefix="model.layers.1.attn.compressor", kind=None):
    """A compressor's module and its table of angles; its states and rows begin at byte 0 of blocks of ``memory``."""
    made = (kind or vllm.cpu.DeepseekV4CPUCompressor)()
    w = weights(spec)
    made.prefix, made.k_cache_prefix = prefix, f"{prefix}.k_cache"
    made.compress_ratio, made.head_dim, made.rope_head_dim = spec.ratio, spec.head_dim, spec.rope_dim
    made.overlap, made.rms_norm_eps, made.rotate = spec.overlap, spec.eps, spec.head_dim == 128
    made.ape, made.norm = nn.Parameter(w.ape, requires_grad=False), nn.Module()
    made.norm.weight = nn.Parameter(w.norm.bfloat16(), requires_grad=False)
    rows, size = 4 if spec.overlap else 8, 132 if spec.head_dim == 128 else 584
    floats = memory.view(torch.float32)
    state = floats.as_strided((memory.shape[0], rows, spec.state_dim), (PAGE // 4, spec.state_dim, 1))
    many = 256 // spec.ratio
    cache = memory.as_strided((memory.shape[0], many, size), (PAGE, size, 1))
    made.state_cache = SimpleNamespace(kv_cache=state, prefix=f"{prefix}.state_cache")
    made._static_forward_context = {made.k_cache_prefix: SimpleNamespace(kv_cache=cache)}
    return made, SimpleNamespace(cos_sin_cache=torch.cat([ROPE.cos, ROPE.sin], 1))


@dataclass
class Engine:
    """One compressor's tables for a few requests: blocks of one memory, some for its states, some for its rows."""

    spec: object
    state_table: torch.Tensor
    cache_table: torch.Tensor

    @classmethod
    def of(cls, spec, requests, positions, blocks):
        """Blocks at random, none twice, block 0 for nobody."""
        rows = 4 if spec.overlap else 8
        columns, pages = -(-positions // rows), -(-positions // 256)
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        state, rest = order[: requests * columns], order[requests * columns :]
        cache = rest[: requests * pages]
        return cls(spec, state.view(requests, -1).to(torch.int32), cache.view(requests, -1).to(torch.int64))

    def metadata(self, starts, lengths, pad=0):
        """CompressorMetadata, the compressed cache's slots and the positions of a step; ``pad`` tokens behind it."""
        rows, many = 4 if self.spec.overlap else 8, 256 // self.spec.ratio
        owner, positions, slots, cache_slots = [], [], [], []
        for q, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for p in range(start, start + length):
                window = p // self.spec.ratio
                owner.append(q)
                positions.append(p)
                slots.append(int(self.state_table[q, p // rows]) * rows + p % rows)
                ends = (p + 1) % self.spec.ratio == 0
                page = int(self.cache_table[q, window // many])
                cache_slots.append(page * many + window % many if ends else -1)
        metadata = Metadata(
            block_table=self.state_table[: len(starts)].clone(),
            slot_mapping=torch.tensor([*slots, *[-1] * pad], dtype=torch.int64),
            block_size=rows,
            token_to_req_indices=torch.tensor([*owner, *[0] * pad], dtype=torch.int32),
        )
        return metadata, torch.tensor([*cache_slots, *[-1] * pad]), torch.tensor([*positions, *[0] * pad])


def step(vllm, module, rope, memory_tables, kv_score, starts, lengths, pad=0):
    """One forward of a module; ``memory_tables``: its ``Engine``."""
    metadata, slots, positions = memory_tables.metadata(starts, lengths, pad)
    told = {module.state_cache.prefix: metadata, module.k_cache_prefix: SimpleNamespace(slot_mapping=slots)}
    vllm.context = Context(told)
    module.forward(kv_score, positions, rope)
    return vllm.context


def latent_layer(vllm, ratio, rings=None, prefix="model.layers.2.attn.compressor", kind=None):
    """A module of V4.1: rings [blocks, capacity, 1024] fp32 for ratio 2, none for ratio 1."""
    made = (kind or vllm.v41.DeepseekCompressor)()
    made.prefix, made.k_cache_prefix, made.compress_ratio = prefix, f"{prefix}.k_cache", ratio
    made.head_dim, made.rms_norm_eps, made.norm = 512, 1e-6, nn.Module()
    gen = torch.Generator().manual_seed(ratio)
    made.norm.weight = nn.Parameter((1 + 0.2 * torch.randn(512, generator=gen)).bfloat16(), requires_grad=False)
    made.state_cache = None if ratio == 1 else SimpleNamespace(kv_cache=rings, prefix=f"{prefix}.state_cache")
    return made


def ring_metadata(turns, capacity, pad=0, named=False):
    """Metadata and positions of a step of V4.1: (block, first position, tokens) of requests; block 0 is nobody's.

    named: vLLM's first runner has slots of the first request for padding, where a graph is larger than its step.
    """
    owner, positions, slots = [], [], []
    for q, (block, start, count) in enumerate(turns):
        for p in range(start, start + count):
            owner.append(q)
            positions.append(p)
            slots.append(block * capacity + p % capacity if block else -1)
    ends = torch.tensor([0, *(count for _, _, count in turns)]).cumsum(0)
    owner = torch.tensor([*owner, *[0] * pad], dtype=torch.int32)
    padding = [turns[0][0] * capacity if named and turns[0][0] else -1] * pad
    metadata = RingMetadata(torch.tensor([*slots, *padding], dtype=torch.int64), ends.to(torch.int32), owner)
    return metadata, torch.tensor([*positions, *[0] * pad], dtype=torch.int64)


def latents(vllm, modules, x, metadata, positions):
    """One forward pass of modules of V4.1, each with tokens of its own; what they give."""
    told = {m.state_cache.prefix if m.state_cache else m.k_cache_prefix: metadata for m in modules}
    vllm.context = Context(told)
    return [module.forward(tokens, positions) for module, tokens in zip(modules, x, strict=True)]
