"""Forms of the kernels beside the reference, under the interpreter: all kinds are asked for, wrong rows are seen."""

import pytest

pytest.importorskip("triton")
from kvcondense.backends.triton import TritonBackend
from kvcondense.backends.triton.kernels import condense
from kvcondense.backends.triton.variants import variants
from kvcondense.bench.forms import COUNTS, Form, Job, check, forms

SOME = [
    "indexer-ring-fp32-16rows-mxfp4_indexer",
    "csa-paged-fp32-1048576rows-fp8_model1",
    "r2-ring-bf16-16rows-bf16",
    "r1-decode-ring-fp32-fp4_v41",
    "csa-together-paged-fp32-fp8_model1",
    "r2-tiles-ring-bf16-fp4_v41",
    "r1-project-stateless-fp32-rows",
    "csa-apart-fp32-16rows-fp8_model1",
    "indexer-decode-apart-bf16-mxfp4_indexer",
    "indexer-filled-fp32-16rows-mxfp4_indexer",
    "hca-online-fp32-1048576rows-fp8_model1",
]


def named(name):
    return next(f for f in forms() if f.variant.name == name)


def test_every_variant_is_a_form_or_finishes_no_row():
    asked = {f.variant for f in forms() if f.requests == COUNTS[0]}
    for v in set(variants()) - asked:
        assert v.form == "plan" or (v.kind, v.form, v.state) == ("hca", "decode", ""), v.name
    names = [f.name for f in forms()]
    assert len(names) == len(set(names))
    for count in COUNTS[1:]:
        assert {f.variant.kind for f in forms() if f.requests == count} == {"hca", "csa", "indexer", "r2", "r1"}


def test_every_form_and_state_can_be_set_up():
    """Whatever kind of state a variant gets: jobs are made, and those without a history stay so."""
    met = {(f.variant.form, f.variant.state, f.variant.state_type): f for f in forms() if f.requests == COUNTS[0]}
    assert {state for _, state, _ in met} == {"ring", "paged", "online", "apart", "filled", ""}
    for form in met.values():
        if form.variant.kind != "hca":  # whose histories take long
            job = Job(form.variant, 1, "cpu")
            assert bool(job.start) == bool(form.variant.state) == (job.state is not None), form.name
            assert not job.expected().isnan().any(), form.name


def test_a_state_that_is_wrong_is_told(monkeypatch):
    real = TritonBackend.run

    def wrong(self, step):
        real(self, step)
        step.state.memory[-1].mul_(1.5)

    monkeypatch.setattr(TritonBackend, "run", wrong)
    for name in ("csa-apart-fp32-16rows-fp8_model1", SOME[0]):
        record = check(Form(named(name).variant, 1), "cpu")
        assert not record["right"]
        assert record["bytes_equal"]


@pytest.mark.parametrize("name", SOME)
def test_a_form_gives_the_references_rows(name):
    record = check(Form(named(name).variant, 1), "cpu")
    assert record["right"], record
    assert record["off_by_rms"] < 0.1


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("variant", [v for v in variants() if v.windows], ids=lambda v: v.name)
def test_a_form_of_several_windows_pools_them_together(variant, requests, monkeypatch):
    pooled, real = [], condense.pool_together
    monkeypatch.setattr(condense, "pool_together", lambda *given: pooled.append(given) or real(*given))
    assert check(Form(variant, requests), "cpu")["right"]
    assert len(pooled) >= requests


def test_rows_and_bytes_that_are_wrong_are_told(monkeypatch):
    real = TritonBackend.run

    def wrong(self, step):
        real(self, step)
        step.rows.mul_(1.5)

    monkeypatch.setattr(TritonBackend, "run", wrong)
    record = check(Form(named(SOME[0]).variant, 1), "cpu")
    assert not record["right"]
    assert not record["bytes_equal"]
    assert record["off_by_rms"] > 0.1
