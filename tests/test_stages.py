"""Each stage alone: forms that must agree, orders that must not matter, tables against transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import CompressorSpec, CompressorWeights, ModelConfig, RopeTable, project
from kvcondense.golden.decode import sylvester
from kvcondense.numerics import ordered_bits, round_bf16, tree_sum, ulp_distance
from kvcondense.rope_table import inverse_frequencies
from kvcondense.spec import Rounding
from kvcondense.stages import hadamard, norm, pool, rope


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [1, 2, 8, 128])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
def test_softmax_forms_agree(window, scale):
    kv, score = randn(5, window, 64), randn(5, window, 64, seed=1) * scale
    kv[0, : window // 2], score[0, : window // 2] = 0, float("-inf")
    two, run = pool.two_pass(kv, score), pool.online(kv, score)
    assert (two - run).abs().max() <= 1e-6
    assert torch.allclose(two.double(), (kv.double() * score.double().softmax(1)).sum(1), atol=2e-6)


@pytest.mark.parametrize("hidden", [[0, 1, 2, 3], [7], [0, 7], [0, 1, 2, 3, 7], [3], list(range(7))])
def test_scores_of_minus_infinity_have_no_weight(hidden):
    """Wherever they come from: positions before the first, or a gate that is -inf, the last candidate's too."""
    kv, score = randn(2, 8, 4), randn(2, 8, 4, seed=1)
    rest = [j for j in range(8) if j not in hidden]
    alone = pool.two_pass(kv[:, rest], score[:, rest])
    score[:, hidden] = float("-inf")
    for form in (pool.two_pass, pool.online):
        assert torch.allclose(form(kv, score), alone, atol=1e-6)


@pytest.mark.parametrize("rounding", Rounding)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-20, 1e-3, 1.0, 50.0]))
def test_rope_forms_agree_bitwise(rounding, seed, scale):
    n = round_bf16(randn(3, 80, seed=seed) * scale)
    angle = randn(3, 32, seed=seed + 1) * 100
    cos, sin = angle.cos(), angle.sin()
    a, b = rope.pairwise(n, cos, sin, rounding), rope.selector(n, cos, sin, rounding)
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))
    assert torch.equal(a[:, :16], n[:, :16])
    assert not torch.equal(a, n)


def test_rope_forms_agree_on_zeros_up_to_their_sign():
    n = torch.zeros(2, 64)
    n[:, ::3] = -0.0
    angle = randn(2, 32)
    pair = [f(n, angle.cos(), angle.sin(), Rounding.REFERENCE) for f in (rope.pairwise, rope.selector)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("d", [1, 2, 16, 128, 512])
def test_hadamard_is_sylvester_and_orthonormal(d):
    x, y = randn(4, d), randn(4, d, seed=1)
    assert torch.allclose(hadamard.hadamard(x), x @ sylvester(d), atol=1e-5)
    assert torch.allclose(hadamard.hadamard(hadamard.hadamard(x)), x, atol=1e-5)
    dots = [(a * b).sum(-1) for a, b in ((x, y), (hadamard.hadamard(x), hadamard.hadamard(y)))]
    assert torch.allclose(*dots, atol=1e-4)


def test_norm_rounding_points():
    pooled, gamma = randn(4, 32), 1 + randn(32, seed=1) * 0.2
    u = pooled.bfloat16().double()
    expected = gamma.double() * u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = norm.rms_norm(pooled, gamma, 1e-6, Rounding.REFERENCE)
    assert torch.equal(out, round_bf16(out))
    assert (ulp_distance(out.bfloat16(), expected.bfloat16()) <= 1).all()
    exact = pooled.double()
    expected = gamma.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm.rms_norm(pooled, gamma, 1e-6, Rounding.FUSED).double(), expected, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 512])
def test_tree_sum_sums_and_ignores_the_batch(n):
    x = randn(9, n)
    total = tree_sum(x)
    assert torch.allclose(total[:, 0].double(), x.double().sum(-1), atol=1e-5)
    assert all(torch.equal(tree_sum(x[i : i + 1]), total[i : i + 1]) for i in range(9))


