"""The same operation as two Triton kernels: a program pools a window, or takes back a strip of them."""

from __future__ import annotations

from typing import Any

import torch

from kvcondense.backends.triton.runtime import fp32, interpreted, on_device, why_no_device
from kvcondense.layout.plan import Plan
from kvcondense.spec import CompressorSpec
from kvcondense.training.cpu import by_phase

_STRIP = 32
"""Windows of a program that takes back; their gradients of ape are added up in it, then strip by strip."""
_TILE = 4096


def can_run(spec: CompressorSpec, kv_score: torch.Tensor) -> bool:
    """True on a GPU with Triton, in fp32 or less, for head_dim a power of two; under the interpreter only if asked."""
    if why_no_device(kv_score.device) is not None or (interpreted() and not _USE_INTERPRETER):
        return False
    return kv_score.dtype is not torch.float64 and spec.head_dim & (spec.head_dim - 1) == 0 and spec.head_dim >= 2


_USE_INTERPRETER = False
"""Tests set it: nobody wants the interpreter for its speed."""


def forward(
    spec: CompressorSpec, kv_score: torch.Tensor, ape: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and lse, [E, d] each."""
    from kvcondense.training.kernels import pool_kernel

    pooled, lse = kv_score.new_empty(2, plan.num_windows, spec.head_dim, dtype=torch.float32)
    x, first, constants = _operands(spec, kv_score, plan)
    if plan.num_windows:
        with on_device(x.device):
            pool_kernel[(plan.num_windows, spec.head_dim // constants["BLOCK"])](
                x,
                None if ape is None else fp32(ape),
                first,
                plan.window_index,
                pooled,
                lse,
                x.stride(0),
                **{"LEVELS": constants["PADDED"].bit_length() - 1, **constants},
            )
    return pooled, lse


def backward(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    ape: torch.Tensor | None,
    plan: Plan,
    of_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of kv_score and ape."""
    from kvcondense.training.kernels import unpool_kernel

    pooled, lse, given = of_rows
    x, first, constants = _operands(spec, kv_score, plan)
    d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    strips = -(-plan.num_windows // _STRIP)
    d_ape = torch.zeros(strips, spec.window, spec.head_dim, dtype=torch.float32, device=x.device)
    if strips:
        with on_device(x.device):
            unpool_kernel[(strips, spec.head_dim // constants["BLOCK"])](
                x, None if ape is None else fp32(ape), first, plan.window_index, pooled, lse, given, d_x, d_ape,
                plan.num_windows, x.stride(0), d_x.stride(0), **{"STRIP": _STRIP, **constants},
            )  # fmt: skip
    return d_x, by_phase(spec, d_ape.sum(dim=0))


def _operands(spec: CompressorSpec, kv_score: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """kv_score with channels side by side, each window's first own token [E], and compile-time values."""
    x = kv_score if kv_score.stride(1) == 1 else kv_score.contiguous()
    first = plan.batch.query_start_loc[plan.window_request] + plan.window_index * spec.ratio
    padded = 1 << (spec.window - 1).bit_length()
    block = max(min(spec.head_dim, _TILE // padded), min(spec.head_dim, 16))
    constants = {
        "R": spec.ratio, "W": spec.window, "PADDED": padded, "N": spec.width,
        "D": spec.head_dim, "BLOCK": block, "GATE": spec.has_gate, "num_warps": max(1, min(8, block * padded // 512)),
    }  # fmt: skip
    return x, first, constants
