"""The demo's model: a small random DeepSeek-V4 of transformers, and what its compressors read and make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

TEXT = Path(__file__).parents[2] / "LICENSE"
TOKENS = 2999  # one byte a token; no multiple of 4 or 128, so that windows stay open at the end
CSA, HCA = 1, 2
PARTS = {CSA: ("main", "indexer"), HCA: ("main",)}
NAMES = {(CSA, "main"): "CSA", (CSA, "indexer"): "CSA's indexer", (HCA, "main"): "HCA"}
Entered = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""What entered the compressor of a layer: hidden states [1, T, D], and the query's residual."""


def make_model() -> Any:
    """A random model whose compressors have something to do: gates, biases and gammas of realistic spread."""
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        num_experts_per_tok=2,
        n_routed_experts=4,
        mlp_layer_types=["moe"] * 3,
        index_n_heads=4,
        index_topk=64,
        hc_mult=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        max_position_embeddings=1 << 20,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in (CSA, HCA):
            main = model.model.layers[layer].self_attn.compressor
            for c in [main, *([main.indexer] if layer == CSA else [])]:
                c.gate_proj.weight.normal_(std=1.5 / 512**0.5)
                c.kv_proj.weight.normal_(std=1.5 / 512**0.5)
                c.position_bias.normal_(std=0.12)
                c.kv_norm.weight.normal_(mean=0.97, std=0.19)
    return model


def read_text(model: Any, step: Callable[[str], None]) -> Entered:
    """Prefill the text."""
    tokens = torch.tensor([list(TEXT.read_bytes()[:TOKENS])])
    entered: Entered = {}

    def keep(layer: int, args: tuple) -> None:
        entered[layer] = args[0].detach(), args[1].detach()

    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: step(f"reading the text, layer {i + 1} of {len(layers)}"))
        for i, layer in enumerate(layers)
    ]
    for i in PARTS:
        compressor = layers[i].self_attn.compressor
        hooks.append(compressor.register_forward_pre_hook(lambda _, args, i=i: keep(i, args)))
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return entered


@torch.no_grad()
def their_rows(model: Any, entered: Entered) -> dict[tuple[int, str], torch.Tensor]:
    """Rows that transformers' compressors make of what entered them, in their own dtype.

    The rest of a model in bf16 is left out: its attention takes ten minutes where torch emulates bf16 products.
    """
    cache: Any = DynamicCache(config=model.config)
    for i, (x, residual) in entered.items():
        x, residual = x.to(model.dtype), residual.to(model.dtype)
        model.model.layers[i].self_attn.compressor(x, residual, torch.arange(x.shape[1])[None], cache, i)
    names = {"main": "compressor", "indexer": "indexer"}
    return {(i, part): cache.layers[i].compressed_kv[names[part]][0] for i in PARTS for part in PARTS[i]}
