"""The config.json files that people have, made from one: official releases, re-saves, and DeepSeek's own code's."""

import copy

import torch

YARN = {
    "type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}
RATIOS = {"flash": [0, 0, *[4, 128] * 20, 4], "pro": [128, 128, *[4, 128] * 29, 4]}
"""Of the main layers."""
MTP = {"flash": [0, 0, 0], "pro": [0, 0, 0]}
"""Entries past them in Flash-0731 (46 for 43) and Pro-0813 (64 for 61), whose num_nextn_predict_layers is 1."""
TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
SMALL = {"hidden_size": 32, "head_dim": 16, "qk_rope_head_dim": 8, "index_head_dim": 8, "max_position_embeddings": 4096}


def official(name="flash", **changes):
    """config.json of Flash-0731 or Pro-0813, as far as it is about compressors, with a few neighbours."""
    data = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "hidden_size": {"flash": 4096, "pro": 7168}[name],
        "num_hidden_layers": len(RATIOS[name]),
        "num_nextn_predict_layers": 1,
        "compress_ratios": RATIOS[name] + MTP[name],
        "rms_norm_eps": 1e-6,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": dict(YARN),
        "max_position_embeddings": 1048576,
        "num_attention_heads": 64,
        "transformers_version": "4.57.1",
    }
    return {**data, **changes}


def without(data, *keys):
    return {k: v for k, v in data.items() if k not in keys}


def flat(data, kind="yarn", **changes):
    """An engine's config class that saved an official file: one rope_parameters, no rope_scaling."""
    block = {k: v for k, v in data["rope_scaling"].items() if k != "type"}
    block |= {"rope_type": kind, "rope_theta": data["rope_theta"], **changes}
    return {**without(data, "rope_scaling"), "rope_parameters": block}


def vllm(data):
    """What vLLM's build_deepseek_v4_rope has made of that block when the last layer is built."""
    neutral = {"mscale": 0, "mscale_all_dim": 0, "is_deepseek_v4": True, "rope_dim": data["qk_rope_head_dim"]}
    return flat(data, "deepseek_yarn", **{**neutral, "rope_theta": data["compress_rope_theta"]})


def nested(data, **changes):
    """transformers' own spelling."""
    partial = data["qk_rope_head_dim"] / data["head_dim"]
    block = {k: v for k, v in data["rope_scaling"].items() if k != "type"}
    block |= {"rope_type": "yarn", "rope_theta": float(data["compress_rope_theta"]), "partial_rotary_factor": partial}
    main = {"rope_type": "default", "rope_theta": float(data["rope_theta"]), "partial_rotary_factor": partial}
    parameters = {"main": main, "compress": {**block, "attention_factor": 1.0, **changes}}
    return {**without(data, "rope_scaling", "qk_rope_head_dim"), "rope_parameters": parameters,
            "partial_rotary_factor": partial}  # fmt: skip


def typed(data):
    """Layer types in the place of ratios."""
    types = [TYPES[r] for r in data["compress_ratios"]][: data["num_hidden_layers"]]
    return {**without(data, "compress_ratios"), "layer_types": types, "compress_rates": dict(RATES)}


def typed_by_scalars(data):
    """The same with the rates of transformers' first versions."""
    data = without(typed(data), "compress_rates")
    return {**data, "compress_rate_csa": 4, "compress_rate_hca": 128}


def multimodal(data, kind=None):
    """The model inside a text_config, which may have no model_type."""
    text = {**without(data, "architectures", "model_type"), **({"model_type": kind} if kind else {})}
    vision = {"model_type": "vision", "num_hidden_layers": 32, "hidden_size": 1024, "rope_theta": 10000}
    return {"architectures": data["architectures"], "model_type": data["model_type"], "text_config": text,
            "vision_config": vision}  # fmt: skip


