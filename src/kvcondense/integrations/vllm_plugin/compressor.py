"""The forwards that are exchanged, and V4's: a bound step on vLLM's own states and pages."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch

from kvcondense.bound import Bound, bind
from kvcondense.integrations import vllm
from kvcondense.integrations.vllm_plugin import latents, steps
from kvcondense.integrations.vllm_plugin.layers import Layer, layer_of, log
from kvcondense.integrations.vllm_plugin.support import OURS, V4, V41, Support, named, support
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights


def install() -> Support:
    """Exchange the forwards that ``support`` names, once in a process; say why the others stay, and touch nothing."""
    found = support()
    for why in (found.why,) if found.why else found.left:
        log.warning("kvcondense: vLLM's compressor stays as it is: %s", why)
    for family, classes in found.classes.items():
        for one in classes:
            own: Any = vars(one).get("forward")
            if own is not None and not hasattr(own, OURS):
                ours = _FORWARDS[family](own, found)
                setattr(ours, OURS, True)
                one.forward = ours  # type: ignore[attr-defined]
                log.info("kvcondense: compresses in the place of vLLM's %s", named(one))
    return found


def _instead(original: Any, found: Support) -> Any:
    """A forward of the same signature: tokens to the state, finished windows to the cache, by one step of ours."""
    context_of = import_module("vllm.forward_context").get_forward_context

    @functools.wraps(original)
    def forward(self: Any, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
        context = context_of()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):  # a profile run, which vLLM's forward leaves in the same way
            return
        layer = _layer(self, rotary_emb, found)
        plan = None
        if layer.bound is not None:
            cache_slots = metadata[self.k_cache_prefix].slot_mapping
            plan = steps.plan(layer.bound, context, metadata[self.state_cache.prefix], cache_slots, positions)
        if layer.bound is None or plan is None:
            original(self, kv_score, positions, rotary_emb)
            return
        layer.bound.condense(kv_score, plan)

    return forward


_FORWARDS = {V4.name: _instead, V41.name: latents.instead}


def _layer(module: Any, rotary_emb: Any, found: Support) -> Layer:
    """What a module is bound to, with its states, the pages that rows go to, and the angles that it is given."""
    states, cache = module.state_cache.kv_cache, module._static_forward_context[module.k_cache_prefix]

    def make(weights: CompressorWeights, angles: RopeTable | None) -> Bound:
        state, pages = vllm.state(states), cache_of(cache)
        return bind(spec_of(module), weights, angles, state=state, cache=pages, shared_blocks=True)

    return layer_of(module, found, (states, cache.kv_cache, _scale_of(cache)), make, rotary_emb.cos_sin_cache)


def spec_of(module: Any) -> CompressorSpec:
    """The compressor that a module is. vLLM rounds nothing before the cache and does not rotate the indexer's keys."""
    return CompressorSpec(
        ratio=module.compress_ratio,
        head_dim=module.head_dim,
        eps=module.rms_norm_eps,
        rope_dim=module.rope_head_dim,
        overlap=bool(module.overlap),
        rounding=Rounding.FUSED,
    )


def cache_of(cache: Any) -> Any:
    """The pages of a layer that rows go to, with scales as vLLM's kernel for them writes: its C++ and CuTe-DSL kernels
    have the floor of main rows on the scale (its Triton kernel, of ROCm, has it on amax).
    """
    kv_cache, name = cache.kv_cache, None
    if kv_cache.dtype == torch.uint8 and kv_cache.shape[-1] == 584:
        name = "fp8_model1_scale_floor"
    elif kv_cache.dtype == torch.uint8 and kv_cache.shape[-1] == 132:
        kernels = import_module("vllm.models.deepseek_v4.common.ops.fused_compress_quant_cache")
        bytes_of_scales = getattr(kernels, "mqa_logits_use_mx_scales", lambda: False)()
        name = "fp8_indexer_ue8m0" if bytes_of_scales else "fp8_indexer_pow2"
    return vllm.cache(kv_cache, scale=_scale_of(cache), format=name)


def _scale_of(cache: Any) -> torch.Tensor | None:
    """Of a whole cache of e4m3 rows."""
    return getattr(cache, "_flashinfer_fp8_kv_scale", None) if cache.kv_cache.dtype == torch.float8_e4m3fn else None
