"""Prepared steps: buffers that stay, any plan; rows, states, caches and errors of ``condense``, through every kind."""

import contextlib
from dataclasses import replace

import pytest
import torch

from interrupting import interrupted_at
from kvcondense import KvCondenseError, OnlineState, PagedCache, RaggedBatch, StatePool, compress
from kvcondense.backends import cpu
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
        before = mine.rows.clone()
        mine.run(static)
        rows = other.bound.condense(mine.tokens, other.plan(lengths, starts)).values
        assert all(map(torch.equal, one.bytes(), other.bytes()))
        count = static.num_windows
        assert torch.equal(mine.rows[: len(rows)], rows)
        assert not mine.rows[len(rows) : count].any(), "padding, whatever stood there"
        assert torch.equal(mine.rows[count:], before[count:])


def test_a_plan_whose_filling_is_broken_off_is_used_by_nobody():
    """At any line: it is as before, or as after, or no step is admitted with it."""
    line, refused, seen = 0, 0, [10**9]
    while line <= seen[0]:
        line += 1
        layer = Layer(SPECS["csa"])
        layer.state.tags = None
        bounds = {"max_tokens": TOKENS, "max_positions": 96, "cache_rows": layer.cache.num_rows}
        static, new = (
            Plan.build_static(
                layer.spec, layer.plan(*step).batch, state_layout=layer.state.layout, page_rows=8, **bounds
            )
            for step in STEPS[:2]
        )
        states = [[t.clone() for t in _values(p)] for p in (static, new)]
        mine = prepare(layer.bound, torch.randn(TOKENS, layer.spec.projected))
        mine.run(static)
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(line) as seen:
            static.copy_(new)
        if any(all(map(torch.equal, _values(static), state)) for state in states):
            continue
        refused += 1
        with pytest.raises(KvCondenseError, match="plan: expected a plan that was filled to the end"):
            mine.run(static)
        static.copy_(new)
        mine.run(static)
    assert refused > 5


def _values(plan):
    return [t for owner in (plan, plan.batch) for t in vars(owner).values() if isinstance(t, torch.Tensor)]


def _moved_tokens(_, mine):
    mine.tokens.data = mine.tokens.clone()


def _moved_rows(_, mine):
    mine.rows.data = mine.rows.clone()


def _other_shape(_, mine):
    mine.tokens.resize_(2 * TOKENS, mine.tokens.shape[1] // 2)


def _other_strides(_, mine):
    mine.tokens.as_strided_(mine.tokens.shape, (0, 1))


def _other_type(_, mine):
    mine.tokens.data = mine.tokens.view(torch.int32)


def _gradients(_, mine):
    mine.tokens.requires_grad_()


def _shorter_table(layer, _):
    layer.bound.rope.cos.resize_(4, layer.bound.rope.cos.shape[1])


def _moved_state(layer, _):
    layer.state.data = layer.state.data.clone()


def _other_layout(layer, _):
    layer.state.layout = replace(layer.state.layout, ring_rows=layer.state.layout.ring_rows - 1)


def _other_pages(layer, _):
    layer.cache.page_rows = 4


def _wrong_tags(layer, _):
    layer.state.tags += 1


@pytest.mark.parametrize(
    "spoil",
    [_moved_tokens, _moved_rows, _other_shape, _other_strides, _other_type, _gradients, _shorter_table, _moved_state,
     _other_layout, _other_pages, _wrong_tags],
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
    for wrong in ([1.0], None):
        with pytest.raises(KvCondenseError, match="x: expected"):
            compress(layer.spec, wrong, layer.bound.weights, layer.bound.rope, layer.plan([1, 1], [0, 0]).batch)
    with pytest.raises(KvCondenseError, match="x: expected a tensor"):
        prepare(layer.bound, x=[1.0])
    with pytest.raises(KvCondenseError, match="x: expected exactly one of kv_score and x, got both or neither"):
        prepare(layer.bound)


def test_moved_weights_are_noticed_where_they_are_multiplied():
    layer = Layer(SPECS["csa"])
    mine = prepare(layer.bound, x=torch.randn(TOKENS, HIDDEN).bfloat16())
    mine.run(layer.plan([9, 4], [0, 0]))
    layer.bound.weights.w.data = layer.bound.w.clone()
    with pytest.raises(KvCondenseError, match="x, rows: expected the memory that was prepared"):
        mine.run(layer.plan([1, 1], [9, 4]))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_what_is_prepared_in_inference_mode_runs_outside_of_it(impl):
    one, other = Layer(SPECS["csa"], impl), Layer(SPECS["csa"], impl)
    tokens = torch.randn(TOKENS, one.spec.projected)
    with torch.inference_mode():
        mine = prepare(one.bound, tokens)
    for step in STEPS:
        mine.run(one.plan(*step))
        other.bound.condense(tokens, other.plan(*step))
        assert all(map(torch.equal, one.bytes(), other.bytes()))


def test_a_backend_of_one_s_own_is_asked_for_every_step():
    class Own(type(cpu.BACKEND)):
        def why_not(self, step):
            return "no more than two windows" if step.plan.num_windows > 2 else None

        def run(self, step):
            super().run(step)
            step.rows.add_(1)

    one, other = (Layer(SPECS["csa"], Own()) for _ in range(2))
    mine = prepare(one.bound, torch.randn(TOKENS, one.spec.projected))
    for step in (([4, 4], [0, 0]), ([4, 1], [4, 4])):
        mine.run(one.plan(*step))
        rows = other.bound.condense(mine.tokens, other.plan(*step)).values
        assert torch.equal(mine.rows[: len(rows)], rows)
    with pytest.raises(KvCondenseError, match="no more than two windows"):
        mine.run(one.plan([8, 7], [8, 5]))


def test_plans_pass_for_a_device_too():
    layer = Layer(SPECS["csa"])
    form = layer.bound.checked.form
    assert form.device == layer.bound.weights.norm.device
    plan = layer.plan([4, 4], [0, 0])
    layer.bound.admit(plan, 8)
    assert plan.passed == {form: 8}


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
