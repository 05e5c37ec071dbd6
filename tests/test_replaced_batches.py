"""Batches whose fields were put in their place after ``build``: every eager door asks of them what ``build`` asks."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch

from kvcondense import KvCondenseError, RaggedBatch, condense, training
from kvcondense.errors import RangeError
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner
from kvcondense.snapshot import load_live, save_live
from test_doors import BACKENDS, BAD, BAD_PAGES, OTHER, SPEC, Setting

MORE = {
    "slot of nobody": {"state_slots": [0, -1]},
    "slots that are too few": {"state_slots": [0]},
    "start below": {"start_positions": [0, -2]},
    "tokens in reverse": {"query_start_loc": [0, 8, 4]},
    "tokens that begin late": {"query_start_loc": [1, 8, 16]},
    "drafts below": {"draft_rows": [0, -1]},
    "rows that are one": {"block_table": [[1], [1]]},
}
KINDS = [(k, b) for k in ("ring", "online") for b in BAD | MORE] + [("paged", b) for b in BAD_PAGES]


def planned(s, batch):
    return Plan.build(s.spec, batch, state_layout=s.state.layout, page_rows=4)


def by_build(s, batch):
    plan = planned(s, batch)
    return condense(s.spec, s.kv_score, s.weights, s.rope, batch, plan=plan, state=s.state, cache=s.cache, impl=s.impl)


def by_planner(s, batch):
    (plan,) = Planner([(s.spec, s.state.layout, 4)]).plans(batch)
    return condense(s.spec, s.kv_score, s.weights, s.rope, batch, plan=plan, state=s.state, cache=s.cache, impl=s.impl)


def without_plan(s, batch):
    return condense(s.spec, s.kv_score, s.weights, s.rope, batch, state=s.state, cache=s.cache, impl=s.impl)


DOORS = {f.__name__: f for f in (by_build, by_planner, without_plan)}


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("kind", "bad"), KINDS)
def test_replaced_fields_are_asked_for(kind, bad, door, impl):
    """Either an error and nothing written, or what a batch built of the same fields does."""
    s, other = (Setting(OTHER if kind == "online" else SPEC, kind, impl) for _ in range(2))
    change = {n: torch.tensor(v) for n, v in {**BAD, **BAD_PAGES, **MORE}[bad].items()}
    spoilt = replace(s.made()[0], **change)
    given = {f.name: getattr(spoilt, f.name) for f in fields(spoilt)}
    before = s.held()
    try:
        built = RaggedBatch.build(**{n: t if t is None else t.clone() for n, t in given.items()})
        wanted = DOORS[door](other, built).values
    except KvCondenseError:
        wanted = None
    if wanted is None:
        with pytest.raises(KvCondenseError):
            DOORS[door](s, spoilt)
        assert all(torch.equal(a, b) for a, b in zip(before, s.held(), strict=True))
    else:
        assert torch.equal(DOORS[door](s, spoilt).values, wanted)
        assert all(torch.equal(a, b) for a, b in zip(s.held(), other.held(), strict=True))
    assert (wanted is not None) == (bad == "slot of nobody")


def test_narrow_integers_are_widened():
    s = Setting()
    batch = s.made()[0]
    narrow = replace(batch, block_table=torch.tensor([[0], [1]], dtype=torch.int32))
    plan = planned(s, narrow)
    assert plan.given is narrow
    assert plan.batch.block_table.dtype is torch.int64
    assert torch.equal(plan.window_slot, s.plan.window_slot)
    assert planned(s, batch).batch is batch


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("door", ["by_build", "by_planner"])
def test_what_a_field_becomes_later_is_nothing_to_the_plan(door, impl):
    """Tensors of whoever replaced a field, filled with slots far away after the plan was made."""
    s, other = Setting(impl=impl), Setting(impl=impl)
    wanted = DOORS[door](other, other.made()[0]).values
    given = s.made()[0]
    batch = replace(given, **{f.name: t.clone() for f in fields(given) if (t := getattr(given, f.name)) is not None})
    make = {"by_build": planned, "by_planner": lambda s, b: Planner([(s.spec, s.state.layout, 4)]).plans(b)[0]}[door]
    plan = make(s, batch)
    assert plan.given is batch
    for field in fields(batch):
        t = getattr(batch, field.name)
        if t is not None:
            t.fill_(2**40)
    got = condense(s.spec, s.kv_score, s.weights, s.rope, batch, plan=plan, state=s.state, cache=s.cache, impl=s.impl)
    assert torch.equal(got.values, wanted)
    assert all(torch.equal(a, b) for a, b in zip(s.held(), other.held(), strict=True))


def test_what_a_batch_remembers_is_no_field():
    """``vars`` make another batch, and copies of any kind are batches that nobody vouches for."""
    batch = RaggedBatch.build([0, 4], start_positions=[0], state_slots=[1])
    assert batch.is_own
    for other in (
        RaggedBatch(**vars(batch)),
        copy.copy(batch),
        copy.deepcopy(batch),
        pickle.loads(pickle.dumps(batch)),
    ):
        assert not other.is_own
        assert vars(other).keys() == {f.name for f in fields(batch)}
        assert other.checked() is not other
    assert batch.owned().is_own
    assert batch.checked() is batch


@pytest.mark.parametrize("kind", ["ring", "online"])
def test_nobody_has_no_state(kind):
    s = Setting(OTHER if kind == "online" else SPEC, kind)
    without_plan(s, s.made()[0])
    payload = save_live(s.spec, s.state, RaggedBatch.at(8, state_slot=0))
    before = s.held()
    spoilt = replace(RaggedBatch.at(8, state_slot=0), state_slots=torch.tensor([-1]))
    with pytest.raises(RangeError):
        load_live(s.spec, s.state, spoilt, payload)
    assert all(torch.equal(a, b) for a, b in zip(before, s.held(), strict=True))


@pytest.mark.parametrize("bad", [b for b in BAD | MORE if "query_start_loc" in {**BAD, **MORE}[b]])
def test_training_asks_too(bad):
    s = Setting()
    batch = RaggedBatch.build([0, 8, 16], start_positions=[0, 0])
    spoilt = replace(batch, **{n: torch.tensor(v) for n, v in {**BAD, **MORE}[bad].items()})
    with pytest.raises(KvCondenseError):
        training.condense(s.spec, s.kv_score, s.weights, s.rope, spoilt)
