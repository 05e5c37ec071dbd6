"""The fused projection under Triton's interpreter: equal to projection and step, whatever the chunks and neighbours."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from projected import HIDDEN, NAMES, bf16_weights, check_against_two_steps, play

from guarded import guarded
from kvcondense import KvCondenseError, PagedCache, RaggedBatch, StatePool, compress, explain, project
from kvcondense.backends import Step
from kvcondense.backends.triton import TritonBackend, fused, tuning
from kvcondense.backends.triton.kernels.products import reach
from kvcondense.errors import UnsupportedError
from kvcondense.layout.plan import Plan
from machine import SPECS, rope


@pytest.mark.parametrize("kind", ["none", "ring", "paged", "two tensors"])
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_projection_and_step(name, kind):
    ratio = SPECS[name].ratio
    if kind == "two tensors" and not SPECS[name].has_gate:
        pytest.skip("no scores are stored")
    chunks = [(2 * ratio + 1, 11)] if kind == "none" else [(ratio + 3, 9), (1, 7), (2 * ratio, 0), (5, ratio + 2)]
    check_against_two_steps(name, kind, chunks, "tiles")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["csa", "hca", "r2", "gateless"])
def test_chunks_do_not_change_a_bit(name, dtype):
    ratio = SPECS[name].ratio
    whole = play(name, "ring", [(2 * ratio + 5, ratio + 2)], "tiles", dtype)
    parts = play(name, "ring", [(3, ratio), (ratio, 1), (1, 0), (ratio + 1, 1)], "tiles", dtype)
    for a, b in zip(whole[0], parts[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["csa", "r2-overlap", "r8-overlap", "gateless"])
def test_windows_at_the_edges_of_tiles(name, compiled, monkeypatch):
    """With overlap a tile's first window reads tokens of the one that the tile before finished."""
    if compiled:
        as_compiled(monkeypatch)
    many = fused.TILE + 3 * SPECS[name].ratio
    chunks = [(many, 1), (SPECS[name].ratio + 1, many + 40), (200, 150)]
    tiles, steps = play(name, "ring", chunks, "tiles"), play(name, "ring", chunks, None, product="triton")
    assert sum(len(rows) for rows in tiles[0]) > 2 * fused.windows_per_tile(SPECS[name])
    for a, b in zip([*tiles[0], *tiles[1:]], [*steps[0], *steps[1:]], strict=True):
        assert torch.equal(a, b)


def as_compiled(monkeypatch):
    """What chips get that copy by descriptor and whose products end in registers: not what the interpreter gets."""
    monkeypatch.setattr(tuning, "boxes", lambda arch: True)
    real = tuning.epilogue_options
    monkeypatch.setattr(tuning, "epilogue_options", lambda arch, *more: real("sm_90", *more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "ring", "paged", "two tensors"])
@pytest.mark.parametrize("name", ["csa", "hca", "r2", "r8-overlap", "r1", "gateless"])
def test_copies_by_descriptor_change_no_bit(name, kind, dtype, monkeypatch):
    """Tokens side by side or not, stored ones or none, more channels than are looked up at once."""
    if (kind == "two tensors" and not SPECS[name].has_gate) or (kind == "none" and dtype is torch.bfloat16):
        pytest.skip("no scores are stored, or nothing is")
    monkeypatch.setitem(SPECS, "wide", replace(SPECS[name], head_dim=128))
    ratio = SPECS[name].ratio
    chunks = [(2 * ratio + 1, 11)] if kind == "none" else [(ratio + 3, 9), (1, 7), (2 * ratio, 0), (5, ratio + 2)]
    asked = []
    real = fused.boxes_of
    monkeypatch.setattr(fused, "boxes_of", lambda *a: (asked.append(a), real(*a))[1])
    rows, held, state = play("wide", kind, chunks, "tiles", dtype)
    assert not asked
    as_compiled(monkeypatch)
    found = play("wide", kind, chunks, "tiles", dtype)
    assert asked
    for a, b in zip([*found[0], found[1]], [*rows, held], strict=True):
        assert torch.equal(a, b)
    assert (state is None and found[2] is None) or torch.equal(state, found[2])


