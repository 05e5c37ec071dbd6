"""Plans, addresses and tags against Python-int models of the formulas."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import KvCondenseError, PagedCache, Plan, RaggedBatch, StatePool, condense
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.snapshot import export_live, import_live
from machine import SPECS, Machine, rope, same, tokens, weights


@pytest.mark.parametrize("name", SPECS)
@given(data=st.data())
def test_plan_follows_the_definition(name, data):
    spec = SPECS[name]
    requests = data.draw(
        st.lists(st.tuples(st.integers(-1, 1 << 20), st.integers(0, 3 * spec.window), st.integers(0, 3)), max_size=4)
    )
    layout = RingLayout(len(requests) + 1, spec.required_ring_rows(3))
    starts = [s for s, _, _ in requests]
    counts = [n for _, n, _ in requests]
    drafts = [min(d, n) for _, n, d in requests]
    qsl = [sum(counts[:i]) for i in range(len(counts) + 1)]
    mapping = list(range(1000, 1000 + qsl[-1]))
    batch = RaggedBatch.build(
        qsl,
        start_positions=starts,
        draft_rows=torch.tensor(drafts, dtype=torch.int64),
        state_slots=list(range(len(requests))),
        slot_mapping=mapping,
    )
    plan = Plan.build(spec, batch, state_layout=layout)
    windows, keeps = [], []
    for q, (start, count, draft) in enumerate(zip(starts, counts, drafts, strict=True)):
        if start < 0:
            continue
        for i in range(count):
            position = start + i
            if (position + 1) % spec.ratio == 0:
                windows.append((q, position // spec.ratio, mapping[qsl[q] + i]))
            if position >= spec.live_start(start + count - draft):
                keeps.append((qsl[q] + i, q, position, q * layout.ring_rows + position % layout.ring_rows))
    columns = (plan.window_request, plan.window_index, plan.window_slot)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == windows
    columns = (plan.keep_token, plan.keep_request, plan.keep_position, plan.keep_row)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == keeps
    assert all(c.dtype == torch.int64 for c in columns)


def test_positions_per_token_and_int32_give_the_same_batch():
    spec = SPECS["csa"]
    a = RaggedBatch.build([0, 3, 3, 8], start_positions=[5, 0, 0], state_slots=[2, 1, 0])
    b = RaggedBatch.build(
        torch.tensor([0, 3, 3, 8], dtype=torch.int32),
        positions=torch.tensor([5, 6, 7, 0, 1, 2, 3, 4, 99, -7], dtype=torch.int32),
        state_slots=torch.tensor([2, 1, 0], dtype=torch.int32),
    )
    for field in ("query_start_loc", "start_positions", "state_slots"):
        assert torch.equal(getattr(a, field), getattr(b, field))
        assert getattr(b, field).dtype == torch.int64
    assert Plan.build(spec, a).window_index.tolist() == [1, 0]


def test_padding_positions_make_a_request_inert():
    batch = RaggedBatch.build([0, 2, 4], positions=[3, 4, -1, -1])
    assert batch.active.tolist() == [True, False]
    assert Plan.build(SPECS["r2"], batch).window_request.tolist() == [0]


def test_a_scalar_of_draft_rows_stops_at_the_length_of_a_request():
    batch = RaggedBatch.build([0, 1, 5], start_positions=[9, 9], draft_rows=3)
    assert batch.draft_rows.tolist() == [1, 3]
    spec = SPECS["csa"]
    short = StatePool.ring(spec, 1, spec.required_ring_rows(1))
    decode = RaggedBatch.build([0, 1], start_positions=[0], state_slots=[0], draft_rows=3)
    condense(spec, tokens(spec, 1), weights(spec), rope(spec, 1), decode, state=short)


def test_padded_plan_does_the_same_work():
    spec = SPECS["csa"]
    w, table = weights(spec), rope(spec, 32)
    results = []
    for pad in (False, True):
        state, cache = StatePool.ring(spec, 2), PagedCache.allocate(16, 2, 4)
        batch = RaggedBatch.build([0, 9], start_positions=[0], state_slots=[1], block_table=[[1]])
        plan = Plan.build(spec, batch, state_layout=state.layout, page_rows=4)
        if pad:
            plan = plan.padded(6, 20)
            assert (plan.num_windows, plan.keep_row.shape[0]) == (6, 20)
            assert plan.window_request.tolist() == [0, 0, -1, -1, -1, -1]
        rows = condense(spec, tokens(spec, 9), w, table, batch, plan=plan, state=state, cache=cache, latent=True)
        if pad:
            assert not rows.values[2:].any()
            assert rows.window.tolist() == [0, 1, -1, -1, -1, -1]
        live = export_live(spec, state, RaggedBatch.build([0, 0], start_positions=[9], state_slots=[1]))
        results.append((cache.data.clone(), rows.values[:2], rows.latent[:2], live))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_plan_is_shared_by_layers_of_one_ratio():
    csa, indexer = SPECS["csa"], replace(SPECS["indexer"], head_dim=8, rope_dim=4)
    batch = RaggedBatch.build([0, 9], start_positions=[0], state_slots=[1], block_table=[[1]])
    states = [StatePool.ring(s, 2) for s in (csa, indexer)]
    plan = Plan.build(csa, batch, state_layout=states[0].layout, page_rows=4)
    for spec, state in zip((csa, indexer), states, strict=True):
        cache = PagedCache.allocate(spec.head_dim, 2, 4)
        shared = condense(
            spec, tokens(spec, 9), weights(spec), rope(spec, 9), batch, plan=plan, state=state, cache=cache
        )
        assert shared.slot.tolist() == [4, 5]
        assert torch.equal(cache.rows[1, :2], shared.values.bfloat16())


@given(st.integers(0, 1 << 40), st.integers(1, 300), st.integers(0, 1 << 33))
def test_addresses_are_python_ints(position, rows, slot):
    request = torch.tensor([0])
    at = torch.tensor([position])
    ring = RaggedBatch.build([0, 0], start_positions=[0], state_slots=[slot])
    assert RingLayout(1, rows).address(ring, request, at).item() == slot * rows + position % rows
    page = position // rows
    if page < 10_000:
        table = torch.zeros(1, page + 1, dtype=torch.int64)
        table[0, page] = slot
        paged = RaggedBatch.build([0, 0], start_positions=[0], state_block_table=table)
        assert PagedLayout(1, rows).address(paged, request, at).item() == slot * rows + position % rows


@pytest.mark.parametrize("capacity", [-1, 0, 1])
def test_cache_capacity_is_exact(capacity):
    spec = SPECS["r2"]
    windows = 6
    cache = PagedCache.allocate(16, windows + capacity, 1)
    batch = RaggedBatch.build([0, 12], start_positions=[0], block_table=torch.arange(windows)[None])
    call = (spec, tokens(spec, 12), weights(spec), rope(spec, 12), batch)
    if capacity < 0:
        with pytest.raises(KvCondenseError, match="block_table"):
            condense(*call, cache=cache)
        assert not cache.data.any()
    else:
        condense(*call, cache=cache)
        assert cache.rows[:windows].any(-1).all()
        assert not cache.rows[windows:].any()


def test_paged_state_needs_only_the_pages_it_touches():
    spec = SPECS["csa"]
    state = StatePool.paged(spec, 3, 4)
    w, table = weights(spec), rope(spec, 64)
    whole = condense(spec, tokens(spec, 22), w, table, RaggedBatch.build([0, 22], start_positions=[0]))
    # Rows 8.. of the first 14 tokens are kept (pages 2 and 3); pages 0 and 1 were never given out.
    first = RaggedBatch.build([0, 14], start_positions=[0], state_block_table=[[-100, 10**9, 2, 0]])
    condense(spec, tokens(spec, 22)[:14], w, table, first, state=state)
    second = RaggedBatch.build([0, 8], start_positions=[14], state_block_table=[[-100, 10**9, 2, 0, 1, -1]])
    with pytest.raises(KvCondenseError, match=r"state_block_table\[0, 5\]"):
        condense(spec, tokens(spec, 22)[14:], w, table, second, state=state)
    second = RaggedBatch.build([0, 6], start_positions=[14], state_block_table=[[-100, 10**9, 2, 0, 1, -1]])
    rows = condense(spec, tokens(spec, 22)[14:20], w, table, second, state=state)
    assert torch.equal(rows.values, whole.values[3:5])
    shared = RaggedBatch.build([0, 2, 4], start_positions=[0, 0], state_block_table=[[1], [1]])
    with pytest.raises(KvCondenseError, match="state_block_table"):
        condense(spec, tokens(spec, 4), w, table, shared, state=state)


@pytest.mark.parametrize("name", ["csa", "hca", "r8", "gateless"])
@pytest.mark.parametrize("target", ["ring", "long ring", "paged"])
def test_live_rows_move_to_another_pool(name, target):
    spec = SPECS[name]
    for length in (1, spec.ratio - 1, spec.ratio, spec.ratio + 1, 2 * spec.window, 2 * spec.window + 1):
        source = Machine(spec, [tokens(spec, length + spec.window)])
        source.feed([length])
        rows = export_live(spec, source.state, source.batch([0]))
        assert rows.shape[0] == length - spec.live_start(length)
        other = Machine(
            spec, source.sequences, paged=target == "paged", max_draft=8 if target == "long ring" else 0, seed=3
        )
        other.state.data.fill_(float("nan"))
        other.done = [length]
        import_live(spec, other.state, other.batch([0]), rows)
        for machine in (source, other):
            machine.feed([spec.window])
        new = spec.visible_rows(length + spec.window) - spec.visible_rows(length)
        assert same(source.cache_of(0)[-new:], other.cache_of(0)[-new:])


def test_boundary_needs_no_rows_without_overlap_and_r_with_it():
    assert all(SPECS["hca"].live_start(n) == n for n in (128, 256, 1 << 20))
    assert all(n - SPECS["csa"].live_start(n) == 4 for n in (4, 8, 1 << 20))


def test_tags_notice_positions_that_only_rejected_drafts_reached():
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 40)], max_draft=7)
    machine.feed([16])
    machine.feed([8], drafts=7, junk=1e4, accept=1)
    machine.feed([1])
    machine.done = [20]  # rows 18 and 19 hold drafts that were taken back
    with pytest.raises(KvCondenseError, match="expected position 18"):
        machine.feed([1])


def test_tags_notice_that_a_slot_has_a_new_owner():
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 40)])
    machine.feed([15])
    machine.done = [0]
    machine.feed([2])
    machine.done = [15]
    with pytest.raises(KvCondenseError, match="expected position 8"):
        machine.feed([1])


def test_tags_notice_a_row_that_a_later_chunk_overwrote():
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 40)])
    machine.feed([20])
    machine.done = [13]  # rolled back further than the ring reaches
    with pytest.raises(KvCondenseError, match="state of request 0: expected position 8"):
        machine.feed([1])
    machine.state.tags = None  # the check is a choice
    machine.feed([1])
