"""Stage 5: RoPE of the trailing channels, in the pairwise and in the selector form."""

from __future__ import annotations

import torch

from kvcondense.numerics import round_bf16
from kvcondense.spec import Rounding


def pairwise(n: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) on channel pairs (2i, 2i + 1) of the last rope_dim channels.

    n [E, d], cos and sin [E, rope_dim / 2] -> [E, d]. REFERENCE rounds the rotated channels to bf16.
    """
    rope_dim = 2 * cos.shape[-1]
    nope, tail = n[..., : n.shape[-1] - rope_dim], n[..., n.shape[-1] - rope_dim :]
    even, odd = _rotate(tail[..., 0::2], tail[..., 1::2], cos, sin, rounding)
    return torch.cat([nope, torch.stack([even, odd], dim=-1).flatten(-2)], dim=-1)


def selector(n: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """The same rotation with 0/1 matrices instead of strides, for matrix engines (pypto-lib's PR 270).

    even = n E, odd = n O; out = even' E^T + odd' O^T. Each sum has one non-zero term, so it is exact; only the sign of
    a zero can differ from ``pairwise``.
    """
    rope_dim = 2 * cos.shape[-1]
    nope, tail = n[..., : n.shape[-1] - rope_dim], n[..., n.shape[-1] - rope_dim :]
    pick_even, pick_odd = (m.to(tail) for m in selector_matrices(rope_dim))
    even, odd = _rotate(tail @ pick_even, tail @ pick_odd, cos, sin, rounding)
    return torch.cat([nope, even @ pick_even.t() + odd @ pick_odd.t()], dim=-1)


def selector_matrices(rope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E, O [rope_dim, rope_dim / 2]: E picks even channels, O odd ones."""
    identity = torch.eye(rope_dim, device="cpu")
    return identity[:, 0::2].contiguous(), identity[:, 1::2].contiguous()


def _rotate(
    even: torch.Tensor, odd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.to(even.dtype), sin.to(even.dtype)
    out = even * cos - odd * sin, even * sin + odd * cos
    return (round_bf16(out[0]), round_bf16(out[1])) if rounding.rotated else out
