"""What HostedStates refuses, what is left where a move is broken off, and what a device is told in which order."""

import contextlib
import json

import pytest
import torch
from typer.testing import CliRunner

from hosting import Model
from interrupting import interrupted_at
from kvcondense import KvCondenseError, OnlineState, StatePool
from kvcondense.bench import measure
from kvcondense.bench.swap import Case
from kvcondense.cli import app
from kvcondense.errors import DeviceError, DtypeError, RangeError, ShapeError, StateMismatchError, UnsupportedError
from kvcondense.layout.hosted import HostedStates, _Layer
from machine import SPECS


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


@pytest.mark.parametrize("move", ["out", "in", "drop"])
def test_an_interrupt_at_any_line_leaves_a_state_in_one_place(move):
    """Where it is, all tags name it and no others do; moved again from there, it goes on as if nothing had been."""
    layers, q, ends = ("0 csa", "2 online"), ("request", 0), set()
    stays = Model("cpu", layers, length=40)
    for counts in ([9, 3, 0, 0], [20, 1, 0, 0]):
        stays.feed(counts)
    lines, seen = 0, [0]
    while seen[0] == lines:
        model = Model("cpu", layers, length=40)
        model.feed([9, 3, 0, 0])
        hosted, slot, lines = model.hosted, model.slot(0), lines + 1
        calls = {
            "out": lambda h=hosted, s=slot: h.swap_out(q, s, 9),
            "in": lambda h=hosted, s=slot: h.swap_in(q, s),
            "drop": lambda h=hosted: h.drop(q),
        }
        if move != "out":
            calls["out"]()
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(lines) as seen:
            calls[move]()
        away = hosted.requests == (q,)
        ends.add(away)
        for name, m in model.machines.items():
            tags = m.state.tags.view(m.state.layout.num_slots, -1)[slot]
            assert bool((tags >= 0).any()) is (not away and move != "drop"), f"line {lines}"
            assert bool((hosted.pool(name).tags >= 0).any()) is away, f"line {lines}"
        numbers = [moved.number for moved in hosted.moves()]
        assert numbers == sorted(set(numbers))
        hosted.swap_out("another", model.slot(1), 3)  # takes no room that is not free
        if not away and move == "drop":
            continue
        if not away:
            calls["out"]()
        calls["in"]()
        hosted.swap_in("another", model.slot(1))
        model.feed([20, 1, 0, 0])
        model.check(stays)
    assert ends == {True, False}
    assert lines > 15


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


def streamed(monkeypatch):
    """Two layers' states on a device that writes down what it is told."""
    model = Model("cpu", ("0 csa", "1 ring"))
    model.feed([6, 0, 0, 0])
    streams = Streams()
    monkeypatch.setattr(model.hosted, "_streams", streams)
    monkeypatch.setattr(model.hosted, "_stream", streams.own)
    return model, streams


def test_on_an_accelerator_copies_have_a_stream_and_each_layer_an_event(monkeypatch):
    """The order of what a device is told; that it does it, only a device shows."""
    model, streams = streamed(monkeypatch)
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


def test_what_an_interrupt_has_begun_to_copy_is_waited_for(monkeypatch):
    model, streams = streamed(monkeypatch)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(streams.own, "record_event", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.out(0)
    streams.said.clear()
    model.hosted.wait("0 csa")
    model.hosted.wait("1 ring")
    assert streams.said == ["current waits for own"], "the first layer has begun, the second has not"


def test_the_bench_compares_and_prints(tmp_path, monkeypatch):
    cases = {"tiny": Case("tiny", 2, 133, False), "small": Case("small", 2, 133, True)}
    monkeypatch.setattr("kvcondense.cli.work.bench.SWAPS", cases)
    monkeypatch.setattr(measure.Rates, "measure", lambda: measure.Rates(memory=1e9, cache=1e10, gemm=1e11))
    file = tmp_path / "t.jsonl"
    result = CliRunner().invoke(app, ["bench", "--swap", "--json", str(file)])
    assert result.exit_code == 0, result.output
    records = [r for r in map(json.loads, file.read_text().splitlines()) if "runner" in r]
    assert [r["runner"] for r in records] == ["out", "in", "plain copy"] * 2
    # 20 layers of ratio 128 with 5 rows of 1024 channels, 21 with 5 of 2048, and as many indexers of 512.
    assert records[0]["swapped_bytes"] == 2 * 4 * 5 * (20 * 1024 + 21 * 2048 + 21 * 512)
    assert records[3]["swapped_bytes"] == 2 * 4 * (20 * 128 * 1024 + 21 * 8 * (2048 + 512))
    assert [records[i]["of_plain"] for i in (2, 5)] == [1.0, 1.0]
    again = CliRunner().invoke(app, ["bench", "--swap", "--from", str(file)])
    assert "| tiny | out |" in again.output
    monkeypatch.setattr(HostedStates, "swap_in", lambda self, request, slot: self.drop(request))
    monkeypatch.setattr(HostedStates, "swap_out", lambda self, *a: real(self, a[0], a[1]))
    assert CliRunner().invoke(app, ["bench", "--swap"]).exit_code == 1


real = HostedStates.swap_out
