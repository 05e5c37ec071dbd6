"""Prepared steps: buffers that stay, any plan; rows, states, caches and errors of ``condense``, through every kind."""

from dataclasses import replace

import pytest
import torch

from kvcondense import KvCondenseError, OnlineState, PagedCache, RaggedBatch, StatePool
from kvcondense.bound import bind
from kvcondense.conformance.invariants import first_failure
from kvcondense.conformance.own import KINDS, BackendAdapter
from kvcondense.layout.plan import Plan
from kvcondense.prepared import prepare
from machine import SPECS, rope, weights

TOKENS, HIDDEN = 24, 64


class PreparedAdapter(BackendAdapter):
    """The kit's adapter of a backend, each of whose steps goes through one buffer of its number of tokens."""

    def init(self, setup):
        super().init(setup)
        self.bound = bind(setup.spec, setup.weights, setup.rope, state=self.owned, cache=self.cache, impl=self.impl)
        self.prepared = {}

    def step(self, kv_score, batch):
        key = kv_score.shape, kv_score.dtype
        if key not in self.prepared:
            self.prepared[key] = prepare(self.bound, torch.empty_like(kv_score))
        mine = self.prepared[key]
        mine.tokens.copy_(kv_score)
        mine.run(self.bound.plan(self._own(batch)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kit_passes_through_prepared_steps(kind):
    assert first_failure(lambda: PreparedAdapter("cpu", kind)) is None


class Layer:
    """A compressor of two requests, its state and cache, and steps of it."""

    def __init__(self, spec, impl="cpu", online=False, latent=False, cache=None):
        self.spec = spec
        self.state = OnlineState.allocate(spec, 2) if online else StatePool.ring(spec, 2, spec.required_ring_rows(2))
        self.state.reset([0, 1])
        self.cache = cache or PagedCache.allocate(spec.head_dim, 4, 8)
        table = rope(spec, 96)
        w = weights(spec, hidden=HIDDEN)
        w = replace(w, w=w.w.bfloat16())
        self.bound = bind(
            spec, w, table, state=self.state, cache=self.cache, latent=latent, impl=impl
        )  # fmt: skip

    def plan(self, lengths, starts):
        offsets = [0, lengths[0], sum(lengths)]
        slots = {"state_slots": [0, 1], "block_table": [[0, 1], [2, 3]]}
        return self.bound.plan(RaggedBatch.build(offsets, start_positions=starts, **slots))

    def bytes(self):
        return [t.clone().view(torch.uint8) for owner in (self.state, self.cache) for t in owner.tensors.values()]


STEPS = (([9, 4], [0, 0]), ([1, 1], [9, 4]), ([1, 7], [10, 5]), ([12, 12], [11, 12]), ([1, 0], [23, -1]))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("impl", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("name", ["csa", "hca", "r8 online"])
def test_one_buffer_takes_every_step_with_the_bits_of_a_bound_compressor(name, impl, hidden):
    """The first step is another one than those that follow: it asks the backend."""
    online = name.endswith("online")
    spec = SPECS[name.split()[0]]
    one, other = (Layer(spec, impl, online, latent=True) for _ in range(2))
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
    mine = prepare(one.bound, x=x) if hidden else prepare(one.bound, torch.empty(TOKENS, spec.projected))
    take = other.bound.compress if hidden else other.bound.condense
    gen = torch.Generator().manual_seed(3)
    rows = 0
    for lengths, starts in STEPS:
        mine.tokens.copy_(torch.randn(mine.tokens.shape, generator=gen))
        before = mine.rows.clone()
        mine.run(one.plan(lengths, starts))
        wanted = take(mine.tokens.clone(), other.plan(lengths, starts))
        count = wanted.values.shape[0]
        assert torch.equal(mine.rows[:count], wanted.values)
        assert torch.equal(mine.latent[:count], wanted.latent)
        assert torch.equal(mine.rows[count:], before[count:]), "which are nobody's"
        assert all(map(torch.equal, one.bytes(), other.bytes()))
        assert not online or torch.equal(one.state.tags, other.state.tags)
        rows += count
    assert rows or name == "hca"


def test_a_static_plan_is_filled_anew_in_place():
    one, other = Layer(SPECS["csa"]), Layer(SPECS["csa"])
    one.state.tags = other.state.tags = None
    mine = prepare(one.bound, torch.randn(TOKENS, one.spec.projected))
    static = None
    for lengths, starts in STEPS:
        plan = one.plan(lengths, starts)
        bounds = {"max_tokens": TOKENS, "max_positions": 96, "cache_rows": one.cache.num_rows}
        new = Plan.build_static(one.spec, plan.batch, state_layout=one.state.layout, page_rows=8, **bounds)
        static = static or new
        static.copy_(new)
        mine.run(static)
        other.bound.condense(mine.tokens, other.plan(lengths, starts))
        assert all(map(torch.equal, one.bytes(), other.bytes()))


def _moved_tokens(_, mine):
    mine.tokens = mine.tokens.clone()


def _moved_rows(_, mine):
    mine.rows.data = mine.rows.clone()


def _moved_state(layer, _):
    layer.state.data = layer.state.data.clone()


def _other_layout(layer, _):
    layer.state.layout = replace(layer.state.layout, ring_rows=layer.state.layout.ring_rows - 1)


def _other_pages(layer, _):
    layer.cache.page_rows = 4


def _wrong_tags(layer, _):
    layer.state.tags += 1


@pytest.mark.parametrize(
    "spoil", [_moved_tokens, _moved_rows, _moved_state, _other_layout, _other_pages, _wrong_tags]
)  # fmt: skip
def test_what_is_no_longer_as_prepared_is_an_error_before_anything_is_written(spoil):
    layer = Layer(SPECS["csa"])
    mine = prepare(layer.bound, torch.randn(TOKENS, layer.spec.projected))
    mine.run(layer.plan([9, 4], [0, 0]))
    following = layer.plan([1, 1], [9, 4])
    spoil(layer, mine)
    before = layer.bytes()
    with pytest.raises(KvCondenseError, match="memory|state"):
        mine.run(following)
    assert all(map(torch.equal, before, layer.bytes()))


def test_a_plan_that_reaches_further_is_an_error_however_often_others_passed():
    layer = Layer(SPECS["csa"])
    mine = prepare(layer.bound, torch.randn(TOKENS, layer.spec.projected))
    mine.run(layer.plan([12, 12], [0, 0]))
    before = layer.bytes()
    longer = layer.plan([13, 12], [12, 12])
    for _ in range(2):
        with pytest.raises(KvCondenseError, match="kv_score: expected at least 25 rows"):
            mine.run(longer)
    with pytest.raises(KvCondenseError, match="plan: expected at most 24 windows"):
        mine.run(layer.plan([1, 1], [12, 12]).padded(25, 25))
    assert all(map(torch.equal, before, layer.bytes()))


def test_the_buffer_is_no_memory_that_steps_write():
    layer = Layer(SPECS["csa"])
    rows = layer.state.data.view(-1, layer.spec.projected)
    with pytest.raises(KvCondenseError, match="kv_score: expected memory that no step writes"):
        prepare(layer.bound, rows[:4])
    with pytest.raises(KvCondenseError, match=r"kv_score: expected shape \[any"):
        prepare(layer.bound, torch.zeros(4, 3))
    with pytest.raises(KvCondenseError, match=r"x: expected shape \[any, 64"):
        prepare(layer.bound, x=torch.zeros(4, 3))
    with pytest.raises(KvCondenseError, match="x: expected exactly one of kv_score and x, got both or neither"):
        prepare(layer.bound)


def test_moved_weights_are_noticed_where_they_are_multiplied():
    layer = Layer(SPECS["csa"])
    mine = prepare(layer.bound, x=torch.randn(TOKENS, HIDDEN).bfloat16())
    mine.run(layer.plan([9, 4], [0, 0]))
    layer.bound.weights.w.data = layer.bound.w.clone()
    with pytest.raises(KvCondenseError, match="x, rows: expected the memory that was prepared"):
        mine.run(layer.plan([1, 1], [9, 4]))


def _scaled(strict=False, scale=1e-6):
    cache = PagedCache.allocate(
        SPECS["csa"].head_dim, 4, 8, format="fp8_tensor", tensor_scale=scale, strict=strict
    )  # fmt: skip
    return Layer(SPECS["csa"], cache=cache)


def test_validation_mode_still_raises_before_anything_is_written():
    layer = _scaled(strict=True)
    mine = prepare(layer.bound, torch.randn(TOKENS, layer.spec.projected))
    before = layer.cache.data.clone()
    for _ in range(2):
        with pytest.raises(KvCondenseError, match="saturate|hold"):
            mine.run(layer.plan([9, 4], [0, 0]))
        assert torch.equal(before, layer.cache.data)
    layer.cache.strict = False
    mine.run(layer.plan([9, 4], [0, 0]))
    assert not torch.equal(before, layer.cache.data)
    layer.cache.strict = True
    with pytest.raises(KvCondenseError, match="saturate|hold"):
        mine.run(layer.plan([1, 4], [9, 4]))


def test_the_scale_of_a_cache_is_what_it_is_by_then():
    one, other = _scaled(scale=0.02), _scaled(scale=0.02)
    mine = prepare(one.bound, torch.randn(TOKENS, one.spec.projected))
    for scale, (lengths, starts) in zip((0.02, 0.04), STEPS, strict=False):
        for layer in (one, other):
            layer.cache.scales.fill_(scale)
        mine.run(one.plan(lengths, starts))
        other.bound.condense(mine.tokens, other.plan(lengths, starts))
        assert torch.equal(one.cache.data, other.cache.data)
