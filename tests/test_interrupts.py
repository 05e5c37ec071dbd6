"""A step that is broken off, at any line, is never taken for one that did not happen: the retry is right, or raises."""

import contextlib
import gc
import signal
import sys
from pathlib import Path

import pytest
import torch

import kvcondense
from kvcondense import KvCondenseError, OnlineState, PagedCache, RaggedBatch, StatePool, compress, condense
from kvcondense.errors import StateMismatchError
from machine import SPECS, rope, tokens, weights

HOME = str(Path(kvcondense.__file__).parent)


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


@contextlib.contextmanager
def interrupted_at(line):
    """KeyboardInterrupt before the ``line``-th line of the library that runs within; yields how many have run."""
    seen = [0]

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


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
