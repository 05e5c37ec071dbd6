"""The CPU kernels' numerics: the exponential, rows and states beside the reference's, bytes of every format."""

from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from kvcondense import (
    CompressorSpec,
    CompressorWeights,
    ModelConfig,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
    condense,
)
from kvcondense.backends.cpu.kernels import pool, simd
from kvcondense.formats import FORMATS
from kvcondense.layout.online import OnlineState
from kvcondense.numerics import ulp_distance
from kvcondense.spec import Rounding
from machine import SPECS, rope, tokens, weights
from unusual import UNUSUAL


@pytest.fixture(scope="module")
def exp():
    @numba.njit
    def run(x, out, n):
        for i in range(0, 4 * n, simd.BYTES):
            simd.store(out + i, pool.exp(simd.load(x + i)))

    def call(x):
        x = x.contiguous()
        out = torch.zeros_like(x)
        run(x.data_ptr(), out.data_ptr(), x.numel())
        return out

    return call


def exact(x):
    """e^x in fp64."""
    return torch.from_numpy(np.exp(x.double().numpy()))


def test_exp_is_as_near_as_weights_need_it_for_every_sampled_number(exp):
    gen = torch.Generator().manual_seed(0)
    near = torch.arange(1 << 20, dtype=torch.int32)
    x = torch.cat([
        -87.3 * torch.rand(1 << 22, generator=gen),
        87.3 * torch.rand(1 << 20, generator=gen),
        -torch.rand(1 << 20, generator=gen),
        -(2.0 ** (-30 * torch.rand(1 << 20, generator=gen))),
        # Neighbours of the points where the integer part of 8 x log2 e changes.
        (-(0.5 + (near >> 10)) * np.log(2) / 8).clamp(min=-87.3).float() * (1 + (near % 7 - 3) * 2.0**-23),
    ])  # fmt: skip
    assert x.numel() > 8_000_000
    true, got = exact(x), exp(x)
    error = (got.double() - true).abs() / true
    assert (error <= 2.0**-23 + x.abs() * 2.0**-26).all()
    # What a weight is off by, beside the largest one, which is 1 and whose neighbour below is 2^-24 away.
    assert (error * true)[x <= 0].max() <= 1.25 * 2.0**-24
    assert (got.float() != true.float()).any()
    assert ulp_distance(got, true.float())[x.abs() < 4].max() <= 2


def test_exp_at_its_ends(exp):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, -1e-45, -inf, nan, -88.1, -104.0, -1e30, -87.33, -87.6, -88.0, -3.4e38, 0, 0, 0, 0])
    got = exp(x)
    assert got[[0, 1, 2, 12]].tolist() == [1.0] * 4, "the first score has weight exactly 1"
    assert got[[3, 5, 6, 7, 11]].tolist() == [0.0] * 5, "minus infinity has weight exactly 0"
    assert torch.isnan(got[4])
    assert got[8] > 0
    assert ((got[8:11] - exact(x[8:11])).abs() < 2.0**-126).all()


def both(spec, kv_score, batch, make_state, *, format="bf16", **kwargs):
    """(rows, state bytes, cache bytes) of the reference and of the CPU backend, from equal states."""
    out = []
    for impl in ("reference", "cpu"):
        state = make_state()
        cache = PagedCache.allocate(spec.head_dim, 2, 300, format=format)
        table = torch.tensor([[1], [0]])
        rows = condense(
            spec, kv_score, weights(spec), rope(spec, 1024), replace(batch, block_table=table),
            state=state, cache=cache, impl=impl, **kwargs,
        )  # fmt: skip
        out.append((rows, state, cache))
    return out


def seeded(spec, dtype=torch.float32, online=False):
    """Two requests at positions 240 and 131 with earlier tokens in their state."""
    state = OnlineState.allocate(spec, 2, 3) if online else StatePool.ring(spec, 2, spec.window + 3, dtype=dtype)
    history = tokens(spec, 371, seed=3)
    batch = RaggedBatch.build([0, 240, 371], start_positions=[0, 0], state_slots=[0, 1])
    condense(spec, history, weights(spec), rope(spec, 1024), batch, state=state, impl="reference")
    return state


