"""Engines' tensors: what a step writes into them, byte by byte, against layouts packed by hand from their sources."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from kvcondense import (
    CompressorSpec,
    CompressorWeights,
    ModelConfig,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
    condense,
)
from kvcondense.api import store
from kvcondense.bound import bind
from kvcondense.errors import DtypeError, KvCondenseError, RangeError, ShapeError
from kvcondense.formats import FORMATS
from kvcondense.golden.pages import encode_row, place
from kvcondense.integrations import atom, flashmla, sglang, vllm
from kvcondense.snapshot import load_live, save_live
from kvcondense.spec import Rounding
from published import fp32_row, indexer_page, model1_page

EXAMPLE = Path(__file__).parent.parent / "examples" / "engine.py"
FLASH = ModelConfig.FLASH
CSA = CompressorSpec.csa(FLASH, rounding=Rounding.FUSED)
INDEXER = CompressorSpec.indexer(FLASH, rounding=Rounding.FUSED)
UNROTATED = CompressorSpec.indexer(FLASH, rounding=Rounding.FUSED, rotate=False)  # as vLLM has it
HCA = CompressorSpec.hca(FLASH, rounding=Rounding.FUSED)
V41 = CompressorSpec.for_layer(ModelConfig.V41_FLASH, 2, rounding=Rounding.LATENT)  # ratio 2
ROPE = RopeTable.build(FLASH, 1024)


def weights(spec):
    gen = torch.Generator().manual_seed(5)
    ape = torch.randn(spec.ratio, spec.width, generator=gen)
    return CompressorWeights(norm=1 + 0.2 * torch.randn(spec.head_dim, generator=gen), ape=ape)


def tokens(spec, count, seed=0):
    return torch.randn(count, spec.projected, generator=torch.Generator().manual_seed(seed))


def blocks(count, rows, size, stride, dtype):
    """An engine's tensor with padded blocks, and its memory."""
    storage = torch.zeros(count, stride, dtype=dtype)
    return storage.as_strided((count, rows, size), (stride, size, 1)), storage


def raw_bytes(storage):
    return bytes(storage.contiguous().view(torch.uint8).flatten().tolist())