def test_ordered_bits_are_monotone_over_all_finite_bf16():
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[torch.isfinite(values)]
    order = values.float().argsort(stable=True)
    keys = ordered_bits(values)[order]
    steps = keys.diff()
    assert values.shape[0] == 65280
    assert ((steps == 1) | ((steps == 0) & (values[order][1:] == 0))).all()
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    assert ulp_distance(zeros[:1], zeros[1:]).item() == 0


@pytest.mark.parametrize("config", [ModelConfig.FLASH, ModelConfig.DEMO], ids=["yarn", "plain"])
def test_tables_are_those_of_transformers_bit_for_bit(config):
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    y = config.yarn
    parameters = {"rope_type": "default"}
    if y:
        parameters = {
            "rope_type": "yarn",
            "factor": y.factor,
            "original_max_position_embeddings": y.original_max_positions,
            "beta_fast": y.beta_fast,
            "beta_slow": y.beta_slow,
        }
    theirs = modeling.DeepseekV4RotaryEmbedding(
        modeling.DeepseekV4Config(
            compress_rope_theta=config.compress_rope_theta,
            rope_parameters=parameters,
            max_position_embeddings=config.max_positions,
        )
    )
    last = config.max_positions - 1
    positions = torch.tensor([0, 1, 2, 31, 32, 127, 4095, *([65535, 65536, 131072, last] if y else [])])
    cos, sin = theirs(torch.zeros(1), positions[None], layer_type="compress")
    table = RopeTable.build(config)
    ours = table.rows(positions)
    assert table.cos.shape == (config.max_positions, 32)
    # Above the ramp transformers forms 1 / (16 f) where DeepSeek forms (1 / f) / 16: at most an ulp, below 1e-6 rad.
    exact = inverse_frequencies(config) == theirs.compress_inv_freq
    assert exact[:16].all()
    for a, b in ((ours[0], cos[0]), (ours[1], sin[0])):
        assert torch.equal(a[:, exact], b[:, exact])
        assert torch.allclose(a[:10], b[:10], atol=1e-5)
    assert exact.sum() >= 16


def test_yarn_ramp_of_flash_runs_from_15_to_25():
    config = ModelConfig.FLASH
    plain = inverse_frequencies(replace(config, yarn=None))
    ratio = inverse_frequencies(config) / plain
    assert torch.equal(ratio[:16], torch.ones(16))
    assert torch.allclose(ratio[25:], torch.full((7,), 1 / 16))
    assert ((ratio[16:25] < 1) & (ratio[16:25] > 1 / 16)).all()


@pytest.mark.parametrize("length", [1, 5, 4096, 100_001])
def test_table_rows_do_not_depend_on_the_tables_length(length):
    table, whole = RopeTable.build(ModelConfig.FLASH, length), RopeTable.build(ModelConfig.FLASH, 1 << 17)
    assert torch.equal(table.cos, whole.cos[:length])
    assert torch.equal(table.sin, whole.sin[:length])


def test_fp64_angles_would_not_do():
    table = RopeTable.build(ModelConfig.FLASH)
    p = 1_000_003
    angle = p * inverse_frequencies(ModelConfig.FLASH).double()
    assert (table.cos[p].double() - angle.cos()).abs().max() > 1e-3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("hidden", "width"), [(32, 16), (256, 512), (24, 40), (4096, 128)])
def test_projection_of_a_token_does_not_depend_on_its_batch(hidden, width, threads):
    spec = CompressorSpec(ratio=4, head_dim=width, eps=1e-6, rope_dim=0)
    weights = CompressorWeights(norm=torch.ones(width), w=randn(2 * width, hidden).bfloat16())
    x = randn(150, hidden, seed=2).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = project(spec, x, weights)
        for start, stop in ((0, 1), (3, 70), (63, 65), (64, 128), (149, 150), (0, 64), (7, 7)):
            assert torch.equal(project(spec, x[start:stop], weights), whole[start:stop])
    finally:
        torch.set_num_threads(before)
    exact = x.double().numpy() @ weights.w.double().numpy().T
    assert np.abs(whole.numpy() - exact).max() <= 1e-5 * np.abs(exact).max()
    assert torch.allclose(project(spec, x, weights, tile=None), whole, rtol=1e-4, atol=1e-4)
