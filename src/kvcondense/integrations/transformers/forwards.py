"""The forwards of transformers' compressors and indexers on kvcondense, and which calls are left to transformers'."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from kvcondense.errors import UnsupportedError
from kvcondense.integrations.memory import Memory
from kvcondense.integrations.transformers import cache
from kvcondense.integrations.transformers.accelerated import Accelerated
from kvcondense.spec import CompressorSpec, Rounding

_INDEXER = "DeepseekV4Indexer"
_THEIRS = ContextVar("_THEIRS", default=False)
"""Whether a compressor of transformers is running: its indexer is transformers' too."""


def check_call(done: Accelerated, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a model's call: raise for a cache that it cannot go on with, while nothing is written yet."""
    done.forget()
    names = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")
    call: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    held, brought = call.get("cache"), call.get("inputs_embeds")
    held = call.get("past_key_values") if held is None else held
    brought = call.get("input_ids") if brought is None else brought
    if held is None or brought is None or not hasattr(held, "layers"):
        return
    position_ids = call.get("position_ids")
    if position_ids is None:
        start = held.get_seq_length()
        position_ids = torch.arange(start, start + brought.shape[1])[None]
    for layer, block in zip(held.layers, model.layers, strict=False):
        compressor = getattr(getattr(block, "self_attn", None), "compressor", None)
        known = cache.memories(layer)
        if compressor is None or (known is None and not cache.is_new(layer)):
            continue
        if _needs_gradients(compressor, brought):
            if known is None:
                continue
            raise _gradients()
        fresh = not known
        tokens = done.tokens(position_ids, brought.shape[0], fresh=fresh, cached=True)
        for memory in (known or {}).values():
            assert tokens is not None
            memory.check(tokens)


def kind(module: Any) -> str:
    """Which of transformers' compressors a module is, parametrised or not; empty for others and for other forwards."""
    named = [c for c in type(module).__mro__ if c.__name__ in _FORWARDS]
    return named[0].__name__ if named and named[0].forward is type(module).forward else ""


def forward(
    done: Accelerated, module: Any, hidden_states: torch.Tensor, q_residual: torch.Tensor, position_ids: torch.Tensor,
    past_key_values: Any = None, layer_idx: int = 0, cache: Any = None,
) -> Any:  # fmt: skip
    """``forward`` of a compressor or indexer: ours where the call is, else its own. 5.24 renames the cache."""
    held = past_key_values if cache is None else cache
    layer = None if held is None else held.layers[layer_idx]
    call = _Call(done, module, hidden_states, q_residual, position_ids, held, layer_idx)
    if module in done.modules[:1] and position_ids.is_inference():
        done.forget()
    if done.modules and not _THEIRS.get() and _is_ours(call, layer):  # undone: somebody kept this forward
        kv_score = torch.cat([module.kv_proj(hidden_states), module.gate_proj(hidden_states)], dim=-1)
        if not kv_score.requires_grad or kind(module) == _INDEXER:  # nobody differentiates what is picked
            return _FORWARDS[kind(module)](call, _seen(call, layer, kv_score))
        if _claimed(layer):
            raise _gradients()
    before = _THEIRS.set(True)
    try:
        return type(module).forward(module, hidden_states, q_residual, position_ids, held, layer_idx)
    finally:
        _THEIRS.reset(before)


def _claimed(layer: Any) -> bool:
    """Whether a layer of a cache, or None, is one that kvcondense fills."""
    return cache.memories(layer) is not None


@dataclass(frozen=True)
class _Call:
    """What a compressor is called with; ``cache`` is the whole one or None."""

    done: Accelerated
    module: Any
    hidden: torch.Tensor
    q_residual: torch.Tensor
    position_ids: torch.Tensor
    cache: Any
    layer_idx: int


@dataclass(frozen=True)
class _Seen:
    """Rows [B, n, d] that a call may look at, and from which row on each of its queries may not [B, S]."""

    rows: torch.Tensor
    threshold: torch.Tensor
    same: bool


def _gradients() -> UnsupportedError:
    return UnsupportedError(cache.CACHE, "torch.no_grad() for a cache that kvcondense fills", "gradients")


def _needs_gradients(module: Any, hidden: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in module.parameters()))


def _is_ours(call: _Call, layer: Any) -> bool:
    """Whether kvcondense takes a call. A layer is ours from its first call on; raises where it cannot go on."""
    parts = [call.module, *([call.module.indexer] if hasattr(call.module, "indexer") else [])]
    if any(type(part.kv_norm).__name__ != "DeepseekV4RMSNorm" for part in parts):
        return False
    gradients = _needs_gradients(call.module, call.hidden)
    if _claimed(layer):
        if gradients:
            raise _gradients()
        return True
    if gradients:
        return False
    if layer is not None and not cache.is_new(layer):
        return False
    sequences = call.hidden.shape[0]
    return call.done.tokens(call.position_ids, sequences, fresh=True, cached=layer is not None) is not None


