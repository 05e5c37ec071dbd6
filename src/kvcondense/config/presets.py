"""Models as DeepSeek published them, without a file; benchmarks, cases and documents are about these."""

from __future__ import annotations

from typing import Any

from kvcondense.config.model import ModelConfig, Yarn

_YARN_16X = Yarn(factor=16.0, original_max_positions=65536, beta_fast=32.0, beta_slow=1.0)
_V4: dict[str, Any] = {
    "generation": "v4",
    "eps": 1e-6,
    "head_dim": 512,
    "rope_dim": 64,
    "index_head_dim": 128,
    "overlap_ratios": (4,),
}

# Defaults of DeepSeek's inference/model.py, which are also the preset of pypto-lib's PR 270.
ModelConfig.DEMO = ModelConfig(
    name="demo",
    hidden_size=4096,
    num_hidden_layers=7,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
    compress_rope_theta=40000.0,
    yarn=None,
    max_positions=4096,
    **_V4,
)
# config.json of deepseek-ai/DeepSeek-V4-Flash.
ModelConfig.FLASH = ModelConfig(
    name="flash",
    hidden_size=4096,
    num_hidden_layers=43,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    **_V4,
)
# config.json of deepseek-ai/DeepSeek-V4-Pro.
ModelConfig.PRO = ModelConfig(
    name="pro",
    hidden_size=7168,
    num_hidden_layers=61,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    **_V4,
)
# text_config of deepseek-ai/DeepSeek-V4.1-Flash; the last three entries are its DSpark draft layers.
ModelConfig.V41_FLASH = ModelConfig(
    name="v41",
    generation="v4.1",
    hidden_size=5120,
    num_hidden_layers=40,
    compress_ratios=(0, 0, *(2,) * 18, *(1,) * 20, 0, 0, 0),
    eps=1e-20,
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    head_dim=512,
    rope_dim=64,
    index_head_dim=128,
    overlap_ratios=(),
    kv_source_layers=(2, 8, 14, 20),
)

PRESETS: dict[str, ModelConfig] = {
    c.name: c for c in (ModelConfig.DEMO, ModelConfig.FLASH, ModelConfig.PRO, ModelConfig.V41_FLASH)
}
