"""``accelerate``: transformers' DeepSeek-V4 with compressors that keep a fixed state and never copy the rows they have.

What differs from transformers beside speed: sequences of a batch count their own tokens (transformers counts padding
before a prompt as tokens, so the windows of a padded sequence are shifted), and ``crop``, which takes tokens from the
sliding windows of its cache but not from its compressors, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvcondense.backends import Backend
from kvcondense.errors import KvCondenseError, UnsupportedError
from kvcondense.integrations.memory import Memory, Tokens
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

_FIRST_POSITIONS = 1024


def accelerate(model: Any, *, impl: str | Backend = "auto") -> Accelerated:
    """Let the compressors of a ``DeepseekV4ForCausalLM`` (or its inner model) run on kvcondense, in place.

    Prefill, generation, beams and cache resets give transformers' rows up to fp32 rounding, computed in fp32 whatever
    the model's type. Parameters, their names and checkpoints stay as they are. A single query of a CSA layer gets the
    rows that its indexer picked, not all of them under a mask. A call that needs gradients goes the original way,
    without a cache or with one that began so. Undone by ``undo``, or at the end of a ``with``. Raises UnsupportedError
    for a model without such compressors, or one that is accelerated already.
    """
    modules = [m for m in model.modules() if type(m).__name__ in _FORWARDS] if hasattr(model, "modules") else []
    if not modules:
        raise UnsupportedError("model", "one with DeepSeek-V4 compressors of transformers", type(model).__name__)
    if any("forward" in vars(m) for m in modules):
        raise UnsupportedError("model", "one whose compressors are transformers' own", "one that is accelerated")
    done = Accelerated(modules, impl)
    for module in modules:
        module.forward = functools.partial(_forward, done, module)
    return done


class Accelerated:
    """A model whose compressors were replaced; ``undo`` puts transformers' own back."""

    def __init__(self, modules: list[Any], impl: str | Backend) -> None:
        self.modules, self.impl = modules, impl
        self._ropes: dict[Any, RopeTable] = {}
        self._rope_keys: dict[Any, Any] = {}
        self._tokens: tuple[torch.Tensor, Any, Tokens] | None = None
        self._plans: dict[Any, tuple[Tokens, Plan]] = {}

    def undo(self) -> None:
        """Back to transformers' own; caches that were filled meanwhile are not taken by it."""
        for module in self.modules:
            vars(module).pop("forward", None)
        self.modules = []

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def tokens(self, position_ids: torch.Tensor, sequences: int, fresh: bool) -> Tokens:
        """What a call brings, from its positions [B or 1, S]; all layers of a call ask with one tensor.

        A fresh sequence begins at its last position 0; what stands before is padding.
        """
        known = self._tokens
        if known is not None and known[0] is position_ids and known[1] == (sequences, fresh):
            return known[2]
        positions = position_ids.expand(sequences, -1)
        length, found = positions.shape[1], []
        for row in positions.tolist():
            skip = length - 1 - row[::-1].index(0) if fresh and 0 in row else 0
            if fresh and (not row or row[skip] != 0):
                raise KvCondenseError("position_ids", "a 0 where a sequence begins", row[:8])
            if row[skip:] != list(range(row[skip], row[skip] + length - skip)):
                raise KvCondenseError("position_ids", "positions that follow one another", row[:8])
            found.append((row[skip], length - skip, skip))
        tokens = Tokens(*(tuple(column) for column in zip(*found, strict=True)))
        self._tokens = (position_ids, (sequences, fresh), tokens)
        return tokens

    def plan(self, memory: Memory, tokens: Tokens) -> Plan:
        """The plan of a call; layers of a ratio share it."""
        key = (memory.spec.ratio, memory.spec.overlap, memory.pool.layout, memory.pool.data.device)
        known = self._plans.get(key)
        if known is None or known[0] != tokens:
            planner = Planner([(memory.spec, memory.pool.layout, None)])
            self._plans[key] = known = (tokens, tokens.plans(planner, memory.pool.data.device)[0])
        return known[1]

    def rope(self, module: Any, positions: int) -> RopeTable:
        """Cos and sin as the module's own rotary embedding has them, for at least this many positions."""
        rotary = module.rotary_emb
        frequencies = getattr(rotary, f"{module.rope_layer_type}_inv_freq")
        scaling = getattr(rotary, f"{module.rope_layer_type}_attention_scaling")
        place = (module, frequencies.device)
        if place not in self._rope_keys:  # asks a GPU for values: once, not at every step
            self._rope_keys[place] = (frequencies.device, float(scaling), tuple(frequencies.tolist()))
        key = self._rope_keys[place]
        table = self._ropes.get(key)
        if table is None or table.cos.shape[0] < positions:
            size = max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length())
            at = torch.arange(size, device=frequencies.device)[None]
            like = torch.empty(0, device=frequencies.device)
            cos, sin = rotary(like, position_ids=at, layer_type=module.rope_layer_type)
            table = self._ropes[key] = RopeTable(cos[0].contiguous(), sin[0].contiguous())
        return table

    def push(self, module: Any, memory: Memory, hidden: torch.Tensor, tokens: Tokens) -> None:
        """Project hidden [B, S, D] with the module's own layers and take its tokens."""
        x = tokens.pick(hidden)
        kv_score = torch.cat([module.kv_proj(x), module.gate_proj(x)], dim=-1)
        norm, ape = (p.detach().float() for p in (module.kv_norm.weight, module.position_bias))
        end = max((s + n for s, n in zip(tokens.starts, tokens.lengths, strict=True)), default=0)
        rope = self.rope(module, end + memory.spec.ratio)
        memory.push(kv_score, tokens, self.plan(memory, tokens), CompressorWeights(norm=norm, ape=ape), rope, self.impl)

    def memory(self, module: Any, name: str, layer: Any, hidden: torch.Tensor) -> Memory:
        """The memory of a compressor in a cache's layer, or a new one."""
        held: dict[str, Memory] = {} if layer is None else layer.kvcondense
        memory = held.get(name)
        if memory is None:
            memory = held[name] = Memory(_spec(module), hidden[:, :0], hidden.shape[0])
        return memory


