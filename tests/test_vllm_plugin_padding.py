"""The vLLM plugin on a GPU: padding anywhere among tokens writes nothing, tables are read where vLLM has them."""

import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import vllm_stand_ins as stand_ins
from engine_tensors import CSA, HCA, UNROTATED, tokens
from kvcondense import CompressorWeights, Plan, RaggedBatch, planning
from kvcondense.bound import bind
from kvcondense.integrations import vllm as engine
from kvcondense.integrations.vllm_plugin import compressor, install, steps
from vllm_stand_ins import BLOCKS

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: make vllm")
KINDS, TOKENS = ("real", "real", "behind", "whole", "front", "hole", "none"), 104


@pytest.fixture
def vllm(monkeypatch):
    made = stand_ins.install(monkeypatch)
    assert install().why == ""
    return made


def whose(slots, owners, positions, requests):
    """In plain Python, of each request: first token, behind its last, first position; None if nothing is written."""
    found, reached = [], 0
    for q in range(requests):
        mine = [t for t, (slot, owner) in enumerate(zip(slots, owners, strict=True)) if slot >= 0 and owner == q]
        if not mine or [(t, positions[t]) for t in mine] != [
            (mine[0] + i, positions[mine[0]] + i) for i in range(len(mine))
        ]:
            found.append(None)
            continue
        first, end = mine[0], mine[-1] + 1
        found.append((first, end, positions[first]) if first >= reached and (q or not first) else None)
        reached = max(reached, end)
    return found


@pytest.mark.parametrize("seed", range(300))
def test_who_has_which_tokens(seed):
    """Of any metadata: what a plain loop finds, and never padding as a token of somebody."""
    rng = random.Random(seed)
    requests, n = rng.randint(1, 5), rng.randint(1, 16)
    if rng.random() < 0.3:
        owners = [rng.randint(-1, requests) for _ in range(n)]
    else:
        owners = sorted(rng.randint(0, requests - 1) for _ in range(n))
    seen, positions = [rng.choice([0, 7, 130]) for _ in range(requests + 1)], []
    for owner in owners:
        positions.append(seen[owner])
        seen[owner] += 1 if rng.random() < 0.97 else 2
    slots = [-1 if rng.random() < rng.choice([0, 0.1, 0.5]) else t for t in range(n)]
    for t in range(n):
        if slots[t] < 0 and rng.random() < 0.5:
            positions[t] = rng.choice([0, 99])
    metadata = stand_ins.Metadata(
        torch.zeros(requests, 4, dtype=torch.int32), torch.tensor(slots), 4, torch.tensor(owners, dtype=torch.int32)
    )
    told = steps.spans(metadata, torch.tensor(positions))
    offsets, starts = told.query_start_loc.tolist(), told.start_positions.tolist()
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= n
    assert len(starts) == len(offsets) - 1 == 2 * requests - 1
    assert set(starts[1::2]) <= {-1}
    wanted = whose(slots, owners, positions, requests)
    found = [
        (offsets[2 * q], offsets[2 * q + 1], starts[2 * q]) if starts[2 * q] >= 0 else None for q in range(requests)
    ]
    assert found == wanted
    for one in filter(None, found):
        assert min(slots[one[0] : one[1]]) >= 0


def padded(tables, kinds, starts, lengths, rng):
    """What a step says of its tokens, with padding amid them: owners, slots, rows of the cache and positions."""
    metadata, cache_slots, positions = tables.metadata(starts, lengths)
    owners = metadata.token_to_req_indices.tolist()
    columns = list(zip(owners, metadata.slot_mapping.tolist(), cache_slots.tolist(), positions.tolist(), strict=True))
    said = []
    for q, kind in enumerate(kinds):
        mine = [c for c in columns if c[0] == q]
        pads = [(q, -1, rng.choice([-1, 5]), rng.choice([0, 3])) for _ in range(rng.randint(1, 3))]
        said += {
            "real": mine,
            "behind": mine + pads,
            "whole": [(q, -1, -1, 0) for _ in mine],
            "front": pads + mine,
            "hole": mine[:1] + pads + mine[1:],
            "none": [],
        }[kind]
    said += [(0, -1, -1, 0)] * (TOKENS - len(said))
    return [torch.tensor(column) for column in zip(*said, strict=True)]


