"""What only a GPU can show of static plans by one launch: barriers between its passes, graphs that plan and step."""

from dataclasses import fields, replace

import pytest
import torch

from kvcondense import CompressorWeights, OnlineState, PagedCache, Plan, RaggedBatch, StatePool, condense, ops
from kvcondense.backends.triton.variants import specs
from kvcondense.config import ModelConfig
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.online import OnlineLayout
from kvcondense.planning import Planner
from kvcondense.rope_table import RopeTable

DEVICE = "cuda"
STATES = ("ring", "paged", "keep_all", "ringed", "online", "none")
DRAFT, PAGES, COLUMNS, ENTRIES = 3, 4096, 80, 2048


def integers(gen, low, high, *size):
    return torch.randint(low, high, size, generator=gen, device=DEVICE)


def layout_of(state, spec, slots):
    rows = spec.required_ring_rows(DRAFT)
    return {
        "ring": RingLayout(slots, rows),
        "paged": PagedLayout(PAGES, 16),
        "keep_all": PagedLayout(PAGES, 16, keep_all=True),
        "ringed": PagedLayout(PAGES, rows, 2 * rows),
        "online": OnlineLayout(slots, DRAFT),
        "none": None,
    }[state]


def batch_of(gen, state, cache, requests, most):
    """Requests of which a tenth are spoilt in each way; a wrong offset is rare, as it takes those after it along."""
    counts = integers(gen, 0, most + 1, requests)
    where = {}
    if state in ("ring", "online"):
        where["state_slots"] = torch.randperm(requests, generator=gen, device=DEVICE)
    elif state != "none":
        where["state_block_table"] = integers(gen, 0, PAGES, requests, COLUMNS)
    if cache == "table":
        where["block_table"] = integers(gen, -1, 1 << 40, requests, 64)
    elif cache == "mapping":
        where["slot_mapping"] = integers(gen, -1, ENTRIES, 1 + requests * most // 2)
    starts, drafts = integers(gen, -1, 1024, requests), integers(gen, 0, DRAFT + 1, requests)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tables = [(t.view(-1), 10 if t.dim() == 1 else 300) for t in where.values()]
    for values, one_in in ((offsets, 2000), (starts, 10), (drafts, 10), *tables):
        spoilt = integers(gen, 0, one_in, values.shape[0]) == 0
        wrong = torch.tensor([-(2**63), -1, 2**31, 2**62], device=DEVICE)[integers(gen, 0, 4, values.shape[0])]
        others = values[integers(gen, 0, values.shape[0], values.shape[0])]
        values[spoilt] = torch.where(integers(gen, 0, 2, values.shape[0]) == 0, wrong, others)[spoilt]
    return RaggedBatch(offsets, starts, drafts.minimum(counts), **where)


def expected(jobs, batch, bounds):
    rows = bounds["cache_rows"]
    return [
        Plan.build_static(spec, batch, state_layout=layout, page_rows=page_rows, **{**bounds, "cache_rows": most})
        for (spec, layout, page_rows), most in zip(jobs, rows, strict=True)
    ]


def same(found, right):
    for a, b in zip(found, right, strict=True):
        for x, y in ((a, b), (a.batch, b.batch)):
            for name in (f.name for f in fields(y) if isinstance(getattr(y, f.name), torch.Tensor)):
                assert torch.equal(getattr(x, name), getattr(y, name)), name
        assert (a.extremes, a.overwrites) == (b.extremes, b.overwrites)


@pytest.mark.parametrize("cache", ["table", "mapping", "none"])
@pytest.mark.parametrize("state", STATES)
def test_plans_are_those_of_torch(state, cache):
    """One request and several blocks of them, decode and prefill; then filled again from other values."""
    gen = torch.Generator(DEVICE).manual_seed(3)
    chosen = [s for s in specs().values() if state != "online" or not s.overlap]
    for requests, most in ((1, 1), (16, 300), (1500, 4)):
        jobs = [(s, layout_of(state, s, requests), 64) for s in chosen]
        batch = batch_of(gen, state, cache, requests, most)
        bounds = {
            "max_tokens": requests * most, "max_draft": DRAFT, "max_query_len": most, "max_positions": 1200,
            "cache_rows": [1000 + i for i in range(len(jobs))],
        }  # fmt: skip
        found = Planner(jobs).static(batch, **bounds)
        assert found._native is not None
        same(found.plans, expected(jobs, batch, bounds))
        for _ in range(4):
            found.refill(batch_of(gen, state, cache, requests, most))
            same(found.plans, expected(jobs, found.batch, bounds))


@pytest.mark.parametrize("state_kind", ["ring", "paged", "online"])
def test_a_graph_plans_and_steps(state_kind):
    """One graph with the planner's launch and a layer's: replays differ only in what the batch's tensors hold."""
    requests, steps = 3, 150
    spec = specs()["hca" if state_kind == "online" else "csa"]
    gen = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(steps, requests, spec.projected, generator=gen, device=DEVICE)
    weights = CompressorWeights(norm=torch.ones(spec.head_dim, device=DEVICE),
                                ape=torch.randn(spec.ratio, spec.width, generator=gen, device=DEVICE))  # fmt: skip
    rope = RopeTable.build(ModelConfig.FLASH, steps + spec.ratio, device=DEVICE)

    def memory():
        if state_kind == "online":
            state = OnlineState.allocate(spec, requests, 0, device=DEVICE)
        elif state_kind == "paged":
            state = StatePool.paged(spec, requests * 10, 16, device=DEVICE)
        else:
            state = StatePool.ring(spec, requests, device=DEVICE)
        return replace(state, tags=None), PagedCache.allocate(spec.head_dim, requests, 64, device=DEVICE)

    def at(position):
        where = {"state_slots": [2, 0, 1]}
        if state_kind == "paged":
            where = {"state_block_table": torch.arange(requests * 10, device=DEVICE).view(requests, 10)}
        return RaggedBatch.build(torch.arange(requests + 1, device=DEVICE), start_positions=[position] * requests,
                                 block_table=torch.arange(requests, device=DEVICE)[:, None], **where)  # fmt: skip

    (state, cache), (other_state, other_cache) = memory(), memory()
    for c in (cache, other_cache):
        c.data.fill_(0)
    static = Planner([(spec, state.layout, 64)]).static(
        at(0), max_tokens=requests, max_query_len=1, max_positions=rope.cos.shape[0], cache_rows=cache.num_rows
    )
    bound = ops.bind(spec, weights, rope, state=state, cache=cache, impl="triton")
    tokens = x[0].clone()
    bound(tokens, static.plans[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.refill()
        bound(tokens, static.plans[0])
    for position in range(steps):
        tokens.copy_(x[position])
        static.batch.copy_(at(position))
        graph.replay()
        condense(spec, x[position], weights, rope, at(position), state=other_state, cache=other_cache, impl="triton")
        assert torch.equal(cache.data, other_cache.data), position
    assert cache.data.any()
