"""Small steps from hidden states under Triton's interpreter: equal to projection and step, alone and two at once."""

from dataclasses import replace

import pytest
import torch
from projected import HIDDEN, NAMES, bf16_weights, check_against_two_steps, play

from kvcondense import (
    CompressorSpec,
    KvCondenseError,
    PagedCache,
    RaggedBatch,
    StatePool,
    compress,
    condense,
    explain,
    project,
)
from kvcondense.api import Job, compress_many
from kvcondense.backends import Step
from kvcondense.backends.triton import TritonBackend, decode, tuning
from kvcondense.backends.triton.constants import ALIGNED, constants, state_key, tokens_key
from kvcondense.backends.triton.kernels import decode as kernels
from kvcondense.backends.triton.tuning import Choice
from kvcondense.errors import DtypeError
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from machine import SPECS, rope

LONG = ("hca", "none")  # no window of 128 tokens ends in a step of 64 that starts at 0


@pytest.fixture(autouse=True, params=[False, True], ids=["asked where used", "asked ahead"])
def holds(request, monkeypatch):
    """As for AMD's compiler, and for NVIDIA's."""
    monkeypatch.setattr(tuning, "holds_loads", lambda _: request.param)
    tuning.choose_for.cache_clear()
    yield
    tuning.choose_for.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """(phase, two) of every launch."""
    found = []
    real = kernels.decode_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                found.append((options["PHASE"], options["TWO"]))
                return real[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "decode_kernel", Spy())
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in NAMES for k in ("none", "ring", "paged") if (n, k) != LONG]
    + [("csa", "two tensors"), ("r8", "two tensors")],
)
def test_it_equals_projection_and_step(name, kind):
    ratio = SPECS[name].ratio
    chunks = [(2 * ratio + 1, 11)] if kind == "none" else [(ratio + 3, 9), (1, 7), (2 * ratio, 0), (5, ratio + 2)]
    if ratio == 128:
        chunks = [(59, 4), (59, 4), (11, 5), (1, 59), (39, 24), (1, 32)]
    check_against_two_steps(name, kind, chunks, "one launch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["csa", "hca", "r2", "gateless"])
def test_chunks_do_not_change_a_bit(name, dtype):
    ratio = SPECS[name].ratio
    chunks = [(2 * ratio + 5, ratio + 2)], [(3, ratio), (ratio, 1), (1, 0), (ratio + 1, 1)]
    if ratio == 128:
        chunks = [(59, 4), (59, 2), (15, 0)], [(30, 1), (1, 5), (63, 0), (33, 0), (1, 0), (5, 0)]
    whole, parts = (play(name, "ring", c, "one launch", dtype) for c in chunks)
    assert whole[0][0].shape[0] > 0
    for a, b in zip(whole[0], parts[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole[1], parts[1])


def layer(latent=False):
    """Main and indexer compressor of one layer: jobs of a step with a verify request and three decode requests."""
    jobs = []
    for name in ("csa", "indexer"):
        spec = SPECS[name]
        state = StatePool.ring(spec, 4, spec.required_ring_rows(3))
        cache = PagedCache.allocate(spec.head_dim, 8, 4)
        batch = RaggedBatch.build(
            [0, 5, 6, 7, 8],
            start_positions=[0, 3, 4, 7],
            state_slots=[3, 1, 0, 2],
            slot_mapping=[3, 2, 1, 0, 7, 6, 5, 4],
        )
        state.data.normal_(generator=torch.Generator().manual_seed(5))
        state.tags = None
        jobs.append(Job(spec, bf16_weights(spec), rope(spec, 64), batch, None, state, cache, latent))
    return jobs


def test_two_compressors_share_a_launch(launches):
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    together, apart = layer(True), layer(True)
    many = compress_many(x, together, impl="triton")
    assert launches == [(1, True), (2, True), (4, True)]
    launches.clear()
    each = [
        compress(j.spec, x, j.weights, j.rope, j.batch, state=j.state, cache=j.cache, latent=True, impl="triton")
        for j in apart
    ]
    assert launches == 2 * [(1, False), (2, False), (4, False)]
    for a, b, job, other in zip(many, each, together, apart, strict=True):
        assert a.values.shape[0] == 3
        assert a.values.abs().sum() > 0
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.latent, b.latent)
        assert torch.equal(job.state.data, other.state.data)
        assert torch.equal(job.cache.rows, other.cache.rows)
        spec = job.spec
        fresh = next(j for j in layer() if j.spec is spec)
        kv_score = project(spec, x, fresh.weights, impl="reference")
        rows = condense(spec, kv_score, fresh.weights, fresh.rope, fresh.batch, state=fresh.state, impl="reference")
        assert torch.allclose(a.values, rows.values, rtol=2**-7, atol=1e-3)


def test_two_that_count_in_the_same_place_do_not(launches, monkeypatch):
    monkeypatch.setattr(decode, "choice", lambda _, window, head_dim: decode.Choice(8, 4))
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = compress_many(x, layer(), impl="triton")
    assert [two for _, two in launches] == 3 * [True]
    launches.clear()
    jobs = layer()
    batch = jobs[0].batch
    plan = Plan.build(jobs[0].spec, batch, state_layout=jobs[0].state.layout, page_rows=4)
    rows = compress_many(x, [replace(j, batch=batch, plan=plan) for j in jobs], impl="triton")
    assert [two for _, two in launches] == 6 * [False]
    for a, b in zip(rows, expected, strict=True):
        assert torch.equal(a.values, b.values)


def test_jobs_are_checked_before_anything_is_written():
    x = torch.zeros(8, HIDDEN).bfloat16()
    for change, reason in (
        ({"state": 0}, "state of job 1: expected memory of its own, got memory of state of job 0"),
        ({"cache": 0}, "cache of job 1: expected memory of its own, got memory of cache of job 0"),
        ({"weights": 0}, "weights"),
    ):
        jobs = layer()
        held = [j.state.data.clone() for j in jobs]
        if "weights" in change:
            other = bf16_weights(SPECS["hca"])
        else:
            jobs[1] = jobs[0]
            name = "cache" if "state" in change else "state"
            fresh = getattr(layer()[0], name)
            other = fresh
            change = {name: 0}
        jobs[1] = replace(jobs[1], **dict.fromkeys(change, other))
        with pytest.raises(KvCondenseError, match=reason):
            compress_many(x, jobs, impl="triton")
        for job, before in zip(jobs[:1], held, strict=False):
            assert torch.equal(job.state.data, before)
    with pytest.raises(DtypeError, match="job"):
        compress_many(x, [layer()[0], "indexer"])
    assert compress_many(x, []) == ()


def test_small_steps_take_one_launch_unless_bits_are_to_be_those_of_long_ones(launches):
    job = layer()[0]
    spec, batch = job.spec, job.batch
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    why = explain(spec, None, job.weights, job.rope, batch, state=job.state, cache=job.cache, x=x)
    assert why["triton, one launch"] is None
    assert why["triton, tiles"] is not None
    invariant = TritonBackend(batch_invariant=True)
    rows = compress(spec, x, job.weights, job.rope, batch, state=job.state, cache=job.cache, impl=invariant)
    assert not launches
    other = layer()[0]
    more = compress(spec, x, other.weights, other.rope, batch, state=other.state, cache=other.cache, impl="triton")
    assert launches
    assert torch.allclose(rows.values, more.values, rtol=2**-7, atol=1e-3)


def test_what_it_cannot_do_has_a_reason():
    spec = SPECS["hca"]
    batch = RaggedBatch.build([0, 4], start_positions=[0], state_slots=[0])
    x, w = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(spec.projected, 64, dtype=torch.bfloat16)

    def why(x, w, **changes):
        plan = Plan.build(spec, batch)
        step = Step(spec, plan, x[:0], None, torch.ones(16), None, None, None, torch.zeros(0, 16), None)
        return decode.why_not(replace(step, **changes), x, w)

    assert why(x, w) is None
    assert why(x, w, latent=torch.zeros(0, 16)) is None
    assert "takes 64" in why(x.repeat(17, 1), w)
    assert "bf16" in why(x.float(), w)
    assert "multiple" in why(x[:, :33], w[:, :33])
    assert "online" in why(x, w, state=OnlineState.allocate(spec, 1, 0))
    assert "validation" in why(x, w, cache=PagedCache.allocate(16, 1, 4, strict=True))


def test_spans_depend_on_the_hidden_channels_alone():
    assert [decode.splits(d) for d in (64, 192, 512, 4096, 7168)] == [1, 3, 8, 8, 8]
    assert decode.block_of([1024]) == decode.block_of([2048, 512]) == 32
    assert decode.block_of([512, 16]) == 16


def test_loads_of_16_bytes_are_promised_only_where_rows_are_aligned():
    """Pointers from two places hide it from the compiler: rows that begin elsewhere would be read past their end."""
    spec = CompressorSpec(ratio=4, head_dim=16, eps=1e-6, rope_dim=8, overlap=True)
    memory = torch.zeros(1 << 12)
    cases = {
        "aligned": (memory[: 2 * 8 * 64].view(2, 8, 64), True),
        "a value further": (memory[1 : 2 * 8 * 64 + 1].view(2, 8, 64), False),
        "rows of 65": (memory.as_strided((2, 8, 64), (520, 65, 1)), False),
        "blocks of 513": (memory.as_strided((2, 8, 64), (513, 64, 1)), False),
    }

    def made(rows, of=ALIGNED, spec=spec):
        return constants(spec, state_key(StatePool.wrap(rows, paged=False)), None, 0, False, Choice(2, 4), tokens=of)

    for name, (rows, aligned) in cases.items():
        assert made(rows).aligned is aligned, name
        assert made(rows).alike
        assert not made(rows, "fp32").aligned
        assert not made(rows, "").alike
    narrow = CompressorSpec(ratio=4, head_dim=2, eps=1e-6, rope_dim=0, overlap=True)
    assert not made(memory[: 2 * 8 * 8].view(2, 8, 8), spec=narrow).aligned
    wide = memory.view(8, 512)
    keys = [tokens_key(t) for t in (wide, wide[:, 4:], wide[:, 2:], memory[:1000].view(8, 125), wide.bfloat16())]
    assert keys == [ALIGNED, ALIGNED, "fp32", "fp32", ""]
