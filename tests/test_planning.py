"""Compiled plans: every field of a batch and its plans is what the builders in torch make, and so is every error."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kvcondense import Plan, RaggedBatch, StatePool, condense
from kvcondense.backends.cpu import native
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.online import OnlineLayout
from kvcondense.planning import Planner
from machine import SPECS, rope, tokens, weights

pytestmark = pytest.mark.skipif(native.problem(native.PLAN) is not None, reason="the kernel cannot run here")

STATES, CACHES = ("ring", "paged", "keep_all", "ringed", "online", "none"), ("table", "mapping", "none")
LONGEST, DRAFT = 300, 3
DECODE = {"query_start_loc": [0, 1, 2], "start_positions": [7, 130], "state_slots": [1, 0], "slot_mapping": [5, 9]}


def same(a, b, path=""):
    """Equal in every field, down to types; tensors in shape, type, strides and values."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype, a.stride(), a.tolist()) == (b.shape, b.dtype, b.stride(), b.tolist()), path
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, RaggedBatch | Plan):
        for field in fields(a):
            same(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    else:
        assert a == b, path


def by_torch(jobs, metadata):
    batch = RaggedBatch.build(**metadata)
    return batch, tuple(Plan.build(spec, batch, state_layout=a, page_rows=b) for spec, a, b in jobs)


def outcome(make, *arguments):
    try:
        return make(*arguments)
    except Exception as error:
        return type(error), str(error)


def forbid(monkeypatch):
    """From here on the builders in torch are not there: nothing but compiled code can answer."""
    monkeypatch.setattr(Plan, "build", None)
    monkeypatch.setattr(RaggedBatch, "build", None)


def layout_of(kind, spec, requests):
    rows = spec.required_ring_rows(DRAFT)
    return {
        "ring": RingLayout(requests + 1, rows),
        "paged": PagedLayout(600, 5),
        "keep_all": PagedLayout(600, 5, keep_all=True),
        "ringed": PagedLayout(600, rows, 2 * rows),
        "online": OnlineLayout(requests + 1, DRAFT),
        "none": None,
    }[kind]


@st.composite
def steps(draw):
    """Jobs and metadata that the builders take."""
    state, cache = draw(st.sampled_from(STATES)), draw(st.sampled_from(CACHES))
    requests = draw(st.integers(0, 5))
    names = [n for n in SPECS if state != "online" or not SPECS[n].overlap]
    jobs = [
        (SPECS[n], layout_of(state, SPECS[n], requests), draw(st.integers(1, 7)))
        for n in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    ]
    counts = [draw(st.integers(0, 40)) for _ in range(requests)]
    starts = [draw(st.integers(-1, LONGEST - 40)) for _ in range(requests)]
    integers, seed = draw(st.sampled_from([torch.int32, torch.int64])), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)

    def some(values):
        values = torch.as_tensor(values).to(integers)
        kind = draw(st.sampled_from(["sequence", "tensor", "strided"]))
        if kind == "sequence":
            return values.tolist()
        return values.repeat_interleave(2, dim=-1)[..., ::2] if kind == "strided" else values

    metadata = {
        "query_start_loc": some([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]),
        "start_positions": some(starts),
        "draft_rows": draw(st.sampled_from([0, 2, some([min(draw(st.integers(0, DRAFT)), n) for n in counts])])),
    }
    if state in ("ring", "online"):
        slots = torch.randperm(requests + 1, generator=generator)[:requests]
        metadata["state_slots"] = some([-1 if draw(st.integers(0, 4)) == 0 else int(s) for s in slots])
    elif state != "none":
        table = torch.randperm(600, generator=generator)[: requests * 61].view(requests, 61)
        metadata["state_block_table"] = some(table) if requests else table
    if cache == "table":
        table = torch.randint(0, 1 << 20, (requests, LONGEST), generator=generator)
        metadata["block_table"] = some(table) if requests else table
    elif cache == "mapping":
        entries = sum(counts) + draw(st.integers(0, 3))
        highest = draw(st.sampled_from([2, 99]))
        metadata["slot_mapping"] = some(torch.randint(-1, highest, (entries,), generator=generator))
    return jobs, metadata


