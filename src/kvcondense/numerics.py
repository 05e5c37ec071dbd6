"""Rounding, ordering and reductions that every backend must reproduce, in one place.

Reductions are elementwise adds in a written-down order, so that a result never depends on the batch around it, the
thread count or the vector width.
"""

from __future__ import annotations

import torch

FP32_LOWEST = torch.finfo(torch.float32).min
"""Score of an empty state slot in pypto-lib (its finite stand-in for minus infinity)."""

TILE = 64
"""Tokens per GEMM of the batch-invariant form: every GEMM has this many rows, whatever the spare ones hold."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64 (for oracles); everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_bf16(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest bf16 (ties to even) and keep the dtype of ``x``."""
    return x.to(torch.bfloat16).to(x.dtype)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum the last dimension by repeated halving: [..., n] -> [..., 1].

    The second half is added to the first until one column is left; an odd last column is carried to the next level.
    Only elementwise adds, so one row gives the same bits alone and inside any batch.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        paired = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([paired, x[..., 2 * half :]], dim=-1) if x.shape[-1] % 2 else paired
    return x


def ordered_bits(x: torch.Tensor) -> torch.Tensor:
    """Map bf16 or fp32 values to integers that grow with the value: neighbours differ by 1, -0 and +0 are equal.

    The raw bits are sign-magnitude, so their plain difference is wrong across zero.
    """
    integer, lowest = {torch.bfloat16: (torch.int16, -(2**15)), torch.float32: (torch.int32, -(2**31))}[x.dtype]
    bits = x.contiguous().view(integer).to(torch.int64)
    return torch.where(bits < 0, lowest - bits, bits)


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Number of representable values between ``a`` and ``b`` (same dtype, bf16 or fp32), as int64."""
    return (ordered_bits(a) - ordered_bits(b)).abs()
