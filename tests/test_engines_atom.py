"""ATOM's tensors: a state in two, pages in two buffers, indexer keys in tiles, byte by byte."""

import pytest
import torch

from engine_tensors import CSA, HCA, ROPE, raw_bytes, tokens, weights
from kvcondense import (
    RaggedBatch,
    StatePool,
)
from kvcondense.api import store
from kvcondense.bound import bind
from kvcondense.errors import DtypeError, KvCondenseError, ShapeError
from kvcondense.golden.pages import encode_row, place
from kvcondense.integrations import atom
from kvcondense.snapshot import load_live, save_live
from published import fp32_row


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
