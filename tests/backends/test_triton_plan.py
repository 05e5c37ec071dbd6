"""Static plans by one launch, interpreted: those of ``Plan.build_static``, entry for entry, from any metadata."""

from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from guarded import guarded
from kvcondense import KvCondenseError, Plan, RaggedBatch, planning
from kvcondense.backends.triton import planning as launcher
from kvcondense.backends.triton.kernels import plan as kernels
from kvcondense.errors import RangeError, ShapeError
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.extremes import Bounds
from kvcondense.layout.online import OnlineLayout
from kvcondense.planning import Planner
from machine import SPECS

STATES, CACHES = ("ring", "paged", "keep_all", "ringed", "online", "none"), ("table", "mapping", "none")
TOKENS, DRAFT, LONGEST, PAGES = 60, 3, 300, 61
SOUND = ("query_start_loc", "start_positions", "draft_rows")
HUGE = [-(2**63), -5, -2, -1, 0, 1, 2, 40, 599, 600, 2**31 - 20, 2**31, 2**40, 2**62, 2**63 - 1]


@contextmanager
def on_gpu():
    """The interpreter as a GPU, in which nothing but the kernel may make a static plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_launches", lambda device: True)
        patch.setattr(Plan, "build_static", None)
        yield patch


@contextmanager
def counted(patch):
    """How many times the kernel is launched, and with how many programs."""
    grids, real = [], kernels.plan_kernel

    class Counter:
        def __getitem__(self, grid):
            grids.append(grid)
            return real[grid]

    patch.setattr(kernels, "plan_kernel", Counter())
    yield grids


def by_torch(jobs, batch, bounds, rows):
    return [
        Plan.build_static(
            spec, batch, max_tokens=bounds.tokens, max_draft=bounds.draft, max_query_len=bounds.query_len,
            max_positions=bounds.positions, state_layout=layout, page_rows=page_rows, cache_rows=most,
        )
        for (spec, layout, page_rows), most in zip(jobs, rows, strict=True)
    ]  # fmt: skip


def same(found, expected, *, kernel=True):
    """Equal in every field, the batches' too. The kernel's plans read slots and tables where the caller has them."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for field in fields(Plan):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, torch.Tensor):
                assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), field.name
                assert x.tolist() == y.tolist(), field.name
            elif field.name == "given":
                assert x is y
            elif field.name == "batch":
                for part in fields(RaggedBatch):
                    s, t = getattr(x, part.name), getattr(y, part.name)
                    if kernel and part.name not in SOUND:
                        assert s is getattr(a.given, part.name), part.name
                    if t is None:
                        assert s is None, part.name
                    else:
                        assert (s.dtype, s.tolist()) == (t.dtype, t.tolist()), part.name
            else:
                assert x == y, field.name


def static(jobs, batch, bounds, rows):
    """By the kernel, in one launch."""
    with on_gpu() as patch, counted(patch) as grids:
        found = Planner(jobs).static(
            batch, max_tokens=bounds.tokens, max_draft=bounds.draft, max_query_len=bounds.query_len,
            max_positions=bounds.positions, cache_rows=rows,
        )  # fmt: skip
    assert grids == [(len(jobs),)]
    return found


def layout_of(kind, spec, slots):
    rows = spec.required_ring_rows(DRAFT)
    return {
        "ring": RingLayout(slots, rows),
        "paged": PagedLayout(600, 5),
        "keep_all": PagedLayout(600, 5, keep_all=True),
        "ringed": PagedLayout(600, rows, 2 * rows),
        "online": OnlineLayout(slots, DRAFT),
        "none": None,
    }[kind]


