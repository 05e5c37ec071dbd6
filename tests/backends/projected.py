"""A small run from hidden states, for every way of doing the steps: chunks of two requests side by side."""

from dataclasses import replace

import torch

from kvcondense import PagedCache, RaggedBatch, StatePool, condense, project
from kvcondense.backends import Step
from kvcondense.backends.triton import decode, fused
from kvcondense.layout.plan import Plan
from machine import SPECS, rope, weights

HIDDEN = 192
NAMES = [n for n in SPECS if n != "indexer"] + ["indexer"]
WAYS = {"tiles": (fused.why_not, lambda step, x, w: fused.run(step, x, w)),
        "one launch": (decode.why_not, lambda step, x, w: decode.run([step], x, [w]))}  # fmt: skip


def bf16_weights(spec, hidden=HIDDEN):
    """Weights whose projection the kernels take."""
    w = weights(spec, hidden=hidden)
    return replace(w, w=w.w.bfloat16())


def play(name, kind, chunks, way, dtype=torch.float32, product="reference"):
    """Chunks (tokens of each request) in a way, or None: project, then condense; rows by request, bytes, state.

    product: who projects; the backend's own gives tokens the bits that tiles give them.
    """
    spec = SPECS[name]
    w = bf16_weights(spec)
    gen = torch.Generator().manual_seed(3)
    total = [sum(c[i] for c in chunks) for i in range(2)]
    x = [torch.randn(n, HIDDEN, generator=gen).bfloat16() for n in total]
    state = None
    if kind == "ring":
        state = StatePool.ring(spec, 3, spec.required_ring_rows(0), dtype=dtype)
    elif kind == "paged":
        state = StatePool.paged(spec, 160, 5, dtype=dtype)
    elif kind == "two tensors":
        kv, score = torch.zeros(2, 3, spec.required_ring_rows(0), spec.width, dtype=dtype)
        state = StatePool.wrap(kv, score=score, paged=False)
    if state is not None:
        for t in state.memory:
            t.fill_(0)
    cache = PagedCache.allocate(spec.head_dim, 200, 4, format="bf16")
    rows, at = ([], []), [0, 0]
    for chunk in chunks:
        where = {} if kind == "none" else {"state_slots": [2, 0]}
        if kind == "paged":
            where = {"state_block_table": torch.arange(160).view(2, 80)}
        batch = RaggedBatch.build(
            [0, chunk[0], sum(chunk)], start_positions=at, block_table=torch.arange(200).view(2, 100), **where
        )
        tokens = torch.cat([x[i][at[i] : at[i] + chunk[i]] for i in range(2)])
        layout = None if state is None else state.layout
        plan = Plan.build(spec, batch, state_layout=layout, page_rows=4)
        if way is None:
            kv_score = project(spec, tokens, w, tile=None, impl=product)
            out = condense(
                spec, kv_score, w, rope(spec, 1024), batch, plan=plan, state=state, cache=cache, impl="triton"
            ).values
        else:
            why_not, run = WAYS[way]
            plan = plan.padded(plan.num_windows + 3, plan.keep_token.shape[0] + 2)
            out = torch.full((plan.num_windows, spec.head_dim), float("nan"))
            # What stands behind the last request's tokens is nobody's.
            tokens = torch.cat([tokens, torch.full((1, HIDDEN), float("nan")).bfloat16()])
            step = Step(spec, plan, tokens[:0].float(), w.ape, w.norm, rope(spec, 1024), state, cache, out, None)
            assert why_not(step, tokens, w.w) is None
            run(step, tokens, w.w)
            assert out[plan.window_request < 0].isnan().all(), "padding is left alone"
            assert not plan.counters.any(), "counters are left zero"
        for i in range(2):
            rows[i].append(out[plan.window_request == i])
            at[i] += chunk[i]
    held = None if state is None else state.take(torch.arange(state.layout.num_rows)).float()
    return [torch.cat(r) for r in rows], cache.rows.clone(), held


def check_against_two_steps(name, kind, chunks, way):
    """Rows and state of a way are those of a projection and a step, up to the order of the projection's sum."""
    expected, _, held = play(name, kind, chunks, None)
    rows, _, state = play(name, kind, chunks, way)
    assert sum(r.shape[0] for r in rows) > 0
    for a, b in zip(rows, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=2**-7, atol=1e-3)
    if held is not None:
        assert torch.allclose(state, held, rtol=1e-5, atol=1e-5)
