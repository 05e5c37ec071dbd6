"""Inputs of a golden run, named and laid out as in pypto-lib's PR 270, plus earlier tokens and per-row positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.config import PRESETS
from kvcondense.errors import RangeError, require_known
from kvcondense.formats import CacheFormat, get_format
from kvcondense.golden.decode import sylvester
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.stages.rope import selector_matrices

KINDS = ("hca", "csa", "indexer")
MAX_POSITIONS = 1 << 17
"""Largest start position that a golden run accepts; its tables and caches are dense."""


@dataclass(frozen=True)
class GoldenCase:
    """What to run. ``history`` 0 is PR 270's own test: one step from an empty state, its inputs and its cos and sin."""

    kind: str = "hca"
    preset: str = "demo"
    batch: int = 4
    start_pos: tuple[int, ...] | None = None
    history: int = 1000
    rotate: bool = True
    scale: float = 1.0
    seed: int = 0
    rounding: Rounding = Rounding.REFERENCE
    format: str = "bf16"

    @property
    def spec(self) -> CompressorSpec:
        require_known("kind", self.kind, KINDS)
        require_known("preset", self.preset, PRESETS)
        build = getattr(CompressorSpec, self.kind)
        return build(PRESETS[self.preset], rotate=self.rotate, rounding=self.rounding)

    def starts(self) -> list[int]:
        """Position of the decoded token of each row.

        Default: the original's first window end without history, else window ends at or after ``history`` and past
        the third window, one window further for every row.
        """
        ratio = self.spec.ratio
        if self.start_pos:
            starts = [self.start_pos[b % len(self.start_pos)] for b in range(self.batch)]
        elif self.history == 0:
            starts = [ratio - 1] * self.batch
        else:
            base = max(-(-(self.history + 1) // ratio), 3) * ratio - 1
            starts = [base + b * ratio for b in range(self.batch)]
        limit = min(PRESETS[self.preset].max_positions, MAX_POSITIONS)
        for start in starts:
            if not 0 <= start < limit:
                within = f"positions 0..{limit - 1} (preset {self.preset})"
                if self.start_pos:
                    raise RangeError("start_pos", within, start)
                got = f"{self.history}: row {starts.index(start)} would be at {start}"
                raise RangeError("history", f"{within}, each row a window further than the last", got)
        return starts


@dataclass(frozen=True)
class GoldenInputs:
    """Tensors of PR 270 and, beside them, ``x_history``: the tokens right before start_pos, row by row.

    x [B, 1, D] bf16; wkv, wgate [D, N] bf16; ape [r, N], norm_w [d] fp32; cos, sin [positions, rd/2] fp32 (a row of
    NaN where the step may not look); even_select, odd_select [rd, rd/2] and hadamard [d, d] bf16; kv_state,
    score_state [B, c * r, N] fp32; kv_cache [B, maxlen / r, d] bf16; start_pos one int per row; rotate in ``spec``.
    ``format``: what the cache of the run holds; kv_cache gives its shape.
    """

    spec: CompressorSpec
    format: CacheFormat
    x: torch.Tensor
    x_history: list[torch.Tensor]
    wkv: torch.Tensor
    wgate: torch.Tensor
    ape: torch.Tensor
    norm_w: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    even_select: torch.Tensor
    odd_select: torch.Tensor
    hadamard: torch.Tensor
    kv_state: torch.Tensor
    score_state: torch.Tensor
    kv_cache: torch.Tensor
    start_pos: list[int]


def make_inputs(case: GoldenCase) -> GoldenInputs:
    """Random inputs of ``case`` from its seed; raises before allocating anything if the case makes no sense."""
    spec, config, starts = case.spec, PRESETS[case.preset], case.starts()
    fmt = get_format(case.format)
    fmt.check(spec.head_dim, spec.rope_dim)
    for name, value, low in (("batch", case.batch, 1), ("history", case.history, 0)):
        if value < low:
            raise RangeError(name, f"at least {low}", value)
    gen = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    batch, hidden, width, d = case.batch, config.hidden_size, spec.width, spec.head_dim
    original = case.history == 0
    scale = 0.1 if original else case.scale
    maxlen = max(4096, -(-(max(starts) + 1) // spec.ratio) * spec.ratio)
    if original:
        # PR 270 passes one row, cos(i * 1e-3), for the row being finished; anything else it reads would be an error.
        angle = torch.arange(spec.rope_dim // 2) * 1e-3
        cos, sin = torch.full((2, maxlen, spec.rope_dim // 2), float("nan"))
        rows = [s // spec.ratio * spec.ratio for s in starts]
        cos[rows], sin[rows] = angle.cos(), angle.sin()
    else:
        table = RopeTable.build(config, maxlen)
        cos, sin = table.cos, table.sin
    even, odd = selector_matrices(spec.rope_dim)
    return GoldenInputs(
        spec=spec,
        format=fmt,
        x=(scale * randn(batch, 1, hidden)).bfloat16(),
        x_history=[(scale * randn(min(case.history, start), hidden)).bfloat16() for start in starts],
        wkv=(randn(hidden, width) / hidden**0.5).bfloat16(),
        wgate=(randn(hidden, width) / hidden**0.5).bfloat16(),
        ape=randn(spec.ratio, width) * 0.1,
        norm_w=torch.ones(d) if original else 1 + 0.2 * randn(d),
        cos=cos,
        sin=sin,
        even_select=even.bfloat16(),
        odd_select=odd.bfloat16(),
        hadamard=sylvester(d).bfloat16(),
        kv_state=torch.zeros(batch, spec.window, width),
        score_state=torch.full((batch, spec.window, width), FP32_LOWEST),
        kv_cache=torch.zeros(batch, maxlen // spec.ratio, d, dtype=torch.bfloat16),
        start_pos=starts,
    )
