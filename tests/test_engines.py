"""Engines' tensors: what a step writes into them, byte by byte, against layouts packed by hand from their sources."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from engine_tensors import CSA, HCA, INDEXER, ROPE, UNROTATED, blocks, raw_bytes, rows_by_page, tokens, weights
from kvcondense import (
    RaggedBatch,
    condense,
)
from kvcondense.errors import DtypeError, KvCondenseError, RangeError, ShapeError
from kvcondense.integrations import flashmla, sglang, vllm
from published import fp32_row, indexer_page, model1_page

EXAMPLE = Path(__file__).parent.parent / "examples" / "engine.py"


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
