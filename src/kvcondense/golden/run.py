"""Run a golden case: the decode reference on one side, a backend through the public API on the other, then compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.api import condense, project
from kvcondense.backends import Backend
from kvcondense.golden.compare import Comparator, Comparison, allclose, row_bounds
from kvcondense.golden.decode import DecodeCompressor
from kvcondense.golden.inputs import GoldenInputs
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights


def comparators(inputs: GoldenInputs) -> dict[str, Comparator]:
    """The bounds of each output: states as in PR 270, rows without its outlier budget.

    With history the cache holds enough rows to ask for 99.9 % equal bits. Not after a rotation: PR 270's Hadamard is a
    bf16 matrix, off by 1e-4, where kvcondense scales butterflies in fp32.
    """
    states, rows = allclose(atol=1e-3, rtol=1e-3), row_bounds(inputs.spec)
    history = max(h.shape[0] for h in inputs.x_history) >= 2 * inputs.spec.window
    cache = row_bounds(inputs.spec, 0.999 if history and not inputs.spec.rotate else 0.0)
    return {"kv": rows, "kv_state": states, "score_state": states, "kv_cache": cache}


@dataclass(frozen=True)
class GoldenOutputs:
    """Outputs in PR 270's layout: kv [B, 1, d] fp32 (0 if no window ends), states [B, c * r, N], kv_cache bf16."""

    kv: torch.Tensor
    kv_state: torch.Tensor
    score_state: torch.Tensor
    kv_cache: torch.Tensor


def run_reference(inputs: GoldenInputs) -> GoldenOutputs:
    """Decode every row token by token with :class:`DecodeCompressor`."""
    spec = inputs.spec
    kv_out = torch.zeros(inputs.x.shape[0], 1, spec.head_dim)
    kv_state, score_state = inputs.kv_state.clone(), inputs.score_state.clone()
    kv_cache = inputs.kv_cache.clone()
    wkv, wgate = inputs.wkv.float(), inputs.wgate.float()
    for b, start in enumerate(inputs.start_pos):
        decode = DecodeCompressor(spec, inputs.ape, inputs.norm_w, inputs.cos, inputs.sin, inputs.hadamard)
        x = torch.cat([inputs.x_history[b], inputs.x[b]]).float()  # [h + 1, D]
        kv, score = x @ wkv, x @ wgate  # [h + 1, N]
        row = None
        for i, position in enumerate(range(start - inputs.x_history[b].shape[0], start + 1)):
            row = decode.step(kv[i], score[i], position)
            if row is not None:
                kv_cache[b, position // spec.ratio] = row.bfloat16()
        if row is not None:
            kv_out[b, 0] = row
        kv_state[b], score_state[b] = decode.kv_state, decode.score_state
    return _comparable(inputs, GoldenOutputs(kv_out, kv_state, score_state, kv_cache))


def run_backend(inputs: GoldenInputs, impl: str | Backend) -> GoldenOutputs:
    """The same through ``project`` and ``condense``: history in three ragged chunks, then one decode step."""
    spec, batch = inputs.spec, inputs.x.shape[0]
    weights = CompressorWeights.from_parts(inputs.wkv.t(), inputs.wgate.t(), inputs.ape, inputs.norm_w)
    rope = RopeTable(inputs.cos, inputs.sin)
    state = StatePool.ring(spec, batch)
    first = [s - h.shape[0] for s, h in zip(inputs.start_pos, inputs.x_history, strict=True)]
    _seed_empty(inputs, state, first)
    kv_cache = inputs.kv_cache.clone()
    cache = PagedCache.wrap(kv_cache)
    done = [0] * batch
    kv = torch.zeros(batch, 1, spec.head_dim)

    def step(counts: list[int], x: torch.Tensor, drafts: int) -> None:
        starts = [f + n for f, n in zip(first, done, strict=True)]
        metadata = RaggedBatch.build(
            [0, *torch.tensor(counts).cumsum(0).tolist()],
            start_positions=starts,
            state_slots=list(range(batch)),
            block_table=[[b] for b in range(batch)],
            draft_rows=drafts,
        )
        kv_score = project(spec, x, weights)
        rows = condense(spec, kv_score, weights, rope, metadata, state=state, cache=cache, impl=impl)
        if drafts:
            kv[rows.request, 0] = rows.values
        for b, n in enumerate(counts):
            done[b] += n

    for part in range(3):
        counts = [(h.shape[0] * (part + 1) // 3) - n for h, n in zip(inputs.x_history, done, strict=True)]
        chunk = [h[n : n + c] for h, n, c in zip(inputs.x_history, done, counts, strict=True)]
        if sum(counts):
            step(counts, torch.cat(chunk), drafts=0)
    # The last token is marked as one that may be rejected, so that its window stays in the state, as it does in
    # PR 270; otherwise nothing of a finished window is kept.
    step([1] * batch, inputs.x[:, 0], drafts=1)
    kv_state, score_state = _original_layout(inputs, state)
    return _comparable(inputs, GoldenOutputs(kv, kv_state, score_state, kv_cache))


def compare(inputs: GoldenInputs, actual: GoldenOutputs, expected: GoldenOutputs) -> dict[str, Comparison]:
    """Compare the four outputs, in order."""
    return {name: c(getattr(actual, name), getattr(expected, name)) for name, c in comparators(inputs).items()}


def _seed_empty(inputs: GoldenInputs, state: StatePool, first: list[int]) -> None:
    """Make every position before a row's first token an empty slot of PR 270: kv 0, score -FLT_MAX."""
    spec = inputs.spec
    before = RaggedBatch.build([0] * (len(first) + 1), start_positions=first, state_slots=list(range(len(first))))
    rows = torch.zeros(sum(p - spec.live_start(p) for p in first), spec.state_dim)
    rows[:, spec.width :] = FP32_LOWEST
    import_live(spec, state, before, rows)


def _original_layout(inputs: GoldenInputs, state: StatePool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring rows by position -> PR 270's slots after the step (previous window first, shifted when a window ended)."""
    spec = inputs.spec
    ring = state.data.view(len(inputs.start_pos), -1, 2, spec.width)
    out = torch.stack([inputs.kv_state, inputs.score_state], dim=2).clone()  # [B, slots, 2, N]
    for b, start in enumerate(inputs.start_pos):
        for slot, position in _slot_positions(inputs, start):
            if position >= 0:
                out[b, slot] = ring[b, position % ring.shape[1]]
    return out[:, :, 0], out[:, :, 1]


def _slot_positions(inputs: GoldenInputs, start: int) -> list[tuple[int, int]]:
    """(slot, position) of every slot that still means something after the token at ``start``."""
    r, overlap = inputs.spec.ratio, inputs.spec.overlap
    base = start // r * r
    current = [(j + (r if overlap else 0), base + j) for j in range(start - base + 1)]
    if not overlap:
        return current
    ended = (start + 1) % r == 0
    return current + [(j, base + j - (0 if ended else r)) for j in range(r)]


def _comparable(inputs: GoldenInputs, outputs: GoldenOutputs) -> GoldenOutputs:
    """Reset slots left over from an earlier window to the empty state: nobody reads them before they are rewritten."""
    for b, start in enumerate(inputs.start_pos):
        meaningful = {slot for slot, _ in _slot_positions(inputs, start)}
        stale = [s for s in range(inputs.spec.window) if s not in meaningful]
        if inputs.x_history[b].shape[0]:
            outputs.kv_state[b, stale] = inputs.kv_state[b, stale]
            outputs.score_state[b, stale] = inputs.score_state[b, stale]
    return outputs
