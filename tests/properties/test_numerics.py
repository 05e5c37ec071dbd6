"""I9 and I7: rows against a loop-form fp64 oracle that shares no code with the package, near and far positions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from kvcondense import CompressorSpec, ModelConfig, RaggedBatch, RopeTable, StatePool, condense
from kvcondense.golden.compare import row_bounds
from kvcondense.layout.snapshot import import_live
from kvcondense.spec import Rounding
from machine import CONFIG, SPECS, Machine, rope, tokens, weights


def run(spec, kv_score, w=None):
    n = kv_score.shape[0]
    batch = RaggedBatch.build([0, n], start_positions=[0])
    return condense(spec, kv_score, w or weights(spec), rope(spec, n), batch).values


def expect(spec, kv_score, w=None):
    w = w or weights(spec)
    return torch.from_numpy(
        oracle.rows(spec, kv_score.double().numpy(), w.ape, w.norm, theta=CONFIG.compress_rope_theta)
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("name", SPECS)
def test_rows_follow_the_oracle(name, scale):
    spec = SPECS[name]
    kv_score = tokens(spec, 5 * spec.window + 1) * scale
    actual, expected = run(spec, kv_score), expect(spec, kv_score)
    assert actual.shape[0] >= 5
    if spec.rounding is Rounding.FUSED:
        assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)
        return
    result = row_bounds(spec)(actual, expected.float())
    assert result.passed, result.detail
    if not spec.rotate:  # an unrotated row is bf16 everywhere, so bits can be compared
        assert result.equal >= 0.98


@pytest.mark.parametrize("name", SPECS)
def test_fp64_inputs_are_computed_in_fp64(name):
    spec = replace(SPECS[name], rounding=Rounding.FUSED, rope_dim=0)
    kv_score = tokens(spec, 3 * spec.window).double()
    actual = run(spec, kv_score)
    assert actual.dtype == torch.float64
    assert torch.allclose(actual, expect(spec, kv_score), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_tiny_inputs_feel_eps(eps):
    spec = replace(SPECS["csa"], eps=eps, rounding=Rounding.FUSED)
    kv_score = tokens(spec, 40)
    kv_score[:, : spec.width] *= 1e-11
    actual, expected = run(spec, kv_score), expect(spec, kv_score)
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-9)
    # mean(u^2) is about 1e-23: far below both, but 1e-20 leaves a visible row and 1e-6 does not.
    assert (actual.abs().max() > 1e-3) == (eps < 1e-10)


@pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
def test_score_offsets_cancel(offset):
    spec = replace(SPECS["r8"], has_ape=False)
    kv_score = tokens(spec, 16)
    kv_score[:, spec.width :] = torch.round(kv_score[:, spec.width :] * 8) / 8  # exact after adding the offset
    shifted = kv_score.clone()
    shifted[:, spec.width :] += offset
    assert torch.equal(run(spec, shifted), run(spec, kv_score))


def test_equal_scores_average_and_one_dominating_score_selects():
    spec = replace(SPECS["r8"], has_ape=False, rope_dim=0)
    kv_score = tokens(spec, 8)
    kv_score[:, spec.width :] = 0.25
    w = replace(weights(spec), norm=torch.ones(16))
    mean = kv_score[:, : spec.width].double().mean(0)
    assert torch.allclose(run(spec, kv_score, w).double()[0], mean / mean.square().mean().sqrt(), atol=1e-5)
    kv_score[3, spec.width :] = 1e4
    picked = kv_score[3, : spec.width].double()
    assert torch.allclose(run(spec, kv_score, w).double()[0], picked / picked.square().mean().sqrt(), atol=1e-5)


@pytest.mark.parametrize("score", [-3e38, -1e30, 0.0, 1e30])
def test_window_zero_survives_extreme_scores(score):
    spec = SPECS["csa"]
    kv_score = tokens(spec, 8)
    kv_score[:, spec.width :] = score
    rows = run(spec, kv_score)
    assert torch.isfinite(rows).all()
    flat = kv_score.clone()
    flat[:, spec.width :] = 0
    if abs(score) >= 1e30:  # the bias is lost beside such a score, so all candidates weigh the same
        w = replace(weights(spec), ape=torch.zeros(4, 32))
        assert torch.equal(rows, run(spec, flat, w))


@pytest.mark.parametrize("config", [ModelConfig.FLASH, ModelConfig.DEMO], ids=["yarn", "plain"])
@pytest.mark.parametrize("row", [0, 1, 2, 31, 32, 8191, 16384 + 5, 262143])
def test_row_rotates_at_its_first_position(config, row):
    """Row c of ratio 4 against a rotation formed by hand in fp32 at 4c, up to position 2^20."""
    spec = replace(CompressorSpec.csa(config), head_dim=64)
    plain = replace(spec, rope_dim=0)
    first = 4 * row
    kv_score = tokens(spec, 4, row)
    w = weights(spec)
    table = RopeTable.build(config, first + 4)

    def one(s, rope_table):
        state = StatePool.ring(s, 1)
        held = torch.randn(first - s.live_start(first), s.state_dim, generator=torch.Generator().manual_seed(1))
        start = RaggedBatch.build([0, 0], start_positions=[first], state_slots=[0])
        import_live(s, state, start, held)
        batch = RaggedBatch.build([0, 4], start_positions=[first], state_slots=[0])
        return condense(s, kv_score, w, rope_table, batch, state=state)

    rotated, unrotated = one(spec, table), one(plain, None)
    assert rotated.window.tolist() == [row]
    angle = np.float32(first) * by_hand(config)
    a, b = unrotated.values[0].double().numpy()[0::2], unrotated.values[0].double().numpy()[1::2]
    cos, sin = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
    expected = torch.from_numpy(np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(-1))
    assert torch.allclose(rotated.values[0].double(), expected, rtol=2**-8, atol=2e-3)


def by_hand(config):
    """Inverse frequencies from the formula of the specification, one at a time."""
    out = []
    for i in range(32):
        inv = np.float32(1) / np.float32(config.compress_rope_theta ** (2 * i / 64))
        if config.yarn:
            # floor(dim(32)) and ceil(dim(1)) for theta 160000 are 15 and 25, as published.
            ramp = np.float32(min(max((i - 15) / 10, 0), 1))
            inv = inv / np.float32(16) * ramp + inv * (1 - ramp)
        out.append(inv)
    return np.array(out, dtype=np.float32)


def test_latent_is_the_row_before_rope():
    spec = SPECS["r2"]
    batch = RaggedBatch.build([0, 8], start_positions=[0])
    out = condense(spec, tokens(spec, 8), weights(spec), rope(spec, 8), batch, latent=True)
    bare = condense(replace(spec, rope_dim=0), tokens(spec, 8), weights(spec), None, batch)
    assert torch.equal(out.latent, bare.values)
    assert not torch.equal(out.values, out.latent)


def test_strided_and_bf16_kv_score():
    spec = SPECS["csa"]
    kv_score = tokens(spec, 12).bfloat16()
    wide = torch.full((12, spec.projected + 7), float("nan"), dtype=torch.bfloat16)
    wide[:, 3 : 3 + spec.projected] = kv_score
    assert torch.equal(run(spec, wide[:, 3 : 3 + spec.projected]), run(spec, kv_score.float()))


def test_machine_rows_match_the_oracle_after_chunks():
    spec = SPECS["csa"]
    machine = Machine(spec, [tokens(spec, 30)])
    for n in (3, 9, 1, 17):
        machine.feed([n])
    result = row_bounds(spec)(machine.cache_of(0).view(torch.bfloat16), expect(spec, tokens(spec, 30)).bfloat16())
    assert result.passed, result.detail
