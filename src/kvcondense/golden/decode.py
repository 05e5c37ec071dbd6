"""The golden reference: one token at a time, written as PR 270 and DeepSeek's decode branch are, not as our stages.

Own layout and control flow on purpose: weights [D, N], a state of slots that is shifted after a window, no plan, no
positions in the state. It shares no code with the library's stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.numerics import FP32_LOWEST
from kvcondense.spec import CompressorSpec, Rounding


@dataclass
class DecodeCompressor:
    """One request. ape [r, N], norm_w [d], cos and sin [positions, rd/2], hadamard [d, d]; fp32 but hadamard.

    State kv_state, score_state [c * r, N]: kv 0 and score -FLT_MAX where nothing was stored. With overlap, slots
    0..r-1 hold the previous window and r..2r-1 the current one.
    """

    spec: CompressorSpec
    ape: torch.Tensor | None
    norm_w: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    hadamard: torch.Tensor | None = None

    def __post_init__(self) -> None:
        slots, width = self.spec.window, self.spec.width
        self.kv_state = torch.zeros(slots, width)
        self.score_state = torch.full((slots, width), FP32_LOWEST)

    def step(self, kv: torch.Tensor, score: torch.Tensor | None, start_pos: int) -> torch.Tensor | None:
        """Take kv and score [N] of the token at ``start_pos``; return the fp32 row [d] if it completes a window."""
        spec, ratio, d = self.spec, self.spec.ratio, self.spec.head_dim
        biased = torch.zeros(spec.width) if score is None else score
        if self.ape is not None:
            biased = biased + self.ape[start_pos % ratio]
        slot = start_pos % ratio + (ratio if spec.overlap else 0)
        self.kv_state[slot], self.score_state[slot] = kv, biased
        if (start_pos + 1) % ratio:
            return None
        if spec.overlap:
            kvs = torch.cat([self.kv_state[:ratio, :d], self.kv_state[ratio:, d:]])
            scores = torch.cat([self.score_state[:ratio, :d], self.score_state[ratio:, d:]])
        else:
            kvs, scores = self.kv_state, self.score_state
        pooled = (kvs * scores.softmax(dim=0)).sum(dim=0)
        if spec.overlap:
            self.kv_state[:ratio] = self.kv_state[ratio:].clone()
            self.score_state[:ratio] = self.score_state[ratio:].clone()
        return self._finish(pooled, start_pos // ratio * ratio)

    def _finish(self, pooled: torch.Tensor, position: int) -> torch.Tensor:
        def rounded(t: torch.Tensor, *profiles: Rounding) -> torch.Tensor:
            return t.bfloat16().float() if self.spec.rounding in profiles else t

        u = rounded(pooled, Rounding.REFERENCE)
        n = rounded(
            self.norm_w * (u * torch.rsqrt(u.square().mean() + self.spec.eps)), Rounding.REFERENCE, Rounding.LATENT
        )
        rope = self.spec.rope_dim
        if rope:
            x0, x1 = n[-rope:].unflatten(0, (-1, 2)).unbind(-1)
            cos, sin = self.cos[position], self.sin[position]
            y0, y1 = (rounded(t, Rounding.REFERENCE) for t in (x0 * cos - x1 * sin, x0 * sin + x1 * cos))
            n = torch.cat([n[:-rope], torch.stack([y0, y1], dim=-1).flatten()])
        if self.spec.rotate:
            assert self.hadamard is not None
            n = n @ self.hadamard.float()
        return n


def sylvester(d: int) -> torch.Tensor:
    """H_d / sqrt(d) in natural order [d, d] fp32, by doubling."""
    h = torch.ones(1, 1)
    while h.shape[0] < d:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return h / d**0.5