@st.composite
def steps(draw, *, hostile):
    """Jobs of one kind of state, a batch, its bounds, and rows of the caches."""
    state, cache = draw(st.sampled_from(STATES)), draw(st.sampled_from(CACHES))
    requests = draw(st.integers(1, 5))
    names = [n for n in SPECS if state != "online" or not SPECS[n].overlap]
    jobs = [
        (SPECS[n], layout_of(state, SPECS[n], requests + 1), draw(st.integers(1, 7)))
        for n in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    counts = [draw(st.integers(0, 14)) for _ in range(requests)]
    where = {}
    if state in ("ring", "online"):
        where["state_slots"] = torch.randperm(requests + 1, generator=generator)[:requests]
    elif state != "none":
        where["state_block_table"] = torch.randperm(600, generator=generator)[: requests * PAGES].view(requests, PAGES)
    if cache == "table":
        where["block_table"] = torch.randint(0, 1 << 20, (requests, LONGEST), generator=generator)
    elif cache == "mapping":
        where["slot_mapping"] = torch.randint(-1, 99, (TOKENS + draw(st.integers(0, 5)),), generator=generator)
    batch = RaggedBatch(
        torch.tensor([0, *counts]).cumsum(0),
        torch.tensor([draw(st.integers(-1, LONGEST - 15)) for _ in counts]),
        torch.tensor([min(draw(st.integers(0, DRAFT)), n) for n in counts]),
        **where,
    )
    for _ in range(draw(st.integers(1, 6)) if hostile else 0):
        values = [t for f in fields(batch) if (t := getattr(batch, f.name)) is not None and t.numel()]
        flat = draw(st.sampled_from(values)).view(-1)
        other = flat[draw(st.integers(0, min(flat.numel(), 70) - 1))].item()  # of somebody else: a slot or a page
        flat[draw(st.integers(0, min(flat.numel(), 70) - 1))] = draw(st.sampled_from([other, *HUGE]))
    tokens = draw(st.sampled_from([sum(counts), TOKENS])) if not hostile else draw(st.sampled_from([0, 7, TOKENS]))
    longest = draw(st.sampled_from([1, 5, tokens]))
    bounds = Bounds(tokens, longest, draw(st.integers(0, DRAFT)), draw(st.sampled_from([None, LONGEST, 150])))
    return jobs, batch, bounds, [draw(st.sampled_from([None, 50, 1 << 18])) for _ in jobs]


@pytest.mark.parametrize("hostile", [False, True], ids=["good", "hostile"])
@given(data=st.data())
def test_plans_are_the_builders(hostile, data):
    jobs, batch, bounds, rows = data.draw(steps(hostile=hostile))
    same(static(jobs, batch, bounds, rows).plans, by_torch(jobs, batch, bounds, rows))


@given(data=st.data())
def test_tables_of_an_engine_are_read_as_they_are(data):
    """int32, at any stride: the plans of the same numbers in int64."""
    jobs, batch, bounds, rows = data.draw(steps(hostile=False))
    narrow = {}
    for name in ("state_block_table", "block_table"):
        if (table := getattr(batch, name)) is not None:
            memory = torch.full((table.shape[0], table.shape[1] + 3), -1, dtype=torch.int32)
            narrow[name] = memory[:, : table.shape[1]].copy_(table)
    found = static(jobs, replace(batch, **narrow), bounds, rows).plans
    for plan, expected in zip(found, by_torch(jobs, batch, bounds, rows), strict=True):
        for field in fields(Plan):
            if isinstance(t := getattr(expected, field.name), torch.Tensor):
                assert torch.equal(getattr(plan, field.name), t), field.name
        assert all(getattr(plan.batch, name) is t for name, t in narrow.items())
    for plan in by_torch(jobs, replace(batch, **narrow), bounds, rows):
        assert all(getattr(plan.batch, name).dtype == torch.int64 for name in narrow)


@given(data=st.data())
def test_refilled_plans_are_the_builders(data):
    """In place, from what the batch's tensors hold by then; what was left in counters is gone."""
    jobs, batch, bounds, rows = data.draw(steps(hostile=True))
    found = static(jobs, batch, bounds, rows)
    places = [[t.data_ptr() for t in vars(p).values() if isinstance(t, torch.Tensor)] for p in found.plans]
    starts = batch.start_positions.tolist()
    batch.start_positions.copy_(torch.tensor([data.draw(st.sampled_from([s, 3, 130, -1])) for s in starts]))
    for plan in found.plans:
        plan.counters.fill_(7)
    with on_gpu() as patch, counted(patch) as grids:
        found.refill()
    assert len(grids) == 1
    same(found.plans, by_torch(jobs, batch, bounds, rows))
    assert places == [[t.data_ptr() for t in vars(p).values() if isinstance(t, torch.Tensor)] for p in found.plans]


def many(requests, *, paged=False, seed=5):
    """A batch of several blocks of requests, a tenth of them spoilt, and jobs for it."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *size):
        return torch.randint(low, high, size or (requests,), generator=generator)

    counts = integers(0, 4)
    spoilt = integers(0, 10) == 0
    slots, pages = torch.randperm(requests, generator=generator), integers(0, 900, requests, 60)
    slots[spoilt] = slots[integers(0, requests)][spoilt]  # of others
    pages[spoilt, 3] = -1
    batch = RaggedBatch(
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        integers(-1, 290),
        torch.minimum(integers(0, 3), counts),
        state_slots=None if paged else slots,
        state_block_table=pages if paged else None,
        slot_mapping=integers(-1, 10_000, 3 * requests),
    )
    jobs = []
    for name in ("hca", "csa", "r1"):
        layout = PagedLayout(900, 5, keep_all=name == "r1") if paged else layout_of("ring", SPECS[name], requests)
        jobs.append((SPECS[name], layout, 64))
    return jobs, batch, Bounds(3 * requests, 3, DRAFT, 1000)


@pytest.mark.parametrize("paged", [False, True], ids=["ring", "paged"])
@pytest.mark.parametrize("requests", [launcher.INTERPRETED_BLOCK, 3 * launcher.INTERPRETED_BLOCK + 1])
def test_requests_that_fill_several_blocks(requests, paged):
    jobs, batch, bounds = many(requests, paged=paged)
    found = static(jobs, batch, bounds, [9000] * 3)
    same(found.plans, by_torch(jobs, batch, bounds, [9000] * 3))
    inert = (found.plans[0].batch.start_positions < 0).sum()
    assert 0 < inert < requests // 2


def test_a_query_start_loc_that_falls():
    spec = SPECS["r2"]
    long = list(range(2 * launcher.INTERPRETED_BLOCK + 2))
    long[launcher.INTERPRETED_BLOCK - 1] = 50  # the next block is behind it
    for values in (
        long,
        [0, 5, 3, 8],
        [3, 2, 1, 0],
        [0, 9, 9, 70],
        [-4, 2, 4, 6],
        [0, 2, -1, 2],
        [2**62, -(2**63), 1, 4],
    ):
        nothing = torch.zeros(len(values) - 1, dtype=torch.int64)
        batch, jobs = RaggedBatch(torch.tensor(values), nothing, nothing), [(spec, None, None)]
        bounds = Bounds(max(10, len(values)), 10, 0, None)
        same(static(jobs, batch, bounds, [None]).plans, by_torch(jobs, batch, bounds, [None]))


@pytest.mark.parametrize("state", ["ring", "paged", "online"])
def test_what_is_just_inside_and_just_outside(state, monkeypatch):
    """One value at a time: the last that is in its bounds, and the first that is not."""
    names = ["r2", "hca"] if state == "online" else ["r2", "csa"]
    jobs = [(SPECS[n], layout_of(state, SPECS[n], 4), 3) for n in names]
    most = torch.iinfo(torch.int64).max // 3
    where = {"state_slots": torch.tensor([3, 0])}
    if state == "paged":
        where = {"state_block_table": torch.tensor([[7] * 9, [8] * 9])}
    table = {"block_table": torch.full((2, 9), 11)}
    base = RaggedBatch(torch.tensor([0, 5, 9]), torch.tensor([35, 40]), torch.tensor([1, 0]), **where, **table)
    bounds, rows, edges = Bounds(9, 5, 1, 44), [36, 35], []
    for name, index, values in (
        ("query_start_loc", 0, [-1, 1]),
        ("query_start_loc", 1, [3, 4, 6, 9, 10]),
        ("query_start_loc", 2, [4, 5, 8, 10]),
        ("start_positions", 0, [-1, 0, 38, 39, 40]),
        ("start_positions", 1, [2, 4, 41]),
        ("draft_rows", 0, [-1, 0, 2, 6]),
        ("state_slots", 0, [-1, 1, 2, 4, 0]),
        ("state_block_table", (0, 6), [-1, 599, 600]),
        ("state_block_table", (0, 7), [-1, 0, 599, 600]),
        ("block_table", (0, 6), [-1, most - 1, most]),
        ("block_table", (1, 3), [-1, 10, 12, most - 1, most]),
    ):
        for value in values if getattr(base, name) is not None else ():
            spoilt = getattr(base, name).clone()
            spoilt[index] = value
            edges.append(replace(base, **{name: spoilt}))
    values = len(edges)
    for width in range(1, 9):
        edges.append(replace(base, block_table=base.block_table[:, :width]))
        edges.append(replace(base, block_table=None, slot_mapping=torch.arange(30, 30 + width)))
        if state == "paged":
            edges.append(replace(base, state_block_table=base.state_block_table[:, :width]))
    # Nothing is kept behind a boundary without overlap: it is the rows that are read that need a page.
    edges.append(replace(base, start_positions=torch.tensor([37, 5]), query_start_loc=torch.tensor([0, 5, 6])))
    for width in range(1, 9) if state == "paged" else ():
        edges.append(
            replace(edges[-1], state_block_table=base.state_block_table[:, :width], draft_rows=base.draft_rows * 0)
        )
    tried = [(batch, bounds, rows) for batch in edges]
    tried += [(batch, replace(bounds, positions=None), [None] * 2) for batch in edges[:values]]
    # Blocks that end among a step's tokens are many, most of them zero counters: an eighth of the batches has them.
    for block, some in ((launcher.INTERPRETED_BLOCK, tried), (8, tried[::8])):
        monkeypatch.setattr(launcher, "INTERPRETED_BLOCK", block)
        for batch, limit, most in some:
            same(static(jobs, batch, limit, most).plans, by_torch(jobs, batch, limit, most))


def test_nothing_lies_outside_the_tensors():
    """Every tensor of a hostile batch, and the plans' own memory, end where memory does."""
    real = torch.empty
    for seed in range(4):
        for paged in (False, True):
            jobs, batch, bounds = many(7, paged=paged, seed=seed)
            for name, value in (("start_positions", 2**40), ("draft_rows", -(2**63)), ("query_start_loc", 2**62)):
                getattr(batch, name)[seed] = value
            held = {f.name: t if (t := getattr(batch, f.name)) is None else guarded(t) for f in fields(batch)}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", lambda *size, **more: guarded(real(*size, **more)))
                found = static(jobs, RaggedBatch(**held), bounds, [50] * 3)
            same(found.plans, by_torch(jobs, found.batch, bounds, [50] * 3))


def test_a_refill_does_nothing_else():
    """Neither an operation of torch nor memory: what is captured is one launch."""
    jobs, batch, bounds = many(9)
    found = static(jobs, batch, bounds, [None] * 3)
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(str(func))
            return func(*args, **(kwargs or {}))

    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "plan_kernel", {(3,): lambda *operands, **options: launched.append(operands)})
        with Watch():
            found.refill()
    assert len(launched) == 1
    assert not asked


