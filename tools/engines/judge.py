"""Two memories beside each other: how many bytes differ, and whether that is rounding or an error."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.scenes import Memory, Scene
from kvcondense.formats import FORMATS

PASS, FAIL, SKIPPED = "PASS", "FAIL", "skipped"
SHARE = 2.0**-13
"""Bytes of rows that may differ. fp32 sums in another order move a value by some 2^-23 of itself, which changes one
code of bf16 in 2^14, fewer of narrower ones; a rounding that is missing or in the wrong place changes one in 2^10."""
_STEP = {2: (0.625, 1 / 6), 4: (2.0**-3, 2.0**-9 / 224), 8: (2.0**-7, 0.0)}
"""By bits of a mantissa: one step of a code, relative to the value, and the least step, relative to the row's amax.
FP4's has a flip of its e4m3 scale in it."""


@dataclass(frozen=True)
class Verdict:
    """What was compared and what came of it. apart: the largest distance of two values, relative to the row's amax."""

    status: str
    state_bytes: int
    state_differ: int
    cache_bytes: int
    cache_differ: int
    apart: float
    why: str = ""


def bound(scene: Scene) -> str:
    """What rows that are not equal may be, in words."""
    if scene.kind.close:
        return f"values within {scene.kind.close:.1e} of their row's largest"
    return f"one step of a code, in {max(1.0, SHARE * _size(scene)):.0f} bytes"


def judge(scene: Scene, one: Memory, other: Memory) -> Verdict:
    """State bytes are equal; rows differ in few codes, each by one step; nothing else in the cache does."""
    mine, theirs = one.state_bytes, other.state_bytes
    state_differ = int((mine != theirs).sum()) if mine.shape == theirs.shape else max(mine.numel(), theirs.numel())
    differ = int((one.cache != other.cache).sum())
    size, far = _size(scene), 0.0
    if differ:
        rows = (memory.pages.decode_rows(scene.written) for memory in (one, other))
        far = apart(*rows)
    why = f"{state_differ} bytes of the state" if state_differ else ""
    if differ and not why:
        why = _rows(scene, one, other, differ, size)
    return Verdict(FAIL if why else PASS, theirs.numel(), state_differ, size, differ, far, why)


def _size(scene: Scene) -> int:
    return FORMATS[scene.kind.format].row_bytes(scene.spec.head_dim) * scene.written.shape[0]


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest distance of two values, relative to their row's amax."""
    largest = torch.maximum(mine.abs(), theirs.abs()).amax(dim=1, keepdim=True)
    return float(((mine - theirs).abs() / largest).nan_to_num().max())


def _rows(scene: Scene, one: Memory, other: Memory, differ: int, size: int) -> str:
    """Why rows that are not equal to the byte are wrong; nothing if they are not."""
    slots = torch.arange(one.pages.num_rows)
    mine, theirs = one.pages.decode_rows(slots), other.pages.decode_rows(slots)
    untouched = torch.ones(slots.shape[0], dtype=torch.bool)
    untouched[scene.written] = False
    if not torch.equal(mine[untouched], theirs[untouched]):
        return "rows that the step does not name"
    if torch.equal(mine, theirs):
        return f"{differ} bytes that hold no value"
    if scene.kind.close:
        far = apart(mine, theirs)
        return f"values apart by {far:.1e} of their row" if far > scene.kind.close else ""
    return beyond(scene.kind.format, mine, theirs, differ, size)


def beyond(form: str, mine: torch.Tensor, theirs: torch.Tensor, differ: int, size: int) -> str:
    """Why decoded rows [E, d], of whose ``size`` bytes ``differ`` differ, are not equal but for sums in another order.

    Nothing if they are: few codes differ, each by one step.
    """
    larger = torch.maximum(mine.abs(), theirs.abs())
    relative, least = _STEP[_mantissa(form)]
    bound = relative * larger + least * larger.amax(dim=1, keepdim=True)
    over = int(((mine - theirs).abs() > bound).sum())
    if over:
        return f"{over} values by more than one step"
    return f"{differ} bytes of rows, more than {SHARE * size:.0f}" if differ > max(1.0, SHARE * size) else ""


def _mantissa(name: str) -> int:
    if "fp4" in name:
        return 2
    return 8 if name.startswith("bf16") else 4
