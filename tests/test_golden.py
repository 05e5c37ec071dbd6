"""The golden run, its comparators, and the mutants that verify must catch."""

import re

import pytest
import torch

from kvcondense import KvCondenseError
from kvcondense.backends.reference import ReferenceBackend, Stages
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.formats import FORMATS
from kvcondense.golden.compare import allclose, bf16_allclose_or_ulp, ratio_allclose, row_bounds, rowwise
from kvcondense.golden.inputs import KINDS, GoldenCase, make_inputs
from kvcondense.golden.run import comparators, compare, run_backend, run_reference
from kvcondense.spec import Rounding
from kvcondense.stages import norm, pool, rope

OUTPUTS = ["kv", "kv_state", "score_state", "kv_cache", "kv_bytes"]


def verify(impl="reference", **case):
    inputs = make_inputs(GoldenCase(batch=2, **case))
    return compare(inputs, run_backend(inputs, impl), run_reference(inputs))


@pytest.mark.parametrize("rotate", [True, False], ids=["rotate", "plain"])
@pytest.mark.parametrize("history", [0, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_passes(kind, history, rotate):
    results = verify(kind=kind, history=history, rotate=rotate)
    assert list(results) == OUTPUTS
    assert all(r.passed for r in results.values()), results
    assert results["kv_state"].worst < 1e-5


@pytest.mark.parametrize("start_pos", [(0,), (126,), (127,), (129, 255), (400, 3)])
@pytest.mark.parametrize("kind", ["hca", "csa"])
def test_reference_passes_at_any_start(kind, start_pos):
    results = verify(kind=kind, start_pos=start_pos, history=130)
    assert all(r.passed for r in results.values()), results


@pytest.mark.parametrize(
    "stages",
    [Stages(pool=pool.online), Stages(rope=rope.selector), Stages(pool=pool.online, rope=rope.selector)],
    ids=["online", "selector", "both"],
)
def test_the_original_kernels_forms_pass(stages):
    """PR 270 pools online, last slot first, and rotates with selector matrices."""
    results = verify(ReferenceBackend("original", stages), kind="hca", history=300)
    assert all(r.passed for r in results.values()), results


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_rounding_is_noticed_by_the_case_itself(kind):
    results = verify(MUTANTS["no-bf16-before-norm"], kind=kind, history=600, rotate=False)
    assert not results["kv_cache"].passed
    assert "bit-equal" in results["kv_cache"].detail


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    "format", ["bf16", "fp4_v41_times", "fp4_v41_times_interleaved", "fp8_model1_via_fp4_v41_times"]
)
def test_latent_profile_rounds_the_norm_alone_and_quantises_the_fp32_row(impl, format):
    """vLLM's chain for V4.1; ``golden.pages`` gets the rows as the backend returned them."""
    results = verify(impl, kind="csa", history=40, rounding=Rounding.LATENT, rotate=False, format=format)
    assert all(r.passed for r in results.values()), results


@pytest.mark.parametrize("profile", Rounding)
def test_profiles_differ_where_they_say(profile):
    """Of a row that bf16 cannot hold: which stage changes it, and whether the cache's bytes are those of its bf16."""
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)) / 3
    unrounded = norm.rms_norm(x, torch.ones(512), 1e-6, Rounding.FUSED)
    n = norm.rms_norm(x, torch.ones(512), 1e-6, profile)
    assert torch.equal(n, n.bfloat16().float()) == profile.latent
    assert torch.equal(n, unrounded.bfloat16().float()) == (profile.latent and not profile.pooled)
    cos, sin = torch.full((40, 32), 0.6), torch.full((40, 32), 0.8)
    row = rope.pairwise(n, cos, sin, profile)
    assert torch.equal(row, row.bfloat16().float()) == profile.rotated
    fmt = FORMATS["fp4_v41_times"]
    stored = fmt.encode(row, exact=not profile.row)["values"]
    assert torch.equal(stored, fmt.encode(row.bfloat16())["values"]) == (profile is not Rounding.LATENT)


def test_fused_profile_passes_against_its_own_reference():
    results = verify(kind="csa", history=40, rounding=Rounding.FUSED, rotate=False)
    assert all(r.passed for r in results.values()), results


@pytest.mark.parametrize(("kind", "format"), [("hca", "fp8_model1"), ("csa", "mxfp8_v41_window")])
def test_quantised_values_are_compared_with_the_row_before(kind, format):
    results = verify(kind=kind, history=300, format=format)
    assert all(r.passed for r in results.values()), results
    saturated = verify(MUTANTS["scale-rounded-down"], kind=kind, history=300, format=format)
    assert not saturated["kv_cache"].passed
    assert not saturated["kv_bytes"].passed
    assert saturated["kv"].passed


def test_bytes_of_no_row_are_canaries():
    inputs = make_inputs(GoldenCase(kind="hca", batch=1, history=300, format="fp8_model1"))
    bytes_, expected = run_backend(inputs, "reference").kv_bytes
    assert torch.equal(bytes_, expected)
    assert (bytes_ == 0xA5).sum() > 29 * 584
    assert (bytes_[-100:] == 0xA5).all(), "32 rows of 584 bytes leave a tail"


