"""Every door to a step is checked: what does not fit is an error, and nothing outside the buffers is touched.

Buffers end at unmapped pages (``guarded.py``), so that a step that leaves them would end the run.
"""

from dataclasses import replace

import pytest
import torch

from guarded import guarded
from kvcondense import (
    CompressorWeights,
    KvCondenseError,
    OnlineState,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
    compress,
    condense,
    ops,
    training,
)
from kvcondense.api import Job, compress_many
from kvcondense.bound import bind
from kvcondense.formats import FORMATS
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.online import OnlineLayout
from kvcondense.layout.plan import Plan
from kvcondense.prepared import prepare
from machine import SPECS, rope, weights

HIDDEN, TOKENS = 64, 16
BACKENDS = ("reference", "cpu", "triton")
SPEC = SPECS["csa"]
OTHER = SPECS["r8"]


class Setting:
    """A legal step of two requests; tests spoil one part of it."""

    def __init__(self, spec=SPEC, kind="ring", impl="auto"):
        w = weights(spec, hidden=HIDDEN)
        self.spec, self.impl, self.kind = spec, impl, kind
        self.weights = replace(w, norm=guarded(w.norm), ape=None if w.ape is None else guarded(w.ape), w=w.w.bfloat16())
        table = rope(spec, TOKENS)
        self.rope = RopeTable(guarded(table.cos), guarded(table.sin))
        gen = torch.Generator().manual_seed(1)
        self.x = torch.randn(TOKENS, HIDDEN, generator=gen).bfloat16()
        self.kv_score = guarded(torch.randn(TOKENS, spec.projected, generator=gen))
        if kind == "online":
            fresh = OnlineState.allocate(spec, 2, 1)
            self.state = OnlineState(*(guarded(torch.zeros_like(t)) for t in (fresh.acc, fresh.folded, fresh.log)),
                                     OnlineLayout(2, 1))  # fmt: skip
        elif kind == "paged":
            data = guarded(torch.zeros(8, 4, spec.state_dim))
            self.state = StatePool(data, PagedLayout(8, 4))
        else:
            self.state = StatePool.ring(spec, 2, spec.required_ring_rows(1))
            self.state = StatePool(guarded(torch.zeros_like(self.state.data)), self.state.layout)
        cache = PagedCache.allocate(spec.head_dim, 2, 4)
        self.cache = replace(cache, data=guarded(cache.data))
        self.lengths, self.starts = [8, 8], [0, 0]
        self.where = {"block_table": [[0], [1]]}
        self.batch = self.plan = None

    def made(self):
        """Batch and plan, unless a test brought its own."""
        if self.batch is None:
            held = {"state_block_table": [[0, 1, 2], [3, 4, 5]]} if self.kind == "paged" else {"state_slots": [0, 1]}
            offsets = [0, self.lengths[0], sum(self.lengths)]
            self.batch = RaggedBatch.build(offsets, start_positions=self.starts, **held, **self.where)
        if self.plan is None:
            self.plan = Plan.build(self.spec, self.batch, state_layout=self.state.layout, page_rows=4)
        return self.batch, self.plan

    def held(self):
        """Everything that a step writes."""
        return [t.clone() for owner in (self.state, self.cache) for t in owner.tensors.values()]


def by_condense(s):
    batch, plan = s.made()
    return condense(s.spec, s.kv_score, s.weights, s.rope, batch, plan=plan, state=s.state, cache=s.cache, impl=s.impl)


def by_compress(s):
    batch, plan = s.made()
    return compress(s.spec, s.x, s.weights, s.rope, batch, plan=plan, state=s.state, cache=s.cache, impl=s.impl)


def by_compress_many(s):
    batch, plan = s.made()
    return compress_many(s.x, [Job(s.spec, s.weights, s.rope, batch, plan, s.state, s.cache)], impl=s.impl)[0]


def by_bound(s):
    _, plan = s.made()
    bound = bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache, impl=s.impl)
    return bound.condense(s.kv_score, plan)


def by_operator(s):
    _, plan = s.made()
    operator = ops.bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache, impl=s.impl)
    return operator(s.kv_score, plan)


def by_prepared(s):
    _, plan = s.made()
    bound = bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache, impl=s.impl)
    prepare(bound, s.kv_score).run(plan)


def by_prepared_compress(s):
    _, plan = s.made()
    bound = bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache, impl=s.impl)
    prepare(bound, x=s.x).run(plan)


DOORS = {
    f.__name__: f
    for f in (by_condense, by_compress, by_compress_many, by_bound, by_operator, by_prepared, by_prepared_compress)
}


def page_beyond(s):
    s.where = {"block_table": [[0], [2]]}


def page_far_beyond(s):
    s.where = {"block_table": [[0], [2**40]]}


def page_whose_product_leaves_int64(s):
    s.where = {"block_table": [[0], [2**62 + 1]]}


def slot_just_past_the_end(s):
    s.where = {"slot_mapping": [7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]}


def slots_that_are_one(s):
    s.where = {"slot_mapping": [5] * 16}


def short_tokens(s):
    s.kv_score, s.x = guarded(s.kv_score[:15]), s.x[:15]


