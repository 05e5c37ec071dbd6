"""I2: rejected drafts leave no trace, whatever they held and however wide the step was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from machine import PAIRS, SPECS, STATES, Machine, same, tokens

JUNK = (float("nan"), float("inf"), 1e4, -1e4)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
def test_verify_then_reject_equals_never_having_drafted(name, kind, data):
    spec = SPECS[name]
    width = data.draw(st.integers(1, 8), label="width")
    start = data.draw(st.integers(0, 3 * spec.window), label="committed tokens")
    rounds = data.draw(
        st.lists(st.tuples(st.integers(0, width), st.sampled_from(JUNK)), min_size=1, max_size=4), label="rejected"
    )
    total = start + sum(width - rejected for rejected, _ in rounds) + width + 2 * spec.window + 1
    other = tokens(spec, total + 9, 5)
    machine = Machine(spec, [tokens(spec, total), other], max_draft=width, **STATES[kind])
    machine.feed([start, start // 2])
    for rejected, junk in rounds:
        # A verify step of the first request beside a decode step of another one.
        before = machine.done[1]
        chunk = [width, 1]
        real = machine.sequences[0].clone()
        at = machine.done[0]
        machine.sequences[0][at + width - rejected : at + width] = junk
        machine.feed(chunk, drafts=width, accept=None)
        machine.sequences[0] = real
        machine.done = [at + width - rejected, before + 1]
    while machine.done[0] < total:
        machine.feed([min(data.draw(st.integers(1, spec.window + 2)), total - machine.done[0]), 0])
    for q in range(2):
        whole = machine.whole(q)
        same(machine.cache_of(q), whole.cache_of(0))
        same(machine.live_of(q), whole.live_of(0))
    assert machine.cache_of(0).numel() > 0


@pytest.mark.parametrize(("name", "kind"), [p for p in PAIRS if p[0] in ("csa", "hca", "r8") and p[1] != "paged"])
def test_exactly_the_required_rows_suffice(name, kind):
    spec = SPECS[name]
    for width in range(1, 9):
        lengths = list(range(3 * spec.ratio)) if spec.ratio < 100 else [0, 1, 127, 128, 129, 255, 256]
        sequences = [tokens(spec, length + width + spec.window) for length in lengths]
        machine = Machine(spec, sequences, max_draft=width, **STATES[kind])
        machine.feed(lengths)
        machine.feed([width] * len(lengths), drafts=width, junk=float("nan"), accept=0)
        machine.feed([spec.window] * len(lengths))
        for q in range(len(lengths)):
            whole = machine.whole(q)
            same(machine.cache_of(q), whole.cache_of(0))
            same(machine.live_of(q), whole.live_of(0))


def test_bound_is_the_published_one():
    for spec in SPECS.values():
        w = spec.window
        for v in range(1, 9):
            assert spec.required_ring_rows(v - 1) == max(w, v + w - 2)
            assert spec.required_ring_rows(v) == max(w, v + w - 1)


def test_rows_of_rejected_drafts_are_not_visible():
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 40)], max_draft=7)
    machine.feed([6])
    rows = machine.feed([7], drafts=6, junk=1e4, accept=1)
    assert rows.window.tolist() == [1, 2]
    assert spec.visible_rows(machine.done[0]) == 1
    machine.feed([20])
    assert same(machine.cache_of(0), machine.whole(0).cache_of(0))
    assert torch.isfinite(machine.cache_of(0).view(torch.bfloat16)).all()
