"""vLLM's compressor modules as bound steps: weights, states and caches where vLLM has them, and the forward instead."""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvcondense.bound import Bound, bind
from kvcondense.errors import KvCondenseError
from kvcondense.integrations import vllm
from kvcondense.integrations.vllm_plugin import steps
from kvcondense.integrations.vllm_plugin.support import OURS, Support, support
from kvcondense.layout.memory import version
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

_log = logging.getLogger("vllm.kvcondense")  # vLLM's own handler shows what is below "vllm"
_layers: weakref.WeakKeyDictionary[Any, Layer] = weakref.WeakKeyDictionary()
_angles = WeakTensorKeyDictionary()


@dataclass
class Layer:
    """A module's compressor, bound to the memory that lay at ``places``; without one, vLLM's own forward runs.

    angles: vLLM's own table, and what was copied of it. copies: of weights that are narrower there, (ours, vLLM's).
    """

    bound: Bound | None
    places: tuple[Any, ...]
    angles: tuple[torch.Tensor, Angles | None]
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


@dataclass
class Angles:
    """A copy of vLLM's table, for all modules that share that, and the ``version`` that was copied."""

    table: RopeTable
    version: int | None

    def follow(self, cos_sin_cache: torch.Tensor) -> None:
        """Take over what vLLM's table has become in place, in place: captured graphs read this one."""
        now = version(cos_sin_cache)
        if self.version != now:
            new, self.version = vllm.rope(cos_sin_cache), now
            self.table.cos.copy_(new.cos)
            self.table.sin.copy_(new.sin)


def install() -> Support:
    """Exchange the forwards that ``support`` names, once in a process; otherwise say why not and touch nothing."""
    found = support()
    if found.why:
        _log.warning("kvcondense: vLLM's compressor stays as it is: %s", found.why)
        return found
    for one in found.replaced:
        own: Any = vars(one).get("forward")
        if own is not None and not hasattr(own, OURS):
            one.forward = _instead(own, found)  # type: ignore[attr-defined]
            _log.info("kvcondense: compresses in the place of vLLM's %s", one.__name__)
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

    setattr(forward, OURS, True)
    return forward


def _layer(module: Any, rotary_emb: Any, found: Support) -> Layer:
    """What a module is bound to; bound anew if vLLM has moved any of it. What was copied is as vLLM has it by now."""
    cache, table = module._static_forward_context[module.k_cache_prefix], rotary_emb.cos_sin_cache
    tensors = (module.state_cache.kv_cache, cache.kv_cache, module.norm.weight, module.ape, table, _scale_of(cache))
    places = tuple(None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
    layer = _layers.get(module)
    if layer is None or layer.places != places or layer.angles[0] is not table:
        layer = _layers[module] = _bound(module, cache, table, places, found)
    for mine, theirs in layer.copies:  # weights can be loaded anew in place: a captured graph copies them, too
        mine.copy_(theirs)
    if layer.angles[1] is not None:
        layer.angles[1].follow(table)
    return layer


def _bound(module: Any, cache: Any, table: torch.Tensor, places: tuple[Any, ...], found: Support) -> Layer:
    why = _why_not(module, found)
    if why is None:
        try:
            norm, ape = module.norm.weight.detach(), module.ape.detach()
            with torch.inference_mode(False):  # a later pass may not be in that mode, and copies anew
                angles = _angles_of(table)
                bound = bind(
                    spec_of(module),
                    CompressorWeights(norm=norm, ape=ape),
                    angles.table,
                    state=vllm.state(module.state_cache.kv_cache),
                    cache=cache_of(cache),
                    shared_blocks=True,
                )
            pairs = (bound.weights.norm, norm), (bound.weights.ape, ape)
            copies = tuple((mine, theirs) for mine, theirs in pairs if mine is not None and mine is not theirs)
            return Layer(bound, places, (table, angles), copies)
        except KvCondenseError as error:
            why = str(error)
    _log.warning("kvcondense: %s stays vLLM's: %s", module.prefix, why)
    return Layer(None, places, (table, None))


def _why_not(module: Any, found: Support) -> str | None:
    """Why a module is none that a step of ours does the same as; None if it is one."""
    if type(module) not in found.replaced:
        return f"{type(module).__name__} may write a cache of its own"
    if found.device not in ("cpu", "cuda") or torch.version.hip:
        return f"it was not tried on {'ROCm' if torch.version.hip else found.device}"
    try:
        ranks = import_module("vllm.distributed").get_dcp_group().world_size
    except (AssertionError, AttributeError):  # not initialised, or a version without it
        ranks = 1
    return None if ranks == 1 else f"its tokens are dealt out over {ranks} ranks (decode context parallel)"


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


def _angles_of(cos_sin_cache: torch.Tensor) -> Angles:
    """The copy that all modules share which share vLLM's table."""
    found: Angles | None = _angles.get(cos_sin_cache)
    if found is None:
        found = _angles[cos_sin_cache] = Angles(vllm.rope(cos_sin_cache), version(cos_sin_cache))
    return found


def _scale_of(cache: Any) -> torch.Tensor | None:
    """Of a whole cache of e4m3 rows."""
    return getattr(cache, "_flashinfer_fp8_kv_scale", None) if cache.kv_cache.dtype == torch.float8_e4m3fn else None