def short_rope(s):
    s.rope = RopeTable(guarded(s.rope.cos[:0]), guarded(s.rope.sin[:0]))


def plan_of_another_ratio(s):
    s.made()
    s.plan = Plan.build(OTHER, s.batch, state_layout=s.state.layout, page_rows=4)


def plan_of_another_state(s):
    s.made()
    if s.kind == "paged":
        s.state = StatePool(guarded(torch.zeros(6, 4, s.spec.state_dim)), PagedLayout(6, 4))
    elif s.kind == "online":
        s.state = OnlineState.allocate(s.spec, 3, 1)
    else:
        s.state = StatePool.ring(s.spec, 2, s.spec.required_ring_rows(2))
    s.state.tags = None
    for t in s.state.tensors.values():
        t.zero_()


def plan_of_other_pages(s):
    s.made()
    s.plan = Plan.build(s.spec, s.batch, state_layout=s.state.layout, page_rows=8)


def state_slot_beyond(s):
    if s.kind == "paged":
        pages = [[0, 1, 2], [3, 8, 5]]
        s.batch = RaggedBatch.build([0, 8, 16], start_positions=[0, 0], state_block_table=pages, **s.where)
    else:
        s.batch = RaggedBatch.build([0, 8, 16], start_positions=[0, 0], state_slots=[0, 2], **s.where)


def far_more_tokens_than_there_are(s):
    s.lengths = [8, 2**30]
    s.where = {"block_table": [[0], [1]]}


def a_position_beyond_32_bits(s):
    s.starts = [0, 2**31 - 2]


FAULTS = (
    page_beyond, page_far_beyond, page_whose_product_leaves_int64, slot_just_past_the_end, slots_that_are_one,
    short_tokens, short_rope, plan_of_another_ratio, plan_of_another_state, plan_of_other_pages, state_slot_beyond,
    far_more_tokens_than_there_are, a_position_beyond_32_bits,
)  # fmt: skip


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("kind", ["ring", "paged", "online"])
@pytest.mark.parametrize("door", DOORS)
def test_doors_let_a_legal_step_in(door, kind, impl):
    s = Setting(OTHER if kind == "online" else SPEC, kind, impl)
    DOORS[door](s)
    other = Setting(s.spec, kind, "reference")
    rows = by_condense(other).values
    assert rows.shape[0] == (2 if kind == "online" else 4)
    if "compress" not in door:
        assert torch.allclose(s.cache.rows.float(), other.cache.rows.float(), atol=0.05)
        assert other.cache.rows.any()


@pytest.mark.parametrize("kind", ["ring", "paged", "online"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_doors_are_closed_to_what_does_not_fit(door, fault, kind):
    for impl in BACKENDS:
        spec = OTHER if kind == "online" else SPEC
        s = Setting(spec, kind, impl)
        if kind == "online" and fault is plan_of_another_ratio:
            s.made()
            s.plan = Plan.build(replace(OTHER, ratio=4), s.batch, state_layout=s.state.layout, page_rows=4)
        else:
            fault(s)
        before = s.held()
        with pytest.raises(KvCondenseError):
            DOORS[door](s)
        assert all(torch.equal(a, b) for a, b in zip(before, s.held(), strict=True))


@pytest.mark.parametrize("fault", [short_tokens, short_rope, far_more_tokens_than_there_are, a_position_beyond_32_bits],
                         ids=lambda f: f.__name__)  # fmt: skip
@pytest.mark.parametrize("door", [training.condense, training.compress], ids=lambda f: f.__name__)
def test_doors_of_training(door, fault):
    s = Setting()
    fault(s)
    s.weights = CompressorWeights(norm=s.weights.norm, ape=s.weights.ape, w=s.weights.w)
    tokens = s.kv_score if door is training.condense else s.x

    def step():
        batch = RaggedBatch.build([0, s.lengths[0], sum(s.lengths)], start_positions=s.starts)
        return door(s.spec, tokens, s.weights, s.rope, batch)

    with pytest.raises(KvCondenseError):
        step()


# Static plans: a captured graph asks nobody. Bad metadata makes requests inert, or their rows unwritten.

BAD = {
    "slot beyond": {"state_slots": [0, 2]},
    "slot far beyond": {"state_slots": [0, 2**60]},
    "slot below": {"state_slots": [0, -5]},
    "slots that are one": {"state_slots": [0, 0]},
    "start beyond the table": {"start_positions": [0, TOKENS]},
    "start far beyond": {"start_positions": [0, 2**62]},
    "tokens beyond": {"query_start_loc": [0, 8, 17]},
    "tokens below": {"query_start_loc": [0, -8, 0]},
    "tokens far beyond": {"query_start_loc": [0, 8, 2**40]},
    "drafts beyond": {"draft_rows": [0, 2]},
    "page beyond": {"block_table": [[0], [2]]},
    "page far beyond": {"block_table": [[0], [2**62 + 1]]},
    "page below": {"block_table": [[0], [-7]]},
}
BAD_PAGES = {
    "state page beyond": {"state_block_table": [[0, 1, 2], [3, 8, 5]]},
    "state page below": {"state_block_table": [[0, 1, 2], [3, -1, 5]]},
    "state page far beyond": {"state_block_table": [[0, 1, 2], [3, 2**60, 5]]},
}


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "bad"), [(k, b) for k in ("ring", "online") for b in BAD] + [("paged", b) for b in BAD_PAGES]
)
def test_doors_of_static_plans_write_nothing_elsewhere(kind, bad, impl):
    """The plan is copied into one that a graph has captured: what is sound is done, the rest is as if it were not."""
    s = Setting(OTHER if kind == "online" else SPEC, kind, impl)
    batch, _ = s.made()
    shape = {
        "max_tokens": TOKENS, "max_draft": 1, "state_layout": s.state.layout, "page_rows": 4,
        "max_positions": TOKENS, "cache_rows": s.cache.num_rows,
    }  # fmt: skip
    captured = Plan.build_static(s.spec, batch, **shape)
    operator = ops.bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache, impl=s.impl)
    operator(s.kv_score, captured)
    for owner in (s.state, s.cache):
        for t in owner.tensors.values():
            t.zero_()
    change = {**BAD, **BAD_PAGES}[bad]
    spoilt = replace(batch, **{name: torch.tensor(value) for name, value in change.items()})
    captured.copy_(Plan.build_static(s.spec, spoilt, **shape))
    operator(s.kv_score, captured)

    good = Setting(s.spec, kind, impl)
    first = "slots that are one" not in bad and "tokens below" not in bad
    good.lengths = [8 if first else 0, 0]
    good.made()
    if "page" in bad and "state" not in bad:  # the request is sound: its state is kept, its row goes nowhere
        good.lengths, good.batch, good.plan = [8, 8], None, None
        good.where = {"slot_mapping": [-1] * 3 + [0] + [-1] * 3 + [int(kind != "online")] + [-1] * 8}
    good.impl = impl
    by_operator(good)
    assert torch.equal(s.cache.data, good.cache.data)
    for a, b in zip(s.state.tensors.values(), good.state.tensors.values(), strict=True):
        assert torch.equal(a, b)


