"""Compressor(nn.Module): owns the parameters of one compressor and calls the functions; for training loops."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
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
    values rows take, straight through. Plain tensors go in and come out, so that DDP and FSDP can wrap it. Parameters
    may be DTensors that every rank of their mesh holds whole, as under tensor parallelism, where engines and trainers
    replicate the compressor.
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
        return self._weights(None)

    def _weights(self, shards: Shards | None) -> CompressorWeights:
        ape = None if self.ape is None else _plain("ape", self.ape, shards)
        return CompressorWeights(norm=_plain("norm", self.norm, shards), ape=ape, w=_plain("w", self.w, shards))

    def forward(self, x: torch.Tensor, where: RaggedBatch | Shards) -> torch.Tensor:
        """x [T, D] -> finished rows [E, d], document by document, window by window.

        ``where``: packed documents (``training.compress``), or this rank's segments of long ones
        (``parallel.train_shard``; all ranks call it, and backward too). Raises a KvCondenseError for bad input.
        """
        if isinstance(where, RaggedBatch):
            return training.compress(self.spec, x, self.weights, self.rope, where, format=self.format).values
        require("where", where, Shards)
        weights = self._weights(where)
        assert weights.w is not None
        dtype = compute_dtype(torch.promote_types(x.dtype, weights.w.dtype))
        kv_score = nn.functional.linear(x.to(dtype), weights.w.to(dtype))
        return train_shard(self.spec, kv_score, weights, self.rope, where, format=self.format).values


def _plain(name: str, parameter: torch.Tensor, shards: Shards | None) -> torch.Tensor:
    """What this rank holds of a parameter: all of it.

    A mesh's ranks that share sequences out (``shards`` are of their group) have a part of its gradient each; ranks that
    do the same have the whole one. Raises RangeError for a parameter that is cut over ranks.
    """
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return parameter
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(parameter, DTensor)
    if not all(isinstance(p, Replicate) for p in placements):
        raise RangeError(name, "a parameter that every rank of its mesh holds whole", placements)
    shared = set() if shards is None else set(dist.get_process_group_ranks(shards.group))
    groups = [set(dist.get_process_group_ranks(g)) for g in parameter.device_mesh.get_all_groups()]
    parts = [Partial() if group <= shared else Replicate() for group in groups]
    reached = math.prod(len(group) for group in groups if group <= shared)
    if shared & set(parameter.device_mesh.mesh.flatten().tolist()) and reached != len(shared):
        wanted = "dimensions of the parameters' mesh, whole"
        raise RangeError("shards.group", wanted, f"ranks {sorted(shared)} of {parameter.device_mesh}")
    return parameter.to_local(grad_placements=parts)
