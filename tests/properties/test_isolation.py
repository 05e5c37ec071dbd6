"""I3, I4: a request's bytes depend on its own tokens alone; padding and slot -1 write nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from machine import PAIRS, PATTERN, SPECS, STATES, Machine, rope, same, tokens, weights


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
def test_slot_order_neighbours_and_padding_do_not_matter(name, kind, data):
    spec = SPECS[name]
    n = data.draw(st.integers(2, 4))
    lengths = [data.draw(st.integers(0, 2 * spec.window + 3)) for _ in range(n)]
    seed = data.draw(st.integers(0, 5))
    machine = Machine(spec, [tokens(spec, m, i) for i, m in enumerate(lengths)], seed=seed, **STATES[kind])
    if kind != "paged":
        machine.state.reset(range(n))
    first = [data.draw(st.integers(0, m)) for m in lengths]
    for counts in (first, [m - f for m, f in zip(lengths, first, strict=True)]):
        machine.feed(counts, order=data.draw(st.permutations(range(n))), padding=data.draw(st.integers(0, 5)))
    for q in range(n):
        same(machine.cache_of(q), machine.whole(q).cache_of(0))
        same(machine.live_of(q), machine.whole(q).live_of(0))


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[0] in ("csa", "hca", "r8-overlap", "r8")])
@pytest.mark.parametrize("length", ["0", "1", "r-1", "r", "r+1", "W", "W+1"])
def test_recycled_slot_keeps_nothing_of_its_last_occupant(name, kind, length):
    spec = SPECS[name]
    n = eval(length, {"r": spec.ratio, "W": spec.window})
    machine = Machine(spec, [tokens(spec, 2 * spec.window + 1)], **STATES[kind])
    machine.feed([2 * spec.window + 1])
    machine.sequences[0] = tokens(spec, n + spec.window, 8)
    machine.done = [0]
    machine.cache.rows.fill_(PATTERN)
    machine.feed([n])
    machine.feed([spec.window])
    assert same(machine.cache_of(0), machine.whole(0).cache_of(0))
    same(machine.live_of(0), machine.whole(0).live_of(0))


@pytest.mark.parametrize("state", ["ring", "paged"])
def test_nothing_but_owned_rows_is_written(state):
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 30, 0), tokens(spec, 30, 1)], paged=state == "paged")
    guard = torch.full_like(machine.state.data, 3.0)
    machine.state.data.copy_(guard)
    machine.feed([13, 0], padding=4)
    written = (machine.state.data != guard).any(-1).nonzero()[:, 0].tolist()
    live = range(spec.live_start(13), 13)
    if state == "ring":
        expected = sorted(int(machine.slots[0]) * 8 + p % 8 for p in live)
    else:
        expected = sorted(int(machine.state_table[0, p // 5]) * 5 + p % 5 for p in live)
    assert sorted(written) == expected
    rows = machine.cache.rows.flatten(0, 1)
    touched = (rows != PATTERN).any(-1).nonzero()[:, 0].tolist()
    assert sorted(touched) == sorted(int(machine.table[0, c // 3]) * 3 + c % 3 for c in range(3))


def test_inert_requests_and_slot_minus_one():
    spec = SPECS["csa"]
    state, cache = StatePool.ring(spec, 3), PagedCache.allocate(16, 2, 4)
    cache.rows.fill_(PATTERN)
    state.data.fill_(3.0)
    mapping = [-1] * 8 + [7] * 8 + [6] * 8
    batch = RaggedBatch.build([0, 8, 16, 24], start_positions=[0, 0, -1], state_slots=[1, -1, 2], slot_mapping=mapping)
    kv_score = torch.cat([tokens(spec, 8), torch.full((24, spec.projected), float("nan"))])
    rows = condense(spec, kv_score, weights(spec), rope(spec, 8), batch, state=state, cache=cache)
    assert rows.request.tolist() == [0, 0]
    assert torch.isfinite(rows.values).all()
    assert (cache.rows == PATTERN).all()
    assert (state.data[:8] == 3.0).all()
    assert (state.data[16:] == 3.0).all()
    assert (state.data[8:16] != 3.0).any()


def test_what_an_inert_request_carries_is_not_looked_at():
    batch = RaggedBatch.build([0, 2, 5], positions=[7, 8, -9, 40, 3], state_slots=[0, -1])
    assert batch.start_positions.tolist() == [7, -1]
    assert batch.active.tolist() == [True, False]


def test_slot_zero_is_a_legal_slot():
    spec = SPECS["csa"]
    cache = PagedCache.allocate(16, 1, 4)
    batch = RaggedBatch.build([0, 8], start_positions=[0], slot_mapping=[-1, -1, -1, 2, -1, -1, -1, 0])
    rows = condense(spec, tokens(spec, 8), weights(spec), rope(spec, 8), batch, cache=cache)
    assert torch.equal(cache.rows[0, 2], rows.values[0].bfloat16())
    assert torch.equal(cache.rows[0, 0], rows.values[1].bfloat16())


def test_packed_documents_equal_separate_ones():
    spec = SPECS["csa"]
    docs = [tokens(spec, n, n) for n in (5, 1, 12, 0, 9)]
    packed = RaggedBatch.build([0, 5, 6, 18, 18, 27], start_positions=[0] * 5)
    rows = condense(spec, torch.cat(docs), weights(spec), rope(spec, 16), packed)
    alone = [
        condense(spec, d, weights(spec), rope(spec, 16), RaggedBatch.build([0, len(d)], start_positions=[0])).values
        for d in docs
    ]
    assert torch.equal(rows.values, torch.cat(alone))
    assert rows.request.tolist() == [0, 2, 2, 2, 4, 4]
