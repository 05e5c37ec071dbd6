"""The compressor with gradients: packed documents in, finished rows out, differentiable in every learned tensor.

What is kept for the backward pass is the inputs, the pooled rows and one number per row and channel; the weights of the
softmax, [windows, window, d], are formed again, in pieces that stay in a cache.
"""

from __future__ import annotations

import torch

from kvcondense import validate
from kvcondense.bound import CondensedRows, bind
from kvcondense.errors import RangeError, UnsupportedError, require
from kvcondense.formats import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.numerics import compute_dtype
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.training import documents, rows
from kvcondense.training.pool import pool
from kvcondense.weights import CompressorWeights

__all__ = ["compress", "condense"]


def condense(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    *,
    format: str | None = None,
) -> CondensedRows:
    """``kvcondense.condense`` with gradients for kv_score, weights.ape and weights.norm; nothing is stored.

    P = sum_j softmax_j(Z_j + ape) K_j, then norm, RoPE and Hadamard, as the spec has them. ``batch``: documents packed
    one after the other (query_start_loc), all from position 0; inert ones and padding are as good as absent. kv_score
    [T, projected] in fp64, fp32, bf16 or fp16 is computed with in fp64 or fp32; what no window reads has a gradient of
    zero. Where a value is rounded (the REFERENCE and LATENT profiles; ``format``, the name of a cache format whose
    values the rows then take), the gradient is that of the identity. Rows differ from ``condense``'s by the order
    of sums. Raises a KvCondenseError for bad input.
    """
    return condense_from(spec, kv_score, weights, rope, batch, None, format=format)


def condense_from(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    first: torch.Tensor | None,
    *,
    format: str | None = None,
) -> CondensedRows:
    """``condense`` of documents whose first tokens stand at positions ``first`` [R] of longer ones, multiples of the
    ratio (None: 0), for RoPE; nothing before them is read.
    """
    bound = bind(spec, weights, rope)
    require("batch", batch, RaggedBatch)
    validate.tensor("kv_score", kv_score, (None, spec.projected), validate.WEIGHT_DTYPES)
    validate.enough("kv_score", kv_score.shape[0], batch)
    if bool((batch.start_positions[batch.active] != 0).any()):
        raise RangeError("start_positions", "0 for every document", batch.start_positions.tolist())
    kv_score, batch = documents.live("kv_score", kv_score, batch)
    plan = bound.plan(batch)
    bound.admit(plan, kv_score.shape[0])
    chosen = None if format is None else get_format(format)
    if chosen is not None:
        chosen.check(spec.head_dim, spec.rope_dim)
        if chosen.tensor_scale:
            raise UnsupportedError("format", "a format without one scale for the whole cache", chosen.name)
    pooled = pool(spec, kv_score, weights.ape, plan)  # [E, d]
    positions = plan.window_index * spec.ratio
    if first is not None:
        positions = positions + first[plan.window_request]
    values = rows.finish(spec, pooled, weights.norm, rope, positions)
    if chosen is not None:
        values = rows.through(
            values, lambda x: chosen.decode(chosen.encode(x, exact=not spec.rounding.row)).to(x.dtype)
        )
    return CondensedRows(values, plan.window_request, plan.window_index, plan.window_slot)


def compress(
    spec: CompressorSpec,
    x: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    *,
    format: str | None = None,
) -> CondensedRows:
    """The same from hidden states x [T, D], with gradients for x and weights.w too: kv_score = x w^T in fp32 or fp64.

    Who trains in bf16 projects by himself, in his own precision, and calls ``condense``.
    """
    validate.projection(spec, x, weights)
    require("batch", batch, RaggedBatch)
    assert weights.w is not None
    x, batch = documents.live("x", x, batch)
    dtype = compute_dtype(torch.promote_types(x.dtype, weights.w.dtype))
    kv_score = torch.nn.functional.linear(x.to(dtype), weights.w.to(dtype))
    return condense(spec, kv_score, weights, rope, batch, format=format)