@triton.jit
def how_tokens_lie(token, live, out, base, count: tl.constexpr):
    m = tl.arange(0, count)
    tl.store(out, reach(tl.load(token + m), tl.load(live + m) != 0, base, count))


@pytest.mark.parametrize(
    ("token", "live", "base", "expected"),
    [([3, 4, 5, 6], [0, 0, 0, 0], 3, 0), ([3, 4, 5, 6], [1, 1, 1, 1], 3, 1), ([9, 4, 5, 9], [0, 1, 1, 0], 3, 1),
     ([9, 4, 5, 9], [0, 1, 1, 1], 3, 2), ([3, 4, 6, 7], [1, 1, 1, 1], 3, 2), ([-1, 0, 1, 2], [0, 1, 1, 1], -1, 1)],
)  # fmt: skip
def test_descriptors_serve_tokens_side_by_side_alone(token, live, base, expected):
    out = torch.zeros((), dtype=torch.int32)
    token, live = (torch.tensor(t, dtype=torch.int32) for t in (token, live))
    how_tokens_lie[(1,)](token, live, out, base, count=4)
    assert int(out) == expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["csa", "hca", "r8-overlap", "r1-overlap"])
def test_what_a_neighbour_holds_reaches_nobody(name, compiled, monkeypatch):
    """NaN in one request of a tile: the other's rows are those of a clean neighbour."""
    if compiled:
        as_compiled(monkeypatch)
    spec = SPECS[name]
    w, n = bf16_weights(spec), 2 * spec.ratio + 1
    x = torch.randn(3 * n, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    batch = RaggedBatch.build([0, n, 2 * n, 3 * n], start_positions=[0, 0, 0], state_slots=[0, 1, 2])
    found = []
    for spoilt in (False, True):
        state = StatePool.ring(spec, 3)
        state.data.zero_()
        held = x.clone()
        if spoilt:
            held[:n] = held[2 * n :] = float("nan")
        plan = Plan.build(spec, batch, state_layout=state.layout)
        out = torch.zeros(plan.num_windows, spec.head_dim)
        angles = rope(spec, 1024) if spec.rope_dim else None
        fused.run(Step(spec, plan, held[:0].float(), w.ape, w.norm, angles, state, None, out, None), held, w.w)
        found.append((out[plan.window_request == 1], state.data[state.data.shape[0] // 3 :][: spec.ratio].clone()))
    assert found[0][0].isfinite().all()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_padding_is_looked_up_nowhere():
    """Biases of a kept row that is none: memory before ape's first row is not to be touched."""
    spec = SPECS["csa"]
    w, batch = bf16_weights(spec), RaggedBatch.build([0, 6], start_positions=[0], state_slots=[0])
    state = StatePool.ring(spec, 1)
    plan = Plan.build(spec, batch, state_layout=state.layout)
    plan = plan.padded(plan.num_windows, plan.keep_token.shape[0] + 1)
    x, out = torch.randn(6, HIDDEN).bfloat16(), torch.zeros(plan.num_windows, spec.head_dim)
    ape = guarded(w.ape, front=True)
    fused.run(Step(spec, plan, x[:0].float(), ape, w.norm, rope(spec, 64), state, None, out, None), x, w.w)
    assert out.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_plan_may_have_no_requests(compiled, monkeypatch):
    if compiled:
        as_compiled(monkeypatch)
    spec = SPECS["csa"]
    w, state = bf16_weights(spec), StatePool.ring(spec, 1)
    batch = RaggedBatch.build([0], start_positions=[], state_slots=[])
    plan = Plan.build_static(spec, batch, max_tokens=128, state_layout=state.layout)
    x = torch.randn(128, HIDDEN).bfloat16()
    backend = TritonBackend(batch_invariant=True)
    rows = compress(spec, x, w, rope(spec, 64), batch, plan=plan, state=state, impl=backend).values
    assert rows.shape == (plan.num_windows, spec.head_dim)
    assert plan.num_windows == 32


def test_tokens_before_a_start_without_a_state_are_nobodys(monkeypatch):
    """Doors refuse such a step; a plan that is refilled may come to it."""
    spec = replace(SPECS["csa"], rope_dim=0)
    w, batch = bf16_weights(spec), RaggedBatch.build([0, 3, 10], start_positions=[0, 1])
    plan, found = Plan.build(spec, batch), []
    x = torch.randn(15, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    x[:3] = float("nan")
    for way in ("unfused", "rows", "boxes"):
        out = torch.zeros(plan.num_windows, spec.head_dim)
        step = Step(spec, plan, fused.project(x, w.w, False), w.ape, w.norm, None, None, None, out, None)
        if way == "unfused":
            TritonBackend().run(step)
        else:
            if way == "boxes":
                as_compiled(monkeypatch)
            fused.run(step, x, w.w)
        found.append(out)
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_rows_that_a_descriptor_cannot_take_are_copied():
    held = torch.zeros(4, 3 * HIDDEN, dtype=torch.bfloat16)
    taken = (held, held[:, HIDDEN : 2 * HIDDEN])
    others = (
        held[:, 4 : 4 + HIDDEN],
        held.as_strided((4, HIDDEN), (HIDDEN + 4, 1)),
        held[:1, :HIDDEN].expand(4, -1),
        held.flatten()[: 2 * HIDDEN].unfold(0, HIDDEN, 8),
    )
    assert [fused._aligned(t) for t in (*taken, *others)] == [True] * len(taken) + [False] * len(others)


def test_tiles_of_few_channels_are_left_to_the_unfused_step():
    """Their products would be of another instruction than ``project``'s where one takes 64 rows."""
    spec = replace(SPECS["csa"], head_dim=32)
    x, w = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(spec.projected, 64, dtype=torch.bfloat16)
    plan = Plan.build(spec, RaggedBatch.build([0, 4], start_positions=[0]))
    step = Step(spec, plan, x[:0], None, torch.ones(32), None, None, None, torch.zeros(1, 32), None)
    for arch, refused in (("sm_90", True), ("sm_100", True), ("sm_80", False), ("any", False)):
        with tuning.stand_in(arch):
            reason = fused.why_not(step, x, w)
        assert (reason is not None) == refused, (arch, reason)
        assert not refused or "32 channels" in reason


def test_compress_fuses_where_the_table_says_so(monkeypatch):
    spec = SPECS["csa"]
    w = bf16_weights(spec)
    x = torch.randn(140, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    calls = []
    real = fused.run
    monkeypatch.setattr(fused, "run", lambda *a: (calls.append(a[1].shape[0]), real(*a))[0])
    results, whys = [], []
    for counts in ((140,), (127, 13), (40, 40, 40, 20)):
        state = StatePool.ring(spec, 1)
        cache = PagedCache.allocate(16, 2, 32)
        at = 0
        for n in counts:
            batch = RaggedBatch.build([0, n], start_positions=[at], state_slots=[0], block_table=[[0, 1]])
            part = x[at : at + n]
            whys.append(explain(spec, None, w, rope(spec, 256), batch, state=state, cache=cache, x=part))
            compress(
                spec,
                part,
                w,
                rope(spec, 256),
                batch,
                state=state,
                cache=cache,
                impl=TritonBackend(batch_invariant=True),
            )
            at += n
        results.append((cache.rows.clone(), state.data[0, -1].clone()))
    assert calls == [140]
    assert whys[0]["triton, tiles"] is None
    assert "at least 128" in whys[1]["triton, tiles"]
    assert "takes 64" in whys[0]["triton, one launch"]
    assert not [name for name in whys[0] if name.startswith("reference,")]
    for rows, held in results[1:]:
        assert torch.equal(rows, results[0][0]), "fused or not, the bits are the same"
        assert torch.equal(held, results[0][1])
    # One token for each of 128 windows: a tile would have one row in four to project.
    batch = RaggedBatch.build(
        list(range(129)), start_positions=[3] * 128, slot_mapping=[-1] * 128, state_slots=list(range(128))
    )
    state = StatePool.ring(spec, 128)
    state.tags = None
    why = explain(spec, None, w, rope(spec, 256), batch, state=state, x=x[:128])
    assert "state" in why["triton, tiles"]
    with pytest.raises(KvCondenseError, match="exactly one"):
        explain(spec, None, w, rope(spec, 256), batch, state=state)


def test_projection_by_itself_is_right():
    for name in ("csa", "hca", "r1"):
        spec = SPECS[name]
        w = bf16_weights(spec)
        x = torch.randn(130, HIDDEN).bfloat16()
        ours, theirs = (project(spec, x, w, impl=i) for i in ("triton", "reference"))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(project(spec, x[7:8], w, impl="triton"), ours[7:8])
        assert project(spec, x[:0], w, impl="triton").shape == (0, spec.projected)
    with pytest.raises(UnsupportedError, match="bf16"):
        project(spec, x.float(), w, impl="triton")


def test_what_it_cannot_do_has_a_reason():
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 4], start_positions=[0])
    x, w = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(spec.projected, 64, dtype=torch.bfloat16)

    def why(x, w, **changes):
        plan = Plan.build(spec, batch)
        step = Step(spec, plan, x[:0], None, torch.ones(16), None, None, None, torch.zeros(1, 16), None)
        return fused.why_not(replace(step, **changes), x, w)

    assert why(x, w) is None
    assert "bf16" in why(x.float(), w)
    assert "multiple" in why(x[:, :33], w[:, :33])
    assert "latent" in why(x, w, latent=torch.zeros(1, 16))
    assert "tile" in why(x, w, spec=replace(spec, ratio=256, overlap=False))
    assert "overlap" in why(x, w, spec=replace(spec, ratio=32))
    assert "validation" in why(x, w, cache=PagedCache.allocate(16, 1, 4, strict=True))


def test_the_library_multiplies_where_the_table_says_so_unless_bits_must_not_depend_on_the_batch(monkeypatch):
    spec, asked = SPECS["csa"], []
    gen = torch.Generator().manual_seed(5)
    x, w = torch.randn(130, HIDDEN, generator=gen).bfloat16(), bf16_weights(spec)
    batch = RaggedBatch.build([0, 130], start_positions=[0], state_slots=[0])

    def mm(a, b, *, out_dtype):
        asked.append((a.dtype, b.dtype, out_dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(fused, "by_library", lambda device: True)  # no CPU has such a product
    monkeypatch.setattr(torch, "mm", mm)
    rows = {}
    for invariant in (False, True):
        backend, state = TritonBackend(batch_invariant=invariant), StatePool.ring(spec, 1)
        rows[invariant] = compress(spec, x, w, rope(spec, 256), batch, state=state, impl=backend).values
        assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)], "once, by the first of them"
    assert torch.allclose(rows[False], rows[True], rtol=2**-7, atol=1e-3)
    why = explain(spec, None, w, rope(spec, 256), batch, state=StatePool.ring(spec, 1), x=x)
    assert "library" in why["triton, tiles"]


@pytest.mark.parametrize(
    ("device", "hip", "interpreting", "arch", "expected"),
    [("cuda", None, False, "sm_90", True), ("cuda", "6.4", False, "gfx942", False), ("cpu", None, True, "any", False),
     ("cuda", None, True, "any", False), ("npu", None, False, "Ascend", False)],
)  # fmt: skip
def test_where_the_library_multiplies(monkeypatch, device, hip, interpreting, arch, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(fused, "interpreted", lambda: interpreting)
    with tuning.stand_in(arch):
        assert fused.by_library(SimpleNamespace(type=device)) is expected
