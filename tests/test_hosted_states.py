"""States in host memory: requests that went there and came back, into other slots, compute what they would have."""

import random

import pytest
import torch

from hosting import DRAFTS, LAYERS, LENGTH, REQUESTS, Model
from kvcondense import OnlineState, RaggedBatch
from kvcondense.errors import StateMismatchError
from kvcondense.layout.hosted import HostedStates, Move
from kvcondense.snapshot import save_live
from machine import SPECS, Machine, same, tokens


def wander(impl, seed, steps, layers=tuple(LAYERS), most=140, length=LENGTH):
    """Steps of random requests, which go away and come back between them, beside a model whose requests stay."""
    rng = random.Random(seed)
    here, stays = (Model(impl, layers, seed, length) for _ in range(2))
    away, moved, edges = set(), 0, 0
    for _ in range(steps):
        for q in range(REQUESTS):
            if q in away and rng.random() < 0.6:
                free = set(range(REQUESTS + 2)) - {here.slot(p) for p in range(REQUESTS) if p not in away}
                here.back(q, rng.choice(sorted(free)))
                away.remove(q)
            elif q not in away and rng.random() < 0.5:
                edges += here.any.done[q] % 128 == 0 < here.any.done[q]
                here.out(q, whole=rng.random() < 0.5)
                away.add(q)
                moved += 1
        order = [q for q in range(REQUESTS) if q not in away]
        rng.shuffle(order)
        left = {q: length - here.any.done[q] for q in order}
        counts, options = [0] * REQUESTS, {}
        if rng.random() < 0.5:
            drafts = rng.randint(1, DRAFTS)
            order = [q for q in order if left[q] > drafts]
            for q in order:
                counts[q] = 1 + drafts
            accepted = rng.randint(0, drafts)
            options = {"drafts": drafts, "accept": 1 + accepted}
            if accepted == 0:
                options["junk"] = rng.choice([float("nan"), 1e4])
        else:
            for q in order:
                edge = -here.any.done[q] % 128 or 128  # up to the next boundary of every ratio
                counts[q] = min(left[q], rng.choice([0, 1, 4, edge if edge < most else 5, rng.randint(1, most)]))
        if order:
            here.feed(counts, order=order, **options)
            stays.feed(counts, order=order, **options)
    here.check(stays, away)
    assert moved > steps // 2
    assert sum(here.any.done) > REQUESTS
    return here, edges


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_go_away_and_come_back_compute_what_they_would_have(seed):
    wander("cpu", seed, 30)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_on_other_backends(impl):
    wander(impl, 1, 9, layers=("0 csa", "1 ring", "3 online"), most=9, length=140)


def test_boundaries_are_met():
    assert sum(wander("cpu", seed, 30, layers=("0 csa", "2 online"))[1] for seed in range(8)) > 3


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 7, 8, 9, 127, 128, 129, 131, 132, 256, 260])
def test_every_edge_of_a_window(position, whole):
    """Out and in at a position, with drafts behind it, some of them accepted: the online log's rows go along."""
    here, stays = Model("cpu"), Model("cpu")
    accept = min(position, 2)
    for model in (here, stays):
        model.feed([position - accept, 9, 0, 0])
        model.feed([accept + 2, 1, 0, 0] if accept else [0, 1, 0, 0], order=[0], drafts=2, accept=accept)
    here.out(0, whole)
    here.back(0, here.free())
    for model in (here, stays):
        for count in (1, 2, 130):
            model.feed([count, 1, 0, 0])
    here.check(stays)


def test_a_request_that_is_away_cannot_be_stepped_and_its_old_slot_is_free():
    model = Model("cpu", ("0 csa", "2 online"))
    model.feed([9, 5, 7, 0])
    model.out(0)
    for m in model.machines.values():
        with pytest.raises(StateMismatchError, match="nothing that this request wrote"):
            m.feed([1, 0, 0, 0], order=[0])
    assert model.hosted.requests == (("request", 0),)
    for m in model.machines.values():
        m.slots[3] = m.slots[0]
    model.feed([0, 0, 0, 9], order=[3])  # another one takes the slot
    with pytest.raises(StateMismatchError, match=r"slot \d that holds positions of a request .pool.reset"):
        model.back(0, model.slot(3))
    model.back(0, model.free())
    assert model.hosted.requests == ()
    for m in model.machines.values():
        assert same(m.live_of(0), m.whole(0).live_of(0))


def test_slots_and_room_are_used_again():
    model, stays = Model("cpu", host_slots=1), Model("cpu")
    for m in (model, stays):
        m.feed([9, 130, 7, 3])
    for q in (0, 1, 2, 0):
        old = model.slot(q)
        model.out(q)
        for m in model.machines.values():
            m.state.reset([old])
        model.back(q, old)
    for m in (model, stays):
        m.feed([1, 1, 1, 1])
    model.check(stays)


def test_forked_requests_go_apart():
    model, stays = Model("cpu"), Model("cpu")
    for m in (model, stays):
        m.feed([9, 0, 0, 0])
        for machine in m.machines.values():
            machine.state.fork([m.slot(0)], [m.slot(1)])
            machine.done[1] = 9
            machine.sequences[1][:9] = machine.sequences[0][:9]
    model.out(0)
    model.feed([0, 7, 0, 0], order=[1])
    stays.feed([0, 7, 0, 0], order=[1])
    model.out(1, whole=True)
    slots = model.slot(0), model.slot(1)
    model.back(1, slots[0])
    model.back(0, slots[1])
    for m in (model, stays):
        m.feed([120, 120, 0, 0])
    for name, m in model.machines.items():
        for q in range(2):
            assert same(m.cache_of(q)[3:], stays.machines[name].cache_of(q)[3:]) or m.spec.ratio == 128
            same(m.live_of(q), stays.machines[name].live_of(q))