def _spec(module: Any) -> CompressorSpec:
    """The module's compressor, with an fp32 chain."""
    rope_dim = 2 * getattr(module.rotary_emb, f"{module.rope_layer_type}_inv_freq").shape[0]
    return CompressorSpec(
        ratio=module.compress_rate,
        head_dim=module.head_dim,
        eps=module.kv_norm.variance_epsilon,
        rope_dim=rope_dim,
        overlap=module.kv_proj.out_features == 2 * module.head_dim,
        rounding=Rounding.FUSED,
    )


def _layer(module: Any, hidden: torch.Tensor, past_key_values: Any, layer_idx: int) -> tuple[bool, Any]:
    """(whether this call is ours, its layer of the cache or None). A layer is ours from its first call on."""
    layer = None if past_key_values is None else past_key_values.layers[layer_idx]
    gradients = torch.is_grad_enabled() and (
        hidden.requires_grad or any(p.requires_grad for p in module.parameters(recurse=True))
    )
    if hasattr(layer, "kvcondense"):
        if gradients:
            raise UnsupportedError(
                "past_key_values (cache)", "torch.no_grad() for a cache that kvcondense fills", "gradients"
            )
        return True, layer
    if gradients or (layer is not None and layer.compressed_kv["compressor"] is not None):
        return False, layer
    if layer is not None:
        layer.__class__ = _ours(type(layer))
        layer.kvcondense = {}
    return True, layer


@functools.cache
def _ours(kind: Any) -> Any:
    """A layer of transformers' cache whose memories follow what is done to it; an object of ``kind`` can become one."""

    class Ours(kind):
        _layer_type = None  # not one that transformers makes by itself
        kvcondense: dict[str, Memory]

        def _select(self, indices: torch.Tensor) -> None:
            for memory in self.kvcondense.values():
                memory.select(indices)

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for memory in self.kvcondense.values():
                memory.select(torch.arange(len(memory.seen)).repeat_interleave(repeats))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            for memory in self.kvcondense.values():
                memory.select(torch.arange(len(memory.seen))[indices.cpu()])

        def crop(self, tokens_to_remove: int) -> None:
            raise UnsupportedError("crop", "a cache without compressors", f"one to lose {tokens_to_remove} tokens")

        def reset(self) -> None:
            super().reset()
            self.kvcondense = {}

        def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor) -> None:
            """What transformers' own compressor calls first."""
            del name, kv, gate
            raise UnsupportedError(
                "past_key_values (cache)", "a cache that kvcondense has not filled", "one that it has"
            )

    Ours.__name__ = f"Kvcondense{kind.__name__}"
    return Ours


