"""States in host memory: requests that went there and came back, into other slots, compute what they would have."""

import random

import pytest
import torch

from kvcondense import KvCondenseError, OnlineState, RaggedBatch, StatePool
from kvcondense.errors import DeviceError, DtypeError, RangeError, ShapeError, StateMismatchError, UnsupportedError
from kvcondense.layout.hosted import HostedStates, Move, _Layer
from kvcondense.snapshot import save_live
from machine import SPECS, Machine, same, tokens

DRAFTS, LENGTH, REQUESTS = 3, 400, 4
LAYERS = {
    "0 csa": ("csa", {}),
    "0 indexer": ("indexer", {"dtype": torch.bfloat16}),
    "1 ring": ("hca", {}),
    "2 online": ("hca", {"online": True}),
    "3 online": ("r8", {"online": True}),
    "4 raw": ("csa", {}),
    "5 gateless": ("gateless", {}),
}


class Model:
    """A machine for each layer, all fed alike; request q has the same slot in all, and state on the host or not."""

    def __init__(self, impl="auto", layers=tuple(LAYERS), seed=0, length=LENGTH, host_slots=REQUESTS):
        self.machines = {}
        for name in layers:
            spec, options = LAYERS[name]
            sequences = [tokens(SPECS[spec], length, seed=97 * q + len(self.machines)) for q in range(REQUESTS)]
            m = Machine(SPECS[spec], sequences, max_draft=DRAFTS, impl=impl, seed=seed, **options)
            self.machines[name] = m
            if name == "4 raw":  # an engine's memory: kv and scores apart, gaps between slots, no tags
                slots, rows = m.state.layout.num_slots, m.state.layout.ring_rows
                storage = torch.full((slots, 2 * rows + 1, m.spec.width), float("nan"))
                kv, score = storage[:, :rows], storage[:, rows : 2 * rows]
                m.state = StatePool.wrap(kv, score=score, paged=False, raw_scores=True)
        self.hosted = HostedStates({name: (m.spec, m.state) for name, m in self.machines.items()}, host_slots)

    @property
    def any(self):
        return next(iter(self.machines.values()))

    def slot(self, q):
        return int(self.any.slots[q])

    def free(self):
        """A slot that no request has had."""
        return min(set(range(REQUESTS + 2)) - set(self.any.slots.tolist()))

    def feed(self, counts, **options):
        for m in self.machines.values():
            m.feed(counts, **options)

    def out(self, q, whole=False):
        self.hosted.swap_out(("request", q), self.slot(q), None if whole else self.any.done[q])

    def back(self, q, slot):
        self.hosted.swap_in(("request", q), slot)
        for m in self.machines.values():
            m.slots[q] = slot

    def check(self, other, away=()):
        for name, m in self.machines.items():
            for q in range(REQUESTS):
                same(m.cache_of(q), other.machines[name].cache_of(q))
                if q not in away:
                    same(m.live_of(q), other.machines[name].live_of(q))


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


@pytest.mark.parametrize("broken", ["0 csa", "1 ring", "5 gateless"])
def test_nothing_is_lost_when_a_move_is_broken_off(broken, monkeypatch):
    model, stays = Model("cpu"), Model("cpu")
    for m in (model, stays):
        m.feed([9, 130, 0, 0])
    real = _Layer.rows

    def rows(self, *arguments):
        if self.name == broken:
            raise KeyboardInterrupt
        return real(self, *arguments)

    def interrupted(move, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(_Layer, "rows", rows)
            with pytest.raises(KeyboardInterrupt):
                move(*arguments)

    interrupted(model.out, 0)
    assert model.hosted.requests == ()
    assert list(model.hosted.moves()) == []
    model.feed([1, 0, 0, 0], order=[0])
    stays.feed([1, 0, 0, 0], order=[0])
    model.out(0)
    interrupted(model.back, 0, model.slot(0))
    assert model.hosted.requests == (("request", 0),)
    for m in model.machines.values():
        if m.state.tags is not None:
            with pytest.raises(StateMismatchError):
                m.feed([1, 0, 0, 0], order=[0])
    model.back(0, model.slot(0))
    for m in (model, stays):
        m.feed([120, 1, 0, 0])
    model.check(stays)


def bits(model):
    pools = [p for name, m in model.machines.items() for p in (m.state, model.hosted.pool(name))]
    return [t.clone().view(torch.uint8) for p in pools for t in (*p.memory, p.tags) if t is not None]


def refused(model, *cases):
    """Every call raises its error, and all memory and all that is known is as before."""
    before = bits(model), model.hosted.requests
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
    after = bits(model), model.hosted.requests
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1] == after[1]
    assert list(model.hosted.moves()) == []


