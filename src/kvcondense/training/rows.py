"""Norm, RoPE and Hadamard with gradients: one operation on the CPU, elsewhere torch's; roundings pass gradients on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from kvcondense.numerics import round_bf16
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages.hadamard import hadamard
from kvcondense.training import cpu


class _Through(torch.autograd.Function):
    """A function of values whose gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        del ctx
        return change(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        del ctx
        return gradients[0], None


def through(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """change(x), straight through: d change(x) / dx = 1."""
    return _Through.apply(x, change)  # type: ignore[no-any-return]


def finish(
    spec: CompressorSpec, pooled: torch.Tensor, gamma: torch.Tensor, rope: RopeTable | None, position: torch.Tensor
) -> torch.Tensor:
    """P [E, d] -> rows [E, d]: n = gamma (u rsqrt(mean u^2 + eps)), RoPE at ``position`` [E], Hadamard if asked for."""
    if cpu.can_finish(spec, pooled):
        return _Finish.apply(pooled, gamma, spec, rope, position)  # type: ignore[no-any-return]
    return by_autograd(spec, pooled, gamma, rope, position)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pooled: torch.Tensor, gamma: torch.Tensor, *fixed: Any) -> torch.Tensor:
        spec, rope, position = fixed
        ctx.save_for_backward(pooled, gamma, position)
        ctx.spec, ctx.rope = spec, rope
        return cpu.finish(spec, pooled, gamma, rope, position)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        pooled, gamma, position = ctx.saved_tensors
        given = gradients[0].to(pooled.dtype).contiguous()
        d_pooled, d_gamma = cpu.unfinish(ctx.spec, pooled, gamma, ctx.rope, position, given)
        return d_pooled, d_gamma.to(gamma.dtype), None, None, None


def by_autograd(
    spec: CompressorSpec, pooled: torch.Tensor, gamma: torch.Tensor, rope: RopeTable | None, position: torch.Tensor
) -> torch.Tensor:
    """``finish`` in torch's operations."""

    def rounded(x: torch.Tensor, here: bool) -> torch.Tensor:
        return through(x, round_bf16) if here else x

    u = rounded(pooled, spec.rounding.pooled)
    row = rounded(
        gamma.to(u.dtype) * (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + spec.eps)), spec.rounding.latent
    )
    if rope is not None and spec.rope_dim:
        cos, sin = (t.to(u.dtype) for t in rope.rows(position))  # [E, rope_dim / 2]
        fixed, tail = row.split([spec.head_dim - spec.rope_dim, spec.rope_dim], dim=-1)
        a, b = tail[:, 0::2], tail[:, 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        row = torch.cat([fixed, rounded(turned, spec.rounding.rotated)], dim=-1)
    return row @ _matrix(spec.head_dim).to(row) if spec.rotate else row


@functools.cache
def _matrix(d: int) -> torch.Tensor:
    """H_d d^-0.5, symmetric: one product is less work than butterflies whose gradients are kept."""
    return hadamard(torch.eye(d, dtype=torch.float64, device="cpu"))
