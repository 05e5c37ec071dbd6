"""Stage 1: x [T, D] and the merged weight -> kv_score [T, 2N], fp32 sums of exact bf16 products."""

from __future__ import annotations

import torch

from kvcondense.numerics import TILE, compute_dtype


def project(x: torch.Tensor, w: torch.Tensor, tile: int | None = TILE) -> torch.Tensor:
    """kv_score = x @ w.T with operands widened to fp32 (a bf16 product is exact in fp32).

    x [T, D], w [projected, D] -> [T, projected] fp32 (fp64 if an operand is). With a ``tile``, T is cut into GEMMs of
    one fixed shape, so that a token's bits do not depend on how many tokens come with it; ``None`` runs one GEMM.
    """
    dtype = compute_dtype(torch.promote_types(x.dtype, w.dtype))
    tokens = x.shape[0]
    w = w.to(dtype).t()  # [D, projected]
    if tile is None:
        return x.to(dtype) @ w
    out = torch.empty(tokens, w.shape[1], dtype=dtype, device=x.device)
    block = torch.zeros(tile, x.shape[1], dtype=dtype, device=x.device)
    for start in range(0, tokens, tile):
        rows = min(tile, tokens - start)
        block[:rows] = x[start : start + rows]
        out[start : start + rows] = (block @ w)[:rows]
    return out
