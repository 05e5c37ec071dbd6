"""Launches whose programs meet, in a model of concurrency: right under every seed, and wrong ones are caught.

``concurrency.py`` is the model. Expected bytes are those of the interpreter by itself, program after program.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from projected import HIDDEN, bf16_weights

from concurrency import HangError, Model, side_by_side
from kvcondense import OnlineState, PagedCache, RaggedBatch, StatePool
from kvcondense.backends import Step
from kvcondense.backends.triton import BACKEND, TritonBackend, decode
from kvcondense.backends.triton import runtime as triton_runtime
from kvcondense.backends.triton.kernels import arrive, condense, online
from kvcondense.backends.triton.kernels import decode as decode_kernels
from kvcondense.backends.triton.tuning import Choice
from kvcondense.layout import plan as plans
from kvcondense.layout.plan import Plan
from machine import SPECS, rope

SEEDS = range(8)
BLOCK = 4  # of 16 channels: four programs meet at every window


def generator(seed):
    return torch.Generator().manual_seed(seed)


def step_of(name, starts, counts, *, ring=None, kind="ring", seed=1):
    """(a step of requests that bring ``counts`` tokens at ``starts``, x [T, HIDDEN], w), its memory random."""
    spec = SPECS[name]
    weights = bf16_weights(spec)
    requests = len(starts)
    if kind == "online":
        state = OnlineState.allocate(spec, requests, 4)
        state.acc.normal_(generator=generator(seed)).abs_()
        state.log.normal_(generator=generator(seed + 1))
        state.folded.copy_(torch.tensor(starts))
    else:
        state = StatePool.ring(spec, requests, ring or spec.required_ring_rows(max(counts)))
        state.data.normal_(generator=generator(seed))
        state.tags = None
    offsets = [sum(counts[:i]) for i in range(requests + 1)]
    cache = PagedCache.allocate(spec.head_dim, 4 * requests, 4, format="bf16")
    batch = RaggedBatch.build(
        offsets,
        start_positions=starts,
        state_slots=list(range(requests)),
        slot_mapping=list(range(offsets[-1])),
    )
    plan = Plan.build(spec, batch, state_layout=state.layout, page_rows=4)
    rows = torch.full((plan.num_windows, spec.head_dim), 7.0)
    x = torch.randn(offsets[-1], HIDDEN, generator=generator(seed)).bfloat16()
    kv_score = torch.randn(offsets[-1], spec.projected, generator=generator(seed))
    step = Step(spec, plan, kv_score, weights.ape, weights.norm, rope(spec, 1024), state, cache, rows, None)
    return step, x, weights.w


def memory(step):
    """What a step writes."""
    state = step.state
    held = [state.acc, state.folded, state.log] if isinstance(state, OnlineState) else [state.data]
    return [step.rows, step.cache.rows, *held]


def same(steps, expected):
    return all(
        torch.equal(a, b)
        for step, other in zip(steps, expected, strict=True)
        for a, b in zip(memory(step), memory(other), strict=True)
    )


@pytest.fixture
def small(monkeypatch):
    """Windows cut into blocks whose programs meet, so many of which share a launch of decode.

    Odd numbers of them ask ahead for what they can.
    """

    def together(programs):
        chosen = Choice(BLOCK, 4, holds=programs % 2 == 1)
        monkeypatch.setattr(decode, "choice", lambda _, window, head_dim: chosen)
        monkeypatch.setattr(decode, "_programs", lambda device, each: (True, programs))

    return together


def clean(plan):
    """Counters as a launch leaves them: zero, but for generations of barriers."""
    barriers = plan.counters[plan.num_windows :][: plans.BARRIERS]
    rest = torch.cat((plan.counters[: plan.num_windows], plan.counters[plan.num_windows + plans.BARRIERS :]))
    return not rest.any() and bool((barriers % 2**48 == 0).all())


DECODES = {
    "a window of one": lambda: [step_of("csa", [7, 12, 3], [1, 1, 1])],
    "two compressors": lambda: [step_of("csa", [7, 3], [1, 2]), step_of("indexer", [7, 3], [1, 2])],
    "kept rows replace read ones": lambda: [step_of("r8", [11], [9], ring=8)],
    "nothing ends": lambda: [step_of("csa", [4], [1])],
}


def decode_once(jobs):
    decode.run([s for s, _, _ in jobs], jobs[0][1], [w for _, _, w in jobs])
    return [s for s, _, _ in jobs]


@pytest.mark.parametrize("name", DECODES)
def test_concurrency_changes_no_bit_of_a_decode_step(name, small, monkeypatch):
    expected = decode_once(DECODES[name]())
    assert expected[0].plan.overwrites == (name == "kept rows replace read ones")
    for seed in SEEDS:
        small(2 + seed % 4)
        jobs = DECODES[name]()
        with side_by_side(Model(seed), monkeypatch):
            steps = decode_once(jobs)
        assert same(steps, expected), seed
        assert all(clean(s.plan) for s in steps), "a launch takes away what it adds"


@pytest.mark.parametrize("kind", ["ring", "online"])
def test_concurrency_changes_no_bit_of_windows_in_blocks(kind, monkeypatch):
    def jobs():
        return step_of("r8", [3, 14], [14, 3], kind=kind)[0]

    expected = jobs()
    TritonBackend(choice=Choice(BLOCK, 1)).run(expected)
    assert expected.plan.num_windows == 3
    for seed in SEEDS:
        step = jobs()
        with side_by_side(Model(seed), monkeypatch):
            TritonBackend(choice=Choice(BLOCK, 1, holds=seed % 2 == 1)).run(step)
        assert same([step], [expected]), seed
        assert clean(step.plan)


def test_concurrency_of_graphs_replayed_in_a_row(small, monkeypatch):
    """A graph's launches keep their numbers: each replay finds the counters as the first one did."""
    small(4)
    monkeypatch.setattr(decode, "next_launch", lambda: 77)
    for seed in range(4):
        with side_by_side(Model(seed), monkeypatch):
            jobs = DECODES["two compressors"]()
            for token in range(3):
                for (step, x, _), fresh in zip(jobs, DECODES["two compressors"](), strict=True):
                    x.copy_(torch.randn(x.shape, generator=generator(token)))
                    step.state.data.copy_(fresh[0].state.data)
                jobs[1][1].copy_(jobs[0][1])
                steps = decode_once(jobs)
        alone = DECODES["two compressors"]()
        for _, x, _ in alone:
            x.copy_(torch.randn(x.shape, generator=generator(2)))
        monkeypatch.setattr(decode, "_programs", lambda device, each: (False, 4))
        assert same(steps, decode_once(alone)), seed
        small(4)


