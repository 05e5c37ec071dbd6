"""V4.1's forward: bf16 latents by a bound step, from vLLM's rings. What stores and indexes latents stays vLLM's."""

from __future__ import annotations

import functools
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch

from kvcondense.backends.jobs import Job
from kvcondense.bound import Bound, CondensedRows, bind
from kvcondense.errors import UnsupportedError
from kvcondense.integrations import vllm
from kvcondense.integrations.vllm_plugin import steps
from kvcondense.integrations.vllm_plugin.layers import Layer, layer_of
from kvcondense.integrations.vllm_plugin.support import Support
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.plan import Plan
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights


def instead(original: Any, found: Support) -> Any:
    """A forward of the same signature, which gives latents [T, d] whose rows are written where windows end.

    Ratio 1 has neither gate nor state, and the slots of the compressed cache say how many tokens there are.
    """
    context_of = import_module("vllm.forward_context").get_forward_context

    @functools.wraps(original)
    def forward(self: Any, kv_score: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        context = context_of()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):  # a profile run, which vLLM's forward leaves in the same way
            return None
        layer = _layer(self, found)
        if layer.bound is not None:
            told = metadata[self.k_cache_prefix if self.state_cache is None else self.state_cache.prefix]
            made = plan(layer.bound, context, told, positions)
            if made is not None:
                return _latent(layer.bound.condense(kv_score, made), kv_score)
        return original(self, kv_score, positions)

    return forward


def _layer(module: Any, found: Support) -> Layer:
    """What a module is bound to, with its rings."""
    rings = None if module.state_cache is None else module.state_cache.kv_cache

    def make(weights: CompressorWeights, angles: RopeTable | None) -> Bound:
        state = None if rings is None else vllm.ring_state(rings, paged=True)
        return bind(spec_of(module), weights, angles, state=state)

    return layer_of(module, found, (rings,), make)


def spec_of(module: Any) -> CompressorSpec:
    """The compressor that a module is, up to the norm's result: vLLM rotates latents where it stores them."""
    if module.compress_ratio not in (1, 2):
        raise UnsupportedError("compress_ratio", "1 or 2", module.compress_ratio)
    return CompressorSpec(
        ratio=module.compress_ratio,
        head_dim=module.head_dim,
        eps=module.rms_norm_eps,
        rope_dim=0,
        has_ape=False,
        has_gate=module.compress_ratio > 1,
        rounding=Rounding.LATENT,
    )


def plan(bound: Bound, context: Any, metadata: Any, positions: torch.Tensor) -> Plan | None:
    """The plan of a forward pass, whose cache slots are tokens; None without any.

    metadata: CompressorMetadata of the rings, or whatever has the compressed cache's slots. A plan is made once for all
    layers of one ratio and group of rings.
    """
    job: Job = (bound.spec, None if bound.state is None else bound.state.layout, None)
    known = vars(context).setdefault("kvcondense", {})
    key = (job, id(metadata))
    if key not in known:
        known[key] = _plan(job, metadata, positions)
    return known[key]


def _plan(job: Job, metadata: Any, positions: torch.Tensor) -> Plan | None:
    slots, layout = metadata.slot_mapping, job[1]
    many, device = slots.shape[0], slots.device
    if not many:
        return None
    rows = layout.page_rows if isinstance(layout, PagedLayout) else 1
    token, rings = torch.arange(many, device=device), None
    if layout is not None:
        # A request's tokens are those from where it begins: padding behind them may have slots of the first request's.
        # A slot of -1 is of a request without a ring, which is inert.
        ends = metadata.query_start_loc.to(torch.int64)
        first = ends[:-1].clamp(max=many - 1)
        starts = torch.where(slots[first] < 0, -1, positions[first])
        rings = (slots[first] // rows)[:, None]  # [R, 1]
    else:  # a window each, so that it does not matter whose they are
        ends, starts = many * torch.arange(2, device=device), token.new_zeros(1)
    # How many tokens are drafts is not said: as much is kept as a ring takes, as by vLLM's kernel.
    batch = RaggedBatch(ends, starts, ends.diff().clamp(max=rows - 1), state_block_table=rings, slot_mapping=token)
    if not steps.on_host(device):
        return steps.filled(job, batch, (slots.data_ptr(),), max_tokens=many, max_draft=rows - 1)
    return steps.planner(job).step(**{f.name: getattr(batch, f.name) for f in fields(batch)})[1][0]


def _latent(rows: CondensedRows, kv_score: torch.Tensor) -> torch.Tensor:
    """Rows at their tokens, [T, d] bf16; others are as memory was. Spare rows of a static plan, -1, go behind them."""
    latent = kv_score.new_empty(kv_score.shape[0] + 1, rows.values.shape[1], dtype=torch.bfloat16)
    latent[rows.slot] = rows.values.to(torch.bfloat16)
    return latent[:-1]