@given(step=steps())
def test_every_field_is_that_of_the_builders(step):
    jobs, metadata = step
    expected, planner = by_torch(jobs, metadata), Planner(jobs)
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        found, again = planner.step(**metadata), planner.plans(expected[0])
    same(found, expected)
    same(again, expected[1])
    for plan in (*found[1], *again):
        assert not plan.counters.any()
        assert plan.given is plan.batch
    assert all(plan.batch is found[0] for plan in found[1])


VALUES = [-(2**63), -5, -2, -1, 0, 1, 2, 40, 599, 600, 2**31 - 20, 2**31, 2**40, 2**62, 2**63 - 1]
FEW = [-5, -1, 0, 1, 3, 50, 5000]
"""For query_start_loc: nobody plans the windows of 2^40 tokens."""
COLUMNS = ("query_start_loc", "start_positions", "draft_rows", "state_slots", "state_block_table", "slot_mapping",
           "block_table")  # fmt: skip


def other_value(draw, name, value):
    """One entry set to another value, or to one that stands elsewhere."""
    values = torch.as_tensor(value).to(torch.int64).clone()
    flat = values.view(-1)
    if flat.numel():
        i = draw(st.integers(0, flat.numel() - 1))
        choices = FEW if name == "query_start_loc" else VALUES
        other = flat[draw(st.integers(0, flat.numel() - 1))]
        flat[i] = draw(st.sampled_from(choices)) if draw(st.booleans()) else other
    return values


def other_kind(draw, name, value):
    """Another type, shape or device, or nothing at all."""
    del name
    values = torch.atleast_1d(torch.as_tensor(value))
    return draw(
        st.sampled_from([
            None, 3, -1, 2**40, True, "text", 1.5, values.float(), values.bool(), values.to(torch.int8), values[:-1],
            values[None], values.to("meta"), values[..., :1], values.repeat(2, *[1] * (values.dim() - 1)),
            [[1], [1, 2]], [2**70], [True] * values.numel(), values.to_sparse(),
        ])
    )  # fmt: skip


@given(step=steps(), data=st.data())
def test_whatever_the_builders_raise_is_raised(step, data):
    """One to three things go wrong; sometimes the builders do not mind, and then the plans are theirs."""
    jobs, metadata = step
    requests = len(metadata["start_positions"])
    for name in data.draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3, unique=True)):
        change = data.draw(st.sampled_from([other_value, other_value, other_kind]))
        if name in metadata:
            metadata[name] = change(data.draw, name, metadata[name])
        elif data.draw(st.integers(0, 3)) == 0:
            metadata[name] = [0] * requests
    job = data.draw(st.integers(0, len(jobs) - 1))
    spec, layout, pages = jobs[job]
    few = [RingLayout(1, 3), RingLayout(2**40, 2**40), PagedLayout(7, 5), OnlineLayout(9, 0), OnlineLayout(-1, True)]
    jobs[job] = (
        data.draw(st.sampled_from([spec] * 9 + [None])),
        data.draw(st.sampled_from([layout] * 9 + few + ["text"])),
        data.draw(st.sampled_from([pages] * 9 + [None, 0, True, 2**62, 2**70])),
    )
    same(outcome(lambda: Planner(jobs).step(**metadata)), outcome(by_torch, jobs, metadata))


@given(step=steps(), data=st.data())
def test_a_batch_that_was_not_built_is_planned_as_the_builder_plans_it(step, data):
    """Its fields say anything: nothing lies outside memory, and what the builder raises is raised."""
    jobs, metadata = step
    batch = RaggedBatch.build(**metadata)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(COLUMNS))
        if (value := getattr(batch, name)) is not None:
            value = other_value(data.draw, name, value)
            batch = replace(batch, **{name: value[:-1] if data.draw(st.integers(0, 9)) == 0 else value})
    starts = batch.start_positions  # the builder makes everything in proportion to what a start and a length say
    batch = replace(batch, start_positions=torch.where(starts > 2**31, 2**31, starts))
    expected = outcome(lambda: tuple(Plan.build(s, batch, state_layout=a, page_rows=b) for s, a, b in jobs))
    same(outcome(Planner(jobs).plans, batch), expected)


