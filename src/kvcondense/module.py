"""Compressor(nn.Module): owns the parameters of one compressor and calls the functions; for training loops."""

from __future__ import annotations

import torch
from torch import nn

from kvcondense import training
from kvcondense.errors import RangeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.numerics import compute_dtype
from kvcondense.parallel import Shards, train_shard
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights


class Compressor(nn.Module):
    """Parameters w [projected, D], ape [r, N] (if the spec has one) and norm [d] of one compressor.

    ``weights`` become the parameters (w is needed). ``rope`` is shared, not saved. ``format``: the cache format whose
    values rows take, straight through. Plain tensors go in and come out, so that DDP and FSDP can wrap it.
    """

    w: nn.Parameter
    norm: nn.Parameter
    ape: nn.Parameter | None

    def __init__(
        self, spec: CompressorSpec, weights: CompressorWeights, rope: RopeTable | None, *, format: str | None = None
    ) -> None:
        require("spec", spec, CompressorSpec)
        require("weights", weights, CompressorWeights)
        if weights.w is None:
            raise RangeError("weights.w", f"a tensor [{spec.projected}, D]", "None")
        super().__init__()
        self.spec, self.rope, self.format = spec, rope, format
        self.w, self.norm = nn.Parameter(weights.w), nn.Parameter(weights.norm)
        self.register_parameter("ape", None if weights.ape is None else nn.Parameter(weights.ape))

    @property
    def weights(self) -> CompressorWeights:
        """The parameters, as the functions take them."""
        return CompressorWeights(norm=self.norm, ape=self.ape, w=self.w)

    def forward(self, x: torch.Tensor, where: RaggedBatch | Shards) -> torch.Tensor:
        """x [T, D] -> finished rows [E, d], document by document, window by window.

        ``where``: packed documents (``training.compress``), or this rank's segments of long ones
        (``parallel.train_shard``; all ranks call it, and backward too). Raises a KvCondenseError for bad input.
        """
        if isinstance(where, RaggedBatch):
            return training.compress(self.spec, x, self.weights, self.rope, where, format=self.format).values
        require("where", where, Shards)
        dtype = compute_dtype(torch.promote_types(x.dtype, self.w.dtype))
        kv_score = nn.functional.linear(x.to(dtype), self.w.to(dtype))
        return train_shard(self.spec, kv_score, self.weights, self.rope, where, format=self.format).values
