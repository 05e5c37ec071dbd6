"""The Triton backend under Triton's interpreter: rows, bytes, state, splits, launches, refusals."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import CompressorSpec, OnlineState, PagedCache, RaggedBatch, StatePool, condense, explain
from kvcondense.backends import triton as backend
from kvcondense.backends.triton import runtime, tuning
from kvcondense.backends.triton.tuning import Choice
from kvcondense.cli import app
from kvcondense.errors import RangeError, UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.golden import calibrated
from kvcondense.layout.plan import Plan
from machine import SPECS, rope, tokens, weights
from unusual import UNUSUAL

STATES = ("none", "ring", "paged", "online")
PAIRS = [(n, s) for n, spec in SPECS.items() for s in STATES if not (s == "online" and spec.overlap)]


def make_state(spec, kind, dtype=torch.float32, drafts=3):
    if kind == "online":
        return OnlineState.allocate(spec, 3, drafts)
    if kind == "paged":
        return StatePool.paged(spec, 20, 5, dtype=dtype)
    return StatePool.ring(spec, 3, spec.required_ring_rows(drafts), dtype=dtype) if kind == "ring" else None


def batch_for(kind, counts, starts, drafts=0):
    addresses = {"ring": {"state_slots": [2, 0]}, "online": {"state_slots": [2, 0]}, "none": {}}
    pages = torch.arange(20).view(2, 10)
    return RaggedBatch.build(
        [0, counts[0], sum(counts)],
        start_positions=starts,
        block_table=[[0], [1]],
        draft_rows=drafts,
        **addresses.get(kind, {"state_block_table": pages}),
    )


def play(spec, kind, impl, x, *, dtype=torch.float32, form="bf16"):
    """A prefill of two requests, then a verify step that goes on behind rejected drafts; everything there is to see."""
    state = make_state(spec, kind, dtype)
    for memory in () if state is None else (state.acc, state.log) if kind == "online" else (state.data,):
        memory.fill_(0)
    cache = PagedCache.allocate(spec.head_dim, 2, 64, format=form)
    seen = []
    steps = [((25, 15), [0, 0], 0 if kind == "none" else 2), ((1, 5), [24, 13], 3)]
    for counts, starts, drafts in steps[: 1 if kind == "none" else 2]:
        out = condense(
            spec, x[: sum(counts)], weights(spec), rope(spec, 4096), batch_for(kind, counts, starts, drafts),
            state=state, cache=cache, impl=impl, latent=True,
        )  # fmt: skip
        seen += [out.values, out.latent]
    return seen, cache.rows.clone(), state


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_it_agrees_with_the_reference(name, kind):
    spec = SPECS[name]
    x = tokens(spec, 40)
    (mine, my_cache, my_state), (other, cache, state) = (play(spec, kind, i, x) for i in ("triton", "reference"))
    for a, b in zip(mine, other, strict=True):
        assert torch.allclose(a, b, rtol=2**-7, atol=1e-5)
    equal = (my_cache.view(torch.int16) == cache.view(torch.int16)).float().mean()
    assert equal > 0.999
    assert (cache != 0).any() or spec.ratio > 25
    if kind in ("ring", "paged"):
        assert torch.equal(my_state.data, state.data), "kept rows are copies"
    elif kind == "online":
        assert torch.equal(my_state.folded, state.folded)
        assert torch.equal(my_state.log, state.log)
        assert torch.allclose(my_state.acc, state.acc, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["csa", "r8", "gateless"])
def test_tokens_and_states_of_other_types(name, tokens_type):
    spec = SPECS[name]
    x = tokens(spec, 40).to(tokens_type)
    runs = [play(spec, "ring", impl, x, dtype=torch.bfloat16) for impl in ("triton", "reference")]
    assert torch.equal(runs[0][2].data, runs[1][2].data)
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.allclose(a, b, rtol=2**-7, atol=1e-5)


def wide(kind):
    overlap = kind != "hca"
    return CompressorSpec(
        ratio=4 if overlap else 128, head_dim=128 if kind == "indexer" else 512, eps=1e-6, rope_dim=64,
        overlap=overlap, rotate=kind == "indexer",
    )  # fmt: skip


def hostile(spec):
    """Tokens whose rows hold NaN, infinity, and values far below the floors of scales."""
    count = 2 * max(spec.window, 24)
    x = torch.randn(count, spec.projected, generator=torch.Generator().manual_seed(3))
    if spec.overlap:
        x[8, 3] = float("nan")
        x[17, spec.width - 1] = float("inf")
        x[28:, : spec.width] *= 1e-6
    return x


@pytest.mark.parametrize(("kind", "name"), [(k, f.name) for f in FORMATS.values() for k in calibrated.kinds_of(f)])
def test_every_byte_of_every_format(kind, name):
    form, spec = FORMATS[name], wide(kind)
    x = hostile(spec)
    scale = 0.05 if form.tensor_scale else None
    cache, expected = (
        PagedCache.allocate(spec.head_dim, 3, max(8, form.tile), format=form, tensor_scale=scale) for _ in range(2)
    )
    for c in (cache, expected):
        c.fill(0xA5)
    batch = RaggedBatch.build([0, x.shape[0]], start_positions=[0], block_table=[[2, 0]])
    rows = condense(spec, x, weights(spec), rope(spec, 4096), batch, cache=cache, impl="triton")
    assert rows.values.shape[0] == x.shape[0] // spec.ratio
    expected.put(rows.slot, expected.encode(rows.values))
    assert [t.untyped_storage().tolist() for t in cache.memory] == [
        t.untyped_storage().tolist() for t in expected.memory
    ]


@pytest.mark.parametrize("name", UNUSUAL)
def test_bytes_of_formats_that_nobody_has_listed(name):
    form, spec = UNUSUAL[name], wide("indexer")
    x = hostile(spec)
    x[40:44] = 0
    scale = 0.05 if form.tensor_scale else None
    cache, expected = (PagedCache.allocate(spec.head_dim, 3, 8, format=form, tensor_scale=scale) for _ in range(2))
    batch = RaggedBatch.build([0, x.shape[0]], start_positions=[0], block_table=[[2, 0]])
    rows = condense(spec, x, weights(spec), rope(spec, 4096), batch, cache=cache, impl="triton")
    expected.put(rows.slot, expected.encode(rows.values))
    assert torch.equal(cache.data, expected.data)


@pytest.mark.parametrize(("kind", "name"), [("hca", "fp8_model1"), ("csa", "bf16"), ("indexer", "mxfp4_indexer")])
def test_the_golden_run_passes(kind, name):
    words = ["verify", "--kind", kind, "--format", name, "--batch", "1", "--history", "200" if kind == "hca" else "20"]
    result = CliRunner().invoke(app, [*words, "--backend", "triton"])
    assert result.exit_code == 0, result.output
    assert result.output.count("PASS") == 5


@pytest.fixture
def tiled(monkeypatch):
    """Make every step use this choice."""

    def use(choice):
        monkeypatch.setattr(tuning, "choose", lambda *_: choice)

    return use


@pytest.mark.parametrize("kind", ["ring", "online"])
def test_blocks_of_channels_do_not_change_a_bit(kind, tiled):
    spec = CompressorSpec(ratio=8, head_dim=64, eps=1e-6, rope_dim=16)
    x = tokens(spec, 40)
    seen = []
    for choice in (Choice(64, 1), Choice(32, 1), Choice(16, 4), Choice(16, 4, counters=False)):
        tiled(choice)
        rows, cache, state = play(spec, kind, "triton", x)
        seen.append([*rows, cache, state.acc[[0, 2]] if kind == "online" else state.data])
    assert seen[0][0].abs().sum() > 0
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["csa", "r8", "gateless"])
def test_where_rows_of_tokens_begin_does_not_change_a_bit(name, monkeypatch):
    spec, kinds = SPECS[name], []
    real = backend.constants
    monkeypatch.setattr(backend, "constants", lambda *a, **more: kinds.append(more["tokens"]) or real(*a, **more))
    x = tokens(spec, 40)
    wide = torch.full((40, spec.projected + 5), torch.nan)
    wide[:, 1:-4] = x
    every_other = torch.stack([x, x], dim=2).flatten(1)[:, ::2]
    seen = []
    for given in (x, wide[:, 1:-4], every_other):
        rows, cache, state = play(spec, "ring", "triton", given)
        seen.append([*rows, cache, state.data])
    assert set(kinds) == {"fp32, aligned", "fp32"}
    assert seen[0][0].abs().sum() > 0
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


def test_classes_of_rows_are_cut_as_the_table_says(monkeypatch):
    part = {
        "entries": [[128, 512, 128, 32, 8, 1], [128, 512, None, 64, 4, 2]], "hardware_casts": ["bf16"], "counters": True
    }  # fmt: skip
    monkeypatch.setattr(tuning, "table", lambda: {"any": part})
    chosen = [tuning.choose_for.__wrapped__("sm_90", 128, 128, 512, rows) for rows in (1, 128, 129, 10**6)]
    assert [(c.block, c.num_warps, c.windows) for c in chosen] == [(32, 8, 1), (32, 8, 1), (64, 4, 2), (64, 4, 2)]
    assert {c.casts for c in chosen} == {("bf16",)}


@pytest.fixture
def launches(monkeypatch):
    """(windows, kept rows) of every launch."""
    found = []
    real = backend.launch

    def launch(step, cache, c, count, kept, num_warps):
        found.append((count, kept))
        real(step, cache, c, count, kept, num_warps)

    monkeypatch.setattr(backend, "launch", launch)
    return found


def test_a_decode_step_is_one_launch_and_a_long_chunk_keeps_rows_last(launches):
    spec = SPECS["csa"]
    x = tokens(spec, 40)
    results = []
    for impl in ("reference", "triton"):
        state = StatePool.ring(spec, 1)
        out = []
        for start, count in ((0, 7), (7, 1), (8, 30)):
            batch = RaggedBatch.build([0, count], start_positions=[start], state_slots=[0])
            rows = condense(
                spec, x[start : start + count], weights(spec), rope(spec, 64), batch, state=state, impl=impl
            )
            out.append(rows.values)
        results.append((torch.cat(out), state.data))
    # The chunk of 30 tokens lays its rows over those that its first window reads.
    assert launches == [(1, 7), (1, 1), (7, 0), (0, 6)]
    assert torch.allclose(results[0][0], results[1][0], rtol=2**-7, atol=1e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_counters_are_left_zero_and_padding_is_left_alone(tiled):
    tiled(Choice(16, 1))
    spec = CompressorSpec(ratio=4, head_dim=32, eps=1e-6, rope_dim=8, overlap=True)
    x = tokens(spec, 24)
    state = StatePool.ring(spec, 4)
    batch = RaggedBatch.build(
        [0, 9, 9, 10], start_positions=[0, -1, 3], state_slots=[2, -1, -1], slot_mapping=list(range(10))
    )
    plan = Plan.build_static(spec, batch, max_tokens=24, state_layout=state.layout, max_positions=64, cache_rows=16)
    assert plan.num_windows > 2
    cache = PagedCache.allocate(32, 2, 8)
    rows = condense(spec, x, weights(spec), rope(spec, 64), batch, plan=plan, state=state, cache=cache, impl="triton")
    assert (rows.window >= 0).sum() == 2
    assert (rows.values[rows.window < 0] == 0).all()
    assert (plan.counters == 0).all()
    assert cache.rows.ne(0).any(-1).nonzero().tolist() == [[0, 3], [0, 7]]
    other = condense(spec, x, weights(spec), rope(spec, 64), batch, state=StatePool.ring(spec, 4), impl="reference")
    assert torch.equal(rows.values[:2], other.values)


def test_static_plans_know_when_rows_can_be_kept_at_once():
    spec = SPECS["csa"]
    ring = StatePool.ring(spec, 2, spec.required_ring_rows(4)).layout
    pages = StatePool.paged(spec, 4, 8).layout

    def plan(layout, length, most):
        address = {"state_slots": [0, 1]} if layout is ring else {"state_block_table": [[0, 1], [2, 3]]}
        batch = RaggedBatch.build([0, length, 2 * length], start_positions=[8, 11], **address)
        host = Plan.build(spec, batch, state_layout=layout)
        device = Plan.build_static(spec, batch, max_tokens=64, max_query_len=most, state_layout=layout)
        assert device.overwrites or not host.overwrites
        return device, host

    assert plan(ring, 4, 4)[0].overwrites is False
    assert plan(ring, 5, 5)[0].overwrites is True
    assert plan(ring, 1, None)[0].overwrites is True
    assert plan(pages, 1, 1)[0].overwrites is False
    assert plan(pages, 2, 2)[0].overwrites is True
    target, source = plan(ring, 1, 4)[0], plan(ring, 1, None)[0]
    with pytest.raises(Exception, match="overwrites"):
        target.copy_(source)
    source.copy_(target)


def test_pages_that_are_used_again_within_a_step():
    """Two pages taking turns: the chunk's last rows land on those that its first window reads."""
    spec = SPECS["csa"]
    x = tokens(spec, 40)
    turns = torch.arange(10) % 2
    results = []
    for impl in ("reference", "triton"):
        state = StatePool.paged(spec, 2, 8)
        out = []
        for start, count in ((0, 6), (6, 34)):
            batch = RaggedBatch.build([0, count], start_positions=[start], state_block_table=turns[None])
            plan = Plan.build(spec, batch, state_layout=state.layout)
            assert plan.overwrites == (start > 0)
            rows = condense(
                spec, x[start : start + count], weights(spec), rope(spec, 64), batch, plan=plan, state=state, impl=impl
            )
            out.append(rows.values)
        results.append(torch.cat(out))
    assert torch.allclose(results[0], results[1], rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("kind", ["ring", "online"])
def test_validation_mode_raises_before_anything_is_written(kind):
    spec = SPECS["r2"]
    batch = RaggedBatch.build([0, 8], start_positions=[0], state_slots=[0], block_table=[[0]])
    x = tokens(spec, 8)
    state = make_state(spec, kind)
    held = (state.acc, state.folded, state.log) if kind == "online" else (state.data,)
    for memory in held:
        memory.fill_(5)
    cache = PagedCache.allocate(16, 1, 4, format="fp8_tensor", tensor_scale=1e-5, strict=True)
    with pytest.raises(RangeError, match="values that fp8_tensor can hold"):
        condense(spec, x, weights(spec), rope(spec, 64), batch, state=state, cache=cache, impl="triton")
    assert (cache.data == 0).all()
    assert all((memory == 5).all() for memory in held)
    good = PagedCache.allocate(16, 1, 4, format="fp8_tensor", tensor_scale=0.1, strict=True)
    plain = PagedCache.allocate(16, 1, 4, format="fp8_tensor", tensor_scale=0.1)
    other = make_state(spec, kind)
    for s, c in ((state, good), (other, plain)):
        condense(spec, x, weights(spec), rope(spec, 64), batch, state=s, cache=c, impl="triton")
    assert torch.equal(good.data, plain.data)
    if kind == "online":
        assert torch.equal(state.acc[0], other.acc[0])
        assert state.folded[0] == 8


def test_it_refuses_with_a_reason():
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 4], start_positions=[0])

    def run(change=None, x=None, **kwargs):
        s = spec if change is None else change
        return condense(s, tokens(s, 4) if x is None else x, weights(s), rope(s, 64), batch, impl="triton", **kwargs)

    with pytest.raises(UnsupportedError, match="computes? in fp32"):
        run(x=tokens(spec, 4).double())
    with pytest.raises(UnsupportedError, match="not a power of two"):
        run(CompressorSpec(4, 24, 1e-6, 8))
    with pytest.raises(UnsupportedError, match="the window has 2000 tokens"):
        run(CompressorSpec(2000, 16, 1e-6, 8))
    batch = RaggedBatch.build([0, 4], start_positions=[0], state_slots=[0])
    with pytest.raises(UnsupportedError, match=r"the state is torch\.float64"):
        run(state=StatePool.ring(spec, 1, dtype=torch.float64))


