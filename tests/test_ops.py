"""The operator: equal to condense, traceable in one graph, checked once when it is bound."""

import pytest
import torch

from kvcondense import (
    CompressorSpec,
    KvCondenseError,
    ModelConfig,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
    condense,
    ops,
)
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from machine import SPECS, rope, tokens, weights


def setup(kind, form="bf16"):
    spec = SPECS["r8" if kind == "online" else "csa"]
    state = OnlineState.allocate(spec, 3, 3) if kind == "online" else StatePool.ring(spec, 3, 16)
    if kind == "none":
        state = None
    elif kind == "two tensors":
        state = StatePool.wrap(torch.zeros(3, 16, spec.width), score=torch.zeros(3, 16, spec.width), paged=False)
    for memory in () if state is None else (state.acc, state.log) if kind == "online" else state.memory:
        memory.zero_()
    scale = 0.1 if form == "fp8_tensor" else None
    cache = PagedCache.allocate(spec.head_dim, 2, 64, format=form, tensor_scale=scale)
    batch = RaggedBatch.build(
        [0, 25, 40], start_positions=[0, 0], state_slots=[2, 0], block_table=[[0], [1]], draft_rows=2
    )
    plan = Plan.build(spec, batch, state_layout=None if state is None else state.layout, page_rows=64)
    return spec, state, cache, plan


def bound(kind, impl, form="bf16", latent=False):
    spec, state, cache, plan = setup(kind, form)
    if state is not None:
        state.tags = None
    layer = ops.bind(spec, weights(spec), rope(spec, 64), state=state, cache=cache, impl=impl, latent=latent)
    return layer, tokens(spec, 40), plan


def memory(layer):
    layer = layer.bound
    state = layer.state
    held = (
        [] if state is None else [state.acc[[0, 2]], state.folded[[0, 2]]] if layer.spec.ratio == 8 else [*state.memory]
    )
    return [*held, layer.cache.data]


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_pages_in_two_buffers(impl):
    spec = CompressorSpec.csa(ModelConfig.FLASH)
    x, table = tokens(spec, 12), RopeTable.build(ModelConfig.FLASH, 16)
    batch = RaggedBatch.build([0, 12], start_positions=[0], block_table=[[1]])
    caches = [PagedCache.allocate(512, 2, 4, format="fp8_model1_two_buffers") for _ in range(2)]
    condense(spec, x, weights(spec), table, batch, cache=caches[0], impl=impl)
    layer = ops.bind(spec, weights(spec), table, cache=caches[1], impl=impl)
    layer(x, layer.bound.plan(batch))
    for a, b in zip(*(cache.memory for cache in caches), strict=True):
        assert bool(a.any())
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["bf16", "fp8_tensor"])
@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("kind", ["ring", "two tensors", "online", "none"])
def test_a_bound_layer_does_what_condense_does(kind, impl, form):
    spec, state, cache, plan = setup(kind, form)
    x = tokens(spec, 40)
    expected = condense(
        spec, x, weights(spec), rope(spec, 64), plan.batch, plan=plan, state=state, cache=cache, latent=True, impl=impl
    )
    layer, x, plan = bound(kind, impl, form, latent=True)
    rows, latent = layer(x, plan)
    assert rows.abs().sum() > 0
    assert torch.equal(rows, expected.values)
    assert torch.equal(latent, expected.latent)
    held = [] if state is None else [state.acc[[0, 2]], state.folded[[0, 2]]] if kind == "online" else [*state.memory]
    for a, b in zip(memory(layer), [*held, cache.data], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", ["ring", "online"])
def test_it_compiles_to_one_graph(kind, impl):
    torch._dynamo.reset()
    layer, x, plan = bound(kind, impl)
    expected, _ = layer(2 * x, plan)
    held = [t.clone() for t in memory(layer)]
    layer, x, plan = bound(kind, impl)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        rows, _ = layer(2 * x, plan)
        return rows.relu()

    assert torch.equal(step(x), expected.relu())
    for a, b in zip(memory(layer), held, strict=True):
        assert torch.equal(a, b)


def test_the_operator_keeps_its_promises(monkeypatch):
    """torch's own check: schema, what is mutated, the fake, and tracing with static and dynamic shapes."""
    layer, x, plan = bound("ring", "reference")
    calls = []
    real = ops._condense
    monkeypatch.setattr(ops, "_condense", lambda *args: calls.append(args) or real(*args))
    layer(x, plan)
    results = torch.library.opcheck(torch.ops.kvcondense.condense.default, calls[0])
    assert set(results.values()) == {"SUCCESS"}


def test_what_does_not_fit_is_refused_once():
    spec, state, cache, plan = setup("ring")
    with pytest.raises(KvCondenseError, match=r"state\.tags"):
        ops.bind(spec, weights(spec), rope(spec, 64), state=state, cache=cache)
    state.tags = None
    with pytest.raises(KvCondenseError, match="cache"):
        ops.bind(spec, weights(spec), rope(spec, 64), state=state, cache=PagedCache.allocate(32, 1, 4))
    layer = ops.bind(spec, weights(spec), rope(spec, 64), state=state, cache=cache)
    other = Plan.build(spec, plan.batch, page_rows=64)
    with pytest.raises(KvCondenseError, match="plan for the layout"):
        layer(tokens(spec, 40), other)
    with pytest.raises(KvCondenseError, match="kv_score"):
        layer(tokens(spec, 40)[:, 1:], plan)