@pytest.mark.parametrize("spec", [CSA, HCA], ids=["csa", "hca"])
@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
def test_padding_amid_tokens_changes_no_byte(vllm, monkeypatch, spec, odd):
    """A padded step leaves the bytes of the step without padding, which the host has planned."""
    monkeypatch.setattr(steps, "_statics", type(steps._statics)())
    rng, tables = random.Random(5), stand_ins.Engine.of(spec, 3, 160, BLOCKS)
    if odd:
        tables.state_table = tables.state_table[:, : tables.state_table.shape[1] // 2 * 2 - 1].contiguous()
    memory = torch.randint(0, 99, (BLOCKS, stand_ins.PAGE), dtype=torch.uint8)
    plain, table = memory.clone(), tables.state_table.clone()
    module, rope = stand_ins.layer(vllm, spec, memory)
    fresh, _ = stand_ins.layer(vllm, spec, plain)
    held = [torch.zeros(TOKENS, dtype=torch.int64) for _ in range(4)]
    rows, done, left_out = 4 if spec.overlap else 8, [0, 0, 0], 0
    for i in range(20):
        kinds = [rng.choice(KINDS) for _ in done]
        lengths = [min(rng.choice([1, 3, 6, 30]), 150 - n) for n in done]
        said, x = padded(tables, kinds, done, lengths, rng), tokens(spec, TOKENS, i)
        live = whose(said[1].tolist(), said[0].tolist(), said[3].tolist(), len(done))
        real = [t for one in filter(None, live) for t in range(one[0], one[1])]
        for mine, new in zip(held, said, strict=True):
            mine.copy_(new)
        with monkeypatch.context() as patch:
            stand_ins.as_on_a_gpu(patch)
            forward(vllm, module, rope, x, table, rows, held)
        if real:
            forward(vllm, fresh, rope, x[real], tables.state_table, rows, [column[real] for column in said])
        assert torch.equal(memory, plain), (i, kinds)
        done = [n if one is None else n + one[1] - one[0] for n, one in zip(done, live, strict=True)]
        left_out += live.count(None)
    assert vllm.asked == []
    assert len(steps._statics) == 1
    assert torch.equal(table, tables.state_table), "nobody writes to vLLM's table"
    assert left_out > 10
    assert min(done) > 10


def forward(vllm, module, rope, x, table, rows, said):
    """A module's step of tokens of which ``said`` is what ``padded`` gives."""
    owners, slots, cache_slots, positions = said
    metadata = stand_ins.Metadata(table, slots, rows, owners.to(torch.int32))
    told = {module.state_cache.prefix: metadata, module.k_cache_prefix: SimpleNamespace(slot_mapping=cache_slots)}
    vllm.context = stand_ins.Context(told)
    module.forward(x, positions, rope)


@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
def test_a_gpu_reads_vllms_table_where_it_lies(vllm, monkeypatch, odd):
    """By Triton's kernels, interpreted: int32, no copy, and a plan that is filled anew sees what vLLM has put there."""
    monkeypatch.setattr(steps, "_statics", type(steps._statics)())
    spec, tables = UNROTATED, stand_ins.Engine.of(UNROTATED, 2, 40, BLOCKS)
    tables.state_table = tables.state_table[:, : 9 if odd else 10].contiguous()
    memories = [torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8) for _ in range(2)]
    ours, plain = (_bound(vllm, spec, memory) for memory in memories)
    job = ours.spec, ours.state.layout, ours.cache.page_rows
    table, slots = torch.zeros_like(tables.state_table), torch.zeros(14, dtype=torch.int64)
    plans = []
    for start in (0, 6, 12, 18):
        metadata, cache_slots, positions = tables.metadata([start, start], [6, 6], 2)
        x = tokens(spec, 14, start)
        batch = RaggedBatch.build(
            [0, 6, 12], start_positions=[start, start], state_block_table=tables.state_table, slot_mapping=cache_slots
        )
        plain.condense(x, plain.plan(batch))
        table[:, : start // 4 + 3] = tables.state_table[:, : start // 4 + 3]  # vLLM deals out blocks as it needs them
        slots.copy_(cache_slots)
        with monkeypatch.context() as patch:
            patch.setattr(planning, "_launches", lambda _: True)
            patch.setattr(Plan, "build_static", None)
            plans.append(steps._static(ours, job, steps.spans(metadata, positions), table, slots))
        ours.condense(x, plans[-1])
        assert torch.equal(*memories), start
    assert len({id(plan) for plan in plans}) == 1
    read = plans[0].batch.state_block_table
    assert read.dtype == torch.int32
    assert (read.data_ptr() == table.data_ptr()) is not odd
    assert bool(memories[0].any())


def _bound(vllm, spec, memory):
    """A module's states and rows under Triton's kernels."""
    module, rope = stand_ins.layer(vllm, spec, memory)
    cache = module._static_forward_context[module.k_cache_prefix]
    return bind(
        spec, CompressorWeights(norm=module.norm.weight, ape=module.ape), engine.rope(rope.cos_sin_cache),
        state=engine.state(module.state_cache.kv_cache), cache=compressor.cache_of(cache), shared_blocks=True,
        impl="triton",
    )  # fmt: skip
