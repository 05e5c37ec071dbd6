"""The online state against the ring: a stated bound on P, nearly all row bits, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import CompressorSpec, KvCondenseError, ModelConfig, OnlineState, Plan, RaggedBatch, StatePool
from kvcondense.api import condense
from kvcondense.golden.compare import row_bounds
from kvcondense.layout.online import OnlineLayout
from machine import SPECS, STATES, Machine, rope, tokens, weights

NAMES = [n for n, s in SPECS.items() if not s.overlap]
BOUND = 3e-6  # of the largest |K| in the window, as the class says


def both(spec, kv_score, **changes):
    """Pooled values (norm and RoPE switched off as far as they go) of the ring's form and of the online form."""
    n = kv_score.shape[0]
    w, table = weights(spec), rope(spec, n)
    out = []
    for state in (StatePool.ring(spec, 1), OnlineState.allocate(spec, 1)):
        batch = RaggedBatch.build([0, n], start_positions=[0], state_slots=[0])
        out.append(condense(spec, kv_score, w, table, batch, state=state, **changes))
    return out


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000), gain=st.sampled_from([0.01, 1.0, 20.0]), offset=st.sampled_from([0.0, 1e4, -1e4]))
def test_pools_agree_within_the_stated_bound(name, seed, gain, offset):
    spec = replace(SPECS[name], has_ape=False, rope_dim=0)
    kv_score = tokens(spec, 3 * spec.ratio, seed)
    if spec.has_gate:
        kv_score[:, spec.width :] = kv_score[:, spec.width :] * gain + offset
    from kvcondense.stages import online, pool

    for window in range(3):
        part = kv_score[window * spec.ratio :][: spec.ratio]
        kv = part[:, : spec.width]
        score = part[:, spec.width :] if spec.has_gate else torch.zeros_like(kv)
        acc = torch.tensor([float("-inf"), 0.0, 0.0])[:, None].repeat(1, spec.head_dim)[None]
        for k, z in zip(kv, score, strict=True):
            acc = online.step(acc, k[None], z[None])
        expected = pool.two_pass(kv[None], score[None])
        delta = (acc[:, 2] / acc[:, 1] - expected).abs()
        assert delta.max() <= BOUND * kv.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_rings_but_for_flips_of_a_rounding(name):
    spec = replace(SPECS[name], head_dim=512, rope_dim=64)
    ring, online = (r.values for r in both(spec, tokens(spec, 4 * spec.ratio + 3)))
    assert ring.shape[0] >= 4
    assert row_bounds(spec, 0.99 if spec.rounding.value == "reference" else 0.0)(online, ring).passed


def test_scores_of_minus_infinity_have_no_weight():
    spec = SPECS["r8"]
    kv_score = tokens(spec, 16)
    kv_score[[0, 3, 9], spec.width :] = float("-inf")
    ring, online = (r.values for r in both(spec, kv_score))
    assert torch.isfinite(online).all()
    torch.testing.assert_close(online, ring, rtol=1e-5, atol=1e-6)


def test_sizes_are_the_published_ones():
    spec = CompressorSpec.hca(ModelConfig.FLASH)
    assert OnlineState.allocate(spec, 1).nbytes_per_slot == 6144 + 8
    assert 4 * spec.state_dim * spec.window == 524_288
    assert OnlineState.allocate(spec, 1, 4).nbytes_per_slot == 6144 + 8 + 4 * 4096


REFUSED = {
    "overlap": ("spec", lambda: OnlineState.allocate(SPECS["csa"], 1)),
    "no slots": ("num_slots", lambda: OnlineState.allocate(SPECS["hca"], 0)),
    "drafts": ("max_draft", lambda: OnlineState.allocate(SPECS["hca"], 1, -1)),
    "spec": ("spec", lambda: OnlineState.allocate("hca", 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_states_are_refused(case):
    name, make = REFUSED[case]
    with pytest.raises(KvCondenseError, match=f"^{name}: expected"):
        make()


def test_steps_that_the_state_cannot_take_are_refused_and_nothing_is_written():
    spec = SPECS["hca"]
    machine = Machine(spec, [tokens(spec, 400)], max_draft=3, **STATES["online"])
    machine.feed([130])

    def bits():
        state = machine.state
        return [t.clone() for t in (state.acc.view(torch.int32), state.folded, state.log.view(torch.int32), state.tags)]

    before = bits()
    for done, count, drafts, message in (
        (130, 4, 4, "state log_rows: expected at least 4"),
        (129, 1, 0, "state of request 0.*positions 130..130"),
        (131, 1, 0, "state of request 0.*positions 130..130"),
    ):
        machine.done = [done]
        with pytest.raises(KvCondenseError, match=message):
            machine.feed([count], drafts=drafts)
        for old, new in zip(before, bits(), strict=True):
            assert torch.equal(old, new)
    machine.done = [130]
    machine.feed([3], drafts=3, accept=1)
    for done in (134, 129):
        machine.done = [done]
        with pytest.raises(KvCondenseError, match=r"positions 130\.\.133"):
            machine.feed([1])
    machine.done = [131]
    machine.feed([2])
    overlapping = RaggedBatch.build([0, 2], start_positions=[0], state_slots=[0])
    with pytest.raises(KvCondenseError, match="windows overlap"):
        Plan.build(SPECS["csa"], overlapping, state_layout=OnlineLayout(1, 0))
    with pytest.raises(KvCondenseError, match="state_slots"):
        Plan.build(spec, RaggedBatch.build([0, 2], start_positions=[0]), state_layout=OnlineLayout(1, 0))


def test_a_window_boundary_needs_no_state():
    """Prefix reuse: a request can start at any multiple of the ratio in a slot that holds something else."""
    spec = SPECS["hca"]
    sequence = tokens(spec, 300)
    machine = Machine(spec, [sequence], **STATES["online"])
    machine.feed([77])
    machine.done = [0]
    assert machine.live_of(0).view(torch.float32)[:, 0].tolist() == [float("-inf"), 0.0, 0.0]
    machine.done = [128]
    machine.feed([140])
    whole = Machine(spec, [sequence], **STATES["online"])
    whole.feed([268])
    assert torch.equal(machine.cache_of(0)[1:], whole.cache_of(0)[1:])
    assert torch.equal(machine.live_of(0), whole.live_of(0))