CALL = RaggedBatch.build([0, 40, 55], start_positions=[240, 131], state_slots=[0, 1], draft_rows=[0, 3])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["fp32", "bf16 state", "bf16 tokens", "fp16 tokens", "bf16 both", "strided"])
def test_rows_and_states_are_the_references(name, kind):
    spec = SPECS[name]
    dtype = torch.bfloat16 if kind in ("bf16 state", "bf16 both") else torch.float32
    x = tokens(spec, 55, seed=1)
    if "tokens" in kind or kind == "bf16 both":
        x = x.to(torch.float16 if "fp16" in kind else torch.bfloat16)
    if kind == "strided":
        x = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(1)[:, ::2]
        assert x.stride() == (2 * spec.projected, 2)
    (r, old, _), (c, new, _) = both(spec, x, CALL, lambda: seeded(spec, dtype))
    assert r.values.shape[0] > 0
    close(c.values, r.values, spec)
    # What is kept is stored, not computed: equal bits (but for memory that nobody wrote).
    assert torch.equal(old.data.nan_to_num(7), new.data.nan_to_num(7))
    assert not torch.isnan(new.data).all()


@pytest.mark.parametrize("name", ["hca", "r8", "r2"])
def test_online_rows_and_states_are_the_references(name):
    spec = SPECS[name]
    (r, old, _), (c, new, _) = both(spec, tokens(spec, 55, seed=1), CALL, lambda: seeded(spec, online=True))
    close(c.values, r.values, spec)
    torch.testing.assert_close(new.acc, old.acc, rtol=1e-5, atol=1e-5)
    assert torch.equal(new.folded, old.folded)
    assert torch.equal(new.log.nan_to_num(7), old.log.nan_to_num(7))


