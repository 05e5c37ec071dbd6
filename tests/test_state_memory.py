"""States in an engine's own tensors: raw scores, padded pages, pages that are rings, every row kept. Same bytes."""

import pytest
import torch

from kvcondense import RaggedBatch, StatePool, condense
from kvcondense.errors import KvCondenseError, RangeError, ShapeError
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.plan import Plan
from kvcondense.snapshot import load_live, save_live
from machine import PATTERN, SPECS, Machine, rope, same, tokens

GAP = 48
"""Elements between blocks that are nobody's."""
STEPS = [([9, 3], 0, None), ([1, 30], 0, None), ([4, 4], 3, 2), ([4, 4], 3, 1), ([17, 1], 0, None), ([1, 1], 0, None)]


def memory(spec, kind, dtype):
    """A pool over a tensor with gaps between its blocks, and how requests find their pages (positions, or None)."""
    ring = spec.required_ring_rows(3)
    each, page = {
        "raw ring": (ring, 0), "pages": (5, 5), "all kept": (5, 5), "page rings": (ring, 4 * ring),
        "two rings": (ring, 0), "two sets of pages": (5, 5),
    }[kind]  # fmt: skip
    pages = 60 if page else 4
    options = {"paged": page > 0, "page_tokens": page, "keep_all": kind == "all kept"}
    if kind.startswith("two") and spec.has_gate:
        storage = torch.full((2, pages, each * spec.width + GAP), PATTERN, dtype=dtype)
        kv, score = (
            t.as_strided((pages, each, spec.width), (t.shape[1], spec.width, 1), t.storage_offset()) for t in storage
        )
        return StatePool.wrap(kv, score=score, **options), storage.flatten(0, 1), page
    storage = torch.full((pages, each * spec.state_dim + GAP), PATTERN, dtype=dtype)
    rows = storage.as_strided((pages, each, spec.state_dim), (storage.shape[1], spec.state_dim, 1))
    return StatePool.wrap(rows, raw_scores=kind in ("raw ring", "page rings"), **options), storage, page


def machine(name, kind, impl, dtype=torch.float32):
    spec = SPECS[name]
    sequences = [tokens(spec, 120, seed) for seed in range(2)]
    m = Machine(spec, sequences, max_draft=3, impl=impl, dtype=dtype)
    if kind is None:
        return m, None
    m.state, storage, page = memory(spec, kind, dtype)
    if page:
        m.slots, m.state_table = None, torch.randperm(60, generator=torch.Generator().manual_seed(1)).view(2, 30)
    return m, storage


def drive(m):
    for counts, drafts, accept in STEPS:
        m.feed(counts, drafts=drafts, accept=accept)
    return [m.cache_of(q) for q in range(2)]


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", ["raw ring", "pages", "all kept", "page rings", "two rings", "two sets of pages"])
@pytest.mark.parametrize("name", ["csa", "indexer", "r8", "r2", "gateless", "r2-overlap"])
def test_rows_are_those_of_a_plain_ring(name, kind, impl):
    plain, _ = machine(name, None, "reference" if impl == "reference" else impl)
    m, storage = machine(name, kind, impl)
    for a, b in zip(drive(plain), drive(m), strict=True):
        assert same(a, b)
    assert bool((storage[:, -GAP:] == PATTERN).all()), "written between blocks"
    assert bool((storage[:, :-GAP] != PATTERN).any())


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", ["raw ring", "page rings", "two rings"])
def test_a_bf16_state_with_raw_scores_gives_a_split_the_same_bytes(kind, impl):
    a, _ = machine("csa", kind, impl, torch.bfloat16)
    b, _ = machine("csa", kind, impl, torch.bfloat16)
    drive(a)
    b.feed(a.done)
    for q in range(2):
        assert same(a.cache_of(q), b.cache_of(q))


