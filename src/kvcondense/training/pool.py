"""The pooling of windows as one differentiable operation: forward and backward in pieces that stay in a cache.

A token's channels are read by one window each (the own half by its window, the other half by the next one), so that the
gradient is written, never added to, and no order of additions has to be chosen but ape's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kvcondense.layout.plan import Plan
from kvcondense.numerics import compute_dtype
from kvcondense.spec import CompressorSpec
from kvcondense.training import cpu
from kvcondense.training import triton as gpu
from kvcondense.training.cpu import by_phase, zero_unread

_PIECE = 1 << 20
"""Elements of a piece, [windows, window, d]: 4 MiB in fp32, so that operations are worth their calls."""


def pool(spec: CompressorSpec, kv_score: torch.Tensor, ape: torch.Tensor | None, plan: Plan) -> torch.Tensor:
    """P [E, d] = sum_j softmax_j(Z_j + ape) K_j of the plan's windows, for documents from position 0."""
    return _Pool.apply(kv_score, ape, spec, plan)  # type: ignore[no-any-return]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_score: torch.Tensor, ape: torch.Tensor | None, spec: CompressorSpec, plan: Plan) -> Any:
        way = next((way for way in (gpu, cpu) if way.can_run(spec, kv_score)), _Torch)
        pooled, lse = way.forward(spec, kv_score, ape, plan)
        ctx.save_for_backward(kv_score, ape, pooled, lse)
        ctx.spec, ctx.plan, ctx.way = spec, plan, way
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        kv_score, ape, pooled, lse = ctx.saved_tensors
        given = gradients[0].to(pooled.dtype).contiguous()
        d_kv_score, d_ape = ctx.way.backward(ctx.spec, kv_score, ape, ctx.plan, (pooled, lse, given))
        return d_kv_score, None if ape is None else d_ape.to(ape.dtype), None, None


@dataclass(frozen=True)
class _Piece:
    """Windows first .. last - 1 of a document, in the tokens that they read.

    rows: where their rows are. own, before [n, r, parts, d]: tokens in each window, and those of the window before it,
    which the first one of a document does not have.
    """

    rows: slice
    own: torch.Tensor
    before: torch.Tensor | None
    starts: bool

    def sides(self, own: int) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """(which windows and candidates, their tokens): own ones, from candidate ``own`` on, then those before."""
        yield (slice(0, None), slice(own, None)), self.own
        if self.before is not None:
            yield (slice(int(self.starts), None), slice(0, own)), self.before


