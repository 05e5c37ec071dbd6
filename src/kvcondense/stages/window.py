"""Stage 2: the candidates of every window, from this call's tokens or from the state; and which rows to keep."""

from __future__ import annotations

import torch

from kvcondense.layout.batch import spread
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.spec import CompressorSpec


def token_positions(plan: Plan, num_tokens: int) -> torch.Tensor:
    """Absolute position of every token of the call, 0 for tokens of inert requests and padding: [T] int64."""
    batch = plan.batch
    positions = batch.query_start_loc.new_zeros(num_tokens)
    request, offset = spread(batch.lengths)
    live = batch.active[request]
    positions[: request.shape[0]] = torch.where(live, batch.start_positions[request] + offset, 0)
    return positions


def state_rows(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    ape: torch.Tensor | None,
    positions: torch.Tensor,
    state_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Rows [kv | score + ape[p mod r]] of every token, as the state stores them: [T, state_dim].

    A token read from this call must equal the same token read back from the state, so the rows pass through the
    state's dtype either way.
    """
    dtype = compute_dtype(kv_score.dtype)
    rows = kv_score.to(dtype)
    if spec.has_gate and ape is not None:
        kv, score = rows.split(spec.width, dim=-1)  # [T, N] each
        rows = torch.cat([kv, score + ape.to(dtype)[positions % spec.ratio]], dim=-1)
    return rows if state_dtype is None else rows.to(state_dtype).to(dtype)


def gather(
    spec: CompressorSpec,
    plan: Plan,
    rows: torch.Tensor,
    state: StatePool | None,
    ape: torch.Tensor | None,
    stored: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of each window, oldest first: kv and score [E, W, d] each; ``stored``: all of them from the state.

    Candidate j of window c is position (c + 1) * r - W + j. It reads channels [0, d) if it lies before the window
    (overlap) and the last d channels if it lies in it. Positions below 0 are kv 0, score -inf.
    """
    batch, d = plan.batch, spec.head_dim
    request = plan.window_request[:, None]  # [E, 1]
    step = torch.arange(spec.window, device=request.device)
    position = (plan.window_index[:, None] + 1) * spec.ratio - spec.window + step  # [E, W]
    missing = position < 0
    start = batch.start_positions[request]
    in_call = (position >= start) & (not stored)
    token = torch.where(in_call, batch.query_start_loc[request] + position - start, 0)
    half = halves_of(spec, step)
    parts = spec.state_dim // spec.width  # kv and score, or kv alone
    by_half = rows.view(rows.shape[0], parts, spec.halves, d)  # [T, parts, c, d]
    picked = by_half[token, :, half]  # [E, W, parts, d]
    if state is not None:
        old_ones = ~in_call & ~missing
        # Lanes that read nothing from the state have no address: a table need not have a page for them. They take row
        # 0, which is dropped.
        address = torch.zeros_like(position)
        address[old_ones] = state.layout.address(batch, request.expand_as(position)[old_ones], position[old_ones])
        old = state.take(address).unflatten(2, (parts, spec.halves, d))  # [E, W, parts, c, d]
        old = old[:, torch.arange(spec.window, device=half.device), :, half].transpose(0, 1).to(rows.dtype)
        picked = torch.where(old_ones[:, :, None, None], old, picked)
    kv = torch.where(missing[:, :, None], 0.0, picked[:, :, 0])
    raw = state is not None and state.layout.raw_scores
    score = torch.where(missing[:, :, None], float("-inf"), scores(spec, picked, position, half, ape, raw))
    return kv, score


def halves_of(spec: CompressorSpec, step: torch.Tensor) -> torch.Tensor:
    """Which half of its channels candidate ``step`` [W] of a window is read from: 1 in the window, 0 before it."""
    return (step >= spec.window - spec.ratio).to(torch.int64) if spec.overlap else torch.zeros_like(step)


def scores(
    spec: CompressorSpec,
    picked: torch.Tensor,
    position: torch.Tensor,
    half: torch.Tensor,
    ape: torch.Tensor | None,
    raw: bool,
) -> torch.Tensor:
    """Biased scores [E, W, d]: stored with the row (without the ape if ``raw``), or, without a gate, the ape alone."""
    score = picked[:, :, 1] if spec.has_gate else torch.zeros_like(picked[:, :, 0])
    if ape is None or (spec.has_gate and not raw):
        return score
    by_half = ape.to(picked.dtype).view(spec.ratio, spec.halves, spec.head_dim)
    return score + by_half[position % spec.ratio, half]


def keep(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Write the rows that later steps can read into the state (after all reads of this step)."""
    state.put(plan.keep_row, rows[plan.keep_token].to(state.data.dtype))