def rows_by_page(rows, slots, page_rows):
    """{page: {row of it: values}} of finished rows, as the cache's encoder gets them: bf16 values."""
    found = {}
    for row, slot in zip(rows.bfloat16().float().tolist(), slots.tolist(), strict=True):
        found.setdefault(slot // page_rows, {})[slot % page_rows] = row
    return found


# vLLM: CompressorStateCache [num_blocks, block_size, 2 N] fp32, pages of 32832 bytes (32768 up to a multiple of 576).
@pytest.mark.parametrize(("spec", "block_rows"), [(CSA, 4), (HCA, 8)], ids=["csa", "hca"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_vllm_state_blocks_hold_kv_and_biased_score_of_every_token(spec, block_rows, impl):
    states, storage = blocks(48, block_rows, spec.state_dim, 8208, torch.float32)
    pages, page_storage = blocks(3, 64, 584, 37440, torch.uint8)
    table = torch.randperm(47, generator=torch.Generator().manual_seed(2))[:46].view(2, 23).to(torch.int32) + 1
    lengths, w, x = [spec.ratio + 9, 6], weights(spec), tokens(spec, spec.ratio + 15)
    slots = torch.full((sum(lengths),), -1)
    ends = range(spec.ratio - 1, lengths[0], spec.ratio)
    for c, end in enumerate(ends):
        slots[end] = 64 + c + 1
    batch = vllm.batch(
        torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        state_block_table=table,
        slot_mapping=slots,
    )
    done = condense(spec, x, w, ROPE, batch, state=vllm.state(states), cache=vllm.cache(pages), impl=impl)
    written = raw_bytes(storage)
    for q, first in ((0, 0), (1, lengths[0])):
        for p in range(lengths[q]):
            offset = int(table[q, p // block_rows]) * 8208 * 4 + p % block_rows * spec.state_dim * 4
            row = x[first + p].clone()
            row[spec.width :] += w.ape[p % spec.ratio]
            assert fp32_row(written, offset, spec.state_dim) == row.tolist(), (q, p)
    rows = rows_by_page(done.values, done.slot, 64)
    if spec is CSA:
        assert len(rows[1]) >= 3
        assert raw_bytes(page_storage[1]) == model1_page(rows[1], 64)
        assert not any(raw_bytes(page_storage[2]))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_vllm_goes_on_from_blocks_that_it_wrote_itself(impl):
    """State rows put there by hand, as vLLM's own kernel stores them, and a decode step here."""
    states, storage = blocks(5, 4, CSA.state_dim, 8208, torch.float32)
    table, w, x = torch.tensor([[3, 1]], dtype=torch.int32), weights(CSA), tokens(CSA, 8)
    for p in range(7):
        row = x[p].clone()
        row[CSA.width :] += w.ape[p % 4]
        storage[int(table[0, p // 4]), p % 4 * CSA.state_dim : (p % 4 + 1) * CSA.state_dim] = row
    batch = vllm.batch(torch.tensor([0, 1]), torch.tensor([8]), state_block_table=table)
    row = condense(CSA, x[7:], w, ROPE, batch, state=vllm.state(states), impl=impl).values
    whole = vllm.batch(torch.tensor([0, 8]), torch.tensor([8]), state_block_table=table)
    other = vllm.state(torch.zeros(5, 4, CSA.state_dim))
    assert torch.equal(row[0], condense(CSA, x, w, ROPE, whole, state=other, impl=impl).values[1])


def test_vllm_indexer_cache_and_tables():
    pages, storage = blocks(2, 64, 132, 132 * 64, torch.uint8)
    x, w = tokens(UNROTATED, 12), weights(UNROTATED)
    slots = torch.full((12,), -1)
    slots[[3, 7, 11]] = torch.tensor([64, 70, 3])
    batch = vllm.batch(
        torch.tensor([0, 12]), torch.tensor([12]), state_block_table=torch.tensor([[0, 1, 2]]), slot_mapping=slots
    )
    state = vllm.state(torch.zeros(3, 4, UNROTATED.state_dim), prefix_caching=False)
    done = condense(UNROTATED, x, w, ROPE, batch, state=state, cache=vllm.cache(pages, format="fp8_indexer_pow2"))
    for page, rows in rows_by_page(done.values, done.slot, 64).items():
        assert raw_bytes(storage[page]) == indexer_page(rows, 64, power_of_two=True)
    assert not bool(state.data[0].any()), "without prefix caching, rows that nobody can read are not written"
    cache = torch.cat([ROPE.cos, ROPE.sin], dim=1)
    assert torch.equal(vllm.rope(cache).sin, ROPE.sin)
    assert vllm.rope(cache).cos.is_contiguous()


def test_vllm_caches_of_one_size_must_be_named():
    """132, 288 and 528 bytes: fp32 or ue8m0 scales, block-split or interleaved rows; nothing in a buffer tells."""
    for size, names in ((132, ("fp8_indexer_pow2", "fp8_indexer_ue8m0")), (288, ("fp4_v41_times_interleaved",)),
                        (528, ("mxfp8_v41_window", "mxfp8_v41_window_interleaved"))):  # fmt: skip
        pages = torch.zeros(2, 64, size, dtype=torch.uint8)
        for name in names:
            assert vllm.cache(pages, format=name).format.name == name
            with pytest.raises(KvCondenseError, match=f"^format: expected one of .*{name}"):
                vllm.cache(pages)
    with pytest.raises(ShapeError, match="rows: expected 528 bytes"):
        vllm.cache(torch.zeros(2, 64, 288, dtype=torch.uint8), format="mxfp8_v41_window")


def test_vllm_states_with_a_head_of_their_own():
    """[B, 1, N, C], as 0.33 has them, are the same memory."""
    tensor = torch.zeros(5, 1, 4, CSA.state_dim)
    state = vllm.state(tensor)
    assert state.data.data_ptr() == tensor.data_ptr()
    assert state.blocks.shape[:2] == (5, 4)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("spec", [CSA, HCA, UNROTATED], ids=["csa", "hca", "indexer"])
def test_vllm_windows_of_a_state_that_vllm_filled(spec, impl):
    """Its first kernel has saved every token; the second one's work is ``Bound.pool``."""
    count, block = 2 * spec.ratio + 3, 4
    w, x, start = weights(spec), tokens(spec, 2 * count), spec.ratio + 1
    columns = -(-(start + count) // block)
    table = torch.randperm(2 * columns + 3, generator=torch.Generator().manual_seed(1))[: 2 * columns].view(2, -1)
    states = torch.full((2 * columns + 3, block, spec.state_dim), float("nan"))
    for q, length in ((0, count), (1, start + count)):  # the second request goes on at ``start``
        for p in range(length):
            kv, score = x[q * count + p % count].split(spec.width)
            states[table[q, p // block], p % block] = torch.cat([kv, score + w.ape[p % spec.ratio]])
    slots = torch.full((2 * count,), -1)
    ends = [t for t in range(2 * count) if ((t if t < count else start + t - count) + 1) % spec.ratio == 0]
    slots[ends] = torch.arange(len(ends)) + 3
    batch = vllm.batch(
        torch.tensor([0, count, 2 * count]), torch.tensor([count, start + count]), state_block_table=table,
        slot_mapping=slots,
    )  # fmt: skip
    wanted = None
    for state in (states.clone(), states.clone()):
        cache = PagedCache.allocate(spec.head_dim, 1, 64, format="bf16")
        bound = bind(spec, w, ROPE, state=vllm.state(state), cache=cache, impl=impl)
        if wanted is None:
            again = torch.cat([x[:count], torch.stack([x[count + (start + i) % count] for i in range(count)])])
            done = bound.condense(again, bound.plan(batch))
            wanted = done.values, cache.data.clone()
        else:
            done = bound.pool(bound.plan(batch))
            assert torch.equal(state.nan_to_num(7), states.nan_to_num(7)), "nothing is written to the state"
    assert torch.equal(done.values, wanted[0])
    assert torch.equal(cache.data, wanted[1])
    assert done.values.shape[0] == len(ends) > 3
    # A slot for each position, in place of blocks: pages of one row.
    rows = states.flatten(0, 1)[:, None]
    at = (table * block)[:, :, None] + torch.arange(block)
    pool = StatePool.wrap(rows, paged=True, keep_all=True)
    bound = bind(spec, w, ROPE, state=pool, impl=impl)
    single = RaggedBatch.build(
        batch.query_start_loc, start_positions=batch.start_positions, state_block_table=at.flatten(1)
    )
    assert torch.equal(bound.pool(bound.plan(single)).values, wanted[0])


def test_only_pages_with_every_row_are_pooled_from():
    w, table = weights(CSA), [[0, 1]]
    ring, paged = StatePool.ring(CSA, 2), StatePool.paged(CSA, 4, 4)
    partly = StatePool.wrap(torch.zeros(4, 4, CSA.state_dim), paged=True)
    for state, where in ((ring, {"state_slots": [0]}), (paged, {"state_block_table": table}),
                         (partly, {"state_block_table": table}), (None, {})):  # fmt: skip
        bound = bind(CSA, w, ROPE, state=state, impl="reference")
        batch = RaggedBatch.build([0, 8], start_positions=[0], **where)
        with pytest.raises(KvCondenseError, match="^state: expected pages that others write, a row for every position"):
            bound.pool(bound.plan(batch))
    whole = StatePool.wrap(torch.zeros(4, 4, CSA.state_dim), paged=True, keep_all=True)
    bound = bind(CSA, w, ROPE, state=whole, impl="reference")
    with pytest.raises(ShapeError, match="state_block_table: expected at least 3 pages"):
        bound.pool(bound.plan(RaggedBatch.build([0, 9], start_positions=[0], state_block_table=table)))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_vllm_rings_of_v41(impl):
    """Row p mod capacity of a request's block is [kv | score]; block 0 is the null block; rows of ratio 2 at odd p."""
    capacity, d = 8, V41.head_dim
    states = torch.full((4, 1, capacity, 2 * d), 7.0)
    storage = torch.zeros(2, 528 * 64, dtype=torch.uint8)
    cache = vllm.cache(storage.view(2, 64, 528), format="mxfp8_v41_window_interleaved")
    rope = RopeTable.build(ModelConfig.V41_FLASH, 64)
    w = CompressorWeights(norm=(1 + 0.2 * torch.randn(d, generator=torch.Generator().manual_seed(5))).bfloat16())
    bound = bind(V41, w, rope, state=vllm.ring_state(states), cache=cache, latent=True, impl=impl)
    x, seen, rows = tokens(V41, 40), [0, 0], {}
    for lengths in ((5, 3), (1, 1), (3, 6), (2, 1)):  # the last two tokens of a request may be drafts
        taken = [x[20 * q + seen[q] :][: lengths[q]] for q in range(2)]
        seen = [a + b for a, b in zip(seen, lengths, strict=True)]
        step = torch.cat([*taken, torch.full((2, 2 * d), float("nan"))])  # a padding request with the null block
        first, second = lengths
        slots = torch.full((first + second + 2,), -1)
        for q, end in ((0, first), (1, first + second)):
            for t in range(end - lengths[q], end):
                position = seen[q] - (end - t)
                slots[t] = 40 * q + position // 2 if position % 2 else -1
        batch = vllm.ring_batch(
            torch.tensor([0, first, first + second, first + second + 2]), torch.tensor([*seen, 2]),
            block_table=torch.tensor([[3, 0], [1, 0], [0, 0]], dtype=torch.int32), slot_mapping=slots,
            draft_rows=torch.tensor([min(2, first), min(2, second), 0]),
        )  # fmt: skip
        done = bound.condense(step, bound.plan(batch))
        rows |= dict(zip(done.slot.tolist(), zip(done.latent, done.values, strict=True), strict=True))
    memory = raw_bytes(states)
    for q, block in ((0, 3), (1, 1)):
        for p in range(seen[q] - 3, seen[q]):
            assert fp32_row(memory, 4 * 2 * d * (capacity * block + p % capacity), 2 * d) == x[20 * q + p].tolist()
    assert bool((states[[0, 2]] == 7).all()), "neither the null block nor anybody else's is written"
    assert sorted(rows) == [*range(5), *range(40, 45)]
    for q in range(2):
        for window in range(5):
            latent, row = rows[40 * q + window]
            kv, z = x[20 * q + 2 * window :][:2].double().split(d, dim=1)
            pooled = (torch.softmax(z, 0) * kv).sum(0)
            exact = pooled * torch.rsqrt(pooled.square().mean() + V41.eps) * w.norm.double()
            assert torch.equal(latent, latent.bfloat16().float())
            assert ((latent - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
            data, scales = encode_row("mxfp8_v41_window", row, exact=True)
            page, at = divmod(40 * q + window, 64)
            assert raw_bytes(storage[page, 528 * at : 528 * at + 528]) == data + scales
    with pytest.raises(ShapeError, match=r"block_table: expected \[R, at least 1\]"):
        vllm.ring_batch(torch.tensor([0, 1]), torch.tensor([1]), block_table=torch.zeros(1, 0, dtype=torch.int32))


def test_vllm_ratio_1_of_v41_has_no_state():
    spec = CompressorSpec(1, 512, 1e-20, 64, has_ape=False, has_gate=False, rounding=Rounding.LATENT)
    batch = vllm.ring_batch(torch.tensor([0, 3]), torch.tensor([5]))
    w = CompressorWeights(norm=torch.ones(512, dtype=torch.bfloat16))
    done = condense(spec, tokens(spec, 3), w, RopeTable.build(ModelConfig.V41_FLASH, 8), batch)
    assert done.window.tolist() == [2, 3, 4]


def test_vllm_other_caches():
    assert vllm.cache(torch.zeros(2, 64, 512, dtype=torch.bfloat16)).format.name == "bf16"
    assert vllm.cache(torch.zeros(2, 64, 68, dtype=torch.uint8)).format.name == "mxfp4_indexer"
    tensor = torch.zeros(2, 64, 512).to(torch.float8_e4m3fn)
    assert vllm.cache(tensor, scale=torch.tensor(0.5)).format.name == "fp8_tensor"
    with pytest.raises(ShapeError, match="584"):
        vllm.cache(torch.zeros(2, 64, 100, dtype=torch.uint8))
    with pytest.raises(DtypeError, match="fp32"):
        vllm.state(torch.zeros(2, 4, 64, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="cos_sin_cache"):
        vllm.rope(torch.zeros(3, 5))


# SGLang: row swa_page * ring_size + position % ring_size, [kv | score] without ape; or a ring for each request slot.
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_sglang_rings_hold_raw_rows(paged, impl):
    ring, swa_page, w, x = 8, 256, weights(CSA), tokens(CSA, 270)
    buffer = torch.full((6 * ring + 3, CSA.state_dim), 7.0)
    req_to_token = torch.zeros(3, 512, dtype=torch.int32)
    req_to_token[1] = torch.cat([torch.arange(1280, 1536), torch.arange(256, 512)])
    full_to_swa = torch.arange(2048) - 256  # the sliding-window pool's pages: 4 and 0
    where = {"state_slots": torch.tensor([1])}
    if paged:
        pages = sglang.state_pages(req_to_token, torch.tensor([1]), full_to_swa, swa_page)
        assert pages.tolist() == [[4, 0]]
        where = {"state_block_table": pages}
    state = sglang.state(buffer, ring, swa_page_size=swa_page if paged else None)
    storage = torch.zeros(8, math.ceil(584 * 64 / 576) * 576, dtype=torch.uint8)
    rows = []
    for low, high in ((0, 255), (255, 259), (259, 270)):
        batch = sglang.batch(
            torch.tensor([0, high - low]),
            torch.tensor([high]),
            ratio=4,
            out_cache_loc=req_to_token[1, low:high],
            **where,
        )
        done = condense(CSA, x[low:high], w, ROPE, batch, state=state, cache=sglang.cache(storage, 64), impl=impl)
        rows.append(done.values)
    memory = raw_bytes(buffer)
    for p in range(264, 270):  # the last window and what is open
        at = (0 if paged else 1) * ring + p % ring
        assert fp32_row(memory, at * CSA.state_dim * 4, CSA.state_dim) == x[p].tolist()
    assert bool((buffer[6 * ring :] == 7).all())
    rows = torch.cat(rows).bfloat16().float().tolist()
    assert raw_bytes(storage[5]) == model1_page(dict(enumerate(rows[:64])), 64)
    assert raw_bytes(storage[1]) == model1_page(dict(enumerate(rows[64:])), 64)
    assert len(rows) == 67


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("layout", sglang.LAYOUTS)
def test_sglang_rings_and_layouts_of_v41(layout, impl):
    """A ring of 4 rows for each request slot (two drafts); rows of every layout, packed by hand."""
    spec = CompressorSpec.for_layer(ModelConfig.V41_FLASH, 2)
    ring, d, name = 4, spec.head_dim, sglang.LAYOUTS[layout]
    buffer = torch.full((5 * ring + ring + 1, 2 * d), 7.0)
    page = FORMATS[name].page_bytes(d, 32)
    storage = torch.zeros(3, page, dtype=torch.uint8)
    w = CompressorWeights(norm=1 + 0.2 * torch.randn(d, generator=torch.Generator().manual_seed(5)))
    cache = sglang.cache(storage, 32, format=name)
    bound = bind(
        spec, w, RopeTable.build(ModelConfig.V41_FLASH, 64), state=sglang.state(buffer, ring), cache=cache, impl=impl
    )
    x, rows, seen = tokens(spec, 12), {}, 0
    x[4:8, :d] *= 1e-5  # below the floors of scales
    for count, drafts in ((3, 0), (3, 2), (3, 2), (1, 0)):
        batch = sglang.batch(
            torch.tensor([0, count]), torch.tensor([seen + count]), ratio=2, draft_rows=drafts,
            out_cache_loc=torch.arange(70, 82)[seen : seen + count], state_slots=torch.tensor([3]),
        )  # fmt: skip
        done = bound.condense(x[seen : seen + count], bound.plan(batch))
        rows |= dict(zip(done.slot.tolist(), done.values, strict=True))
        seen += count - drafts
    assert sorted(rows) == [35, 36, 37]
    memory = raw_bytes(buffer)
    assert fp32_row(memory, 4 * 2 * d * (3 * ring + (seen - 1) % ring), 2 * d) == x[seen - 1].tolist()
    assert bool((buffer[: 3 * ring] == 7).all())
    assert bool((buffer[4 * ring :] == 7).all())
    for slot, row in rows.items():
        parts = encode_row(name, row)
        for part, places in zip(parts, place(name, d, 32, slot % 32), strict=True):
            assert storage[slot // 32].numpy()[places].tobytes() == part


# ATOM: kv and score + ape in two tensors of rings; 512 bytes of codes and scales beside 64 bf16 channels.
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("spec", "dtype"), [(CSA, torch.float8_e4m3fn), (HCA, torch.float8_e4m3fnuz)], ids=["csa", "hca"]
)
def test_atom_states_and_pages_in_two_tensors(spec, dtype, impl):
    ring, n, w = spec.window + 2, spec.width, weights(spec)
    kv, score = (torch.full((3, ring, n), value) for value in (7.0, 8.0))
    nope, rope_rows = torch.zeros(4, 16, 512, dtype=dtype), torch.zeros(4, 16, 96, dtype=torch.bfloat16)
    second = rope_rows.as_strided((4, 16, 64), (16 * 96, 64, 1))  # blocks at a stride of their own
    state, cache = atom.state(kv, score), atom.cache(nope, second)
    assert state.state_dim == spec.state_dim
    bound = bind(spec, w, ROPE, state=state, cache=cache, impl=impl)
    x, seen, rows = tokens(spec, 2 * spec.ratio + 9), 0, {}
    for count, drafts in ((spec.ratio + 3, 0), (3, 2), (spec.ratio - 1, 0), (3, 1)):
        batch = atom.batch(
            torch.tensor([0, count]), torch.tensor([seen + count]), draft_rows=drafts,
            state_slot_mapping=torch.tensor([1], dtype=torch.int32), block_tables=torch.tensor([[2, 0]]),
        )  # fmt: skip
        done = bound.condense(x[seen : seen + count], bound.plan(batch))
        rows |= dict(zip(done.slot.tolist(), done.values, strict=True))
        seen += count - drafts
    assert seen == 2 * spec.ratio + 5
    for p in range(seen - spec.seed_rows(seen), seen):
        at = 4 * n * (ring + p % ring)
        assert fp32_row(raw_bytes(kv), at, n) == x[p, :n].tolist()
        assert fp32_row(raw_bytes(score), at, n) == (x[p, n:] + w.ape[p % spec.ratio]).tolist()
    assert bool((kv[[0, 2]] == 7).all())
    assert bool((score[[0, 2]] == 8).all())
    one = StatePool.ring(spec, 3, ring)
    bound = bind(spec, w, ROPE, state=one, impl="reference")
    plan = bound.plan(RaggedBatch.build([0, seen], start_positions=[0], state_slots=[1], draft_rows=2))
    expected = bound.condense(x[:seen], plan).values
    assert sorted(rows) == [32, 33, 34][: expected.shape[0]]
    for (slot, row), other in zip(sorted(rows.items()), expected, strict=True):
        torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-6)
        data, scales = encode_row(cache.format.name, row)
        page, at = divmod(slot, 16)
        stored = raw_bytes(nope[page, at].view(torch.uint8))
        assert (stored[:448], stored[448:]) == (data[:448], scales)
        assert scales[:14:2] == scales[1:14:2]
        assert raw_bytes(second[page, at]) == data[448:]


def test_atom_indexer_and_refusals():
    memory = torch.zeros(3, 32 * 132 + 64, dtype=torch.uint8)
    keys = memory[:, : 32 * 128].view(torch.float8_e4m3fn).unflatten(1, (32, 128))
    scales = memory[:, 32 * 128 : 32 * 132].view(torch.float32)
    cache = atom.indexer_cache(keys, scales)
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    store(rows, torch.tensor([3, 17, 31, 40, 95]), cache)
    for slot, row in zip((3, 17, 31, 40, 95), rows, strict=True):
        parts = encode_row("fp8_indexer_pow2_16x16", row)
        for part, places in zip(parts, place("fp8_indexer_pow2_16x16", 128, 32, slot % 32), strict=True):
            assert memory[slot // 32].numpy()[places].tobytes() == part
    with pytest.raises(ShapeError, match="cache_scale: expected fp32, behind the keys"):
        atom.indexer_cache(keys, torch.zeros(3, 32))
    with pytest.raises(DtypeError, match="kv_cache: expected torch.float8_e4m3fn"):
        atom.indexer_cache(memory[:, : 32 * 128].unflatten(1, (32, 128)), scales)
    with pytest.raises(DtypeError, match="beside kv_cache_rope"):
        atom.cache(torch.zeros(2, 16, 512, dtype=torch.bfloat16), torch.zeros(2, 16, 64, dtype=torch.bfloat16))
    with pytest.raises(DtypeError, match="second: expected torch.bfloat16"):
        atom.cache(torch.zeros(2, 16, 512).to(torch.float8_e4m3fn), torch.zeros(2, 16, 64))
    assert atom.cache(torch.zeros(2, 16, 512, dtype=torch.bfloat16)).format.name == "bf16"
    table = atom.rope(ROPE.cos[:, None, None].bfloat16(), ROPE.sin[:, None, None].bfloat16())
    assert torch.equal(table.sin, ROPE.sin.bfloat16().float())
    kv = torch.zeros(3, 8, CSA.width)
    for wrong, message in ((kv.bfloat16(), "torch.float32 as the state data"), (torch.zeros(3, 8, 9), "shape"),
                           (torch.zeros(3, 9, CSA.width)[:, :8], "strides"), (kv, "memory of its own")):  # fmt: skip
        with pytest.raises(KvCondenseError, match=rf"state score.*{message}"):
            bind(CSA, weights(CSA), ROPE, state=atom.state(kv, wrong))


def test_two_tensors_of_a_state_are_reset_forked_and_snapshot():
    kv, score = (torch.randn(4, 8, CSA.width, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    state, at = atom.state(kv.clone(), score.clone()), RaggedBatch.at(7, state_slot=2)
    state.fork([2], [0])
    state.reset([1])
    assert torch.equal(state.memory[0][0], kv[2])
    assert torch.equal(state.memory[1][0], score[2])
    assert all(bool(t[1].isnan().all()) for t in state.memory)
    payload = save_live(CSA, state, at)
    fresh = atom.state(torch.zeros_like(kv), torch.zeros_like(score))
    load_live(CSA, fresh, at, payload)
    assert torch.equal(fresh.memory[0][2, :7], kv[2, :7])
    assert torch.equal(fresh.memory[1][2, :7], score[2, :7])


def test_sglang_indexer_pages():
    x, w = tokens(INDEXER, 8), weights(INDEXER)
    storage = torch.zeros(2, 132 * 64, dtype=torch.uint8)
    cache = sglang.cache(storage, 64, format="fp8_indexer_plain")
    batch = sglang.batch(torch.tensor([0, 8]), torch.tensor([8]), ratio=4, out_cache_loc=torch.arange(256, 264))
    done = condense(INDEXER, x, w, ROPE, batch, cache=cache)
    rows = rows_by_page(done.values, done.slot, 64)
    assert raw_bytes(storage[1]) == indexer_page(rows[1], 64, power_of_two=False)


def test_sglang_ape_is_read_half_by_half():
    original = weights(CSA).ape
    converted = sglang.to_ape(original, overlap=True)
    as_read = converted.reshape(8, 512)  # how SGLang's kernels see it
    for half in range(2):
        for phase in range(4):
            assert torch.equal(as_read[4 * half + phase], original[phase, 512 * half : 512 * half + 512])
    assert torch.equal(sglang.ape(converted, overlap=True), original)
    assert sglang.ape(original, overlap=False) is original
    assert sglang.to_ape(original, overlap=False) is original


def test_sglang_tables_and_refusals():
    table = sglang.rope(torch.complex(ROPE.cos, ROPE.sin))
    assert torch.equal(table.cos, ROPE.cos)
    assert torch.equal(table.sin, ROPE.sin)
    gone = sglang.state_pages(torch.tensor([[0, 1, 2, 3]]), torch.tensor([0]), torch.tensor([-1, -1, 4, 5]), 2)
    assert gone.tolist() == [[-1, 2]]
    with pytest.raises(ShapeError, match="freqs_cis"):
        sglang.rope(ROPE.cos)
    with pytest.raises(ShapeError, match="ring_size"):
        sglang.state(torch.zeros(4, 64), 8)
    with pytest.raises(RangeError, match="head_dim"):
        sglang.cache(torch.zeros(1, 64, dtype=torch.uint8), 1, format="bf16")


# FlashMLA: [num_blocks, block_size, 1, 584], blocks padded to a multiple of 576 bytes.
def test_flashmla_pages_are_written_and_read_in_place():
    page = math.ceil(584 * 2 / 576) * 576
    storage = torch.zeros(4, page, dtype=torch.float8_e4m3fn)
    k_cache = storage[:, : 2 * 584].view(4, 2, 1, 584)
    x, w = tokens(HCA, 384), weights(HCA)
    table = torch.tensor([[3, 1]])
    batch = RaggedBatch.build([0, 384], start_positions=[0], block_table=table)
    cache = flashmla.cache(k_cache)
    done = condense(HCA, x, w, ROPE, batch, cache=cache)
    assert done.slot.tolist() == [6, 7, 2]
    found = rows_by_page(done.values, done.slot, 2)
    for number in range(4):
        assert raw_bytes(storage[number].view(torch.uint8)) == model1_page(found.get(number, {}), 2)
    again = cache.decode_rows(done.slot)
    assert torch.equal(again[:, 448:], done.values[:, 448:].bfloat16().float())
    at = flashmla.indices(torch.tensor([[[2, -1, 0]]]), table, 2)
    assert at.tolist() == [[[2, -1, 6]]]
    assert at.dtype == torch.int32


def test_flashmla_refusals():
    assert flashmla.cache(torch.zeros(2, 4, 1, 512, dtype=torch.bfloat16)).format.name == "bf16"
    with pytest.raises(ShapeError, match="k_cache"):
        flashmla.cache(torch.zeros(2, 4, 2, 584, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="584"):
        flashmla.cache(torch.zeros(2, 4, 1, 656, dtype=torch.uint8))
    with pytest.raises(RangeError, match="rows"):
        flashmla.indices(torch.tensor([[[4]]]), torch.tensor([[3, 1]]), 2)
    with pytest.raises(KvCondenseError, match="rows"):
        flashmla.indices(torch.tensor([[4]]), torch.tensor([[3, 1]]), 2)


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLE))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[9, 6] tokens: rows [0, 1, 0] of requests [0, 0, 1] to slots [64, 65, 128]"
    assert len(lines) == 3
