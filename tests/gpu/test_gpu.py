"""What only a GPU can show, by ``make gpu``: compiled kernels beside the reference, graphs, the chip's own cast."""

import pytest
import torch

from kvcondense import PagedCache, RaggedBatch, condense, ops
from kvcondense.backends.triton import TritonBackend, tuning
from kvcondense.backends.triton.variants import Variant, places, state_of, variants
from kvcondense.bench import device, measure, run, tune
from kvcondense.bench.cases import FORMAT, Case, make_inputs
from kvcondense.bench.runners import EmptyLaunch, Kvcondense
from kvcondense.bound import bind
from kvcondense.config import ModelConfig
from kvcondense.formats import FORMATS
from kvcondense.layout.plan import Plan
from kvcondense.numerics import compute_dtype
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

DEVICE = "cuda"
PROMPT, STEPS = 300, 140


def layer(variant):
    """(spec, weights, rope, state, cache, kv_score of two requests [2, PROMPT + STEPS, projected])."""
    spec = variant.compressor
    gen = torch.Generator(DEVICE).manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=gen, device=DEVICE)

    weights = CompressorWeights(
        norm=1 + 0.2 * random(spec.head_dim), ape=0.1 * random(spec.ratio, spec.width) if spec.has_ape else None
    )
    rope = RopeTable.build(ModelConfig.FLASH, PROMPT + STEPS + spec.ratio, device=DEVICE)
    state = state_of(variant, 2, PROMPT + STEPS, DEVICE)
    cache = None
    if variant.format:
        scale = 0.02 if FORMATS[variant.format].tensor_scale else None
        rows = (PROMPT + STEPS) // spec.ratio + 1
        cache = PagedCache.allocate(
            spec.head_dim, 2 * -(-rows // 64), 64, format=variant.format, tensor_scale=scale, device=DEVICE
        )
    tokens = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[variant.tokens]
    return spec, weights, rope, state, cache, (1.5 * random(2, PROMPT + STEPS, spec.projected)).to(tokens)


def batch_of(variant, cache, start, count, drafts=0):
    pages = 0 if cache is None else cache.data.shape[0] // 2
    return RaggedBatch.build(
        torch.arange(3, device=DEVICE) * count,
        start_positions=[start] * 2,
        block_table=None if cache is None else torch.arange(2 * pages, device=DEVICE).view(2, -1),
        draft_rows=drafts,
        **places(variant, 2, PROMPT + STEPS, DEVICE),
    )


def play(variant, impl, chunks):
    """Finished rows of two requests [2, windows, d], fed in chunks, with the cache's bytes."""
    spec, weights, rope, state, cache, x = layer(variant)
    if state is not None:
        for memory in (state.acc, state.log) if variant.state == "online" else state.memory:
            memory.fill_(0)
    filled = variant.state == "filled" and impl != "reference"
    rows, start = [], 0
    for count in chunks:
        tokens, batch = x[:, start : start + count].flatten(0, 1), batch_of(variant, cache, start, count)
        if filled:  # somebody else's work
            others = batch_of(variant, None, start, count)
            condense(spec, tokens, weights, rope, others, state=state, impl="reference")
            bound = bind(spec, weights, rope, state=state, cache=cache, impl=impl)
            out = bound.pool(bound.plan(batch))
        else:
            out = condense(spec, tokens, weights, rope, batch, state=state, cache=cache, impl=impl)
        rows.append(out.values.view(2, -1, spec.head_dim))
        start += count
    return torch.cat(rows, dim=1), None if cache is None else cache.data.clone()


@pytest.mark.parametrize("variant", [v for v in variants() if v.form == "step"], ids=lambda v: v.name)
def test_variants_equal_the_reference_and_their_own_splits(variant):
    """Rows within rounding of the reference's; any split gives the same bits; a cache holds its rows' bytes."""
    whole, ours = (PROMPT + STEPS,), TritonBackend(choice=variant.choice(tuning.architecture(torch.device(DEVICE))))
    rows, data = play(variant, ours, whole)
    expected, _ = play(variant, "reference", whole)
    rms = expected.square().mean(-1, keepdim=True).sqrt()
    assert float(((rows - expected).abs() / rms).max()) < (0.05 if variant.rounding.value == "reference" else 1e-4)
    if variant.state:
        split, split_data = play(variant, ours, (PROMPT, *[1] * STEPS))
        assert torch.equal(rows, split)
        assert data is None or torch.equal(data, split_data)
    if data is not None:
        cache = layer(variant)[4]
        cache.strict = False
        count = rows.shape[1]
        slots = torch.cat([r * cache.num_rows // 2 + torch.arange(count, device=DEVICE) for r in range(2)])
        cache.put(slots, cache.encode(rows.flatten(0, 1).to(compute_dtype(rows.dtype))))
        assert torch.equal(data, cache.data)


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", ["hca", "csa", "indexer"])
@pytest.mark.parametrize("batch", [1, 3])
def test_small_unfused_cases(kind, batch):
    form = "mxfp4_indexer" if kind == "indexer" else FORMAT
    for case in (Case("", kind, 260, batch, 0, format=form), Case("", kind, 1, batch, 255, format=form)):
        inputs = make_inputs(case, DEVICE)
        expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
        two = [] if kind == "hca" else [tuning.Choice(case.spec.head_dim, 4, windows=2)]
        for choice in (None, tuning.Choice(16, 1), *two):
            runner = Kvcondense(inputs, "triton", "bare")
            assert run.distance(runner, inputs, expected) < run.CLOSE
            step = runner.primed()["step"]
            TritonBackend(choice=choice).run(step)
            again = step.rows.clone()
            TritonBackend().run(step)
            assert torch.equal(again, step.rows)


@pytest.mark.parametrize("kind", ["hca", "csa"])
def test_graphs_are_replayed_with_new_plans(kind):
    """A captured step of fixed capacity takes new tokens, positions and padding by updates in place."""
    variant = Variant(kind, format=FORMAT)
    spec, weights, rope, state, cache, x = layer(variant)
    state.tags = None
    bound = ops.bind(spec, weights, rope, state=state, cache=cache, impl="triton")
    eager = layer(variant)
    eager[3].tags = None
    first = batch_of(variant, cache, 0, PROMPT)
    for s, c in ((state, cache), eager[3:5]):
        condense(spec, x[:, :PROMPT].flatten(0, 1), weights, rope, first, state=s, cache=c, impl="triton")

    def planned(batch):
        plan = Plan.build(spec, batch, state_layout=state.layout, page_rows=64)
        return plan.padded(*Plan.capacity(spec, 2, 2))

    plan = planned(batch_of(variant, cache, PROMPT, 1))
    tokens = x[:, PROMPT].clone()
    bound(tokens, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, _ = bound(tokens, plan)
    for position in range(PROMPT, PROMPT + STEPS):
        tokens.copy_(x[:, position])
        batch = batch_of(variant, cache, position, 1)
        plan.copy_(planned(batch))
        rows.fill_(float("nan"))
        graph.replay()
        out = condense(spec, tokens, weights, rope, batch, state=eager[3], cache=eager[4], impl="triton")
        if out.values.shape[0]:
            assert torch.equal(rows[: out.values.shape[0]], out.values)
        assert torch.equal(state.data, eager[3].data)
        assert torch.equal(cache.data, eager[4].data)


@pytest.mark.parametrize("name", tuning.CASTS)
def test_the_chips_cast_is_used_only_where_it_is_exact(name):
    part = tuning.table().get(tuning.architecture(torch.device(DEVICE)), tuning.table()[tuning.ANY])
    assert tune.cast_is_exact(name, DEVICE) or name not in part["hardware_casts"]


@pytest.mark.alone
def test_the_clock_is_plausible():
    inputs = make_inputs(Case("", "csa", 1, 16, 1000), DEVICE)
    empty, bare = EmptyLaunch(inputs), Kvcondense(inputs, "triton", "bare")
    works = [measure.Work(r.primed, r.step, r.capturable) for r in (empty, bare)]
    for cold in (False, True):
        times = [measure.median(t) for t in device.interleaved(works, cold=cold)]
        assert 0 < times[0] < 50e-6
        assert times[0] <= times[1] < 1e-3
