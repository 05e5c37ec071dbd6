"""What doors remember of weights, plans, states and caches: nothing in copies, nothing of memory that has moved."""

import copy
import pickle
import weakref
from dataclasses import fields, replace

import pytest
import torch

from guarded import guarded
from kvcondense import KvCondenseError, OnlineState, RaggedBatch, condense
from kvcondense.bound import bind
from machine import SPECS, rope, weights
from test_doors import Setting, by_bound, by_condense


@pytest.mark.parametrize("copy", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_doors_remember_nothing_in_copies_of_weights(copy):
    s = Setting()
    by_bound(s)
    other = copy(s.weights)
    assert set(vars(other)) == {"norm", "ape", "w"}
    assert torch.equal(other.norm, s.weights.norm)


@pytest.mark.parametrize("copy", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), replace])
def test_doors_remember_nothing_in_copies_of_plans(copy):
    """What compiled code keeps of a plan are addresses of its own tensors."""
    s = Setting()
    by_bound(s)
    other = copy(s.plan)
    assert s.plan.made
    assert not other.made
    assert set(vars(other)) - {"_made"} == {f.name for f in fields(s.plan)}
    assert torch.equal(by_bound(replace_plan(Setting(), other)).values, by_bound(Setting()).values)


def replace_plan(s, plan):
    """The setting with another plan."""
    s.made()
    s.plan = plan
    return s


def test_doors_look_again_at_a_plan_whose_memory_moved():
    s, other = Setting(), Setting()
    wanted = by_bound(other)
    by_bound(s)
    kept = [t for t in (*vars(s.plan).values(), *vars(s.plan.batch).values()) if isinstance(t, torch.Tensor)]
    places = [t.data_ptr() for t in kept]
    for t in kept:
        t.share_memory_()
    assert places != [t.data_ptr() for t in kept]
    again = Setting()
    rows = bind(again.spec, again.weights, again.rope, state=again.state, cache=again.cache).condense(
        again.kv_score, s.plan
    )
    assert torch.equal(rows.values, wanted.values)
    assert torch.equal(again.cache.data, other.cache.data)


def test_doors_look_again_at_weights_that_moved():
    s = Setting()
    bound = bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache)
    bound.condense(s.kv_score, s.made()[1])
    s.weights.norm.data = s.weights.norm.clone() * 2
    with pytest.raises(KvCondenseError, match="weights.*the memory that was bound"):
        bound.condense(s.kv_score, s.plan)
    assert by_condense(s).values.shape[0] == 4


def test_doors_hold_no_state_or_cache():
    """Weights live on; what was bound to them is freed when nobody else has it, at once."""
    s = Setting()
    by_condense(s)
    held = [weakref.ref(s.state), weakref.ref(s.cache)]
    w, s.state, s.cache, s.plan, s.batch = s.weights, None, None, None, None
    assert [ref() for ref in held] == [None, None]
    fresh = Setting()
    fresh.weights = w
    assert by_condense(fresh).values.shape[0] == 4


def test_doors_look_again_at_memory_that_moved():
    s = Setting()
    bound = bind(s.spec, s.weights, s.rope, state=s.state, cache=s.cache)
    bound.condense(s.kv_score, s.made()[1])
    held, s.cache.data = s.cache.data, s.cache.data[:1]
    with pytest.raises(KvCondenseError, match="the memory that was bound"):
        bound.condense(s.kv_score, s.plan)
    s.cache.data = held
    by_condense(s)
    s.state.data = torch.zeros(s.state.data.shape[0], s.spec.state_dim + 1)
    with pytest.raises(KvCondenseError, match="state"):
        by_condense(s)
    s.state.data = s.kv_score.new_zeros(1).expand(s.state.layout.num_rows, s.spec.state_dim)
    with pytest.raises(KvCondenseError, match="state|memory"):
        by_condense(s)


@pytest.mark.parametrize("impl", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("folded", [-(2**62), -1, 0, 5, 7, 13, 2**62])
def test_an_online_state_without_a_log_is_left_by_nobody(impl, folded):
    """Whatever it says of what it has folded, where no tags are there to know better."""
    spec = SPECS["r8"]
    fresh = OnlineState.allocate(spec, 2)
    state = OnlineState(guarded(fresh.acc.zero_()), guarded(fresh.folded.fill_(folded)), fresh.log, fresh.layout)
    batch = RaggedBatch.build([0, 9], start_positions=[6], state_slots=[1])
    args = spec, torch.randn(9, spec.projected), weights(spec), rope(spec, 64), batch
    rows = condense(*args, state=state, impl=impl)
    assert rows.values.shape[0] == 1
    assert state.folded.tolist() == [folded, 15]