def test_doors_of_static_plans_need_their_bounds():
    s = Setting()
    batch, _ = s.made()
    operator = ops.bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache)
    shape = {"max_tokens": TOKENS, "state_layout": s.state.layout, "page_rows": 4}
    for bounds, name in (({"cache_rows": 8}, "max_positions"), ({"max_positions": TOKENS}, "cache_rows")):
        with pytest.raises(KvCondenseError, match=name):
            operator(s.kv_score, Plan.build_static(s.spec, batch, **shape, **bounds))
    with pytest.raises(KvCondenseError, match="ring_rows"):
        Plan.build_static(s.spec, batch, **shape, max_draft=100)
    for bounds in ({"max_positions": TOKENS + 1, "cache_rows": 8}, {"max_positions": TOKENS, "cache_rows": 9}):
        with pytest.raises(KvCondenseError, match="rope|block_table"):
            operator(s.kv_score, Plan.build_static(s.spec, batch, **shape, **bounds))
    captured = Plan.build_static(s.spec, batch, **shape, max_positions=TOKENS, cache_rows=8)
    operator(s.kv_score, captured)
    for bounds in ({"max_positions": TOKENS + 1, "cache_rows": 8}, {"max_positions": TOKENS, "cache_rows": 9}, {}):
        with pytest.raises(KvCondenseError, match="as what this plan is used with"):
            captured.copy_(Plan.build_static(s.spec, batch, **shape, **bounds))


def test_doors_know_formats_by_what_they_are():
    """Two formats of one name: each layer writes its own."""
    plain = FORMATS["bf16"]
    twin = replace(FORMATS["fp32"], name="bf16")
    rows = {}
    for form in (plain, twin):
        s = Setting()
        cache = PagedCache.allocate(s.spec.head_dim, 2, 4, format=form)
        rows[form] = (ops.bind(s.spec, s.weights, s.rope, state=s.state, cache=cache), s, cache)
    for operator, s, _ in rows.values():
        operator(s.kv_score, s.made()[1])
    narrow, wide = (c for _, _, c in rows.values())
    assert wide.data.shape[1] == 2 * narrow.data.shape[1]
    assert torch.equal(wide.rows.bfloat16(), narrow.rows)
    assert narrow.rows.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_doors_own_what_they_are_given(dtype):
    given = {
        "query_start_loc": [0, 8, 16], "start_positions": [0, 0], "draft_rows": [0, 1], "state_slots": [0, 1],
        "block_table": [[0], [1]],
    }  # fmt: skip
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in given.items()}
    s = Setting()
    offsets = tensors["query_start_loc"]
    s.batch = RaggedBatch.build(offsets, **{name: t for name, t in tensors.items() if t is not offsets})
    s.made()
    for t in tensors.values():
        t.fill_(2**20)
    expected = Setting()
    expected.batch = RaggedBatch.build(given.pop("query_start_loc"), **given)
    assert torch.equal(by_bound(s).values, by_bound(expected).values)
    assert torch.equal(s.state.data, expected.state.data)