GOOD = {
    "query_start_loc": [0, 5, 9, 10], "start_positions": [3, 250, 7], "draft_rows": [2, 0, 1],
    "slot_mapping": [*range(20, 30), -1],
}  # fmt: skip
SLOTS, MOST = {"state_slots": [2, 0, 1]}, 2**31
PAGES = {"state_block_table": torch.arange(3 * 60).view(3, 60).tolist()}
ROWS = {"slot_mapping": None, "block_table": torch.arange(3 * 70).view(3, 70).tolist()}


def with_entry(table, i, j, value):
    table = [list(row) for row in table]
    table[i][j] = value
    return table


HOSTILE = [
    # Rings: (state layout, other metadata, whether the builders take it).
    (RingLayout(3, 9), SLOTS, True),
    (RingLayout(3, 8), SLOTS, False),
    (RingLayout(2, 9), SLOTS, False),
    (RingLayout(3, 9), {"state_slots": [2, 0, 2]}, False),
    (RingLayout(3, 9), {"state_slots": [2, 0, -1]}, True),
    (RingLayout(3, 9), {"state_slots": [2, 0, -2]}, False),
    (RingLayout(3, 9), {"state_slots": [2, -1, -1], "start_positions": [3, -9, 2**40]}, True),
    (RingLayout(3, 9), {}, False),
    (RingLayout(3, 9), PAGES, False),
    (RingLayout(3, 9), {**SLOTS, **PAGES}, False),
    # Drafts.
    (RingLayout(3, 10), {**SLOTS, "draft_rows": 3}, True),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": 3}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": -1}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": True}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": 2**70}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": [0, -1, 0]}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": [0, 0, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": [True, False, True]}, False),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": [1, 1, 1]}, True),
    (RingLayout(3, 9), {**SLOTS, "draft_rows": None}, False),
    # Positions and tokens.
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, -1, 2]}, True),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, -2, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, MOST - 4, 2]}, True),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, MOST - 3, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, 2**63 - 1, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, 2**63, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, 2.0, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": [3, 2]}, False),
    (RingLayout(3, 9), {**SLOTS, "start_positions": None}, False),
    (RingLayout(3, 9), {**SLOTS, "query_start_loc": [1, 5, 9, 10]}, False),
    (RingLayout(3, 9), {**SLOTS, "query_start_loc": [0, 9, 5, 10]}, False),
    (RingLayout(3, 9), {**SLOTS, "query_start_loc": [0, 5, 9, 11]}, True),
    (RingLayout(3, 9), {**SLOTS, "query_start_loc": [0, 5, 9, 12]}, False),
    (RingLayout(3, 9), {**SLOTS, "query_start_loc": []}, False),
    # Cache rows.
    (RingLayout(3, 9), {**SLOTS, "slot_mapping": [*range(10), -2]}, False),
    (RingLayout(3, 9), {**SLOTS, "slot_mapping": [7] * 10}, True),
    (RingLayout(3, 9), {**SLOTS, "slot_mapping": [-1] * 10}, True),
    (RingLayout(3, 9), {**SLOTS, **ROWS}, True),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "slot_mapping": [7] * 10}, False),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "start_positions": [3, 1120, 7]}, False),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "block_table": with_entry(ROWS["block_table"], 0, 0, -1)}, False),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "block_table": with_entry(ROWS["block_table"], 1, 0, -1)}, True),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "block_table": with_entry(ROWS["block_table"], 0, 0, 2**61 - 2)}, True),
    (RingLayout(3, 9), {**SLOTS, **ROWS, "block_table": with_entry(ROWS["block_table"], 0, 0, 2**61 - 1)}, False),
    (
        RingLayout(3, 9),
        {**SLOTS, **ROWS, "start_positions": [3, 250, 15], "block_table": with_entry(ROWS["block_table"], 2, 0, -1)},
        False,
    ),
    # Pages.
    (PagedLayout(180, 5), PAGES, True),
    (PagedLayout(121, 5), PAGES, False),
    (PagedLayout(180, 5), SLOTS, False),
    (PagedLayout(180, 5), {"state_block_table": with_entry(PAGES["state_block_table"], 1, 48, -1)}, False),
    (PagedLayout(180, 5), {"state_block_table": with_entry(PAGES["state_block_table"], 1, 50, 180)}, False),
    (PagedLayout(180, 5), {"state_block_table": with_entry(PAGES["state_block_table"], 1, 47, -1)}, True),
    (PagedLayout(180, 5), {"state_block_table": with_entry(PAGES["state_block_table"], 2, 1, 1)}, False),
    (PagedLayout(180, 5), {**PAGES, "start_positions": [3, 297, 2]}, False),
    (PagedLayout(180, 9, 18), PAGES, True),
    (PagedLayout(180, 8, 16), PAGES, False),
    (PagedLayout(180, 5, keep_all=True), PAGES, True),
    # The online form takes no overlap.
    (OnlineLayout(3, 2), SLOTS, False),
    (RingLayout(2**31 - 1, 9), SLOTS, True),
]


