"""RopeTable: cos and sin by absolute position, with the YaRN frequencies of the compressed layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvcondense import forks
from kvcondense.config import ModelConfig
from kvcondense.errors import RangeError, ShapeError, require


@dataclass(frozen=True)
class RopeTable:
    """cos, sin [positions, rope_dim / 2] fp32, one row per absolute position; pairs are channels (2i, 2i + 1)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __post_init__(self) -> None:
        forks.note()
        if self.cos.dim() != 2 or self.cos.shape != self.sin.shape:
            raise ShapeError(
                "rope", "cos and sin of one shape [positions, rope_dim / 2]", f"{self.cos.shape}, {self.sin.shape}"
            )

    @classmethod
    def build(
        cls, config: ModelConfig, max_positions: int | None = None, *, device: torch.device | str = "cpu"
    ) -> RopeTable:
        """Table of the compressed layers for positions 0 .. max_positions - 1 (default: the model's maximum).

        angle = fp32(p) * inv_i as one fp32 product, then cos and sin in fp32, as DeepSeek's inference/model.py forms
        them. A table made with fp64 angles differs: near p = 1e6 an fp32 angle is off by up to 0.03 rad.
        """
        require("config", config, ModelConfig)
        size = config.max_positions if max_positions is None else max_positions
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise RangeError("max_positions", "an integer of at least 0", repr(size))
        position = torch.arange(size, dtype=torch.float32, device=device)
        angle = torch.outer(position, inverse_frequencies(config).to(device))
        return cls(torch.cos(angle), torch.sin(angle))

    def rows(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position [E] -> [E, rope_dim / 2]."""
        return self.cos[position], self.sin[position]


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """inv_i = theta^(-2i / rope_dim) with the YaRN ramp of the compressed layers: [rope_dim / 2] fp32.

    With YaRN: dim(n) = rope_dim ln(original / (2 pi n)) / (2 ln theta); low = floor(dim(beta_fast)), high =
    ceil(dim(beta_slow)); ramp = clip((i - low) / (high - low), 0, 1); inv <- inv / factor * ramp + inv * (1 - ramp).
    A range that is empty or turned round (small bases) is taken as DeepSeek's and transformers' code take it.
    """
    dim, theta = config.rope_dim, config.compress_rope_theta
    inv = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    yarn = config.yarn
    if yarn is None:
        return inv

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_to_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(turns_to_dim(yarn.beta_slow)), dim - 1)
    span = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / span).clamp(0, 1)
    smooth = 1 - ramp
    return inv / yarn.factor * (1 - smooth) + inv * smooth