def test_raw_rows_are_kv_and_score_and_biased_ones_have_the_ape():
    found = {}
    for kind in ("raw ring", "pages"):
        m, _ = machine("csa", kind, "reference")
        m.feed([7, 7])
        found[kind] = m.state.take(
            m.state.layout.address(m.batch([0, 0]), torch.zeros(3, dtype=torch.long), torch.arange(4, 7))
        )
    spec, sequence = m.spec, m.sequences[0][4:7]
    torch.testing.assert_close(found["raw ring"], sequence, rtol=0, atol=0)
    biased = sequence.clone()
    biased[:, spec.width :] += m.weights.ape[[0, 1, 2]]
    torch.testing.assert_close(found["pages"], biased, rtol=0, atol=0)


def test_with_every_row_kept_another_request_goes_on_from_inside():
    spec = SPECS["csa"]
    m, _ = machine("csa", "all kept", "auto")
    m.feed([40, 0])
    whole = m.cache_of(0)
    m.state_table[1, :4] = m.state_table[0, :4]  # a shared prefix of 20 positions
    m.sequences[1][20:] = m.sequences[0][20:]
    m.done[1] = 20
    m.feed([0, 20])
    assert same(m.cache_of(1)[5:], whole[5:])
    plan = Plan.build(spec, m.batch([1, 1]), state_layout=m.state.layout, page_rows=3)
    static = Plan.build_static(spec, plan.batch, max_tokens=2, state_layout=m.state.layout, page_rows=3)
    assert torch.equal(static.keep_row, plan.padded(static.num_windows, 2).keep_row)


def test_pages_are_forked_and_reset_between_gaps():
    pool, storage, _ = memory(SPECS["csa"], "pages", torch.float32)
    pool.data.copy_(torch.randn(pool.data.shape))
    pool.fork([3], [4])
    pool.reset([5])
    assert torch.equal(pool.data[3], pool.data[4])
    assert bool(pool.data[5].isnan().all())
    assert bool((storage[:, -GAP:] == PATTERN).all())


def test_snapshots_keep_raw_scores_apart():
    m, _ = machine("csa", "raw ring", "reference")
    m.feed([9, 9])
    at = RaggedBatch.at(9, state_slot=int(m.slots[0]))
    payload = save_live(m.spec, m.state, at)
    other, _, _ = memory(m.spec, "raw ring", torch.float32)
    load_live(m.spec, other, at, payload)
    assert torch.equal(other.data[int(m.slots[0])][4:8], m.state.data[int(m.slots[0])][4:8])
    with pytest.raises(KvCondenseError, match="raw_scores"):
        load_live(m.spec, StatePool.ring(m.spec, 4, 12), at, payload)


def test_what_does_not_fit_is_refused():
    rows = torch.zeros(4, 8, 64)
    with pytest.raises(RangeError, match="page_tokens"):
        StatePool.wrap(rows, paged=True, page_tokens=12)
    with pytest.raises(RangeError, match="keep_all"):
        StatePool.wrap(rows, paged=True, page_tokens=16, keep_all=True)
    with pytest.raises(KvCondenseError, match="paged"):
        StatePool.wrap(rows, paged=False, keep_all=True)
    with pytest.raises(ShapeError, match="rows"):
        StatePool.wrap(rows[0], paged=True)
    with pytest.raises(ShapeError, match="state data"):
        StatePool(rows.transpose(1, 2), PagedLayout(4, 64))
    with pytest.raises(RangeError, match="ring_rows"):
        RingLayout(4, 0)
    spec = SPECS["csa"]
    pool = StatePool.wrap(torch.zeros(4, 8, spec.state_dim), paged=True, page_tokens=16)
    batch = RaggedBatch.build([0, 4], start_positions=[0], draft_rows=4, state_block_table=[[0]])
    with pytest.raises(RangeError, match="state page_rows"):
        condense(spec, tokens(spec, 4), machine("csa", None, "auto")[0].weights, rope(spec, 8), batch, state=pool)
