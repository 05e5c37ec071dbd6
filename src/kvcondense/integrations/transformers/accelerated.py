"""``Accelerated``: a model whose compressors run on kvcondense, and what its layers share in a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kvcondense.backends import Backend
from kvcondense.integrations.memory import Memory, Tokens
from kvcondense.integrations.transformers import hooks, positions
from kvcondense.layout.memory import version
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

_FIRST_POSITIONS = 1024


class Accelerated:
    """A model whose compressors were replaced; ``undo`` puts transformers' own back."""

    def __init__(
        self,
        modules: list[Any],
        models: list[Any],
        impl: str | Backend,
        run: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        """``run``: what a compressor's forward becomes, and what is asked before each of the models' calls."""
        self.modules, self.impl = modules, impl
        self._ropes: dict[Any, RopeTable] = {}
        self._rope_keys: dict[Any, Any] = {}
        self._tokens: tuple[torch.Tensor, Any, Tokens | None] | None = None
        self._plans: dict[Any, tuple[Tokens, Plan]] = {}
        for module in modules:
            hooks.replace(module, run[0], self)
        before = functools.partial(run[1], self)
        self._handles = [model.register_forward_pre_hook(before, with_kwargs=True) for model in models]

    def undo(self) -> None:
        """Back to transformers' own. Mutates the model alone; once more is nothing.

        Caches that were filled meanwhile go on, if their sequences have one length; transformers' compressors cannot
        hold others, and UnsupportedError is raised where such a one is used.
        """
        for module in self.modules:
            hooks.restore(module)
        for handle in self._handles:
            handle.remove()
        self.modules, self._handles = [], []
        self.forget()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def forget(self) -> None:
        """A new call begins: its positions may lie in the tensor of the last one."""
        self._tokens = None

    def tokens(self, position_ids: torch.Tensor, sequences: int, *, fresh: bool, cached: bool) -> Tokens | None:
        """``positions.read``; all layers of a call ask with one tensor, which is read once."""
        key, known = (sequences, fresh, cached, version(position_ids)), self._tokens
        if known is not None and known[0] is position_ids and known[1] == key:
            return known[2]
        tokens = positions.read(position_ids, sequences, fresh=fresh, cached=cached)
        self._tokens = (position_ids, key, tokens)
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

    def push(self, module: Any, memory: Memory, kv_score: torch.Tensor, tokens: Tokens) -> None:
        """Take the tokens' kv_score [B, S, projected] into the memory of the module, whose own weights are loaded."""
        with hooks.loaded(module.kv_norm) as kv_norm:
            norm, ape = (p.detach().float() for p in (kv_norm.weight, module.position_bias))
        end = max((s + n for s, n in zip(tokens.starts, tokens.lengths, strict=True)), default=0)
        rope, plan = self.rope(module, end + memory.spec.ratio), self.plan(memory, tokens)
        memory.push(
            tokens.pick(kv_score.detach()), tokens, plan, CompressorWeights(norm=norm, ape=ape), rope, self.impl
        )
