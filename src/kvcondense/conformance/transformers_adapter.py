"""transformers' DeepSeek-V4 compressors as an adapter: fp32, one request at a time, a prefill and single tokens."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from kvcondense.conformance.adapter import Capabilities, Engine, Setup
from kvcondense.conformance.compressors import CONFIG
from kvcondense.errors import UnsupportedError
from kvcondense.layout.batch import RaggedBatch

_LAYERS = {4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


class TransformersAdapter(Engine):
    """The modules take hidden states: with identity matrices for weights, kv_score is the hidden state."""

    capabilities = Capabilities(
        specs=("csa format=fp32", "hca format=fp32"),
        ragged=False,
        chunks=False,
        max_draft=0,
        inert=False,
        spare=False,
        unmapped=False,
        exports=False,
        refuses=False,
        returns_state=False,
        rounding="fused",
        close=1e-4,
    )

    def init(self, setup: Setup) -> None:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        super().init(setup)
        spec = setup.spec
        yarn = CONFIG.yarn
        assert yarn is not None
        self.config = DeepseekV4Config(
            hidden_size=spec.projected,
            num_hidden_layers=1,
            layer_types=[_LAYERS[spec.ratio]],
            mlp_layer_types=["moe"],
            head_dim=spec.head_dim,
            partial_rotary_factor=spec.rope_dim / spec.head_dim,
            index_head_dim=CONFIG.index_head_dim,
            index_n_heads=1,
            q_lora_rank=8,
            rms_norm_eps=spec.eps,
            max_position_embeddings=CONFIG.max_positions,
            compress_rope_theta=CONFIG.compress_rope_theta,
            rope_parameters={
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_positions,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
            },
        )
        kind = modeling.DeepseekV4CSACompressor if spec.overlap else modeling.DeepseekV4HCACompressor
        self.module: Any = kind(self.config).float().eval()
        identity = torch.eye(spec.projected)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.zero_()
            self.module.kv_proj.weight.copy_(identity[: spec.width])
            self.module.gate_proj.weight.copy_(identity[spec.width :])
            self.module.position_bias.copy_(setup.weights.ape)
            self.module.kv_norm.weight.copy_(setup.weights.norm)
        self.caches: dict[int, Any] = {}

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        from transformers import DynamicCache

        assert batch.state_slots is not None
        assert batch.block_table is not None
        slot, start = int(batch.state_slots[0]), int(batch.start_positions[0])
        if start == 0 and batch.lengths[0]:
            self.caches[slot] = DynamicCache(config=self.config)
        count = int(batch.query_start_loc[-1])
        if not count:
            return
        cache, ratio = self.caches[slot], self.setup.spec.ratio
        position = torch.arange(start, start + count)[None]
        with torch.no_grad():
            self.module(kv_score[None, :count], torch.zeros(1, count, self.config.q_lora_rank), position, cache, 0)
        windows = torch.arange(start // ratio, (start + count) // ratio)
        if windows.shape[0]:
            page = batch.block_table[0, windows // self.setup.page_rows]
            self.cache.rows[page, windows % self.setup.page_rows] = cache.layers[0].compressed_kv["compressor"][
                0, windows
            ]

    def reset(self, slots: list[int]) -> None:
        for slot in slots:
            self.caches.pop(slot, None)


def make() -> TransformersAdapter:
    """The factory: ``--adapter kvcondense.conformance.transformers_adapter:make``."""
    try:
        import_module("transformers.models.deepseek_v4")
    except ImportError as error:
        raise UnsupportedError("--adapter", "transformers with deepseek_v4 installed", error) from error
    return TransformersAdapter()