def test_golden_inputs_are_laid_out_as_in_the_original():
    inputs = make_inputs(GoldenCase(kind="hca", history=0, batch=3))
    shapes = {
        name: list(getattr(inputs, name).shape) for name in ("x", "wkv", "ape", "hadamard", "kv_state", "kv_cache")
    }
    assert shapes == {
        "x": [3, 1, 4096],
        "wkv": [4096, 512],
        "ape": [128, 512],
        "hadamard": [512, 512],
        "kv_state": [3, 128, 512],
        "kv_cache": [3, 32, 512],
    }
    assert inputs.start_pos == [127] * 3
    assert inputs.even_select.dtype == torch.bfloat16
    assert inputs.even_select.sum(0).eq(1).all()
    assert inputs.score_state.eq(torch.finfo(torch.float32).min).all()
    assert inputs.cos[0].isfinite().all()
    assert inputs.cos[1].isnan().all()
    outputs = run_reference(inputs)
    assert outputs.kv_cache[:, 0].any(-1).all()
    assert not outputs.kv_cache[:, 1:].any()
    assert (outputs.kv_state != 0).any(-1).sum() == 3


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ({"kind": "mla"}, "kind"),
        ({"preset": "v5"}, "preset"),
        ({"preset": "v41"}, "config"),
        ({"start_pos": (4096,)}, "start_pos"),
        ({"start_pos": (-1,)}, "start_pos"),
        ({"history": -1}, "history"),
        ({"history": 5000}, "history"),
        ({"batch": 0}, "batch"),
    ],
)
def test_bad_cases_are_refused(case, name):
    with pytest.raises(KvCondenseError, match=f"^{name}"):
        make_inputs(GoldenCase(**case))


def test_the_list_of_mutants_covers_what_applies():
    assert len(MUTANTS) >= 50
    assert all(m.bug and m.name == n for n, m in MUTANTS.items())
    assert len({m.bug for m in MUTANTS.values()}) == len(MUTANTS)
    assert {int(re.match(r"B(\d+) \w", m.bug_class)[1]) for m in MUTANTS.values()} == set(range(1, 15))


@pytest.mark.parametrize("name", ["current-token-only", "uniform-average", "overlap-ignored", "scalar-gate"])
def test_one_step_from_an_empty_state_cannot_tell(name):
    """Why history matters: these pass the original's own test."""
    assert all(r.passed for r in verify(MUTANTS[name], kind="csa", history=0).values())
    assert not all(r.passed for r in verify(MUTANTS[name], kind="csa", history=300).values())


def bf16(*values):
    return torch.tensor(values, dtype=torch.bfloat16)


def test_comparators_accept_and_refuse():
    e = bf16(1.0, -2.0, 0.0, 100.0)
    assert allclose()(e, e).passed
    assert not allclose()(e + bf16(0, 0, 0.01, 0), e).passed
    step = e.clone().view(torch.int16)
    step[3] += 1
    step = step.view(torch.bfloat16)
    assert not allclose()(step, e).passed
    assert bf16_allclose_or_ulp(1)(step, e).passed
    step = step.view(torch.int16)
    step[3] += 1
    two = bf16_allclose_or_ulp(1)(step.view(torch.bfloat16), e)
    assert (two.passed, two.worst_ulp) == (False, 2)
    assert "first at 3" in two.detail
    across = bf16_allclose_or_ulp(2, atol=0.0, rtol=0.0)
    tiny = torch.tensor([1, -(2**15) + 1], dtype=torch.int16).view(torch.bfloat16)  # +-smallest subnormal
    assert across(tiny[:1], tiny[1:]).passed
    assert not bf16_allclose_or_ulp(1, atol=0.0, rtol=0.0)(tiny[:1], tiny[1:]).passed


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_comparators_refuse_what_is_not_finite(poison):
    e = torch.ones(1000)
    bad = e.clone()
    bad[7] = poison
    for comparator in (allclose(1e9, 1e9), ratio_allclose(1e9, 1e9, 0.5), rowwise(allclose(1e9, 1e9))):
        assert not comparator(bad[None], e[None]).passed
        assert not comparator(bad[None], bad[None]).passed
    assert not bf16_allclose_or_ulp(10**6)(bad.bfloat16(), e.bfloat16()).passed


def test_budget_is_counted_and_a_wrong_row_cannot_hide():
    e = torch.zeros(400, 512)
    a = e.clone()
    a[17] = 1.0  # one whole row of 400 is wrong
    assert ratio_allclose(max_error_ratio=0.005)(a, e).passed
    row = rowwise(ratio_allclose(max_error_ratio=0.005))(a, e)
    assert not row.passed
    assert "row 17" in row.detail
    a = e.clone()
    a[:, 0] = 1.0  # one element of each row: within 0.5 % everywhere
    assert rowwise(ratio_allclose(max_error_ratio=0.005))(a, e).passed


def test_shapes_and_dtypes_must_agree():
    e = torch.ones(2, 4)
    for comparator in (allclose(), ratio_allclose(), rowwise(allclose()), row_bounds(GoldenCase().spec)):
        assert not comparator(e[:1], e).passed
        assert not comparator(e.double(), e).passed
    assert not bf16_allclose_or_ulp()(e, e).passed


def test_row_bounds_allow_a_flip_and_no_wrong_element():
    inputs = make_inputs(GoldenCase(kind="hca", history=0, batch=1, rotate=False))
    compare_row = comparators(inputs)["kv"]
    row = run_reference(inputs).kv
    flipped = row.clone()
    flipped[0, 0, 3] = (row[0, 0, 3].bfloat16().view(torch.int16) + 1).view(torch.bfloat16).float()
    assert compare_row(flipped, row).passed
    flipped[0, 0, 3] = row[0, 0, 3] + 0.1
    assert not compare_row(flipped, row).passed