@dataclass(frozen=True)
class _Seen:
    """Rows [B, n, d] that a call may look at, and from which row on each of its queries may not [B, S]."""

    rows: torch.Tensor
    threshold: torch.Tensor
    same: bool


def _seen(done: Accelerated, module: Any, name: str, layer: Any, hidden: torch.Tensor, position_ids: Any) -> _Seen:
    memory = done.memory(module, name, layer, hidden)
    tokens = done.tokens(position_ids, hidden.shape[0], not any(memory.seen))
    done.push(module, memory, hidden, tokens)
    return _Seen(memory.visible, (position_ids + 1) // memory.spec.ratio, len(set(memory.counts)) == 1)


def _forward(
    done: Accelerated, module: Any, hidden_states: torch.Tensor, q_residual: torch.Tensor, position_ids: torch.Tensor,
    past_key_values: Any = None, layer_idx: int = 0, cache: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``forward`` of a compressor: ours where the call is, else transformers' own. 5.24 renames the cache."""
    held = past_key_values if cache is None else cache
    ours, layer = _layer(module, hidden_states, held, layer_idx)
    if not ours:
        return type(module).forward(module, hidden_states, q_residual, position_ids, held, layer_idx)
    return _FORWARDS[type(module).__name__](done, module, layer, hidden_states, q_residual, position_ids)


def _hca(
    done: Accelerated, module: Any, layer: Any, hidden_states: torch.Tensor, q_residual: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``DeepseekV4HCACompressor.forward``: rows [B, 1, n, d] and the bias [B, 1, S, n] that hides what is to come."""
    del q_residual
    seen = _seen(done, module, "compressor", layer, hidden_states, position_ids)
    count, queries = seen.rows.shape[1], hidden_states.shape[1]
    if count == 0 or (queries == 1 and seen.same):
        return seen.rows[:, None], None
    hidden_rows = torch.arange(count, device=seen.rows.device) >= seen.threshold[..., None]  # [B or 1, S, n]
    bias = seen.rows.new_zeros(hidden_states.shape[0], 1, queries, count)
    return seen.rows[:, None], bias.masked_fill(hidden_rows[:, None], float("-inf"))


def _csa(
    done: Accelerated, module: Any, layer: Any, hidden_states: torch.Tensor, q_residual: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``DeepseekV4CSACompressor.forward``; for single queries, the picked rows alone."""
    sequences, queries, _ = hidden_states.shape
    main = _seen(done, module, "compressor", layer, hidden_states, position_ids)
    keys = _seen(done, module.indexer, "indexer", layer, hidden_states, position_ids)
    picked = _picked(module.indexer, keys, hidden_states, q_residual, position_ids)  # [B, S, k], -1: none
    count = main.rows.shape[1]
    if queries == 1:
        rows = main.rows.gather(1, picked[:, 0, :, None].clamp(min=0).expand(-1, -1, main.rows.shape[2]))
        bias = None if keys.same else main.rows.new_zeros(picked.shape).masked_fill(picked < 0, float("-inf"))
        return rows[:, None], None if bias is None else bias[:, None]
    bias = main.rows.new_full((sequences, 1, queries, count + 1), float("-inf"))
    bias.scatter_(-1, torch.where(picked < 0, count, picked)[:, None], 0.0)
    return main.rows[:, None], bias[..., :count]


def _picked(
    indexer: Any, keys: _Seen, hidden: torch.Tensor, q_residual: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Indices [B, S, k] of the rows that score best for each query, -1 for those that it may not see."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    sequences, queries, _ = hidden.shape
    cos, sin = indexer.rotary_emb(hidden, position_ids=position_ids, layer_type=indexer.rope_layer_type)
    q = indexer.q_b_proj(q_residual).view(sequences, queries, -1, indexer.head_dim).transpose(1, 2)
    q = apply_rotary_pos_emb(q, cos, sin).transpose(1, 2)
    scores = indexer.scorer(q, keys.rows, hidden)  # [B, S, n]
    future = torch.arange(keys.rows.shape[1], device=scores.device) >= keys.threshold[..., None]
    scores = scores.masked_fill(future, float("-inf"))
    best = scores.topk(min(indexer.index_topk, keys.rows.shape[1]), dim=-1).indices
    return torch.where(best >= keys.threshold[..., None], -1, best)


_FORWARDS: dict[str, Callable[..., Any]] = {"DeepseekV4HCACompressor": _hca, "DeepseekV4CSACompressor": _csa}
