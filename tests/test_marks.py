"""Marks of state rows: compiled code leaves the tags that the state's own methods leave, and sees what they see."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import RaggedBatch, StatePool, marks
from kvcondense.backends.cpu import marking, native
from kvcondense.errors import StateMismatchError
from kvcondense.layout.plan import Plan
from machine import SPECS

pytestmark = pytest.mark.skipif(native.problem(native.MARKS) is not None, reason="compiled code cannot run here")
REQUESTS, PAGES, ROWS = 3, 12, 4


def pool(name, paged):
    spec = SPECS[name]
    return StatePool.paged(spec, PAGES * REQUESTS, ROWS) if paged else StatePool.ring(spec, REQUESTS, 19)


def batch_of(lengths, starts, drafts, paged):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    table = torch.arange(REQUESTS * PAGES).view(REQUESTS, PAGES)
    where = {"state_block_table": table} if paged else {"state_slots": [2, 0, 1]}
    drafts = [min(d, n) for d, n in zip(drafts, lengths, strict=True)]
    return RaggedBatch.build(offsets, start_positions=starts, draft_rows=torch.tensor(drafts), **where)


def around(spec, state, plan, monkeypatch, compiled):
    """A step's marks; tags before, while and after, or the error."""
    if not compiled:
        monkeypatch.setattr(marking, "mark", lambda *_: False)
    facts = plan.facts(spec)
    seen = []
    try:
        marks.check(spec, state, plan, facts)
        marks.begin(state, plan, facts)
        seen.append(state.tags.clone())
        marks.name(state, plan, facts)
        seen.append(state.tags.clone())
    except StateMismatchError as error:
        seen.append(str(error))
    return seen


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["csa", "r8", "r2-overlap"])
@given(
    steps=st.lists(
        st.tuples(*(st.tuples(st.integers(0, 6), st.integers(-5, 2), st.integers(0, 3)) for _ in range(REQUESTS))),
        min_size=1,
        max_size=6,
    )
)
def test_compiled_marks_are_those_of_the_state(name, paged, steps):
    """Histories of chunks, drafts and rollbacks (some of them too far): equal tags at every moment, equal errors."""
    spec, ends = SPECS[name], [0] * REQUESTS
    states = [pool(name, paged) for _ in range(2)]
    for step in steps:
        lengths, starts = [n for n, _, _ in step], [max(0, min(e + back, 40)) for e, (_, back, _) in
                                                    zip(ends, step, strict=True)]  # fmt: skip
        batch = batch_of(lengths, starts, [d for _, _, d in step], paged)
        plan = Plan.build(spec, batch, state_layout=states[0].layout)
        with pytest.MonkeyPatch.context() as patch:
            compiled = around(spec, states[0], plan, patch, True)
            plain = around(spec, states[1], plan, patch, False)
        assert len(compiled) == len(plain)
        for a, b in zip(compiled, plain, strict=True):
            assert a == b if isinstance(b, str) else torch.equal(a, b)
        if not isinstance(plain[0], str):
            ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    assert torch.equal(*(s.tags for s in states))


@pytest.mark.parametrize("spoil", [lambda t: t[:-1], lambda t: t.int(), lambda t: torch.stack([t, t], 1)[:, 0]])
def test_compiled_code_leaves_odd_tags_alone(spoil):
    """They may have been exchanged since the state was made: too few, of another type, with gaps."""
    spec, state = SPECS["csa"], pool("csa", False)
    plan = Plan.build(spec, batch_of([3, 3, 3], [0, 0, 0], [0, 0, 0], False), state_layout=state.layout)
    state.tags = spoil(state.tags)
    before = state.tags.clone()
    assert not marking.mark(marking.BEGIN, state, plan.facts(spec))
    assert torch.equal(state.tags, before)
