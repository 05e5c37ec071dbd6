"""What only a GPU can show of steps from hidden states: matrix units, programs that wait for one another, graphs."""

from dataclasses import replace

import pytest
import torch

from kvcondense import PagedCache, RaggedBatch
from kvcondense.api import Job, compress_many
from kvcondense.backends.triton import TritonBackend, tuning
from kvcondense.backends.triton.variants import Variant, places, specs, state_of
from kvcondense.bench import fused
from kvcondense.bench.fused import LAYERS
from kvcondense.config import ModelConfig
from kvcondense.layout.plan import Plan
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

DEVICE = "cuda"
HIDDEN, REQUESTS, PROMPT, STEPS = 1024, 3, 300, 130
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FORMATS = {"indexer": "mxfp4_indexer"}


def job_of(kind, state_kind="ring", dtype=torch.float32):
    """A job without a batch, with a state and a cache of its own for REQUESTS requests."""
    spec = specs()[kind]
    gen = torch.Generator(DEVICE).manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=gen, device=DEVICE)

    weights = CompressorWeights(
        norm=1 + 0.2 * random(spec.head_dim),
        ape=0.1 * random(spec.ratio, spec.width) if spec.has_ape else None,
        w=(random(spec.projected, HIDDEN) / HIDDEN**0.5).bfloat16(),
    )
    end = PROMPT + STEPS
    rope = RopeTable.build(ModelConfig.FLASH, end + spec.ratio, device=DEVICE)
    state = state_of(Variant(kind, state_kind, state_type=TYPES[dtype]), REQUESTS, end, DEVICE)
    for memory in state.memory:
        memory.fill_(0)
    state.tags = None
    pages = -(-(end // spec.ratio + 1) // 64)
    form = FORMATS.get(kind, "fp8_model1")
    cache = PagedCache.allocate(spec.head_dim, REQUESTS * pages, 64, format=form, device=DEVICE)
    return Job(spec, weights, rope, None, None, state, cache)


def at(job, start, count):
    """The job for tokens start .. start + count - 1 of every request."""
    pages = job.cache.data.shape[0] // REQUESTS
    paged = job.state.layout.__class__.__name__ == "PagedLayout"
    where = places(Variant("hca", "paged" if paged else "ring"), REQUESTS, PROMPT + STEPS, DEVICE)
    batch = RaggedBatch.build(
        torch.arange(REQUESTS + 1, device=DEVICE) * count,
        start_positions=[start] * REQUESTS,
        block_table=torch.arange(REQUESTS * pages, device=DEVICE).view(REQUESTS, -1),
        **where,
    )
    return replace(job, batch=batch)


def tokens():
    gen = torch.Generator(DEVICE).manual_seed(3)
    return torch.randn(REQUESTS, PROMPT + STEPS, HIDDEN, generator=gen, device=DEVICE).bfloat16()


def play(jobs, impl, chunks):
    """Rows [REQUESTS, windows, d] of every job, fed in chunks, with the bytes of its cache and its state."""
    x, start, rows = tokens(), 0, [[] for _ in jobs]
    for count in chunks:
        part = x[:, start : start + count].flatten(0, 1)
        for found, out in zip(rows, compress_many(part, [at(j, start, count) for j in jobs], impl=impl), strict=True):
            found.append(out.values.view(REQUESTS, -1, out.values.shape[1]))
        start += count
    return (
        [torch.cat(r, dim=1) for r in rows],
        [j.cache.data.clone() for j in jobs],
        [torch.stack(j.state.memory) for j in jobs],
    )


def same(a, b):
    return all(torch.equal(s, t) for left, right in zip(a, b, strict=True) for s, t in zip(left, right, strict=True))


KINDS = [("hca",), ("csa",), ("csa", "indexer"), ("r2",), ("r1",)]
STATES = [(k, s) for k in KINDS for s in ("ring", "paged", "apart") if (k, s) != (("r1",), "apart")]  # r1 has no scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kinds", "state"), STATES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_rows_equal_the_references_and_repeat(kinds, state, dtype):
    """Within rounding of the reference, from tiles and from single steps; run to run, the same bytes."""
    chunks = (PROMPT, *[1] * (STEPS - 20), 20)
    ours, again = (play([job_of(k, state, dtype) for k in kinds], "triton", chunks) for _ in range(2))
    assert same(ours, again)
    expected, _, _ = play([job_of(k, state, dtype) for k in kinds], "reference", chunks)
    for a, b in zip(ours[0], expected, strict=True):
        rms = b.square().mean(-1, keepdim=True).sqrt()
        assert float(((a - b).abs() / rms).max()) < 0.1


@pytest.mark.parametrize("kind", ["hca", "csa", "indexer", "r2", "r1"])
def test_small_steps_have_the_same_bits_however_they_are_cut(kind, monkeypatch):
    monkeypatch.setattr(tuning, "one_launch_tokens", lambda arch: None)  # else more than 16 tokens are a library's

    def in_steps(size):
        return play([job_of(kind)], "triton", [size] * (PROMPT // size))[:2]

    whole = in_steps(20)
    for size in (1, 5, 10):
        assert same(in_steps(size), whole)


@pytest.mark.parametrize("kind", ["hca", "csa", "indexer", "r2", "r1"])
def test_batch_invariant_rows_have_the_same_bits_in_every_step(kind):
    backend = TritonBackend(batch_invariant=True)
    whole = play([job_of(kind)], backend, (PROMPT + STEPS,))
    for chunks in ((PROMPT, *[1] * STEPS), (7,) * 61 + (3,)):
        rows, data, _ = play([job_of(kind)], backend, chunks)
        assert same((rows, data), whole[:2])


@pytest.mark.parametrize("kinds", [("hca",), ("csa", "indexer")], ids="+".join)
@pytest.mark.parametrize("count", [1, 8])
def test_graphs_are_replayed_with_new_plans(kinds, count):
    """Counters are zero, but for generations, replay after replay; 24 tokens: a library's product, and the step."""
    jobs, eager = ([job_of(k) for k in kinds] for _ in range(2))
    x = tokens()
    for side in (jobs, eager):
        compress_many(x[:, :PROMPT].flatten(0, 1), [at(j, 0, PROMPT) for j in side], impl="triton")

    def planned(job, position):
        job = at(job, position, count)
        plan = Plan.build(job.spec, job.batch, state_layout=job.state.layout, page_rows=64)
        return plan.padded(*Plan.capacity(job.spec, count * REQUESTS, REQUESTS))

    plans = [planned(j, PROMPT) for j in jobs]
    part = x[:, PROMPT : PROMPT + count].flatten(0, 1).clone()
    ready = [replace(j, batch=p.batch, plan=p) for j, p in zip(jobs, plans, strict=True)]
    compress_many(part, ready, impl="triton")  # compiles, and asks for what the checks need to know of the plans
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress_many(part, ready, impl="triton")
    for position in range(PROMPT, PROMPT + STEPS - count + 1, count):
        part.copy_(x[:, position : position + count].flatten(0, 1))
        for job, plan in zip(jobs, plans, strict=True):
            plan.copy_(planned(job, position))
        graph.replay()
        compress_many(part.clone(), [at(j, position, count) for j in eager], impl="triton")
        for a, b, plan in zip(jobs, eager, plans, strict=True):
            if count == 1:
                assert torch.equal(a.state.data, b.state.data)
                assert torch.equal(a.cache.data, b.cache.data)
            else:  # whose bits are the library's
                torch.testing.assert_close(a.state.data, b.state.data, rtol=1e-4, atol=1e-4)
            assert not (plan.counters % 2**48).any()


@pytest.mark.parametrize("kinds", [("hca",), ("csa", "indexer")], ids="+".join)
def test_tiles_are_replayed(kinds):
    """Descriptors of x and the weights are part of a captured graph."""
    backend, x = TritonBackend(batch_invariant=True), tokens()
    jobs, eager = ([job_of(k) for k in kinds] for _ in range(2))
    for side in (jobs, eager):
        compress_many(x[:, :PROMPT].flatten(0, 1), [at(j, 0, PROMPT) for j in side], impl=backend)
    memory = [t for j in jobs for t in (*j.state.memory, j.cache.data)]
    held = [t.clone() for t in memory]
    part = x[:, PROMPT:].flatten(0, 1).clone()
    plans = [Plan.build(j.spec, j.batch, state_layout=j.state.layout, page_rows=64)
             for j in (at(j, PROMPT, STEPS) for j in jobs)]  # fmt: skip
    ready = [replace(j, batch=p.batch, plan=p) for j, p in zip(jobs, plans, strict=True)]
    compress_many(part, ready, impl=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = [r.values for r in compress_many(part, ready, impl=backend)]
    for _ in range(2):
        for t, old in zip(memory, held, strict=True):
            t.copy_(old)
        graph.replay()
    expected = compress_many(part.clone(), [at(j, PROMPT, STEPS) for j in eager], impl=backend)
    for job, other, row, right in zip(jobs, eager, rows, expected, strict=True):
        assert torch.equal(row, right.values)
        assert torch.equal(job.cache.data, other.cache.data)
        assert all(torch.equal(a, b) for a, b in zip(job.state.memory, other.state.memory, strict=True))


@pytest.mark.parametrize("kinds", [("hca",), ("csa", "indexer")], ids="+".join)
def test_kernels_that_start_early_read_what_those_before_have_kept(kinds):
    """Steps side by side in one graph, each of which reads rows of the one before, as eager ones in full order."""
    count = 32
    x, sides = tokens(), []
    for early in (True, False):
        jobs = [job_of(k) for k in kinds]
        compress_many(x[:, :PROMPT].flatten(0, 1), [at(j, 0, PROMPT) for j in jobs], impl="triton")
        parts = [x[:, PROMPT + i].clone() for i in range(count)]
        steps = [[at(j, PROMPT + i, 1) for j in jobs] for i in range(count)]
        steps = [
            [replace(j, plan=Plan.build(j.spec, j.batch, state_layout=j.state.layout, page_rows=64)) for j in step]
            for step in steps
        ]

        def run(parts=parts, steps=steps):
            return [[r.values for r in compress_many(p, s, impl="triton")] for p, s in zip(parts, steps, strict=True)]

        if early:
            held = [[t.clone() for t in (*j.state.memory, j.cache.data)] for j in jobs]
            run()  # compiles
            for job, was in zip(jobs, held, strict=True):
                for t, old in zip((*job.state.memory, job.cache.data), was, strict=True):
                    t.copy_(old)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                rows = run()
            graph.replay()
        else:
            with tuning.in_full_order():
                rows = run()
        sides.append([[r for step in rows for r in step], *([*j.state.memory, j.cache.data] for j in jobs)])
    assert same(*sides)
    assert any(r.shape[0] for r in sides[0][0])


@pytest.mark.parametrize("name", [n for n in LAYERS if "prefill 65536" not in n and "524288" not in n])
def test_layers_of_the_bench_are_right(name):
    inputs = [fused.make_inputs(case, DEVICE) for case in LAYERS[name].cases]
    expected = [fused.reference_rows(i) for i in inputs]
    ways = fused.ways(inputs)
    assert ways[0].name.startswith("fused")
    for way in ways:
        for rows, right in zip(way.rows(), expected, strict=True):
            assert fused.off(rows, right) < fused.CLOSE
