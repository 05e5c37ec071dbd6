"""Mutants of the arithmetic of a row: softmax, norm, RoPE and its table, Hadamard rotation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from kvcondense.backends import Step
from kvcondense.backends.reference import Stages
from kvcondense.conformance.mutants.mutant import HADAMARD, NUMERICS, ROPE, Mutant
from kvcondense.numerics import round_bf16, tree_sum
from kvcondense.rope_table import RopeTable
from kvcondense.spec import Rounding
from kvcondense.stages import norm, pool, rope

_THETA, _FACTOR, _ORIGINAL = 160000.0, 16.0, 65536
"""Of the compressed layers of DeepSeek-V4: RoPE base, YaRN factor, positions before YaRN."""


def _pool_current(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return kv[:, -1]


def _pool_uniform(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return pool.two_pass(kv, torch.where(torch.isneginf(score), score, 0.0))


def _pool_scalar_gate(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return pool.two_pass(kv, score.mean(-1, keepdim=True).expand_as(score))


def _pool_without_max(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    weight = torch.exp(score)  # overflows from 89 on; all of them vanish below -104
    return (weight * kv).sum(1) / weight.sum(1)


def _pool_not_rescaled(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Running softmax whose sums stay as they are when the maximum grows."""
    top, total, pooled = score[:, 0], torch.zeros_like(kv[:, 0]), torch.zeros_like(kv[:, 0])
    for j in range(kv.shape[1]):
        top = torch.maximum(top, score[:, j])
        weight = torch.where(torch.isneginf(score[:, j]), 0.0, torch.exp(score[:, j] - top))
        total, pooled = total + weight, pooled + weight * kv[:, j]
    return pooled / total


def _norm_with_eps(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, gamma, 10 * eps, rounding)


def _norm_eps_outside(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    u = round_bf16(pooled) if rounding.pooled else pooled
    n = gamma * (u / ((tree_sum(u * u) / u.shape[-1]).sqrt() + eps))
    return round_bf16(n) if rounding.latent else n


def _norm_unrounded(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, gamma, eps, Rounding.FUSED).bfloat16().to(pooled.dtype)


def _norm_without_gamma(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, torch.ones_like(gamma), eps, rounding)


def _rope_half_split(n: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    d = 2 * cos.shape[-1]
    low, high = n[..., -d:].chunk(2, dim=-1)
    paired = torch.stack([low, high], dim=-1).flatten(-2)
    out = rope.pairwise(torch.cat([n[..., :-d], paired], dim=-1), cos, sin, rounding)
    rotated = out[..., -d:].unflatten(-1, (-1, 2))
    return torch.cat([out[..., :-d], rotated[..., 0], rotated[..., 1]], dim=-1)


def _plain(theta: float) -> Callable[[int], torch.Tensor]:
    """Frequencies without YaRN, for so many pairs of channels."""
    return lambda half: 1.0 / (theta ** (torch.arange(half, dtype=torch.float32) / half))


def _all_divided(half: int) -> torch.Tensor:
    return _plain(_THETA)(half) / _FACTOR


def _ramp_reversed(half: int) -> torch.Tensor:
    """YaRN with its two ends exchanged: what turns fast is divided, what turns slowly is not."""
    low, high = (half * math.log(_ORIGINAL / (turns * 2 * math.pi)) / math.log(_THETA) for turns in (32, 1))
    ramp = ((torch.arange(half) - math.floor(low)) / (math.ceil(high) - math.floor(low))).clamp(0, 1)
    inv = _plain(_THETA)(half)
    return inv / _FACTOR * (1 - ramp) + inv * ramp


def _table(frequencies: Callable[[int], torch.Tensor]) -> Callable[[Step], Step]:
    """RoPE with other frequencies than those of the model's table."""

    def alter(step: Step) -> Step:
        assert step.rope is not None
        size, half = step.rope.cos.shape
        angle = torch.outer(torch.arange(size, dtype=torch.float32), frequencies(half))
        return replace(step, rope=RopeTable(angle.cos(), angle.sin()))

    return alter


def _table_in_bf16(step: Step) -> Step:
    assert step.rope is not None
    cos, sin = (t.bfloat16().to(t.dtype) for t in (step.rope.cos, step.rope.sin))
    return replace(step, rope=RopeTable(cos, sin))


def _rotate(step: Step) -> Step:
    return replace(step, spec=replace(step.spec, rotate=True))


MUTANTS = (
    Mutant("current-token-only", "uses the last token of the window alone", NUMERICS, Stages(pool=_pool_current)),
    Mutant("uniform-average", "averages the window instead of weighing it", NUMERICS, Stages(pool=_pool_uniform)),
    Mutant("scalar-gate", "one gate per token instead of one per channel", NUMERICS, Stages(pool=_pool_scalar_gate)),
    Mutant(
        "softmax-without-max", "exponentials of scores as they are overflow", NUMERICS, Stages(pool=_pool_without_max)
    ),
    Mutant(
        "softmax-not-rescaled",
        "a running softmax goes on without e^(m - m') when its maximum grows",
        NUMERICS,
        Stages(pool=_pool_not_rescaled),
    ),
    Mutant("rope-at-row-index", "rotates row w at w", ROPE, Stages(rope_position=lambda plan: plan.window_index)),
    Mutant(
        "rope-at-last-position",
        "rotates at the window's last position",
        ROPE,
        Stages(rope_position=lambda plan: (plan.window_index + 1) * plan.ratio - 1),
    ),
    Mutant(
        "rope-clamped",
        "positions stop at the 65536 that the model had before YaRN",
        ROPE,
        Stages(rope_position=lambda plan: (plan.window_index * plan.ratio).clamp(max=_ORIGINAL - 1)),
    ),
    Mutant("rope-table-bf16", "cos and sin are rounded to bf16", ROPE, alter=_table_in_bf16),
    Mutant("half-split-pairs", "rotates channels (i, i + rd/2)", ROPE, Stages(rope=_rope_half_split)),
    Mutant("theta-1e4", "RoPE base of the uncompressed layers", ROPE, alter=_table(_plain(1e4))),
    Mutant("no-yarn", "frequencies without YaRN", ROPE, alter=_table(_plain(_THETA))),
    Mutant("yarn-as-linear", "every frequency is divided by YaRN's factor", ROPE, alter=_table(_all_divided)),
    Mutant("yarn-ramp-reversed", "fast frequencies are divided, slow ones are not", ROPE, alter=_table(_ramp_reversed)),
    Mutant("eps-times-10", "eps 1e-5 instead of 1e-6", NUMERICS, Stages(norm=_norm_with_eps)),
    Mutant("eps-outside-root", "eps is added to the root, not under it", NUMERICS, Stages(norm=_norm_eps_outside)),
    Mutant(
        "no-bf16-before-norm", "REFERENCE profile without its first rounding", NUMERICS, Stages(norm=_norm_unrounded)
    ),
    Mutant("gamma-dropped", "norm without its weight", NUMERICS, Stages(norm=_norm_without_gamma)),
    Mutant("rotate-ignored", "no Hadamard although asked for", HADAMARD, Stages(hadamard=lambda row: row)),
    Mutant("rotate-always", "Hadamard of rows whose queries are not rotated", HADAMARD, alter=_rotate),
)
