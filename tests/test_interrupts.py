"""A step that is broken off, at any line, is never taken for one that did not happen: the retry is right, or raises."""

import contextlib
import gc
import signal

import pytest
import torch

from interrupting import interrupted_at
from kvcondense import KvCondenseError, OnlineState, PagedCache, RaggedBatch, StatePool, compress, condense
from kvcondense.errors import StateMismatchError
from kvcondense.snapshot import load_live, save_live
from machine import SPECS, rope, tokens, weights


class Request:
    """Two requests in a ring that is as short as it may be, so that a step writes over what it reads."""

    def __init__(self, name, online, impl):
        self.spec, self.impl, self.at = SPECS[name], impl, 0
        self.weights = weights(self.spec, hidden=32)
        self.rope = rope(self.spec, 64)
        self.state = OnlineState.allocate(self.spec, 2) if online else StatePool.ring(self.spec, 2)
        for t in self.state.tensors.values():
            t.fill_(0)
        self.cache = PagedCache.allocate(self.spec.head_dim, 2, 64)
        self.x = [tokens(self.spec, 40, seed=s) for s in (1, 2)]

    def step(self, count):
        """``count`` tokens of each request."""
        end = self.at + count
        batch = RaggedBatch.build(
            [0, count, 2 * count], start_positions=[self.at] * 2, state_slots=[0, 1], block_table=[[0], [1]]
        )
        x = torch.cat([x[self.at : end] for x in self.x])
        condense(self.spec, x, self.weights, self.rope, batch, state=self.state, cache=self.cache, impl=self.impl)
        self.at = end


CASES = [("csa", False), ("r8", False), ("r8", True)]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "online"), CASES)
def test_an_interrupt_at_any_line_is_noticed_or_harmless(name, online, impl):
    right = Request(name, online, impl)
    for count in (11, 6, 7):
        right.step(count)
    lines, raised, went_on = 0, 0, 0
    while True:
        request = Request(name, online, impl)
        request.step(11)
        lines += 1
        try:
            with interrupted_at(lines) as seen:
                request.step(6)
        except KeyboardInterrupt:
            pass
        if seen[0] < lines:
            break
        try:
            if request.at == 11:
                request.step(6)
            request.step(7)
        except StateMismatchError as error:
            raised += "broken off" in str(error)  # or the step was done, up to its last line
            continue
        went_on += 1
        assert torch.equal(request.cache.data, right.cache.data), f"interrupted at line {lines}"
    assert lines > 100
    assert went_on > 50
    assert raised > 0 or online, "some line lies between the first row that is written and its name"


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_signal_while_kernels_run(impl):
    """Ctrl-C comes when the kernel has returned; what it has written is not taken for what was there."""
    right = Request("csa", False, impl)
    right.step(11)
    right.step(6)
    noticed = 0
    for delay in (1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 8e-3):
        request = Request("csa", False, impl)
        request.step(11)

        inside = [True]

        def stop(*_, inside=inside):
            if inside:  # once, and not when the step is over: what is raised behind it would end the session
                inside.clear()
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, stop)
        gc.disable()  # what is raised in a callback of the collector is lost
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            request.step(6)
            inside.clear()
        except KeyboardInterrupt:
            noticed += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.enable()
            signal.signal(signal.SIGALRM, before)
        if request.at == 11:
            try:
                request.step(6)
            except StateMismatchError:
                continue
        assert torch.equal(request.cache.data, right.cache.data)
    assert noticed


class Pool:
    """Two slots of 11 and 6 tokens, and what may happen to the second."""

    def __init__(self, kind):
        self.spec = SPECS["r8" if kind == "online" else "csa"]
        self.state = OnlineState.allocate(self.spec, 2) if kind == "online" else StatePool.ring(self.spec, 2)
        self.weights, self.rope = weights(self.spec), rope(self.spec, 64)
        for t in self.state.tensors.values():
            t.fill_(0)
        self.step(tokens(self.spec, 17, seed=1), [0, 0], [11, 6])
        self.payload = save_live(self.spec, self.state, RaggedBatch.at(11, state_slot=0))

    def step(self, x, starts, counts):
        batch = RaggedBatch.build(torch.tensor([0, *counts]).cumsum(0), start_positions=starts, state_slots=[0, 1])
        return condense(self.spec, x, self.weights, self.rope, batch, state=self.state).values

    def load(self):
        load_live(self.spec, self.state, RaggedBatch.at(11, state_slot=1), self.payload)

    def fork(self):
        self.state.fork([0], [1])

    def reset(self):
        self.state.reset([1])

    def goes_on(self, position):
        """Rows of the second slot from a position on; None if its tags say that it does not hold that."""
        try:
            return self.step(tokens(self.spec, 8, seed=position), [0, position], [0, 8])
        except StateMismatchError:
            return None


@pytest.mark.parametrize("kind", ["ring", "online"])
@pytest.mark.parametrize("what", ["load", "fork", "reset"])
def test_what_is_put_into_a_slot_is_not_taken_for_what_was_there(kind, what):
    whole = Pool(kind)
    old = Pool(kind).goes_on(6)
    getattr(whole, what)()
    new = whole.goes_on(11)
    assert (new is None) is (what == "reset")
    lines, seen = 0, [0]
    while seen[0] == lines:
        lines += 1
        for position, wanted in ((6, old), (11, new)):
            pool = Pool(kind)
            with contextlib.suppress(KeyboardInterrupt), interrupted_at(lines) as seen:
                getattr(pool, what)()
            found = pool.goes_on(position)
            assert found is None or torch.equal(found, wanted), f"interrupted at line {lines}"
            getattr(pool, what)()
            assert new is None or torch.equal(pool.goes_on(11), new), "a retry repairs it"
    assert lines > 5


@pytest.mark.parametrize("form", ["one launch", "tiles"])
def test_fused_steps_mark_what_they_write(form, monkeypatch):
    """The same from hidden states: a launch that is broken off leaves its rows without a name."""
    from kvcondense.backends.triton import BACKEND

    spec = SPECS["csa"]
    w = weights(spec, hidden=64)
    w = type(w)(norm=w.norm, ape=w.ape, w=w.w.bfloat16())
    state = StatePool.ring(spec, 1)
    state.data.zero_()
    x = torch.randn(24, 64).bfloat16()

    def step(start, count):
        batch = RaggedBatch.build([0, count], start_positions=[start], state_slots=[0])
        return compress(spec, x[start : start + count], w, rope(spec, 64), batch, state=state, impl="triton")

    step(0, 11)

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(BACKEND), "fused_forms", lambda *_: {form: None})
        patch.setattr(type(BACKEND), "run_fused", broken)
        with pytest.raises(KeyboardInterrupt):
            step(11, 6)
    with pytest.raises(KvCondenseError, match="broken off"):
        step(11, 6)
    step(0, 11)
    step(11, 6)