def _seen(call: _Call, layer: Any, kv_score: torch.Tensor) -> _Seen:
    """Take the call's tokens into the memory of its compressor, in a layer of the cache or for this call alone."""
    if layer is not None and not _claimed(layer):
        cache.claim(layer)
    name = "indexer" if kind(call.module) == _INDEXER else "compressor"
    held = cache.memories(layer)
    memory = None if held is None else held.get(name)
    sequences = call.hidden.shape[0]
    fresh = memory is None
    tokens = call.done.tokens(call.position_ids, sequences, fresh=fresh, cached=layer is not None)
    assert tokens is not None
    if memory is None:
        memory = Memory(_spec(call.module), call.hidden[:, :0], sequences)
    if held is not None:
        held[name] = memory
    call.done.push(call.module, memory, kv_score, tokens)
    return _Seen(memory.visible, (call.position_ids + 1) // memory.spec.ratio, len(set(memory.counts)) == 1)


def _spec(module: Any) -> CompressorSpec:
    """The module's compressor, with an fp32 chain."""
    rope_dim = 2 * getattr(module.rotary_emb, f"{module.rope_layer_type}_inv_freq").shape[0]
    return CompressorSpec(
        ratio=module.compress_rate,
        head_dim=module.head_dim,
        eps=module.kv_norm.variance_epsilon,
        rope_dim=rope_dim,
        overlap=module.position_bias.shape[1] == 2 * module.head_dim,
        rounding=Rounding.FUSED,
    )


def _hca(call: _Call, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``DeepseekV4HCACompressor.forward``: rows [B, 1, n, d] and the bias [B, 1, S, n] that hides what is to come."""
    (sequences, queries, _), count = call.hidden.shape, seen.rows.shape[1]
    if count == 0 or (queries == 1 and seen.same):
        return seen.rows[:, None], None
    hidden_rows = torch.arange(count, device=seen.rows.device) >= seen.threshold[..., None]  # [B or 1, S, n]
    bias = seen.rows.new_zeros(sequences, 1, queries, count)
    return seen.rows[:, None], bias.masked_fill(hidden_rows[:, None], float("-inf"))


def _csa(call: _Call, seen: _Seen) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``DeepseekV4CSACompressor.forward``; for single queries, the picked rows alone."""
    (sequences, queries, _), (rows, count) = call.hidden.shape, (seen.rows, seen.rows.shape[1])
    picked = call.module.indexer(call.hidden, call.q_residual, call.position_ids, call.cache, call.layer_idx)
    if queries == 1:
        found = rows.gather(1, picked[:, 0, :, None].clamp(min=0).expand(-1, -1, rows.shape[2]))
        bias = None if seen.same else rows.new_zeros(picked.shape).masked_fill(picked < 0, float("-inf"))
        return found[:, None], None if bias is None else bias[:, None]
    bias = rows.new_full((sequences, 1, queries, count + 1), float("-inf"))
    bias.scatter_(-1, torch.where(picked < 0, count, picked)[:, None], 0.0)
    return rows[:, None], bias[..., :count]


def _indexer(call: _Call, seen: _Seen) -> torch.Tensor:
    """``DeepseekV4Indexer.forward``: indices [B, S, k] of the best rows of each query, -1 for those it may not see."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    indexer, (sequences, queries, _) = call.module, call.hidden.shape
    cos, sin = indexer.rotary_emb(call.hidden, position_ids=call.position_ids, layer_type=indexer.rope_layer_type)
    q = indexer.q_b_proj(call.q_residual).view(sequences, queries, -1, indexer.head_dim).transpose(1, 2)
    q = apply_rotary_pos_emb(q, cos, sin).transpose(1, 2)
    scores = indexer.scorer(q, seen.rows, call.hidden)  # [B, S, n]
    future = torch.arange(seen.rows.shape[1], device=scores.device) >= seen.threshold[..., None]
    scores = scores.masked_fill(future, float("-inf"))
    best = scores.topk(min(indexer.index_topk, seen.rows.shape[1]), dim=-1).indices
    return torch.where(best >= seen.threshold[..., None], -1, best)


_FORWARDS: dict[str, Callable[[_Call, _Seen], Any]] = {
    "DeepseekV4HCACompressor": _hca,
    "DeepseekV4CSACompressor": _csa,
    _INDEXER: _indexer,
}