def inference(data, **changes):
    """inference/config.json, which is ModelArgs(**file) of DeepSeek's inference/model.py."""
    yarn = data["rope_scaling"]
    return {
        "vocab_size": 129280,
        "dim": data["hidden_size"],
        "n_layers": data["num_hidden_layers"],
        "n_hash_layers": 3,
        "n_heads": 64,
        "head_dim": data["head_dim"],
        "rope_head_dim": data["qk_rope_head_dim"],
        "window_size": 128,
        "original_seq_len": yarn["original_max_position_embeddings"],
        "rope_theta": data["rope_theta"],
        "rope_factor": yarn["factor"],
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
        "index_n_heads": 64,
        "index_head_dim": data["index_head_dim"],
        "compress_rope_theta": data["compress_rope_theta"],
        "compress_ratios": data["compress_ratios"],
        **changes,
    }


FORMS = {
    "official": lambda d: d,
    "rope_type for type": lambda d: {**d, "rope_scaling": {**without(YARN, "type"), "rope_type": "yarn"}},
    "nulls": lambda d: {**d, "rope_scaling": {**YARN, "attention_factor": None, "mscale": None}, "layer_types": None,
                        "num_nextn_predict_layers": None, "text_config": None, "rope_parameters": None},
    "no betas": lambda d: {**d, "rope_scaling": without(YARN, "beta_fast", "beta_slow")},
    "no MTP count": lambda d: without(d, "num_nextn_predict_layers"),
    "stale MTP count": lambda d: {**d, "num_nextn_predict_layers": 0},
    "flat": flat,
    "flat, mscale null": lambda d: flat(d, attention_factor=None, mscale=None, mscale_all_dim=None),
    "flat, beta null": lambda d: flat(d, beta_fast=None, beta_slow=None),
    "flat and official": lambda d: {**d, **flat(d), "rope_scaling": d["rope_scaling"]},
    "vllm": vllm,
    "nested": nested,
    "nested, no attention_factor": lambda d: nested(d, attention_factor=None),
    "nested, left over": lambda d: {**nested(d), "rope_parameters": {**nested(d)["rope_parameters"],
                                    "rope_type": "default", "rope_theta": 10000.0}},
    "nested, rest left over": lambda d: {**nested(d), "rope_parameters": {**flat(d)["rope_parameters"],
                                         **nested(d)["rope_parameters"]}},
    "nested in rope_scaling": lambda d: {**without(nested(d), "rope_parameters"),
                                         "rope_scaling": nested(d)["rope_parameters"]},
    "text_config": multimodal,
    "text_config with a type": lambda d: multimodal(d, "deepseek_v4_text"),
    "text_config, flat": lambda d: multimodal(flat(d)),
    "text_config, nested": lambda d: multimodal(nested(d)),
    "text_config beside the same": lambda d: {**d, **multimodal(d)},
    "no model_type": lambda d: without(d, "model_type"),
    "inference": inference,
    "inference, all keys": lambda d: inference(d, norm_eps=1e-6, n_mtp_layers=3, max_seq_len=1024),
    "types": typed,
    "types and scalars": typed_by_scalars,
    "types alone": lambda d: without(typed(d), "compress_rates"),
    "types and ratios": lambda d: {**typed(d), "compress_ratios": d["compress_ratios"]},
    "ratios and rates": lambda d: {**d, "compress_rates": dict(RATES)},
    "ratios and scalars": lambda d: {**d, "compress_rate_csa": 4, "compress_rate_hca": 128},
}  # fmt: skip
"""Name -> one and the same model in another form."""


def made(form, data):
    """A file of that form, nothing of it shared with another."""
    return copy.deepcopy(FORMS[form](copy.deepcopy(data)))


def tensors(ratios, layers, scheme, hidden=32, head_dim=16, index_head_dim=8):
    """Compressor tensors of a model of SMALL heads; the scheme names a layer: ``scheme(layer)`` -> what precedes it."""
    out = {}
    for layer in layers:
        r = ratios[layer]
        halves = 2 if r == 4 else 1
        for base, d in (("compressor.", head_dim), *([("indexer.compressor.", index_head_dim)] if r == 4 else [])):
            prefix, n = f"{scheme(layer)}attn.{base}", halves * d
            out |= {f"{prefix}{leaf}.weight": torch.zeros(n, hidden, dtype=torch.bfloat16) for leaf in ("wkv", "wgate")}
            out |= {f"{prefix}ape": torch.zeros(r, n), f"{prefix}norm.weight": torch.ones(d, dtype=torch.bfloat16)}
    return out