def spoilt(step):
    """Each finished row is NaN somewhere: nobody can take it for a row."""
    rows = step.rows[step.plan.window_request >= 0]
    return rows.shape[0] > 0 and bool(rows.isnan().any(1).all())


def test_concurrency_with_what_an_aborted_launch_left(small, monkeypatch):
    """Rows are NaN, in the cache too, nobody waits for ever; a new plan, or an updated one, is clean."""
    small(4)
    for seed in SEEDS:
        step, x, w = DECODES["a window of one"]()[0]
        place = seed % step.plan.counters.shape[0]
        blocks = w.shape[0] // decode.block_of([w.shape[0]])
        step.plan.counters[place] = (1 + seed) * ((12345 << 16) + 1)
        with side_by_side(Model(seed), monkeypatch):
            decode.run([step], x, [w])
        if place < step.plan.num_windows:  # a counter of one window
            assert bool(step.rows[place].isnan().all())
            assert bool(step.cache.rows.flatten(0, 1)[step.plan.window_slot[place]].isnan().all())
        elif place == step.plan.num_windows:  # the barrier
            assert spoilt(step)
            assert bool(step.state.data.flatten(0, -2)[step.plan.keep_row].isnan().any(-1).all())
        elif 0 <= place - step.plan.num_windows - plans.BARRIERS < blocks:  # a block of projected channels
            assert spoilt(step)
        fresh = DECODES["a window of one"]()[0][0]
        step.plan.copy_(fresh.plan)
        assert not step.plan.counters.any()


