"""The ends of every range: nothing at all, one token, the last position, and a state in bf16."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import ModelConfig, OnlineState, PagedCache, RaggedBatch, RopeTable, StatePool, condense
from kvcondense.golden.decode import DecodeCompressor
from kvcondense.layout.snapshot import import_live
from kvcondense.snapshot import load_live, save_live
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.stages import pool, window
from machine import PAIRS, SPECS, STATES, Machine, same, tokens, weights


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_nothing_to_do_changes_nothing(name, kind):
    spec = SPECS[name]
    machine = Machine(spec, [tokens(spec, 9), tokens(spec, 9, 1)], **STATES[kind])
    machine.feed([5, 3])
    live, cache = [machine.live_of(q).clone() for q in range(2)], machine.cache.data.clone()
    assert machine.feed([0, 0]).values.shape == (0, spec.head_dim)
    assert machine.feed([0, 0], padding=3).window.tolist() == []
    empty = replace(machine.batch([0, 0]), query_start_loc=torch.zeros(1, dtype=torch.int64))
    fields = ("start_positions", "draft_rows", "state_slots", "state_block_table", "block_table")
    empty = replace(empty, **{f: None if getattr(empty, f) is None else getattr(empty, f)[:0] for f in fields})
    rows = condense(
        spec, tokens(spec, 0), machine.weights, machine.rope, empty, state=machine.state, cache=machine.cache
    )
    assert rows.values.shape == (0, spec.head_dim)
    assert torch.equal(machine.cache.data, cache)
    for q in range(2):
        same(machine.live_of(q), live[q])


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_prompts_of_one_token_beside_empty_ones(name, kind):
    spec = SPECS[name]
    lengths = [1, 0, spec.ratio, 1]
    machine = Machine(spec, [tokens(spec, n + spec.window, q) for q, n in enumerate(lengths)], **STATES[kind])
    machine.feed(lengths)
    machine.feed([spec.window] * 4)
    for q in range(4):
        same(machine.cache_of(q), machine.whole(q).cache_of(0))
        same(machine.live_of(q), machine.whole(q).live_of(0))


@pytest.mark.parametrize("kind", ["ring", "paged"])
def test_the_last_position_of_a_million(kind):
    """Position 1 048 575 completes row 262 143, rotated at 1 048 572; one more token has no position."""
    config = replace(ModelConfig.FLASH, head_dim=16, rope_dim=8, index_head_dim=16)
    spec = CompressorSpec.csa(config)
    last = 1 << 20
    table, w, kv_score = RopeTable.build(config, last), weights(spec), tokens(spec, 8)
    if kind == "ring":
        state, where = StatePool.ring(spec, 1), {"state_slots": [0]}
    else:
        pages = torch.zeros(1, last // 4, dtype=torch.int64)
        pages[0, -2:] = torch.tensor([1, 0])
        state, where = StatePool.paged(spec, 2, 4), {"state_block_table": pages}
    cache = PagedCache.allocate(16, 1, 64)
    blocks = torch.zeros(1, last // 4 // 64, dtype=torch.int64)

    def batch(start, count):
        return RaggedBatch.build([0, count], start_positions=[start], block_table=blocks, **where)

    # Rows of positions last - 8 .. last - 5, which the row of the last window reads.
    rows = torch.cat([kv_score[:4, : spec.width], kv_score[:4, spec.width :] + w.ape], dim=1)
    import_live(spec, state, batch(last - 4, 0), rows)
    got = condense(spec, kv_score[4:], w, table, batch(last - 4, 4), state=state, cache=cache)
    assert got.window.tolist() == [262_143]
    decode = DecodeCompressor(spec, w.ape, w.norm, table.cos, table.sin)
    for i in range(4):
        decode.step(kv_score[i, : spec.width], kv_score[i, spec.width :], last - 8 + i)
    for i in range(4, 8):
        expected = decode.step(kv_score[i, : spec.width], kv_score[i, spec.width :], last - 8 + i)
    torch.testing.assert_close(got.values[0], expected, rtol=2**-7, atol=1e-3)
    assert torch.equal(cache.rows[0, 262_143 % 64], got.values[0].bfloat16())


@pytest.mark.parametrize("name", ["csa", "hca", "r8"])
@given(seed=st.integers(0, 1000), gain=st.sampled_from([0.3, 1.0, 4.0]))
def test_the_error_of_a_bf16_state_is_bounded_as_stated(name, seed, gain):
    spec = replace(SPECS[name], rope_dim=0, rounding=Rounding.FUSED, has_ape=False)
    kv_score = tokens(spec, spec.window, seed) * gain

    def pooled(dtype):
        """P of the last window, from rows in the state's dtype."""
        rows = window.state_rows(spec, kv_score, None, torch.arange(kv_score.shape[0]), dtype)
        half = spec.ratio if spec.overlap else spec.window
        kv, z = rows[:, : spec.width], rows[:, spec.width :]
        d = spec.head_dim
        if spec.overlap:
            kv, z = (torch.cat([t[:half, :d], t[half:, d:]]) for t in (kv, z))
        return pool.two_pass(kv[None], z[None])[0], kv, z

    exact, kv, z = pooled(torch.float32)
    rounded, _, _ = pooled(torch.bfloat16)
    bound = kv.abs().amax(0) * (2**-9 + math.e ** (2 * 2**-9 * z.abs().amax(0)) - 1)
    assert ((rounded - exact).abs() <= bound * (1 + 1e-5) + 1e-7).all()
    assert (rounded != exact).any()


def test_a_snapshot_at_the_start_and_at_the_end_of_the_range():
    spec = SPECS["hca"]
    for position in (0, 128, (1 << 20) - 128):
        for source in (StatePool.ring(spec, 1), OnlineState.allocate(spec, 1)):
            at = RaggedBatch.at(position, state_slot=0)
            payload = save_live(spec, source, at)
            assert len(payload) < 1000, "nothing but a header"
            load_live(spec, source, at, payload)
