"""The device-side plan builder: entry for entry the padded host plan, and no value is ever asked for."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kvcondense import CompressorSpec, CompressorWeights, KvCondenseError, PagedCache, Plan, RaggedBatch, condense
from kvcondense.errors import DeviceError, DtypeError, RangeError, ShapeError
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.online import OnlineLayout
from kvcondense.layout.plan import KEEP_FIELDS, WINDOW_FIELDS
from kvcondense.planning import Planner
from machine import PAIRS, SPECS

MAX_TOKENS, MAX_DRAFT, PAGE = 60, 3, 3


def layout_of(kind, spec, requests):
    if kind == "ring":
        return RingLayout(requests + 1, spec.required_ring_rows(MAX_DRAFT))
    return PagedLayout(400, 5) if kind == "paged" else OnlineLayout(requests + 1, MAX_DRAFT)


def batch_of(data, spec, kind, cache):
    requests = data.draw(st.integers(0, 4))
    counts = [data.draw(st.integers(0, 14)) for _ in range(requests)]
    starts = [data.draw(st.integers(-1, 300)) for _ in range(requests)]
    drafts = [min(data.draw(st.integers(0, MAX_DRAFT)), n) for n in counts]
    pages = 320 // 5 + 1
    where = {}
    if kind == "paged":
        where["state_block_table"] = torch.randperm(400)[: requests * pages].view(requests, pages)
    else:
        where["state_slots"] = torch.randperm(requests + 1)[:requests]
    if cache == "table":
        width = 320 // spec.ratio // PAGE + 1
        where["block_table"] = torch.arange(requests * width).view(requests, width)
    elif cache == "mapping":
        where["slot_mapping"] = torch.arange(MAX_TOKENS) - 1
    return RaggedBatch.build(
        [0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()],
        start_positions=torch.tensor(starts, dtype=torch.int64),
        draft_rows=torch.tensor(drafts, dtype=torch.int64),
        **where,
    )


def both(spec, batch, layout):
    shape = {"state_layout": layout, "page_rows": PAGE}
    host = Plan.build(spec, batch, **shape)
    size = Plan.capacity(spec, MAX_TOKENS, batch.start_positions.shape[0], MAX_DRAFT)
    return host.padded(*size), Plan.build_static(spec, batch, max_tokens=MAX_TOKENS, max_draft=MAX_DRAFT, **shape)


@pytest.mark.parametrize("cache", ["table", "mapping", "none"])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
def test_it_is_the_padded_host_plan(name, kind, cache, data):
    spec = SPECS[name]
    batch = batch_of(data, spec, kind, cache)
    host, device = both(spec, batch, layout_of(kind, spec, batch.start_positions.shape[0]))
    for field in (*WINDOW_FIELDS, *KEEP_FIELDS):
        assert torch.equal(getattr(host, field), getattr(device, field)), field
        assert getattr(device, field).dtype == torch.int64


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_no_value_is_asked_for(name, kind):
    """Fake tensors have no values: a host synchronisation or a shape that depends on data would raise."""
    spec = SPECS[name]
    with FakeTensorMode():
        where = {"state_block_table": torch.zeros(2, 65, dtype=torch.int64)}
        if kind != "paged":
            where = {"state_slots": torch.zeros(2, dtype=torch.int64)}
        integers = (torch.zeros(3, dtype=torch.int64), *(torch.zeros(2, dtype=torch.int64) for _ in range(2)))
        batch = RaggedBatch(*integers, block_table=torch.zeros(2, 9, dtype=torch.int64), **where)
        with pytest.raises(RuntimeError, match=r"aten\.(nonzero|_local_scalar_dense)"):
            Plan.build(spec, batch, state_layout=layout_of(kind, spec, 2), page_rows=PAGE)
        plan = Plan.build_static(
            spec, batch, max_tokens=8, max_draft=1, state_layout=layout_of(kind, spec, 2), page_rows=PAGE
        )
    assert plan.window_slot.shape[0] == Plan.capacity(spec, 8, 2, 1)[0]


def test_a_static_plan_is_updated_in_place():
    spec = SPECS["csa"]
    layout = RingLayout(2, spec.required_ring_rows(0))

    def plan(start, count, slot):
        batch = RaggedBatch.build([0, count], start_positions=[start], state_slots=[slot], block_table=[[3, 4]])
        return Plan.build_static(spec, batch, max_tokens=8, state_layout=layout, page_rows=4)

    captured, later = plan(0, 4, 0), plan(9, 7, 1)
    pointers = [getattr(captured, f).data_ptr() for f in (*WINDOW_FIELDS, *KEEP_FIELDS)]
    captured.copy_(later)
    assert [getattr(captured, f).data_ptr() for f in (*WINDOW_FIELDS, *KEEP_FIELDS)] == pointers
    for field in (*WINDOW_FIELDS, *KEEP_FIELDS):
        assert torch.equal(getattr(captured, field), getattr(later, field))
    assert captured.batch.start_positions.tolist() == [9]
    assert captured.batch is not later.batch
    first = plan(0, 4, 0)
    for other in (replace(first, ratio=8), replace(first, window_slot=first.window_slot[:-1])):
        with pytest.raises(KvCondenseError):
            captured.copy_(other)
        assert captured.batch.start_positions.tolist() == [9], "nothing is written"
    wider = RaggedBatch.build([0, 1], start_positions=[0], state_slots=[0], block_table=[[3, 4, 5]])
    with pytest.raises(KvCondenseError, match="block_table"):
        captured.batch.copy_(wider)


def test_what_checks_remember_is_forgotten_with_the_values():
    """Facts of a plan are kept for further layers, but not beyond ``copy_``; weights fit a spec, not every spec."""
    spec = CompressorSpec(ratio=4, head_dim=16, eps=1e-6, rope_dim=0, has_ape=False)

    def plan(start, slot):
        batch = RaggedBatch.build([0, 4], start_positions=[start], slot_mapping=[slot] * 4)
        return Plan.build(spec, batch)

    cache = PagedCache.allocate(16, 1, 4)
    weights, x = CompressorWeights(norm=torch.ones(16)), torch.randn(4, 32)
    used = plan(0, 3)
    assert used.facts(spec) is used.facts(spec)
    condense(spec, x, weights, None, used.batch, plan=used, cache=cache)
    with pytest.raises(RangeError, match="slot_mapping: expected at most 4, as what this plan is used with, got 5"):
        used.copy_(plan(0, 4))
    assert used.window_slot.tolist() == [3]
    facts = used.facts(spec)
    used.copy_(plan(0, 2))
    assert used.extremes.slots.highest == 2
    assert used.facts(spec) is not facts
    condense(spec, x, weights, None, used.batch, plan=used, cache=cache)
    beyond = plan(0, 4)
    with pytest.raises(RangeError, match="below 4, got 4"):
        condense(spec, x, weights, None, beyond.batch, plan=beyond, cache=cache)
    wide = replace(spec, head_dim=32)
    with pytest.raises(ShapeError, match=r"weights\.norm"):
        condense(wide, torch.randn(4, 64), weights, None, RaggedBatch.build([0, 4], start_positions=[0]))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("state_block_table", lambda t: t.to(torch.int16), DtypeError),
        ("start_positions", lambda t: t.to(torch.int32), DtypeError),
        ("start_positions", lambda t: t.to(torch.float32), DtypeError),
        ("state_block_table", lambda t: t[:1], ShapeError),
        ("state_block_table", lambda t: t.T.contiguous().T, ShapeError),
        ("draft_rows", lambda t: t[:, None], ShapeError),
        ("slot_mapping", lambda t: t[None], ShapeError),
        ("start_positions", lambda t: t.to("meta"), DeviceError),
    ],
)
def test_fields_of_another_form_are_refused(name, change, error):
    """Nobody asks ``RaggedBatch`` itself, and kernels read its fields by address: int32 was read beyond its end."""
    spec, layout = SPECS["csa"], PagedLayout(40, 4)
    batch = RaggedBatch.build(
        [0, 4, 8], start_positions=[0, 4], state_block_table=torch.arange(8).view(2, 4), slot_mapping=torch.arange(8)
    )
    batch = replace(batch, **{name: change(getattr(batch, name))})
    for door in (
        lambda: Plan.build_static(spec, batch, max_tokens=8, state_layout=layout),
        lambda: Planner([(spec, layout, None)]).static(batch, max_tokens=8),
    ):
        with pytest.raises(error, match=name):
            door()


LACKING = {
    "batch": ({}, {"batch": "none"}),
    "state_slots": ({"state_slots": None}, {}),
    "state_block_table": ({}, {"state_layout": PagedLayout(4, 4)}),
    "page_rows": ({"block_table": torch.zeros(2, 1, dtype=torch.int64)}, {"page_rows": None}),
    "state_layout": ({}, {"state_layout": "ring"}),
    "max_tokens": ({}, {"max_tokens": -1}),
    "max_draft": ({}, {"max_draft": 1.0}),
    "max_query_len": ({}, {"max_query_len": True}),
    "max_positions": ({}, {"max_positions": -5}),
    "cache_rows": ({}, {"cache_rows": "all"}),
    "start_positions": ({"start_positions": None}, {}),
    "draft_rows": ({"draft_rows": torch.zeros(2, dtype=torch.int64).to_sparse()}, {}),
    "query_start_loc": ({"query_start_loc": torch.tensor(4)}, {}),
    "slot_mapping": ({"slot_mapping": [0, 1]}, {}),
}


@pytest.mark.parametrize("door", ["build_static", "planner"])
@pytest.mark.parametrize("name", LACKING)
def test_what_is_not_there_is_named(name, door):
    spec = SPECS["csa"]
    fields, options = LACKING[name]
    batch = replace(RaggedBatch.build([0, 4, 8], start_positions=[0, 0], state_slots=[0, 1]), **fields)
    asked = {"max_tokens": 8, "state_layout": layout_of("ring", spec, 2), "page_rows": PAGE, **options}
    batch = asked.pop("batch", batch)
    if door == "planner":
        planner = Planner([(spec, asked.pop("state_layout"), asked.pop("page_rows"))])
        make = functools.partial(planner.static, batch)
    else:
        make = functools.partial(Plan.build_static, spec, batch)
    with pytest.raises(KvCondenseError, match=name):
        make(**asked)
