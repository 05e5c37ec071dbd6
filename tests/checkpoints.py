"""Tiny checkpoints on disk, in every naming, and files streamed through them."""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from kvcondense import CompressorSpec, ModelConfig
from kvcondense.config import Yarn
from kvcondense.stream import HiddenFile, Sequence

HIDDEN = 32
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "rms_norm_eps": 1e-6,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "index_head_dim": 8,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 4096,
}
MODEL = ModelConfig(
    name="tiny",
    generation="v4",
    hidden_size=HIDDEN,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4, 0),
    eps=1e-6,
    compress_rope_theta=160000.0,
    yarn=Yarn(16.0, 65536, 32.0, 1.0),
    max_positions=4096,
    head_dim=16,
    rope_dim=8,
    index_head_dim=8,
    overlap_ratios=(4,),
)
WIDE = replace(MODEL, head_dim=512, rope_dim=64, index_head_dim=128)
"""The same with the heads of DeepSeek-V4, for cache formats that want them."""
SCHEMES = {
    "official": (
        "layers.{}.attn.compressor.",
        "layers.{}.attn.indexer.compressor.",
        "wkv.weight wgate.weight ape norm.weight",
    ),
    "transformers": (
        "model.layers.{}.self_attn.compressor.",
        "model.layers.{}.self_attn.compressor.indexer.",
        "kv_proj.weight gate_proj.weight position_bias kv_norm.weight",
    ),
    "saved by transformers": (
        "model.layers.{}.attn.compressor.",
        "model.layers.{}.attn.indexer.compressor.",
        "wkv.weight wgate.weight ape norm.weight",
    ),
    "vllm": (
        "layers.{}.attn.compressor.",
        "layers.{}.attn.indexer.compressor.",
        "fused_wkv_wgate.weight ape norm.weight",
    ),
    "vllm, multimodal": (
        "language_model.model.layers.{}.attn.compressor.",
        "language_model.model.layers.{}.attn.indexer.compressor.",
        "fused_wkv_wgate.weight ape norm.weight",
    ),
    "atom": (
        "model.layers.{}.attn.compressor.",
        "model.layers.{}.attn.indexer.compressor.",
        "wkv_gate.weight ape norm.weight",
    ),
    "tensorrt-llm": (
        "model.layers.{}.self_attn.compressor.",
        "model.layers.{}.self_attn.indexer.compressor.",
        "wkv_gate.weight ape norm.weight",
    ),
    "ascend": (
        "model.layers.{}.self_attn.compressor.",
        "model.layers.{}.self_attn.indexer.compressor.",
        "wkv.weight wgate.weight ape norm.weight",
    ),
    "automodel": (
        "model.layers.{}.self_attn.compressor.",
        "model.layers.{}.self_attn.compressor.indexer.",
        "wkv.weight wgate.weight ape_param.weight kv_norm.weight",
    ),
    "automodel, plain parameter": (
        "model.language_model.layers.{}.self_attn.compressor.",
        "model.language_model.layers.{}.self_attn.compressor.indexer.",
        "wkv.weight wgate.weight ape_param kv_norm.weight",
    ),
}
"""Name -> what stands before a compressor's leaves, an indexer's, and the leaves; a fused one is wkv on wgate."""
FOREIGN = {
    "transformers": ("q_b_proj.weight", "scorer.weights_proj.weight"),
    "automodel": ("wq_b.weight", "weights_proj.weight"),
}
"""What else lies under an indexer's base."""


def tensors(scheme="official", seed=0, model=MODEL):
    """All compressor tensors of the tiny model, dtypes as published, with some neighbours that are none of ours."""
    gen = torch.Generator().manual_seed(seed)
    main, indexer, leaves = SCHEMES[scheme]
    out = {"embed.weight": torch.ones(3, HIDDEN), "layers.1.attn.wkv.weight": torch.ones(2, 2)}
    for layer, ratio in enumerate(model.compress_ratios):
        for base, part in ((main, "main"), (indexer, "indexer")):
            if ratio == 0 or (part == "indexer" and ratio != 4):
                continue
            spec = CompressorSpec.for_layer(model, layer, part)
            values = (
                torch.randn(spec.width, model.hidden_size, generator=gen).bfloat16(),
                torch.randn(spec.width, model.hidden_size, generator=gen).bfloat16(),
                torch.randn(spec.ratio, spec.width, generator=gen),
                (1 + 0.2 * torch.randn(spec.head_dim, generator=gen)).bfloat16(),
            )
            if len(leaves.split()) == 3:
                values = (torch.cat(values[:2]), *values[2:])
            out |= {base.format(layer) + leaf: v for leaf, v in zip(leaves.split(), values, strict=True)}
            if part == "indexer":
                out |= {base.format(layer) + leaf: torch.ones(2, 2) for leaf in FOREIGN.get(scheme, ())}
    return out


def write(folder, scheme="official", change=lambda t: t, shards=1, model=MODEL, config=None):
    """Write config.json (or ``config``: name -> content) and safetensors; ``change`` edits the tensors first."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"head_dim": model.head_dim, "qk_rope_head_dim": model.rope_dim, "index_head_dim": model.index_head_dim}
    heads["hidden_size"] = model.hidden_size
    for name, content in (config or {"config.json": {**CONFIG, **heads}}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    all_tensors = change(tensors(scheme, model=model))
    names = sorted(all_tensors)
    if shards == 1:
        save_file(all_tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: all_tensors[n] for n in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def run(model, hidden, out, layer=1, chunk=64, stops=(), **options):
    """Compress to ``out``, stopping and resuming after each of ``stops`` tokens."""
    for i, stop in enumerate([*stops, None]):
        sequence = Sequence.start(model, layer, **options)
        if i:
            sequence.resume(out)
        sequence.feed(HiddenFile.open(hidden, layer), chunk=chunk, limit=stop)
        sequence.save(out)
    return out
