"""Inert and empty documents and padding in training: rows and gradients are those without them, bit for bit."""

from dataclasses import replace

import pytest
import torch

from kvcondense import RaggedBatch, training
from kvcondense.errors import KvCondenseError, RangeError
from kvcondense.module import Compressor
from kvcondense.training import cpu
from kvcondense.training import triton as gpu
from machine import SPECS, rope, weights

HIDDEN = 32
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WAYS = [("torch", d) for d in DTYPES] + [("numba", torch.float32)] + [("triton", d) for d in DTYPES[1:]]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """``conftest.poisoned_empty`` for the other two ways to memory that nobody wrote."""
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*args, real=real, **kwargs):
            made = real(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(params=WAYS, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def dtype(request, monkeypatch):
    """A type of tokens, in a way that takes it."""
    way, dtype = request.param
    if way == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(gpu, "_USE_INTERPRETER", True)
        monkeypatch.setattr(gpu, "_STRIP", 2)
    if way == "torch":
        monkeypatch.setattr(cpu, "can_run", lambda *_: False)
        monkeypatch.setattr(cpu, "can_finish", lambda *_: False)
    tokens = torch.zeros(1, SPECS["csa"].projected, dtype=dtype)
    assert way == "torch" or {"numba": cpu, "triton": gpu}[way].can_run(SPECS["csa"], tokens)
    return dtype


def documents(spec):
    """(tokens, live) of each: inert ones first, between and last, longer and shorter than a window, and empty ones."""
    r = spec.ratio
    return [(2 * r, False), (2 * r + 1, True), (0, True), (r - 1, False), (0, False), (3 * r, True),
            (max(r - 1, 1), True), (3 * r + 1, False), (r, True), (r + 1, False)]  # fmt: skip


def batches(spec, padding, by_slots=False):
    """The batch with all of them and that without; which tokens of the first are in the second; who is live."""
    found = documents(spec)
    starts = torch.tensor([0, *(n for n, _ in found)]).cumsum(0)
    live = torch.tensor([is_live for _, is_live in found])
    if by_slots:
        slots = torch.where(live, torch.arange(len(found)), -1)
        batch = RaggedBatch.build(starts, start_positions=[0] * len(found), state_slots=slots)
    else:
        batch = RaggedBatch.build(starts, start_positions=torch.where(live, 0, -1))
    kept = [n for n, is_live in found if is_live and n]
    without = RaggedBatch.build(torch.tensor([0, *kept]).cumsum(0), start_positions=[0] * len(kept))
    read = torch.cat([live.repeat_interleave(batch.lengths), torch.zeros(padding, dtype=torch.bool)])
    return batch, without, read, batch.active.nonzero()[:, 0]


def learned(spec, dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    w = weights(spec, hidden=HIDDEN)
    return replace(w, ape=None if w.ape is None else w.ape.to(wide), norm=w.norm.to(wide), w=w.w.to(dtype))


def run_condense(spec, x, w, table, batch, format=None):
    return training.condense(spec, x, replace(w, w=None), table, batch, format=format)


def run_compress(spec, x, w, table, batch, format=None):
    return training.compress(spec, x, w, table, batch, format=format)


def step(run, spec, x, w, batch, format=None):
    """What comes out, then gradients of the tokens and of what is learned."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w.norm, w.w, w.ape) if t is not None]
    ape = leaves[3] if w.ape is not None else None
    out = run(spec, leaves[0], replace(w, norm=leaves[1], w=leaves[2], ape=ape), rope(spec, 1024), batch, format)
    given = torch.randn(out.values.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = torch.autograd.grad(out.values, leaves, given.to(out.values.dtype), allow_unused=True)
    return out, [out.values.detach(), *found]


def compare(run, spec, dtype, *, padding=3, by_slots=False, format=None):
    batch, without, read, numbers = batches(spec, padding, by_slots)
    width = spec.projected if run is run_condense else HIDDEN
    x = torch.randn(read.shape[0], width, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    x[~read] = float("nan")
    w = learned(spec, dtype)
    rows, (values, d_x, *found) = step(run, spec, x, w, batch, format)
    fewer, (expected_values, expected_d_x, *expected) = step(run, spec, x[read], w, without, format)
    assert torch.equal(rows.request, numbers[fewer.request])
    assert torch.equal(rows.window, fewer.window)
    assert torch.equal(values, expected_values)
    assert bool(values.isfinite().all())
    assert torch.equal(d_x[read], expected_d_x)
    assert not d_x[~read].any()
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("run", [run_condense, run_compress])
@pytest.mark.parametrize("name", list(SPECS))
def test_they_are_as_good_as_absent(name, run, dtype):
    compare(run, SPECS[name], dtype)


@pytest.mark.parametrize("run", [run_condense, run_compress])
@pytest.mark.parametrize("format", ["bf16", "fp8_model1"])
def test_with_the_values_of_a_format(run, format, dtype):
    spec = replace(SPECS["csa"], head_dim=512, rope_dim=64) if format == "fp8_model1" else SPECS["csa"]
    compare(run, spec, dtype, format=format)


@pytest.mark.parametrize("padding", [0, 1, 200])
@pytest.mark.parametrize("by_slots", [False, True])
def test_however_they_are_marked(padding, by_slots, dtype):
    compare(run_condense, SPECS["csa"], dtype, padding=padding, by_slots=by_slots)
    compare(run_compress, SPECS["csa"], dtype, padding=padding, by_slots=by_slots)


@pytest.mark.parametrize("run", [run_condense, run_compress])
def test_nothing_but_them(run, dtype):
    spec = SPECS["csa"]
    x = torch.full((9, spec.projected if run is run_condense else HIDDEN), float("nan"), dtype=dtype)
    rows, (values, *found) = step(
        run, spec, x, learned(spec, dtype), RaggedBatch.build([0, 7, 7], start_positions=[-1, -1])
    )
    assert values.shape == (0, spec.head_dim)
    assert rows.request.shape == (0,)
    assert not any(g.any() for g in found if g is not None)


def test_the_module_takes_them():
    spec = SPECS["csa"]
    batch, without, read, _ = batches(spec, 3)
    x = torch.randn(read.shape[0], HIDDEN, generator=torch.Generator().manual_seed(4))
    x[~read] = float("nan")
    found = []
    for tokens, where in ((x, batch), (x[read], without)):
        module = Compressor(spec, learned(spec, torch.float32), rope(spec, 1024))
        out = module(tokens, where)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_slots_of_the_others_stay_theirs():
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 4, 8, 12], start_positions=[0, -1, 0], slot_mapping=list(range(100, 113)))
    rows = training.condense(spec, torch.randn(13, spec.projected), learned(spec, torch.float32), rope(spec, 64), batch)
    assert rows.request.tolist() == [0, 2]
    assert rows.slot.tolist() == [103, 111]


@pytest.mark.parametrize("starts", [[0, 0], [0, -1]])
def test_fewer_tokens_than_the_batch_says_are_an_error(starts):
    spec = SPECS["csa"]
    batch, w = RaggedBatch.build([0, 4, 8], start_positions=starts), learned(spec, torch.float32)
    with pytest.raises(KvCondenseError, match="kv_score: .*at least 8 rows"):
        training.condense(spec, torch.randn(7, spec.projected), w, rope(spec, 64), batch)
    with pytest.raises(KvCondenseError, match="x: .*at least 8 rows"):
        training.compress(spec, torch.randn(7, HIDDEN), w, rope(spec, 64), batch)
    with pytest.raises(RangeError, match="start_positions"):
        training.condense(
            spec,
            torch.randn(8, spec.projected),
            w,
            rope(spec, 64),
            RaggedBatch.build([0, 4, 8], start_positions=[-1, 4]),
        )
