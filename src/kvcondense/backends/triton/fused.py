"""Launches of the fused projection: x and the merged weight to finished rows, without kv_score in memory."""

from __future__ import annotations

from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import _fp32, _on, why_no_device
from kvcondense.backends.triton.constants import constants, state_key
from kvcondense.backends.triton.tuning import Choice
from kvcondense.layout.online import OnlineState
from kvcondense.layout.state import PagedLayout

TILE = 128
"""Tokens of a tile: whole windows, or kept rows."""
DEPTH = 64
"""Hidden channels of one step of the products."""
_BLOCK, _BLOCK_OVERLAP, _WARPS = 64, 32, 8


def why_not(step: Step, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """None if ``run`` can do this step from x [T, D] and w [projected, D], else the reason."""
    spec = step.spec
    reason = why_no_device(x.device)
    if reason is not None:
        return reason
    if x.dtype is not torch.bfloat16 or w.dtype is not torch.bfloat16:
        return f"x and w are {x.dtype} and {w.dtype}; the products take bf16"
    if x.shape[1] % DEPTH:
        return f"{x.shape[1]} hidden channels are no multiple of {DEPTH}"
    if spec.ratio & (spec.ratio - 1) or spec.ratio > TILE:
        return f"ratio {spec.ratio} does not divide a tile of {TILE} tokens"
    if isinstance(step.state, OnlineState):
        return "an online state is folded token by token"
    if step.latent is not None or (step.cache is not None and step.cache.strict):
        return "latent rows and caches in validation mode take the unfused step"
    return None


def run(step: Step, x: torch.Tensor, w: torch.Tensor) -> None:
    """Windows, then what is kept (the state is read before it is written), then norm to store of every row."""
    from kvcondense.backends.triton.kernels import fused
    from kvcondense.backends.triton.kernels.condense import finish_kernel

    spec, plan, state, cache, batch = step.spec, step.plan, step.state, step.cache, step.plan.batch
    assert not isinstance(state, OnlineState)
    block = min(spec.head_dim, _BLOCK_OVERLAP if spec.overlap else _BLOCK)
    form, page_rows = (None, 0) if cache is None else (cache.format, cache.page_rows)
    c = constants(spec, state_key(state), form, page_rows, False, Choice(block, _WARPS, counters=False))
    options: dict[str, Any] = {"c": c, "num_warps": _WARPS, "enable_fp_fusion": False}
    products: dict[str, Any] = {"K": DEPTH, "WIDE": x.device.type == "cpu", **options}
    x, w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
    ape, data = None if step.ape is None else _fp32(step.ape), None if state is None else state.data
    hidden, windows, keeps = x.shape[1], plan.num_windows, plan.keep_token.shape[0]
    state_stride = 0 if data is None else data.stride(0)
    group = TILE // spec.ratio
    with _on(x.device):
        if windows:
            table, stride = batch.state_slots, 1
            if state is not None and isinstance(state.layout, PagedLayout):
                assert batch.state_block_table is not None
                table, stride = batch.state_block_table, batch.state_block_table.stride(0)
            fused.project_pool_kernel[(-(-windows // group) * c.blocks,)](
                x, w, ape, batch.query_start_loc, batch.start_positions, table, data,
                plan.window_request, plan.window_index, step.rows, windows, hidden,
                x.stride(0), w.stride(0), stride, state_stride, **{"G": group, **products},
            )  # fmt: skip
        if data is not None and keeps:
            fused.project_keep_kernel[(-(-keeps // TILE) * (spec.width // block),)](
                x, w, ape, plan.keep_token, plan.keep_position, plan.keep_row, data, keeps, hidden,
                x.stride(0), w.stride(0), state_stride, **{"M": TILE, **products},
            )  # fmt: skip
        if windows:
            cos, sin = (None, None) if step.rope is None else (_fp32(step.rope.cos), _fp32(step.rope.sin))
            bytes_, page_stride = (None, 0) if cache is None else (cache.data, cache.data.stride(0))
            scales = None if cache is None else cache.scales
            scales_stride = 0 if scales is None or scales.dim() == 0 else scales.stride(0)
            finish_kernel[(windows,)](
                _fp32(step.gamma), cos, sin, step.rows, None, plan.window_request, plan.window_index, plan.window_slot,
                bytes_, scales, page_stride, scales_stride, **options,
            )  # fmt: skip
