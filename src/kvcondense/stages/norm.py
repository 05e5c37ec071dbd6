"""Stage 4: RMS norm of the pooled row, n = gamma * (u * rsqrt(mean(u^2) + eps))."""

from __future__ import annotations

import torch

from kvcondense.numerics import round_bf16, tree_sum
from kvcondense.spec import Rounding


def rms_norm(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    """pooled [E, d], gamma [d] -> [E, d]. u = P, or bf16(P), and n is rounded, as ``rounding`` has it."""
    u = round_bf16(pooled) if rounding.pooled else pooled
    mean = tree_sum(u * u) / u.shape[-1]  # [E, 1]
    n = gamma.to(u.dtype) * (u * torch.rsqrt(mean + eps))
    return round_bf16(n) if rounding.latent else n