def test_whole_slots_leave_acceptance_open_and_positions_settle_it():
    """A slot that moved with its drafts goes on from any of them; one that moved at a position from there alone."""
    for accept in range(4):
        here, stays = Model("cpu"), Model("cpu")
        for m in (here, stays):
            m.feed([9, 0, 0, 0])
            m.feed([4, 0, 0, 0], drafts=3, accept=1, order=[0])
        here.out(0, whole=True)
        here.back(0, here.slot(0))
        for m in (here, stays):
            for machine in m.machines.values():
                machine.done[0] = 10 + accept
            m.feed([3, 0, 0, 0], order=[0])
        here.check(stays)
    here = Model("cpu", ("0 csa", "3 online"))
    here.feed([9, 0, 0, 0])
    here.feed([4, 0, 0, 0], drafts=3, accept=1, order=[0])
    here.out(0)
    here.back(0, here.slot(0))
    for m in here.machines.values():
        m.done[0] = 11
        with pytest.raises(StateMismatchError):
            m.feed([1, 0, 0, 0], order=[0])


@pytest.mark.parametrize("position", [8, 9, 11, 128, 133, 258])
def test_bytes_are_those_that_are_written(position):
    model = Model("cpu")
    model.feed([position, 3, 0, 0])
    hosted, written = model.hosted, {}
    for name in model.machines:
        for view in hosted.views(name).values():
            view.fill_(-7)
    model.out(0)
    for name in model.machines:
        views = hosted.views(name)
        written[name] = sum(int((v != -7).sum()) * v.element_size() for v in views.values())
        spec, state = model.machines[name].spec, model.machines[name].state
        expected = spec.seed_rows(position) * spec.state_dim * state.dtype.itemsize
        if isinstance(state, OnlineState):
            logged = min(position % spec.ratio, DRAFTS)
            expected = (12 * spec.head_dim + 8 + 4 * spec.state_dim * logged) * bool(position % spec.ratio)
        assert written[name] == expected
    assert written == {m.layer: m.bytes for m in hosted.moves()}
    assert sum(written.values()) == hosted.state_bytes(("request", 0))
    assert 0 < hosted.state_bytes(("request", 0)) < hosted.slot_bytes
    hosted.swap_out("whole", model.slot(1))
    assert hosted.state_bytes("whole") == hosted.slot_bytes
    assert hosted.slot_bytes == sum(
        t.nbytes // m.state.layout.num_slots for m in model.machines.values() for t in m.state.memory
    )


def test_views_are_the_hosts_memory_and_pools_like_the_devices():
    model = Model("cpu")
    model.feed([11, 0, 130, 0])
    model.out(2)
    slot = model.hosted.host_slot(("request", 2))
    for name, m in model.machines.items():
        views, pool = model.hosted.views(name), model.hosted.pool(name)
        assert views.keys() == m.state.tensors.keys()
        for part, t in pool.tensors.items():
            assert views[part].data_ptr() == t.data_ptr()
            assert views[part].shape[0] == REQUESTS
            assert not t.is_pinned()
        assert type(pool) is type(m.state)
        assert getattr(pool.layout, "raw_scores", None) is getattr(m.state.layout, "raw_scores", None)
        alone = m.whole(2)
        if not m.online and name != "4 raw" and m.state.dtype is torch.float32:
            at = RaggedBatch.at(130, state_slot=slot)
            assert save_live(m.spec, pool, at) == save_live(alone.spec, alone.state, alone.at(0))


def test_tags_name_what_has_moved_and_nothing_on_the_host_that_is_no_longer_there():
    model = Model("cpu", ("0 csa", "2 online"))
    for count in (3, 6):  # rows 0 .. 2 stay in the ring, and are not read again
        model.feed([count, 0, 0, 0])
    assert 0 in model.any.state.tags
    ring, online = (model.hosted.pool(name).tags for name in model.machines)
    model.out(0)
    assert sorted(ring.unique().tolist()) == [-1, 4, 5, 6, 7, 8]
    assert sorted(online.unique().tolist()) == [-1, 9]
    model.back(0, model.slot(0))
    assert bool((ring == -1).all())
    assert bool((online == -1).all())
    assert sorted(model.any.state.tags.unique().tolist()) == [-1, 4, 5, 6, 7, 8]


def test_moves_are_told_in_order():
    layers = ("0 csa", "2 online", "1 ring")
    model = Model("cpu", layers)
    model.feed([9, 5, 0, 0])
    model.out(1)
    model.out(0, whole=True)
    model.back(1, model.slot(1))
    found = list(model.hosted.moves())
    assert [m.number for m in found] == list(range(9))
    assert [m.layer for m in found] == list(layers) * 3
    told = [(m.request, m.direction, m.position) for m in found[::3]]
    assert told == [(("request", 1), "out", 5), (("request", 0), "out", None), (("request", 1), "in", 5)]
    assert [m.bytes for m in found[:3]] == [m.bytes for m in found[6:]]
    assert [m.host_slot for m in found] == [0] * 3 + [1] * 3 + [0] * 3
    assert list(model.hosted.moves()) == []
    model.out(1)
    assert [type(m) for m in model.hosted.moves()] == [Move] * 3


def test_records_that_nobody_reads_are_dropped_and_missed():
    m = Machine(SPECS["csa"], [tokens(SPECS["csa"], 9)])
    hosted = HostedStates({"a": (m.spec, m.state)}, 1, kept=3)
    m.feed([9])
    for _ in range(2):
        hosted.swap_out(0, int(m.slots[0]), 9)
        hosted.swap_in(0, int(m.slots[0]))
    assert [x.number for x in hosted.moves()] == [1, 2, 3]
