"""A DeepSeek-V4 small enough for an interpreter: vLLM's config of it, its arguments, and random weights that matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_lora_rank": 64,
    "o_groups": 2,
    "sliding_window": 128,
    "index_topk": 512,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 4,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "swiglu_limit": 10.0,
    "norm_topk_prob": True,
    "num_hash_layers": 0,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "bf16",
}


def arguments(folder: Path, ratios: list[int]) -> dict[str, Any]:
    """Of ``LLM`` and ``EngineArgs``, for a model with a layer for each of ``ratios``, whose config is put in folder."""
    config = {**_CONFIG, "num_hidden_layers": len(ratios), "compress_ratios": [*ratios, 0]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 4,
        "dtype": "bfloat16",
        "block_size": 256,
        "kv_cache_dtype": "fp8",
        "enable_prefix_caching": False,
    }


@torch.no_grad()
def randomise(_: Any, model: torch.nn.Module, *__: Any) -> None:
    """A dummy loader's ``load_weights``. vLLM's own 1e-3 lies below the floor of a scale; these rows are near 1."""
    gen = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=gen)
        values = values * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.1 * values
        parameter.copy_(values)
