"""Stage 6: Hadamard rotation of a whole row, natural (Sylvester) order, scale d^-0.5."""

from __future__ import annotations

import torch


def hadamard(row: torch.Tensor) -> torch.Tensor:
    """y = (H_d row) * d^-0.5 by butterflies: [..., d] -> [..., d], d a power of two. Not rounded; the format does that.

    Source: DeepSeek's rotate_activation, which calls fast-hadamard-transform after RoPE.
    """
    d = row.shape[-1]
    step = 1
    while step < d:
        pairs = row.unflatten(-1, (d // (2 * step), 2, step))  # [..., blocks, 2, step]
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        row = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        step *= 2
    return row * d**-0.5