@pytest.mark.parametrize("native", [False, True], ids=["torch", "kernel"])
def test_refills_are_copies(native):
    """Values of another batch are taken over, facts are forgotten, and bounds that buffers lack are refused."""
    jobs, batch, bounds = many(5)
    options = {"max_tokens": bounds.tokens, "max_draft": DRAFT, "max_positions": 1000, "cache_rows": [70, 80, 90]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_launches", lambda device: native)
        found = Planner(jobs).static(batch, **options)
        plan = found.plans[1]
        assert plan.extremes.slots.highest == 79
        facts = plan.facts(jobs[1][0])
        other = many(5, seed=8)[1]
        found.refill(other)
        assert plan.facts(jobs[1][0]) is not facts
        expected = by_torch(jobs, batch, replace(bounds, query_len=bounds.tokens), [70, 80, 90])
        same(found.plans, expected, kernel=native)
        assert batch.start_positions.tolist() == other.start_positions.tolist()
        before = [p.window_slot.tolist() for p in found.plans]
        with pytest.raises(ShapeError, match="start_positions|query_start_loc"):
            found.refill(many(6)[1])
        less = Plan.build_static(
            jobs[1][0], batch, max_tokens=bounds.tokens, max_draft=DRAFT, state_layout=jobs[1][1], page_rows=64,
            max_positions=1000, cache_rows=5,
        )  # fmt: skip
        plan.copy_(less)
        before[1] = plan.window_slot.tolist()
        plan.admitted_to(bounds.tokens, 1000, 5)
        with pytest.raises(RangeError, match="slot_mapping: expected at most 5, as what this plan is used with"):
            found.refill(many(5)[1])
        assert before == [p.window_slot.tolist() for p in found.plans]
        assert batch.start_positions.tolist() == other.start_positions.tolist(), "nothing is written"


def test_what_the_kernel_does_not_take_is_the_builders():
    jobs, batch, bounds = many(4)
    rows = [None] * 3

    def of(batch=batch, bounds=bounds, jobs=jobs, rows=rows):
        return launcher.StaticPlanner.of(jobs, batch, bounds, rows)

    assert of() is not None
    empty = torch.zeros(0, dtype=torch.int64)
    assert of(RaggedBatch(torch.zeros(1, dtype=torch.int64), empty, empty, state_slots=empty)) is None
    assert of(replace(batch, draft_rows=batch.draft_rows.int())) is None
    assert of(replace(batch, draft_rows=batch.draft_rows.repeat_interleave(2)[::2])) is None
    assert of(replace(batch, state_slots=None)) is None
    assert of(replace(batch, start_positions=batch.start_positions[:-1])) is None
    assert of(bounds=replace(bounds, positions=2**31)) is None
    assert of(bounds=replace(bounds, tokens=True)) is None
    assert of(rows=[-1, None, None]) is None
    assert of(jobs=[(SPECS["csa"], PagedLayout(4, 4), 4)], rows=[None]) is None
    table = replace(batch, slot_mapping=None, block_table=torch.zeros(4, 9, dtype=torch.int64))
    assert of(table) is not None
    assert of(replace(table, block_table=table.block_table.t().contiguous().t())) is None
    assert of(table, jobs=[(s, layout, None) for s, layout, _ in jobs]) is None
    found = {}
    for native in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "_launches", lambda device, native=native: native)
            none = Planner([(SPECS["csa"], None, None)]).static(
                RaggedBatch.build([0], start_positions=[]), max_tokens=9
            )
            none.refill()
            found[native] = none.plans[0].window_request.tolist()
            with pytest.raises(KvCondenseError, match="ring_rows") as error:
                Planner(jobs).static(batch, max_tokens=9, max_draft=100)
            found[native] = found[native], str(error.value)
            with pytest.raises(ShapeError, match="cache_rows"):
                Planner(jobs).static(batch, max_tokens=9, cache_rows=[1])
    assert found[False] == found[True]


def test_views_with_strides_and_odd_addresses_are_taken():
    jobs, batch, bounds = many(5, paged=True)
    wide = torch.full((5, 99), 3)
    wide[:, 1:61] = batch.state_block_table
    shifted = torch.zeros(6, dtype=torch.int64)
    shifted[1:] = batch.start_positions
    batch = replace(batch, state_block_table=wide[:, 1:61], start_positions=shifted[1:])
    same(static(jobs, batch, bounds, [None] * 3).plans, by_torch(jobs, batch, bounds, [None] * 3))