@pytest.mark.parametrize("form", ["one launch", "blocks"])
def test_concurrency_of_two_streams_on_one_plan(form, small, monkeypatch):
    """It is not allowed: what meets there ends, and what is not right is NaN."""
    small(3)
    backend, met = TritonBackend(choice=Choice(BLOCK, 1)), 0
    expected = []
    for seed in (1, 2):
        step, x, w = step_of("csa", [7, 12, 3], [1, 1, 1], seed=seed)
        with side_by_side(Model(0), monkeypatch):
            decode.run([step], x, [w]) if form == "one launch" else backend.run(step)
        expected.append(step)
    for seed in range(12):
        first, x, w = step_of("csa", [7, 12, 3], [1, 1, 1], seed=1)
        second, y, _ = step_of("csa", [7, 12, 3], [1, 1, 1], seed=2)
        second = replace(second, plan=first.plan)
        with side_by_side(Model(seed, switch=0.1 + 0.2 * (seed % 5)), monkeypatch, together=True):
            for step, tokens in ((first, x), (second, y)):
                decode.run([step], tokens, [w]) if form == "one launch" else backend.run(step)
        for step, right in zip((first, second), expected, strict=True):
            for row, other in zip(step.rows, right.rows, strict=True):
                assert torch.equal(row, other) or row.isnan().any(), seed
                met += bool(row.isnan().any())
    assert met, "no seed made them meet"


def test_concurrency_of_two_streams_that_look_late(small, monkeypatch):
    """A program that polls when its own launch and another one are through is not told that nobody has come."""
    small(2)
    for seed in range(40):
        first, x, w = step_of("csa", [7], [1], seed=1)
        second, y, _ = step_of("csa", [7], [1], seed=2)
        second = replace(second, plan=first.plan)
        with side_by_side(Model(seed, switch=0.1 + 0.2 * (seed % 5)), monkeypatch, together=True):
            decode.run([first], x, [w])
            decode.run([second], y, [w])


def test_concurrency_leaves_nothing_to_the_plan_without_padding(small, monkeypatch):
    """Barriers count behind the windows, and a plan without padding has fewer."""
    expected, x, w = DECODES["a window of one"]()[0]
    decode.run([expected], x, [w])
    small(3)
    step = DECODES["a window of one"]()[0][0]
    padded = step.plan.padded(step.plan.num_windows + 2, step.plan.keep_token.shape[0] + 2)
    for plan in (padded, padded.without_padding()):
        rows = torch.zeros(plan.num_windows, step.spec.head_dim)
        with side_by_side(Model(3), monkeypatch):
            decode.run([replace(step, plan=plan, rows=rows)], x, [w])
        assert torch.equal(rows[: expected.plan.num_windows], expected.rows)
        assert clean(plan)
    assert padded.without_padding().num_windows == expected.plan.num_windows


