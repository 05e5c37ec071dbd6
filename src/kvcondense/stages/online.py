"""Stages 2 and 3 with an online state: fold tokens into (m, l, o), oldest to newest, and finish windows from it."""

from __future__ import annotations

import torch

from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.spec import CompressorSpec


def fold(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: OnlineState, ape: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled rows [E, d] of the windows of this step, and (m, l, o) [A, 3, d] of the A live requests' open windows.

    rows [T, state_dim] are those of ``window.state_rows``. A window starts from the stored (m, l, o) if its request
    has folded some of it, goes on with the log as far as this step's first position, then with this step's tokens. The
    open window stops before the drafts. Reads the state, writes nothing.
    """
    batch, r, d = plan.batch, spec.ratio, spec.head_dim
    live = batch.active.nonzero()[:, 0]
    committed = (batch.start_positions + batch.lengths - batch.draft_rows)[live]  # [A]
    request = torch.cat([plan.window_request, live])  # [E + A]
    begin = torch.cat([plan.window_index * r, committed // r * r])
    stop = torch.cat([(plan.window_index + 1) * r, committed])
    assert batch.state_slots is not None
    slot, start = batch.state_slots[request], batch.start_positions[request]
    stored = (begin < start) & (state.folded[slot] > begin)
    cursor = torch.where(stored, state.folded[slot], begin)
    empty = torch.tensor([float("-inf"), 0.0, 0.0], dtype=rows.dtype, device=rows.device)[:, None]  # [3, 1]
    acc = torch.where(stored[:, None, None], state.acc[slot].to(rows.dtype), empty)  # [E + A, 3, d]
    offset = torch.arange(r, device=rows.device)
    # Where no window takes a token there is nothing to do: most steps of a long window are short.
    taken = (offset >= (cursor - begin)[:, None]) & (offset < (stop - begin)[:, None])  # [E + A, r]
    for j in taken.any(0).nonzero()[:, 0].tolist():
        position = begin + j
        here = position >= start
        token = torch.where(here & (position < stop), batch.query_start_loc[request] + position - start, 0)
        row = rows[token]  # [E + A, state_dim]
        if state.layout.log_rows:
            logged = state.log[state.layout.address(batch, request, position)].to(rows.dtype)
            row = torch.where(here[:, None], row, logged)
        score = row[:, d:] if spec.has_gate else torch.zeros_like(row)
        if not spec.has_gate and ape is not None:
            score = score + ape.to(rows.dtype)[j]
        acc = torch.where(taken[:, j, None, None], step(acc, row[:, :d], score), acc)
    windows = plan.window_request.shape[0]
    return acc[:windows, 2] / acc[:windows, 1], acc[windows:]


def step(acc: torch.Tensor, kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Fold one token: acc [n, 3, d], kv and score [n, d] -> [n, 3, d]. A score of -inf has weight 0."""
    m, l, o = acc.unbind(1)  # noqa: E741 - the names of the literature
    top = torch.maximum(m, score)
    old, new = torch.exp(m - top), torch.exp(score - top)
    folded = torch.stack([top, l * old + new, o * old + kv * new], dim=1)
    return torch.where(torch.isneginf(score)[:, None], acc, folded)


def keep(plan: Plan, rows: torch.Tensor, acc: torch.Tensor, state: OnlineState) -> None:
    """Write the folded windows and the log of this step's drafts (after all reads)."""
    batch = plan.batch
    assert batch.state_slots is not None
    slots = batch.state_slots[batch.active]
    state.acc[slots] = acc.to(state.acc.dtype)
    state.folded[slots] = (batch.start_positions + batch.lengths - batch.draft_rows)[batch.active]
    state.log[plan.keep_row] = rows[plan.keep_token].to(state.log.dtype)