@pytest.mark.parametrize(("layout", "change", "taken"), HOSTILE)
def test_one_thing_is_wrong_or_only_looks_wrong(layout, change, taken, monkeypatch):
    metadata, jobs = {**GOOD, **change}, [(SPECS["csa"], layout, 4), (SPECS["csa"], None, 4)]
    expected = outcome(by_torch, jobs, metadata)
    assert isinstance(expected[0], RaggedBatch) == taken
    if taken:
        forbid(monkeypatch)
    same(outcome(lambda: Planner(jobs).step(**metadata)), expected)
    if taken:
        same(Planner(jobs).plans(expected[0]), expected[1])


@pytest.mark.parametrize(("log", "drafts", "taken"), [(2, [2, 0, 1], True), (1, [2, 0, 1], False), (0, 0, True)])
def test_a_log_takes_its_drafts(log, drafts, taken):
    metadata, jobs = {**GOOD, **SLOTS, "draft_rows": drafts}, [(SPECS["hca"], OnlineLayout(3, log), None)]
    expected = outcome(by_torch, jobs, metadata)
    assert isinstance(expected[0], RaggedBatch) == taken
    same(outcome(lambda: Planner(jobs).step(**metadata)), expected)


@pytest.mark.parametrize("pages", [None, 0, -1, True, 1.0, 2**40, 2**70])
def test_the_page_size_that_a_table_needs(pages):
    metadata, jobs = {**GOOD, **SLOTS, **ROWS}, [(SPECS["csa"], RingLayout(3, 9), pages)]
    same(outcome(lambda: Planner(jobs).step(**metadata)), outcome(by_torch, jobs, metadata))


def test_a_batch_and_its_plans_own_their_integers():
    given = {name: torch.tensor(values) for name, values in DECODE.items()}
    jobs = [(SPECS["csa"], RingLayout(2, 8), None)]
    expected = by_torch(jobs, DECODE)
    found = Planner(jobs).step(**given)
    for values in given.values():
        values.fill_(-77)
    same(found, expected)
    # What a step writes lies alone; a batch outlives its plans and they outlive others.
    (plan,) = found[1]
    plan.counters.fill_(9)
    plan.counters.zero_()
    own = {getattr(plan, f.name).untyped_storage().data_ptr() for f in fields(plan) if f.name.startswith("keep")}
    assert len(own) == 1
    assert plan.counters.untyped_storage().data_ptr() not in own
    assert found[0].start_positions.untyped_storage().data_ptr() not in own


def test_sizes_that_the_kernel_does_not_multiply_are_left_to_the_builders():
    jobs = [(SPECS["csa"], RingLayout(2**40, 2**40), 2**40)]
    same(Planner(jobs).step(**GOOD, **SLOTS), by_torch(jobs, {**GOOD, **SLOTS}))


def test_many_requests_with_rows_in_any_order():
    """The hash table of slots and rows is filled: nothing is taken for something else."""
    requests, spec = 700, SPECS["csa"]
    generator = torch.Generator().manual_seed(3)
    metadata = {
        "query_start_loc": torch.arange(requests + 1) * 3,
        "start_positions": torch.randint(0, 250, (requests,), generator=generator),
        "slot_mapping": torch.randperm(1 << 20, generator=generator)[: 3 * requests],
        "draft_rows": 2,
    }
    tables = torch.randperm(60 * requests, generator=generator).view(requests, 60)
    for layout, where in (
        (RingLayout(1 << 30, 9), {"state_slots": torch.randperm(1 << 20, generator=generator)[:requests] << 10}),
        (PagedLayout(60 * requests, 5), {"state_block_table": tables}),
    ):
        jobs = [(spec, layout, None)]
        same(Planner(jobs).step(**metadata, **where), by_torch(jobs, {**metadata, **where}))
    metadata["slot_mapping"][1::3] = 5
    metadata["slot_mapping"][2::3] = 5
    (plan,) = Planner(jobs).step(**metadata, **where)[1]
    assert plan.extremes.slots.shared