def test_an_interrupted_launch_leaves_clean_counters(monkeypatch):
    step, _, _ = step_of("r8", [3, 14], [14, 3])
    backend, real, calls = TritonBackend(choice=Choice(BLOCK, 1)), triton_runtime.cache_operands, []
    assert real(step.cache)[0] is step.cache.data

    class Interrupted:
        def __getitem__(self, grid):
            def launch(*args, **options):
                calls.append(grid)
                step.plan.counters.fill_(3)
                raise KeyboardInterrupt

            return launch

    with monkeypatch.context() as patch:
        patch.setattr(condense, "condense_kernel", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            backend.run(step)
    assert calls
    assert not step.plan.counters.any()
    other, _, _ = step_of("r8", [3, 14], [14, 3])
    backend.run(step)
    backend.run(other)
    assert same([step], [other])


# Mutants: what would be wrong with the two ways to meet. The model has to catch each under one of a few seeds.


@triton.jit
def wait_that_does_not(counter, arrival, launch):
    return tl.full((), 1, tl.int1)


@triton.jit
def wait_that_trusts_its_counter(counter, arrival, launch):
    now = arrival[1]
    while (now & 0xFFFF) != 0:
        now = tl.load(counter, volatile=True)
    tl.atomic_add(counter, 0, sem="acquire")
    return tl.full((), 1, tl.int1)


@triton.jit
def arrive_that_does_not_release(counter, launch):
    programs = tl.num_programs(0)
    number = arrive.number_of(launch)
    mine = tl.where(tl.program_id(0) == 0, arrive.GENERATION - (programs - 1) * number, number)
    before = tl.atomic_add(counter, mine, sem="acquire")
    return before, before + mine


@triton.jit
def arrive_that_forgets_one(counter, launch):
    programs = tl.num_programs(0)
    number = arrive.number_of(launch)
    mine = tl.where(tl.program_id(0) == 0, arrive.GENERATION - (programs - 2) * number, number)
    before = tl.atomic_add(counter, mine)
    return before, before + mine


@triton.jit
def last_that_does_not_release(counter, launch, PROGRAMS: tl.constexpr):
    number = arrive.number_of(launch)
    before = arrive.arrived(tl.atomic_add(counter, number, sem="acquire"), number)
    if before == PROGRAMS - 1:
        tl.atomic_add(counter, -PROGRAMS * number, sem="relaxed")
    return (before == PROGRAMS - 1).to(tl.int64)


@triton.jit
def last_that_trusts_its_counter(counter, launch, PROGRAMS: tl.constexpr):
    before = tl.atomic_add(counter, 1) & 0xFFFF
    if before >= PROGRAMS - 1:
        tl.store(counter, 0)
    return (before >= PROGRAMS - 1).to(tl.int64)


@triton.jit
def last_that_comes_first(counter, launch, PROGRAMS: tl.constexpr):
    number = arrive.number_of(launch)
    before = arrive.arrived(tl.atomic_add(counter, number), number)
    if before == PROGRAMS - 1:
        tl.atomic_add(counter, -PROGRAMS * number, sem="relaxed")
    return (before == 0).to(tl.int64)


BARRIERS = (
    wait_that_does_not,
    wait_that_trusts_its_counter,
    arrive_that_does_not_release,
    arrive_that_forgets_one,
)


@pytest.mark.parametrize("mutant", BARRIERS, ids=lambda m: m.fn.__name__)
def test_concurrency_mutants_of_the_barrier_die(mutant, small, monkeypatch):
    name = "a window of one"
    expected = decode_once(DECODES[name]())
    for module in (decode_kernels, arrive):
        monkeypatch.setattr(module, mutant.fn.__name__.partition("_")[0], mutant)
    assert any(_dies(DECODES[name], expected, seed, small, monkeypatch, mutant) for seed in SEEDS)


def _dies(make, expected, seed, small, monkeypatch, mutant):
    small(4)
    jobs = make()
    dirty = mutant is wait_that_trusts_its_counter
    if dirty:
        jobs[0][0].plan.counters[jobs[0][0].plan.num_windows] = 3 * ((12345 << 16) + 1)
    try:
        with side_by_side(Model(seed, drain=0.02), monkeypatch):
            steps = decode_once(jobs)
    except (HangError, interpreter_error()):
        return True
    return not same(steps, expected) and not (dirty and spoilt(steps[0]))


def interpreter_error():
    return triton.runtime.errors.InterpreterError


@pytest.mark.parametrize(
    "mutant", [last_that_does_not_release, last_that_trusts_its_counter], ids=lambda m: m.fn.__name__
)
@pytest.mark.parametrize("kind", ["ring", "online"])
def test_concurrency_mutants_of_the_last_block_die(mutant, kind, monkeypatch):
    backend = TritonBackend(choice=Choice(BLOCK, 1))
    expected = step_of("r8", [3, 14], [14, 3], kind=kind)[0]
    backend.run(expected)
    for module in (condense, online):
        monkeypatch.setattr(module, "last_of", mutant)

    def dies(seed):
        step = step_of("r8", [3, 14], [14, 3], kind=kind)[0]
        if mutant is last_that_trusts_its_counter:
            step.plan.counters[: step.plan.num_windows] = (12345 << 16) + 1
        with side_by_side(Model(seed, drain=0.02), monkeypatch):
            backend.run(step)
        return not same([step], [expected]) and not spoilt(step)

    assert any(dies(seed) for seed in SEEDS)
    assert BACKEND.name == "triton"


@pytest.mark.parametrize(
    "mutant",
    [last_that_does_not_release, last_that_trusts_its_counter, last_that_comes_first],
    ids=lambda m: m.fn.__name__,
)
def test_concurrency_mutants_of_the_last_span_die(mutant, small, monkeypatch):
    """Whoever adds up the partial sums of a block of channels has to be the last, and to see what the others stored."""
    make = DECODES["a window of one"]
    expected = decode_once(make())
    monkeypatch.setattr(decode_kernels, "last_of", mutant)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # NaN in memory would show what a plausible number hides

    def dies(seed):
        small(6)  # a span for each, which take turns often: soon they would meet at the barrier, which hides much
        jobs = make()
        plan, dirty = jobs[0][0].plan, mutant is last_that_trusts_its_counter
        if dirty:
            plan.counters[plan.num_windows + plans.BARRIERS :] = (12345 << 16) + 1
        with side_by_side(Model(seed, switch=0.8, drain=0.02), monkeypatch):
            steps = decode_once(jobs)
        return not same(steps, expected) and not (dirty and spoilt(steps[0]))

    assert any(dies(seed) for seed in SEEDS)