def test_where_it_cannot_run_it_says_so(monkeypatch):
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 4], start_positions=[0])

    def reason():
        return explain(spec, tokens(spec, 4), weights(spec), rope(spec, 64), batch)["triton"]

    assert reason() is None
    monkeypatch.setattr(runtime, "interpreted", lambda: False)
    assert "not on a GPU" in reason()
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert "triton is not installed" in reason()


def test_the_interpreter_is_only_for_those_who_ask(launches):
    spec = CompressorSpec(ratio=4, head_dim=8, eps=1e-6, rope_dim=4)  # too narrow for the CPU backend
    batch = RaggedBatch.build([0, 4], start_positions=[0])
    for impl, count in (("auto", 0), ("triton", 1)):
        rows = condense(spec, tokens(spec, 4), weights(spec), rope(spec, 64), batch, impl=impl)
        assert rows.values.abs().sum() > 0
        assert len(launches) == count


def test_the_tuning_table_serves_what_it_does_not_name():
    for spec in (*SPECS.values(), wide("hca"), wide("csa"), wide("indexer")):
        for rows in (1, 128, 129, 10**6):
            choice = tuning.choose(torch.device("cpu"), spec, rows)
            assert spec.head_dim % choice.block == 0
            assert choice.num_warps & (choice.num_warps - 1) == 0
    assert tuning.choose_for("Ascend", 128, 128, 512, 1).counters is False
    long = replace(wide("hca"), ratio=1024)
    assert tuning.choose(torch.device("cpu"), long, 1).block * 1024 <= 16384
