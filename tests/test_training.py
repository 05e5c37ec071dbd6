"""Gradients of the compressor: by finite differences, beside eager autograd, in Triton, packed, and what is kept."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import RaggedBatch, condense, project, training
from kvcondense.bench import measure
from kvcondense.bench import training as bench
from kvcondense.cli import app
from kvcondense.errors import KvCondenseError, RangeError, UnsupportedError
from kvcondense.spec import Rounding
from kvcondense.training import cpu
from kvcondense.training import triton as gpu
from machine import SPECS, rope, weights

NAMES = list(SPECS)


def lengths(spec):
    """Documents with whole windows, an open one, none, and no tokens at all."""
    r = spec.ratio
    return [2 * r + 1, 0, 3 * r, max(r - 1, 1), r]


def problem(name, dtype=torch.float32, rounding=Rounding.FUSED):
    spec = replace(SPECS[name], rounding=rounding)
    counts = lengths(spec)
    starts = [0]
    for n in counts:
        starts.append(starts[-1] + n)
    gen = torch.Generator().manual_seed(4)
    kv_score = torch.randn(starts[-1] + 2, spec.projected, generator=gen, dtype=torch.float64).to(dtype)
    w = weights(spec, hidden=8)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    ape = None if w.ape is None else w.ape.to(wide)
    w = replace(w, ape=ape, norm=w.norm.to(wide))
    return spec, kv_score, w, RaggedBatch.build(starts, start_positions=[0] * len(counts))


def gradients(run, kv_score, w):
    """Rows, then gradients of kv_score, ape (or None) and norm, for one random gradient of the rows."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (kv_score, w.ape, w.norm)]
    out = run(leaves[0], replace(w, ape=leaves[1], norm=leaves[2]))
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    used = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, used, given)]


def eager(spec, kv_score, w, batch, table):
    """The definition, window by window, in torch operations."""
    rows, starts, r, d = [], batch.query_start_loc.tolist(), spec.ratio, spec.head_dim
    for begin, end in pairwise(starts):
        for c in range((end - begin) // r):
            kv, z = [], []
            for p in range(max((c + 1) * r - spec.window, 0), (c + 1) * r):
                half = slice(spec.width - d, None) if p >= c * r else slice(0, d)
                token = kv_score[begin + p]
                bias = 0 if w.ape is None else w.ape[p % r][half]
                kv.append(token[: spec.width][half])
                z.append((token[spec.width :][half] if spec.has_gate else torch.zeros_like(kv[-1])) + bias)
            pooled = (torch.softmax(torch.stack(z), 0) * torch.stack(kv)).sum(0)[None]
            rows.append(training.rows.finish(spec, pooled, w.norm, table, torch.tensor([c * r])))
    return torch.cat(rows)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_definition(name):
    spec, kv_score, w, batch = problem(name, torch.float64)
    table = rope(spec, 1024)
    ours = gradients(lambda x, w: training.condense(spec, x, w, table, batch).values, kv_score, w)
    expected = gradients(lambda x, w: eager(spec, x, w, batch, table), kv_score, w)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in NAMES if SPECS[n].ratio < 100])