@pytest.mark.parametrize("name", ["hca", "csa", "r8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steepness", [10, 40, 1e4, 1e30])
def test_scores_that_are_far_apart(name, dtype, steepness):
    """Sums begin with a window's first score; later ones that exceed it, by a little or by all that fp32 holds."""
    spec = replace(SPECS[name], rounding=Rounding.FUSED)
    x = tokens(spec, 3 * spec.window + 1, seed=5)
    x[:, spec.width :] *= steepness * torch.rand(spec.width, generator=torch.Generator().manual_seed(1)) ** 4
    x[1, spec.width] = x[2, spec.width] = -float("inf")  # the first score of a window, or one of its own
    x[spec.ratio :: 3, spec.width + 1] = -float("inf")
    x = x.to(dtype)
    batch = RaggedBatch.build([0, x.shape[0]], start_positions=[0], state_slots=[0])
    rows = [
        condense(spec, x, weights(spec), rope(spec, 1024), batch, state=StatePool.ring(spec, 1), impl=impl).values
        for impl in ("cpu", "reference")
    ]
    assert not torch.isnan(rows[0]).any()
    torch.testing.assert_close(*rows, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("online", [True, False])
def test_scores_that_are_no_numbers_never_read_as_numbers(impl, online):
    """A score of +inf or NaN spoils its row, also where it is alone; one of -inf has no weight."""
    spec = replace(SPECS["r8"], rope_dim=0)
    x = tokens(spec, 16)
    score = x[:, spec.width :]
    score[3, 0], score[0, 1], score[2, 2], score[5, 3] = float("inf"), float("inf"), float("nan"), -float("inf")
    state = OnlineState.allocate(spec, 1) if online else StatePool.ring(spec, 1)
    batch = RaggedBatch.build([0, 16], start_positions=[0], state_slots=[0])
    w = weights(spec)
    got = condense(spec, x, w, None, batch, state=state, impl=impl)
    # The norm spreads a NaN over its row, and no further.
    assert torch.isnan(got.values[0]).all()
    assert not torch.isnan(got.values[1]).any()
    score[[3, 0, 2], [0, 1, 2]] = 0.0
    state.reset([0])
    got = condense(spec, x, w, None, batch, state=state, impl=impl)
    assert not torch.isnan(got.values).any()
    for token, channel in ((3, 0), (0, 1), (2, 2)):
        spoilt = x.clone()
        spoilt[token, spec.width + channel] = float("inf")
        state.reset([0])
        assert torch.isnan(condense(spec, spoilt, w, None, batch, state=state, impl=impl).values[0]).all()


@pytest.mark.parametrize("has_ape", [True, False])
def test_one_token_per_row_has_weight_one(has_ape):
    spec = replace(SPECS["r1"], rounding=Rounding.FUSED, rope_dim=0, has_ape=has_ape, has_gate=has_ape)
    x = tokens(spec, 6)
    batch = RaggedBatch.build([0, 6], start_positions=[0])
    w = CompressorWeights(norm=torch.ones(16), ape=torch.randn(1, 16) if has_ape else None)
    rows = [condense(spec, x, w, None, batch, impl=impl).values for impl in ("reference", "cpu")]
    assert torch.equal(*rows)


def close(actual, expected, spec):
    """Two bf16 steps or 1e-3 (contract I9); after a Hadamard, or without rounding, fp32 noise on top."""
    error = (actual - expected).abs()
    if spec.rounding is Rounding.FUSED:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    elif spec.rotate:
        assert (error <= 0.02 * expected.square().mean(-1, keepdim=True).sqrt()).all()
    else:
        steps = ulp_distance(actual.bfloat16(), expected.bfloat16())
        assert ((steps <= 2) | (error <= 1e-3 + 1e-3 * expected.abs())).all()
        assert (actual == expected).float().mean() > 0.99


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, strict) for name in FORMATS for strict in (False, True)), *((n, False) for n in UNUSUAL)],
)
def test_bytes_are_the_formats_own_from_equal_rows(name, strict):
    """Norm weights over 60 powers of two reach subnormal codes, floors of scales, ties and saturation."""
    fmt = (FORMATS | UNUSUAL)[name]
    d = fmt.head_dim or (128 if fmt.through else 512)
    rope_dim = fmt.rope_dim or 0
    spec = CompressorSpec(2, d, 1e-6, rope_dim, rounding=Rounding.FUSED, has_ape=False)
    table = RopeTable.build(ModelConfig.FLASH, 64) if rope_dim else None
    gen = torch.Generator().manual_seed(1)
    gamma = 2.0 ** (4 - (20 if strict else 60) * torch.rand(d, generator=gen))
    x = torch.randn(64, spec.projected, generator=gen)
    if not strict:
        x[10:14, ::3] *= 1e4
        x[30:34] = 0
        x[20, 5], x[21, 7], x[22, 9] = float("nan"), float("inf"), -float("inf")
        gamma[:9] = torch.tensor([1e3, 448.0, 1e30, -3.0, 0.0, -0.0, 6.0, 2.0**-30, 3e38])
    scale = (0.5 if strict else 0.01) if fmt.tensor_scale else None
    batch = RaggedBatch.build([0, 64], start_positions=[0], slot_mapping=torch.arange(64) // 2)
    expected, cache = (
        PagedCache.allocate(d, 4, 9 * fmt.tile, format=fmt, tensor_scale=scale, strict=strict) for _ in range(2)
    )
    for c in (expected, cache):
        c.fill(0xA5)
    rows = condense(spec, x, CompressorWeights(norm=gamma), table, batch, cache=cache, impl="cpu")
    expected.put(rows.slot, fmt.encode(rows.values, expected.tensor_scale))
    assert torch.equal(cache.data, expected.data)
    assert (cache.data != 0xA5).any()
    if expected.second is not None:
        assert torch.equal(cache.second.view(torch.uint8), expected.second.view(torch.uint8))
    if expected.scales is not None:
        assert torch.equal(cache.scales.nan_to_num(9), expected.scales.nan_to_num(9))
