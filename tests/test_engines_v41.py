"""vLLM's and SGLang's tensors of V4.1, byte by byte; and windows of states that an engine has filled itself."""

import pytest
import torch

from engine_tensors import CSA, HCA, ROPE, UNROTATED, V41, raw_bytes, tokens, weights
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
from kvcondense.bound import bind
from kvcondense.errors import KvCondenseError, ShapeError
from kvcondense.formats import FORMATS
from kvcondense.golden.pages import encode_row, place
from kvcondense.integrations import sglang, vllm
from kvcondense.spec import Rounding
from published import fp32_row


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