def test_a_page_that_is_read_and_kept_is_noticed():
    """Request 1 keeps its row where request 0 has one that it reads: the plan says that rows are overwritten."""
    spec, layout = SPECS["r2"], PagedLayout(9, 4)
    for page, overwrites in ((1, True), (5, False)):
        metadata = {"query_start_loc": [0, 1, 2], "start_positions": [5, 4], "state_block_table": [[0, 1], [3, page]]}
        (plan,) = Planner([(spec, layout, None)]).step(**metadata)[1]
        same(plan, by_torch([(spec, layout, None)], metadata)[1][0])
        assert plan.overwrites == overwrites


@pytest.mark.parametrize(
    ("name", "start", "length", "overwrites"),
    [("csa", 0, 40, False), ("csa", 4, 40, True), ("csa", 4, 4, False), ("csa", 5, 2, False), ("r8", 16, 40, False),
     ("r8", 17, 40, True), ("r8", 17, 3, False)],
)  # fmt: skip
def test_a_ring_is_overwritten_only_where_something_is_read(name, start, length, overwrites):
    """A request that begins with a window, and without one before it, reads no row that its last tokens could take."""
    spec = SPECS[name]
    layout = RingLayout(2, spec.required_ring_rows(0))
    metadata = {"query_start_loc": [0, length], "start_positions": [start], "state_slots": [1]}
    (plan,) = Planner([(spec, layout, None)]).step(**metadata)[1]
    same(plan, by_torch([(spec, layout, None)], metadata)[1][0])
    assert plan.overwrites == overwrites


def test_plans_of_later_chunks_are_copied_into_a_padded_one():
    """A graph may be captured with a request's first chunk, which reads nothing that a kept row could replace."""
    spec, layout = SPECS["csa"], RingLayout(1, SPECS["csa"].required_ring_rows(0))

    def planned(start, count, size):
        batch = RaggedBatch.build([0, count], start_positions=[start], state_slots=[0])
        return Plan.build(spec, batch, state_layout=layout).padded(*size)

    first, later = planned(0, 40, (12, 8)), planned(40, 40, (12, 8))
    first.copy_(later)
    assert int(first.batch.start_positions) == 40
    assert first.overwrites
    assert not planned(0, 1, (1, 8)).overwrites, "one token's window finds its rows"


def test_steps_are_planned_by_compiled_code(monkeypatch):
    """``condense`` without a plan, ``Planner.plans`` and positions in the place of start positions."""
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 9], start_positions=[0], state_slots=[1])
    (plan,) = Planner([(spec, RingLayout(2, 8), None)]).step([0, 9], positions=range(9), state_slots=[1])[1]
    monkeypatch.setattr(Plan, "build", None)
    rows = condense(spec, tokens(spec, 9), weights(spec), rope(spec, 9), batch, state=StatePool.ring(spec, 2))
    assert rows.window.tolist() == plan.window_index.tolist() == [0, 1]


def test_without_compiled_code_the_builders_do_it(monkeypatch):
    monkeypatch.setattr(native, "problem", lambda kernels: f"{kernels} cannot run here")
    monkeypatch.setattr(native, "address", None)
    jobs = [(SPECS["hca"], RingLayout(2, 130), None)]
    same(Planner(jobs).step(**DECODE), by_torch(jobs, DECODE))


def test_tensors_without_values_are_left_to_the_builders():
    jobs = [(SPECS["csa"], RingLayout(2, 8), None)]
    with FakeTensorMode():
        assert issubclass(outcome(lambda: Planner(jobs).step(**DECODE))[0], Exception)
    meta = {name: torch.tensor(values, device="meta") for name, values in DECODE.items()}
    same(outcome(lambda: Planner(jobs).step(**meta)), outcome(by_torch, jobs, meta))
