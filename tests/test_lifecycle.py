"""Slots forgotten, forked, exported and imported: to other rings, pages, slots, dtypes and kinds of state."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

import sealing
from kvcondense import KvCondenseError, OnlineState, RaggedBatch, StatePool
from kvcondense.files import sealed
from kvcondense.layout.addresses import RingLayout
from kvcondense.snapshot import load_live, save_live
from machine import PAIRS, SPECS, STATES, Machine, same, tokens


def payload_of(machine, q=0):
    return save_live(machine.spec, machine.state, machine.at(q), ape=machine.weights.ape)


def put(machine, q, payload, **options):
    load_live(machine.spec, machine.state, machine.at(q), payload, ape=machine.weights.ape, **options)


@pytest.mark.parametrize(("name", "source"), PAIRS)
@given(data=st.data())
def test_exported_requests_go_on_elsewhere(name, source, data):
    """I8: the rows and the state are those of a request that never moved, wherever it went."""
    spec = SPECS[name]
    targets = [k for n, k in PAIRS if n == name and (source != "online" or k == "online")]
    target = data.draw(st.sampled_from(targets))
    moved, after = data.draw(st.integers(0, 2 * spec.window + 1)), data.draw(st.integers(0, spec.window + 2))
    sequence = tokens(spec, moved + after + 3)
    drafted = data.draw(st.integers(0, 3))
    here = Machine(spec, [tokens(spec, 5, 1), sequence], max_draft=3, **STATES[source])
    here.feed([3, moved])
    if drafted:  # accepted or not, drafts must not show in the payload
        here.feed([0, drafted], drafts=drafted, junk=float("nan"), accept=0)
    payload = payload_of(here, 1)
    there = Machine(spec, [sequence, tokens(spec, 9, 2)], max_draft=1, seed=3, **STATES[target])
    there.feed([0, 4])
    there.done[0] = moved
    put(there, 0, payload)
    bytes_before = len(payload)
    there.feed([after, 1])
    there.feed([1, 1])
    stayed = Machine(spec, [sequence], **STATES[target])
    stayed.feed([moved])
    rows = spec.visible_rows(moved)
    stayed.feed([after])
    stayed.feed([1])
    assert torch.equal(there.cache_of(0)[rows:], stayed.cache_of(0)[rows:])
    same(there.live_of(0), stayed.live_of(0))
    header, _ = sealing.of_payload(payload)
    size = (
        3 * 4 * spec.head_dim * bool(moved % spec.ratio)
        if source == "online"
        else 4 * spec.state_dim * spec.seed_rows(moved)
    )
    assert header["position"] == moved
    assert 0 <= bytes_before - size < 1200


AT_BOUNDARY = {"csa": 4, "indexer": 4, "hca": 0, "r2": 0, "r1": 0, "r8-overlap": 8}


@pytest.mark.parametrize(("name", "rows"), AT_BOUNDARY.items())
def test_rows_needed_at_a_window_boundary(name, rows):
    spec = SPECS[name]
    assert spec.seed_rows(0) == 0
    for window in (1, 2, 1000):
        assert spec.seed_rows(window * spec.ratio) == rows
    assert spec.seed_rows(spec.ratio * 5 + spec.ratio - 1) == rows + spec.ratio - 1
    with pytest.raises(KvCondenseError, match="position"):
        spec.seed_rows(-1)


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[0] in ("csa", "hca", "r1-overlap", "gateless")])
def test_a_forked_request_and_its_origin_go_on_apart(name, kind):
    spec = SPECS[name]
    a, b = tokens(spec, 3 * spec.window + 20), tokens(spec, 3 * spec.window + 20, 1)
    b[: spec.window + 1] = a[: spec.window + 1]
    machine = Machine(spec, [a, b], **STATES[kind])
    machine.feed([spec.window + 1, 0])
    if kind == "paged":
        machine.state.fork(machine.state_table[0], machine.state_table[1])
    else:
        machine.state.fork(machine.slots[:1], machine.slots[1:2].tolist())
    machine.done[1] = spec.window + 1
    for _ in range(3):
        machine.feed([3, 5])
    machine.feed([spec.window, spec.window + 3])
    shared = spec.visible_rows(spec.window + 1)
    for q in range(2):
        assert same(machine.cache_of(q)[shared:], machine.whole(q).cache_of(0)[shared:])
        same(machine.live_of(q), machine.whole(q).live_of(0))


@pytest.mark.parametrize("kind", ["ring", "online"])
def test_a_fork_takes_the_drafts_along(kind):
    """Forked right after a verify step: both may accept as many of its drafts as they like."""
    spec = SPECS["hca"]
    sequence = tokens(spec, 300)
    machine = Machine(spec, [sequence, sequence.clone()], max_draft=4, **STATES[kind])
    machine.feed([120, 0])
    machine.feed([4, 0], drafts=4)
    machine.state.fork(machine.slots[:1], machine.slots[1:2])
    machine.done = [121, 123]
    machine.sequences[0][121:] += 1
    machine.feed([20, 30])
    for q in range(2):
        assert same(machine.cache_of(q), machine.whole(q).cache_of(0))
        assert same(machine.live_of(q), machine.whole(q).live_of(0))


def test_a_reset_online_slot_holds_nothing():
    spec = SPECS["hca"]
    state = Machine(spec, [tokens(spec, 40)], max_draft=2, **STATES["online"])
    state.feed([9], drafts=2)
    slot, log = int(state.slots[0]), state.state.log.view(3, 2, -1)
    assert (int(state.state.folded[slot]), bool(log[slot].isnan().any())) == (7, False)
    state.state.reset([slot])
    assert int(state.state.folded[slot]) == -1
    assert state.state.acc[slot].isnan().all()
    assert log[slot].isnan().all()


@pytest.mark.parametrize(("name", "kind"), [("csa", "ring"), ("csa", "paged"), ("hca", "ring"), ("hca", "online")])
def test_a_reset_request_cannot_go_on(name, kind):
    spec = SPECS[name]
    machine = Machine(spec, [tokens(spec, 40), tokens(spec, 40, 1)], max_draft=2, **STATES[kind])
    machine.feed([9, 9])
    machine.state.reset(machine.state_table[0] if kind == "paged" else [int(machine.slots[0])])
    with pytest.raises(KvCondenseError, match=r"state of request 0: .*nothing that this request wrote"):
        machine.feed([1, 1])
    with pytest.raises(KvCondenseError, match="nothing that this request wrote"):
        payload_of(machine)
    machine.feed([0, 1])
    machine.done[0] = 0
    machine.feed([12, 0])
    same(machine.live_of(0), machine.whole(0).live_of(0))
    same(machine.live_of(1), machine.whole(1).live_of(0))


def test_bad_slots_are_refused():
    spec = SPECS["r8"]
    for state in (StatePool.ring(spec, 4), OnlineState.allocate(spec, 4, 2), StatePool.paged(spec, 4, 3)):
        for call, name in (
            (lambda s: s.reset([4]), "slots"),
            (lambda s: s.reset([-1]), "slots"),
            (lambda s: s.reset([0.5]), "slots"),
            (lambda s: s.reset(torch.zeros(1, 1, dtype=torch.int64)), "slots"),
            (lambda s: s.fork([0], [7]), "target"),
            (lambda s: s.fork([9], [0]), "source"),
            (lambda s: s.fork([0, 1], [2]), "target"),
            (lambda s: s.fork([0, 1], [2, 2]), "target"),
            (lambda s: s.fork([0, 1], [1, 2]), "target"),
        ):
            with pytest.raises(KvCondenseError, match=f"^{name}: expected"):
                call(state)
        state.reset([])
        state.fork([], [])


def standing(name="csa", kind="ring", n=9):
    machine = Machine(SPECS[name], [tokens(SPECS[name], 40)], max_draft=2, **STATES[kind])
    machine.feed([n])
    return machine


def retouched(payload, change):
    """The payload with an edited header or edited tensors, sealed again."""
    header, tensors = sealing.of_payload(payload)
    change(header, tensors)
    return sealed.pack(header, tensors)


FOREIGN = {
    "schema": (lambda h, t: h.update(schema=3), "payload schema"),
    "position": (lambda h, t: h.update(position=8), "payload position"),
    "spec": (lambda h, t: h["spec"].update(eps=1e-5), "payload spec"),
    "dtype": (lambda h, t: h.update(dtype="bfloat16"), "payload dtype"),
    "unknown dtype": (lambda h, t: h.update(dtype="int8"), "payload header"),
    "no rows": (lambda h, t: t.clear(), "payload: expected tensors"),
    "more tensors": (lambda h, t: t.update(x=torch.ones(1)), "payload: expected tensors"),
    "fewer rows": (lambda h, t: t.update(rows=t["rows"][1:].clone()), "payload rows"),
    "other rows": (lambda h, t: t.update(rows=t["rows"].double()), "payload rows"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_payloads_are_refused_and_nothing_is_written(case):
    change, message = FOREIGN[case]
    machine = standing()
    payload = payload_of(machine)
    target = standing(n=0)
    target.done[0] = 9
    before = target.state.data.view(torch.int32).clone()
    with pytest.raises(KvCondenseError, match=message):
        put(target, 0, retouched(payload, change))
    assert torch.equal(target.state.data.view(torch.int32), before)
    put(target, 0, retouched(payload, lambda h, t: None))
    same(target.live_of(0), machine.live_of(0))


@pytest.mark.parametrize("payload", [b"", b"12345678", b"\xff" * 40, save({"rows": torch.ones(1)})[:-2], save({})])
def test_bytes_that_are_no_payload_are_refused(payload):
    with pytest.raises(KvCondenseError, match="payload"):
        put(standing(), 0, payload)


def test_dtype_is_converted_only_if_asked():
    spec = SPECS["csa"]
    machine = standing()
    payload = payload_of(machine)
    target = Machine(spec, machine.sequences, dtype=torch.bfloat16)
    target.done[0] = 9
    with pytest.raises(KvCondenseError, match="convert=True"):
        put(target, 0, payload)
    put(target, 0, payload, convert=True)
    expected = load(payload)["rows"].bfloat16()
    ring = spec.required_ring_rows(0)
    rows = target.state.data.view(-1, ring, spec.state_dim)[int(target.slots[0])]
    assert torch.equal(rows[torch.arange(4, 9) % ring], expected)


def test_running_values_cannot_become_rows():
    online = standing("hca", "online")
    ring = standing("hca", "ring", 0)
    ring.done[0] = 9
    with pytest.raises(KvCondenseError, match="cannot go on from running values"):
        put(ring, 0, payload_of(online))


def test_one_request_at_a_time():
    machine = Machine(SPECS["csa"], [tokens(SPECS["csa"], 9)] * 2)
    with pytest.raises(KvCondenseError, match="one request"):
        save_live(machine.spec, machine.state, machine.batch([0, 0]))
    batch = RaggedBatch.at(7, state_slot=1)
    assert (batch.start_positions.tolist(), batch.state_slots.tolist(), batch.lengths.tolist()) == ([7], [1], [0])
    assert RaggedBatch.at(7, state_pages=[3, 1]).state_block_table.tolist() == [[3, 1]]
    assert machine.state.layout == RingLayout(4, 8)
    assert replace(batch, state_slots=None).state_slots is None
