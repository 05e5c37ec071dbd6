"""Memory that is not what a tensor says: shared, overlapping, negated, sparse. Refused before anything is written."""

from dataclasses import replace

import pytest
import torch

from kvcondense import (
    KvCondenseError,
    OnlineState,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
    compress,
    condense,
    training,
)
from kvcondense.bound import bind
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.memory import overlap
from kvcondense.layout.online import OnlineLayout
from machine import SPECS, rope, tokens, weights

SPEC = SPECS["csa"]
BATCH = {"start_positions": [0], "state_slots": [0], "block_table": [[0]]}


def setting():
    state = StatePool.ring(SPEC, 2)
    state.data.zero_()
    return {
        "spec": SPEC, "kv_score": tokens(SPEC, 8), "weights": weights(SPEC, hidden=32), "rope": rope(SPEC, 8),
        "batch": RaggedBatch.build([0, 8], **BATCH), "state": state, "cache": PagedCache.allocate(16, 2, 4),
    }  # fmt: skip


def refused(match, call=condense, **changes):
    s = {**setting(), **changes}
    if call is not condense:
        s["x"] = s.pop("kv_score")
    before = [t.clone() for owner in (s["state"], s["cache"]) for t in owner.tensors.values()]
    with pytest.raises(KvCondenseError, match=match):
        call(**s)
    after = [t for owner in (s["state"], s["cache"]) for t in owner.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_alias_of_tokens_and_what_is_written():
    s = setting()
    state = s["state"]
    refused("kv_score: expected memory that no step writes .state is written.", kv_score=state.data[:8], state=state)
    shared = torch.zeros(16, SPEC.state_dim)
    inside = PagedCache.wrap(shared.view(-1).view(torch.bfloat16)[:128].view(2, 4, 16))
    refused(
        "cache: expected memory of its own, got memory of state", state=StatePool(shared, state.layout), cache=inside
    )
    w = weights(SPEC, hidden=32)
    refused("weights.norm", weights=replace(w, norm=shared.view(-1)[:16]), state=StatePool(shared, state.layout))
    table = RopeTable(shared.view(-1)[:32].view(8, 4), rope(SPEC, 8).sin)
    refused("rope.cos", rope=table, state=StatePool(shared, state.layout))


def test_alias_free_blocks_of_one_engine_tensor():
    """States and pages side by side in each block of an engine's tensor are memory of their own."""
    block = torch.zeros(4, 4096, dtype=torch.uint8)
    state = block[:, :2048].view(torch.float32).unflatten(1, (8, 64))
    pages = block[:, 2048 : 2048 + 128].view(torch.bfloat16).unflatten(1, (4, 16))
    assert not overlap(state, pages)
    pool, cache = StatePool.wrap(state, paged=False), PagedCache.wrap(pages)
    s = setting()
    bind(SPEC, s["weights"], s["rope"], state=pool, cache=cache)
    condense(**{**s, "state": pool, "cache": cache})
    assert cache.rows.any()
    nearer = block[:, 2040 : 2040 + 128].view(torch.bfloat16).unflatten(1, (4, 16))
    assert overlap(state, nearer)
    with pytest.raises(KvCondenseError, match="cache"):
        bind(SPEC, s["weights"], s["rope"], state=pool, cache=PagedCache.wrap(nearer))


def test_alias_within_one_tensor():
    row = torch.zeros(1, SPEC.state_dim)
    for data, layout in (
        (row.expand(16, -1), setting()["state"].layout),
        (torch.zeros(9 * 64).as_strided((16, 64), (32, 1)), setting()["state"].layout),
        (torch.zeros(3, 4, 64).as_strided((4, 4, 64), (128, 64, 1)), PagedLayout(4, 4)),
    ):
        with pytest.raises(KvCondenseError, match="state data"):
            StatePool(data, layout)
    bf16 = PagedCache.allocate(16, 2, 4)
    for data in (bf16.data[:1].expand(2, -1), bf16.data.view(-1).as_strided((2, 128), (64, 1))):
        with pytest.raises(KvCondenseError, match="cache data"):
            replace(bf16, data=data)
    keys = PagedCache.allocate(128, 2, 4, format="int8_indexer")
    assert keys.scales is not None
    for scales in (torch.zeros(4, 2).t(), torch.zeros(1, 4).expand(2, -1), torch.zeros(2, 1).expand(-1, 4)):
        with pytest.raises(KvCondenseError, match="scales"):
            replace(keys, scales=scales)


def test_alias_of_values_that_memory_does_not_hold():
    x = tokens(SPEC, 8)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    refused("kv_score: expected a tensor that holds its values", kv_score=negated)
    refused("kv_score: expected a strided tensor", kv_score=x.to_sparse())
    refused("kv_score: expected a tensor without gradients .kvcondense.training", kv_score=x.clone().requires_grad_())
    with torch.no_grad():
        condense(**{**setting(), "kv_score": x.clone().requires_grad_()})
    hidden = torch.randn(8, 32)
    refused("x: expected a tensor without gradients", compress, kv_score=hidden.clone().requires_grad_())
    refused("x: expected a strided tensor", compress, kv_score=hidden.to_sparse())
    refused("x: expected a tensor that holds", compress, kv_score=torch.complex(hidden, hidden).conj().imag)
    w = weights(SPEC, hidden=32)
    refused("weights.norm", weights=replace(w, norm=torch.complex(w.norm, w.norm).conj().imag))
    batch = RaggedBatch.build([0, 8], start_positions=[0])
    with pytest.raises(KvCondenseError, match="kv_score"):
        training.condense(SPEC, negated, w, rope(SPEC, 8), batch)


@pytest.mark.parametrize("part", ["acc", "folded", "log", "tags"])
def test_an_online_state_made_by_hand_is_checked(part):
    spec = SPECS["r8"]
    good = OnlineState.allocate(spec, 2, 3)
    parts = {"acc": good.acc, "folded": good.folded, "log": good.log, "tags": good.tags}
    OnlineState(**parts, layout=OnlineLayout(2, 3))
    t = parts[part]
    for bad in (t[:-1], t.double() if t.is_floating_point() else t.int(), t[..., None]):
        with pytest.raises(KvCondenseError, match=f"state {part}"):
            OnlineState(**{**parts, part: bad}, layout=OnlineLayout(2, 3))


def test_an_online_state_without_a_log_goes_on_inside_a_window():
    """All that a window holds is folded: nothing is read of a log that is not there."""
    spec = SPECS["r8"]
    whole, parts = ([OnlineState.allocate(spec, 1) for _ in range(3)] for _ in range(2))
    for impl, one, two in zip(("reference", "cpu", "triton"), whole, parts, strict=True):
        x, rows = tokens(spec, 16), []
        for state, cuts in ((one, [(0, 16)]), (two, [(0, 5), (5, 11), (11, 16)])):
            for begin, end in cuts:
                batch = RaggedBatch.build([0, end - begin], start_positions=[begin], state_slots=[0])
                rows.append(
                    condense(spec, x[begin:end], weights(spec), rope(spec, 16), batch, state=state, impl=impl).values
                )
        assert torch.equal(rows[0], torch.cat(rows[1:]))
