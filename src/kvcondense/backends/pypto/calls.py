"""A step as calls of a program: one token for each request at a time, in order, on the host's side."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kvcondense.backends import Step
from kvcondense.backends.pypto import worker
from kvcondense.backends.pypto.kernel import BASE, BEGIN, KEPT, POSITION, SLOT, Form
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec
from kvcondense.stages.hadamard import hadamard
from kvcondense.stages.rope import selector_matrices

_TILE = 16
"""Rows of a product come in multiples of it."""


@dataclass(frozen=True)
class Token:
    """What one request does in one call. base: its ring; window: the entry that it ends (-1: none); slot: its row."""

    request: int
    token: int
    position: int
    base: int
    window: int
    slot: int


def run(step: Step, x: torch.Tensor | None = None, w: torch.Tensor | None = None) -> None:
    """Do a step from kv_score, or from hidden states ``x`` [T, D] and the merged weight ``w`` [2 N, D].

    A token of a step may be read by later ones of it although nobody keeps it, so all are written to the ring as they
    come; rows that the plan does not keep are put back in the end.
    """
    spec, state = step.spec, step.state
    assert isinstance(state, StatePool)
    rounds = _rounds(step)
    kept = {int(row) for row in step.plan.keep_row.tolist() if row >= 0}
    written = {t.base + t.position % state.layout.block_rows for tokens in rounds for t in tokens}
    lent = torch.tensor(sorted(written - kept), dtype=torch.int64, device="cpu")
    before = state.take(lent)
    source = step.kv_score if x is None else x
    for tokens in rounds:
        _call(step, spec, state, tokens, source, w)
    state.put(lent, before)


def _rounds(step: Step) -> list[list[Token]]:
    """Tokens by call: the first of every live request, then the second ones, and so on."""
    plan, batch, spec = step.plan, step.plan.batch, step.spec
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    listed = zip(plan.window_request.tolist(), plan.window_index.tolist(), plan.window_slot.tolist(), strict=True)
    for entry, (request, index, slot) in enumerate(listed):
        if request >= 0:
            ends[request, (index + 1) * spec.ratio - 1] = entry, slot
    assert batch.state_slots is not None
    starts, slots, first = (t.tolist() for t in (batch.start_positions, batch.state_slots, batch.query_start_loc))
    rounds: list[list[Token]] = []
    rows = step.state.layout.block_rows  # type: ignore[union-attr]
    for q, start in enumerate(starts):
        if start < 0:
            continue
        for i, token in enumerate(range(first[q], first[q + 1])):
            window, slot = ends.get((q, start + i), (-1, -1))
            if len(rounds) <= i:
                rounds.append([])
            rounds[i].append(Token(q, token, start + i, slots[q] * rows, window, slot))
    return rounds


def _call(
    step: Step,
    spec: CompressorSpec,
    state: StatePool,
    tokens: list[Token],
    source: torch.Tensor,
    w: torch.Tensor | None,
) -> None:
    """One call for these tokens, of requests of their own."""
    batch, d = -(-len(tokens) // _TILE) * _TILE, spec.head_dim
    cache = (
        torch.zeros(1, d, dtype=torch.bfloat16, device="cpu") if step.cache is None else step.cache.rows.flatten(0, 1)
    )
    form = Form(
        batch=batch,
        hidden=0 if w is None else w.shape[1],
        head_dim=d,
        ratio=spec.ratio,
        overlap=spec.overlap,
        rope_dim=spec.rope_dim,
        eps=spec.eps,
        state_rows=state.data.shape[0],
        ring_rows=state.layout.block_rows,
        cache_rows=cache.shape[0],
    )
    where = torch.full((5, batch), -1, dtype=torch.int32, device="cpu")
    where[BASE] = 0
    rows = source.new_zeros(batch, source.shape[1])
    cos, sin = torch.zeros(2, batch, form.pairs, device="cpu")
    for b, t in enumerate(tokens):
        rows[b] = source[t.token]
        where[POSITION, b], where[BASE, b] = t.position, t.base
        if (t.position + 1) % spec.ratio == 0:
            where[BEGIN, b] = max(0, spec.window - 1 - t.position)
        where[KEPT, b], where[SLOT, b] = t.base + t.position % form.ring_rows, t.slot
        if t.window >= 0 and step.rope is not None:
            position = t.position // spec.ratio * spec.ratio
            cos[b, : spec.rope_dim // 2] = step.rope.cos[position]
            sin[b, : spec.rope_dim // 2] = step.rope.sin[position]
    even, odd, signs = _matrices(spec.rope_dim, form.pairs, d)
    assert step.ape is not None
    out = torch.zeros(batch, d, device="cpu")
    operands = [
        rows if w is not None else rows.float(),
        torch.zeros(2 * spec.width, 16, dtype=torch.bfloat16, device="cpu") if w is None else w,
        step.ape.float(),
        step.gamma.float()[None],
        cos,
        sin,
        even,
        odd,
        signs,
        state.data,
        cache,
        out,
        where,
        torch.full((8,), int(spec.rotate), dtype=torch.int32, device="cpu"),
    ]
    worker.run(form, operands)
    for b, t in enumerate(tokens):
        if t.window >= 0:
            step.rows[t.window] = out[b].to(step.rows.dtype)


@functools.cache
def _matrices(rope_dim: int, pairs: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selectors of RoPE's pairs, and the signs of the Hadamard matrix; all exact in bf16."""
    wide = (0, pairs - rope_dim // 2)
    even, odd = (torch.nn.functional.pad(m, wide).bfloat16() for m in selector_matrices(rope_dim))
    return even, odd, torch.sign(hadamard(torch.eye(d, device="cpu"))).bfloat16()