def test_finite_differences_agree(name):
    spec, kv_score, w, batch = problem(name, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (kv_score, w.ape, w.norm) if t is not None]

    def run(x, *learned):
        ape = learned[0] if w.ape is not None else None
        return training.condense(spec, x, replace(w, ape=ape, norm=learned[-1]), rope(spec, 64), batch).values

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_inference(name, rounding):
    spec, kv_score, w, batch = problem(name, rounding=rounding)
    rows = training.condense(spec, kv_score, w, rope(spec, 1024), batch)
    expected = condense(spec, kv_score, w, rope(spec, 1024), batch, impl="reference")
    exact = rounding is Rounding.FUSED
    assert torch.allclose(rows.values, expected.values, rtol=1e-5 if exact else 2**-7, atol=1e-5 if exact else 1e-3)
    assert torch.equal(rows.window, expected.window)
    assert torch.equal(rows.request, expected.request)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_give_the_same_as_torch(name, rounding, monkeypatch):
    spec, kv_score, w, batch = problem(name, torch.float32, rounding)
    assert cpu.can_run(spec, kv_score)
    assert cpu.can_finish(spec, kv_score[:, : spec.head_dim].contiguous())

    def run(x, w):
        return training.condense(spec, x, w, rope(spec, 1024), batch).values

    found = gradients(run, kv_score, w)
    monkeypatch.setattr(cpu, "can_run", lambda *_: False)
    monkeypatch.setattr(cpu, "can_finish", lambda *_: False)
    expected = gradients(run, kv_score, w)
    loose = rounding is Rounding.REFERENCE  # a last bit of fp32 may decide a rounding to bf16
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6 if loose else 2e-5, atol=2e-2 if loose else 2e-5)


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_threads_and_strips_change_no_more_than_they_may(name, monkeypatch):
    """Threads change no bit; the strips' length changes the order of ape's and gamma's sums alone."""
    spec, w = SPECS[name], weights(SPECS[name])
    kv_score = torch.randn(5000, spec.projected, generator=torch.Generator().manual_seed(6))
    batch = RaggedBatch.build([0, 3001, 5000], start_positions=[0, 0])

    def run(x, w):
        return training.condense(spec, x, w, rope(spec, 4096), batch).values

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(run, kv_score, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    monkeypatch.setattr(cpu, "_STRIP_TOKENS", 1 << 20)
    monkeypatch.setattr(cpu, "_STRIP_ROWS", 1 << 20)
    whole = gradients(run, kv_score, w)
    assert torch.equal(whole[0], found[0][0])
    assert torch.equal(whole[1], found[0][1])
    for a, b in zip(whole[2:], found[0][2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_triton_gives_the_same(name, dtype, monkeypatch):
    pytest.importorskip("triton")
    spec, kv_score, w, batch = problem(name, dtype)

    def run(x, w):
        return training.condense(spec, x, w, rope(spec, 1024), batch).values

    expected = gradients(run, kv_score, w)
    monkeypatch.setattr(gpu, "_USE_INTERPRETER", True)
    monkeypatch.setattr(gpu, "_STRIP", 2)
    found = gradients(run, kv_score, w)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["csa", "hca", "r2"])
def test_a_step_from_hidden_states(name):
    """Gradients of x and W as those of a plain product; rows as those of ``compress``."""
    spec, _, w, batch = problem(name)
    x = torch.randn(int(batch.query_start_loc[-1]), 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    w = replace(w, w=w.w.float().requires_grad_())
    out = training.compress(spec, x, w, rope(spec, 1024), batch).values
    found = torch.autograd.grad(out.square().sum(), [x, w.w])
    kv_score = (x @ w.w.T).requires_grad_()
    out = training.condense(spec, kv_score, w, rope(spec, 1024), batch).values
    expected = torch.autograd.grad(out.square().sum(), [x, w.w])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    inference = condense(
        spec, project(spec, x.detach(), replace(w, w=w.w.detach()), impl="reference"), w, rope(spec, 1024), batch,
        impl="reference",
    )  # fmt: skip
    assert torch.allclose(out, inference.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_quantised_values_with_the_gradient_of_what_they_were(name):
    spec, kv_score, w, batch = problem(name)
    plain, quantised = (
        gradients(lambda x, w, f=form: training.condense(spec, x, w, rope(spec, 1024), batch, format=f).values,
                  kv_score, w)
        for form in (None, "bf16")
    )  # fmt: skip
    assert torch.equal(quantised[0], plain[0].bfloat16().float())
    for a, b in zip(quantised[1:], plain[1:], strict=True):
        assert torch.equal(a, b)


def test_the_reference_profiles_roundings_pass_gradients_on():
    spec, kv_score, w, batch = problem("csa", rounding=Rounding.REFERENCE)
    smooth = replace(spec, rounding=Rounding.FUSED)
    a, b = (
        gradients(lambda x, w, s=s: training.condense(s, x, w, rope(s, 64), batch).values, kv_score, w)
        for s in (spec, smooth)
    )
    assert not torch.equal(a[0], b[0])
    for x, y in zip(a[1:], b[1:], strict=True):
        assert float((x - y).abs().max() / y.abs().max()) < 0.02


def test_softmax_weights_are_not_kept():
    case = replace(next(iter(bench.CASES.values())), kind="csa", tokens=512)
    problem = bench.Problem.make(case)
    spec = case.spec
    ours, eagerly = (bench.saved_bytes(run, problem) for run in (bench.ours, bench.eager))
    row = 4 * case.windows * spec.head_dim
    assert ours < 8 * row
    assert eagerly > spec.window * row


def test_what_no_window_reads_has_no_gradient():
    spec, kv_score, w, batch = problem("csa")
    _, d_kv_score, *_ = gradients(lambda x, w: training.condense(spec, x, w, rope(spec, 64), batch).values, kv_score, w)
    r = spec.ratio
    assert not d_kv_score[2 * r].any(), "an open window"
    assert not d_kv_score[int(batch.query_start_loc[-1]) :].any(), "behind the last document"
    by_half = d_kv_score[r : 2 * r].view(r, 2, 2, spec.head_dim)
    assert not by_half[:, :, 0].any(), "the next window's half of a last window"
    assert by_half[:, :, 1].any()


def test_bad_input_is_an_error():
    spec, kv_score, w, batch = problem("csa")
    with pytest.raises(RangeError, match="start_positions"):
        training.condense(spec, kv_score, w, rope(spec, 64), RaggedBatch.build([0, 4], start_positions=[4]))
    with pytest.raises(UnsupportedError, match="format"):
        training.condense(spec, kv_score, w, rope(spec, 64), batch, format="fp8_tensor")
    with pytest.raises(KvCondenseError, match="kv_score"):
        training.condense(spec, kv_score[:, 1:], w, rope(spec, 64), batch)


def test_the_bench_compares_and_prints(tmp_path, monkeypatch):
    case = replace(bench.CASES["training 8192, ratio 4"], tokens=64)
    monkeypatch.setattr("kvcondense.cli.work.bench.TRAINING_CASES", {case.name: case})
    monkeypatch.setattr(measure.Rates, "measure", lambda: measure.Rates(memory=1e9, cache=1e10, gemm=1e11))
    file = tmp_path / "t.jsonl"
    result = CliRunner().invoke(app, ["bench", "--training", "--json", str(file)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["runner"] for r in records if "runner" in r] == ["kvcondense.training", "eager autograd"]
    assert "| forward and backward | kvcondense.training, ms |" in result.output
    monkeypatch.setattr(bench, "ours", lambda p: bench.eager(p) * 1.01)
    result = CliRunner().invoke(app, ["bench", "--training"])
    assert result.exit_code == 1
    assert "not timed" in result.output