def _step(spec: CompressorSpec) -> int:
    """Windows of a piece."""
    return max(1, _PIECE // (spec.window * spec.head_dim))


def _pieces(spec: CompressorSpec, tokens: torch.Tensor, plan: Plan) -> Iterator[_Piece]:
    """The windows of tokens [T, projected], in order."""
    step, row = _step(spec), 0
    parts = spec.projected // spec.width
    starts = plan.batch.query_start_loc.tolist()
    for begin, end in pairwise(starts):
        count = (end - begin) // spec.ratio
        whole = tokens[begin : begin + count * spec.ratio].view(count, spec.ratio, parts, spec.halves, spec.head_dim)
        for first in range(0, count, step):
            last = min(first + step, count)
            before = whole[max(first - 1, 0) : last - 1, :, :, 0] if spec.overlap else None
            yield _Piece(slice(row + first, row + last), whole[first:last, :, :, -1], before, first == 0)
        row += count


class _Torch:
    """Forward and backward in torch, a piece at a time, in buffers that all pieces share."""

    @staticmethod
    def forward(
        spec: CompressorSpec, kv_score: torch.Tensor, ape: torch.Tensor | None, plan: Plan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P and lse = log sum_j e^(z_j), [E, d] each."""
        dtype = compute_dtype(kv_score.dtype)
        pooled, lse = kv_score.new_empty(2, plan.num_windows, spec.head_dim, dtype=dtype)
        own, work = spec.window - spec.ratio, _Work.make(spec, kv_score, ape, dtype)
        for piece in _pieces(spec, kv_score, plan):
            z, spare = work.scores(piece), work.spare(piece)
            top = z.amax(dim=1)
            e = z.sub_(top[:, None]).exp_()
            total = e.sum(dim=1)
            for candidates, tokens in piece.sides(own):
                torch.mul(e[candidates], tokens[:, :, 0], out=spare[candidates])
            torch.div(spare.sum(dim=1), total, out=pooled[piece.rows])
            torch.add(top, total.log_(), out=lse[piece.rows])
        return pooled, lse

    @staticmethod
    def backward(
        spec: CompressorSpec,
        kv_score: torch.Tensor,
        ape: torch.Tensor | None,
        plan: Plan,
        of_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dK_j = w_j g, dz_j = w_j g (K_j - P), d ape = sum of dz; of_rows: P, lse, g [E, d] each."""
        pooled, lse, given = of_rows
        d_tokens = torch.empty_like(kv_score, memory_format=torch.contiguous_format)
        d_ape = torch.zeros(spec.window, spec.head_dim, dtype=pooled.dtype, device=kv_score.device)
        own, work = spec.window - spec.ratio, _Work.make(spec, kv_score, ape, pooled.dtype)
        zero_unread(spec, d_tokens, plan)
        for piece, target in zip(_pieces(spec, kv_score, plan), _pieces(spec, d_tokens, plan), strict=True):
            z, spare = work.scores(piece), work.spare(piece)
            w = z.sub_(lse[piece.rows, None]).exp_().mul_(given[piece.rows, None])
            for (candidates, tokens), (_, to) in zip(piece.sides(own), target.sides(own), strict=True):
                to[:, :, 0] = w[candidates]
                shift = candidates[0].start
                torch.sub(tokens[:, :, 0], pooled[piece.rows][shift:, None], out=spare[candidates])
                dz = spare[candidates].mul_(w[candidates])
                if spec.has_gate:
                    to[:, :, 1] = dz
            d_ape += spare.sum(dim=0)
        return d_tokens, by_phase(spec, d_ape)


def _biases(spec: CompressorSpec, ape: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """ape [r, N] by candidate: [W, d]."""
    if ape is None:
        return None
    return torch.cat(ape.to(dtype).split(spec.head_dim, dim=1)) if spec.overlap else ape.to(dtype)


@dataclass(frozen=True)
class _Work:
    """Buffers [2, windows, W, d] that all pieces share, and the bias [W, d] of each candidate."""

    spec: CompressorSpec
    buffers: torch.Tensor
    biases: torch.Tensor | None

    @classmethod
    def make(cls, spec: CompressorSpec, like: torch.Tensor, ape: torch.Tensor | None, dtype: torch.dtype) -> _Work:
        step = _step(spec)
        return cls(spec, like.new_empty(2, step, spec.window, spec.head_dim, dtype=dtype), _biases(spec, ape, dtype))

    def spare(self, piece: _Piece) -> torch.Tensor:
        """Room for [n, W, d]; 0 where there is no token."""
        spare = self.buffers[1, : piece.own.shape[0]]
        if piece.starts:
            spare[:1, : self.spec.window - self.spec.ratio] = 0.0
        return spare

    def scores(self, piece: _Piece) -> torch.Tensor:
        """z [n, W, d] with the bias; -inf where there is no token."""
        own = self.spec.window - self.spec.ratio
        z = self.buffers[0, : piece.own.shape[0]]
        for candidates, tokens in piece.sides(own):
            part = z[candidates]
            bias = None if self.biases is None else self.biases[candidates[1]]
            if not self.spec.has_gate:
                part.copy_(torch.zeros_like(part) if bias is None else bias.expand_as(part))
            elif bias is None:
                part.copy_(tokens[:, :, 1])
            else:
                torch.add(tokens[:, :, 1], bias, out=part)
        if piece.starts:
            z[:1, :own] = float("-inf")
        return z