def test_errors_come_before_anything_is_written():
    model = Model("cpu", ("0 csa", "2 online"), host_slots=1)
    model.feed([9, 5, 7, 0])
    hosted, first, second = model.hosted, model.slot(0), model.slot(1)
    hosted.swap_out("a", first, 9)
    list(hosted.moves())
    refused(
        model,
        (RangeError, "request: expected one that is not away", lambda: hosted.swap_out("a", second, 5)),
        (RangeError, "host_slots: expected more than 1", lambda: hosted.swap_out("b", second, 5)),
        (RangeError, "request: expected one that is away, got 'b'", lambda: hosted.swap_in("b", first)),
        (RangeError, "expected one that is away", lambda: hosted.drop("b")),
        (RangeError, "expected one that is away", lambda: hosted.state_bytes("b")),
        (RangeError, "expected one that is away", lambda: hosted.host_slot("b")),
        (RangeError, "slot: expected values in 0..5", lambda: hosted.swap_in("a", 6)),
        (RangeError, "slot", lambda: hosted.swap_in("a", -1)),
        (DtypeError, "slot", lambda: hosted.swap_in("a", 1.0)),
        (StateMismatchError, "state of request 'a' in 0 csa", lambda: hosted.swap_in("a", second)),
        (RangeError, "layer", lambda: hosted.wait("1 csa")),
        (RangeError, "did you mean 0 csa", lambda: hosted.views("0 cs")),
        (RangeError, "layer", lambda: hosted.pool("none")),
        (DtypeError, "request: expected a key that can be hashed", lambda: hosted.swap_out([1], second)),
        (DtypeError, "request", lambda: hosted.swap_in(([],), second)),
    )
    hosted.drop("a")
    refused(
        model,
        (RangeError, "position", lambda: hosted.swap_out("b", second, -1)),
        (DtypeError, "position", lambda: hosted.swap_out("b", second, 5.0)),
        (RangeError, "slot", lambda: hosted.swap_out("b", 6)),
        (StateMismatchError, "'b' in 0 csa: expected position 5", lambda: hosted.swap_out("b", second, 6)),
        (StateMismatchError, "'b' in 0 csa: expected position 0", lambda: hosted.swap_out("b", first, 5)),
        (StateMismatchError, "'b' in 0 csa", lambda: hosted.swap_out("b", model.slot(2), 13)),
        (RangeError, "one that is away", lambda: hosted.swap_in("a", first)),
    )


def test_the_online_states_position_is_looked_at_too():
    model = Model("cpu", ("2 online",))
    model.feed([9, 0, 0, 0])
    with pytest.raises(StateMismatchError, match="in 2 online: expected a window folded so that position 10"):
        model.hosted.swap_out("a", model.slot(0), 10)


@pytest.mark.parametrize("field", ["data", "tags"])
def test_exchanged_memory_is_refused(field):
    model = Model("cpu", ("2 online", "0 csa"))
    model.feed([9, 0, 0, 0])
    model.out(0)
    model.back(0, model.slot(0))
    state = model.machines["0 csa"].state
    setattr(state, field, getattr(state, field).clone())
    with pytest.raises(StateMismatchError, match="pools.'0 csa'.: expected the tensors that it had"):
        model.out(0)
    assert model.hosted.requests == ()


def test_pools_that_cannot_be_moved_are_refused():
    csa, hca = SPECS["csa"], SPECS["hca"]
    ring = StatePool.ring(csa, 4)
    for error, match, pools in (
        (UnsupportedError, "StatePool.blocks", {"a": (csa, StatePool.paged(csa, 4, 8))}),
        (ShapeError, "channels", {"a": (SPECS["gateless"], ring)}),
        (RangeError, "ring_rows", {"a": (csa, StatePool.ring(csa, 4, 2))}),
        (UnsupportedError, "overlap", {"a": (csa, OnlineState.allocate(hca, 4))}),
        (KvCondenseError, "memory of", {"a": (csa, ring), "b": (csa, ring)}),
        (DeviceError, "one device", {"a": (csa, ring), "b": (csa, StatePool.ring(csa, 4, device="meta"))}),
        (DtypeError, "a spec and a pool", {"a": ring}),
        (DtypeError, "CompressorSpec", {"a": (ring, csa)}),
        (DtypeError, "layer", {1: (csa, ring)}),
        (RangeError, "at least one", {}),
        (DtypeError, "pools", [(csa, ring)]),
    ):
        with pytest.raises(error, match=match):
            HostedStates(pools, 2)
    with pytest.raises(RangeError, match="host_slots"):
        HostedStates({"a": (csa, ring)}, 0)


class Streams:
    """Stands in for torch.cuda: what is asked of streams and events, in order, and copies' targets between."""

    def __init__(self):
        self.said = []
        self.current, self.own = Stream(self, "current"), Stream(self, "own")

    def current_stream(self, device):
        assert device.type == "cpu"
        return self.current

    def stream(self, stream):
        assert stream is self.own
        return self

    def __enter__(self):
        self.said.append("on own")

    def __exit__(self, *error):
        self.said.append("off own")


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name, self.events = streams, name, 0

    def wait_stream(self, other):
        self.streams.said.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.streams.said.append(f"{self.name} waits for event {event.number}")

    def record_event(self):
        self.events += 1
        self.streams.said.append(f"event {self.events}")
        return Event(self.streams, self.events)


class Event:
    def __init__(self, streams, number):
        self.streams, self.number = streams, number

    def synchronize(self):
        self.streams.said.append(f"host waits for event {self.number}")


def test_on_an_accelerator_copies_have_a_stream_and_each_layer_an_event(monkeypatch):
    """The order of what a device is told; that it does it, only a device shows."""
    model = Model("cpu", ("0 csa", "1 ring"))
    model.feed([6, 0, 0, 0])
    streams = Streams()
    monkeypatch.setattr(model.hosted, "_streams", streams)
    monkeypatch.setattr(model.hosted, "_stream", streams.own)
    real = _Layer.rows
    monkeypatch.setattr(_Layer, "rows", lambda self, *a: streams.said.append(self.name) or real(self, *a))
    told = ["own waits for current", "on own", "0 csa", "event 1", "1 ring", "event 2", "off own"]
    model.hosted.wait("1 ring")
    assert streams.said == [], "nothing has moved"
    model.out(0)
    assert streams.said == told
    streams.said.clear()
    model.hosted.wait("0 csa")
    moves = model.hosted.moves()
    assert next(moves).layer == "0 csa"
    assert streams.said == ["current waits for event 1", "host waits for event 1"]
    streams.said.clear()
    model.back(0, model.slot(0))
    model.hosted.wait("1 ring")
    assert streams.said == [*told[:3], "event 3", "1 ring", "event 4", "off own", "current waits for event 4"]
