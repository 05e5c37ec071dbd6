"""I1, I5, I6, I10: any split of a sequence gives the same cache bytes and live state, from memory full of NaN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcondense import CompressorWeights, ModelConfig, RaggedBatch, RopeTable, condense
from machine import PAIRS, SPECS, STATES, Machine, same, tokens


def partitions(total, cuts):
    """Chunk lengths that add up to ``total``; equal cuts give chunks of length 0."""
    edges = sorted(min(c, total) for c in cuts)
    return [b - a for a, b in zip([0, *edges], [*edges, total], strict=True)]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
def test_any_split_gives_the_same_bytes(name, kind, data):
    spec = SPECS[name]
    limit = 3 * spec.window + spec.ratio + 2
    lengths = data.draw(st.lists(st.integers(0, limit), min_size=1, max_size=3), label="lengths")
    machine = Machine(spec, [tokens(spec, n, i) for i, n in enumerate(lengths)], **STATES[kind])
    plans = [partitions(n, data.draw(st.lists(st.integers(0, n), max_size=6), label="cuts")) for n in lengths]
    for step in range(max(map(len, plans))):
        machine.feed([p[step] if step < len(p) else 0 for p in plans])
    for q in range(len(lengths)):
        assert machine.done[q] == lengths[q]
        whole = machine.whole(q)
        compared = same(machine.cache_of(q), whole.cache_of(0))
        assert compared == (lengths[q] >= spec.ratio)
        assert not torch.isnan(machine.cache_of(q).view(torch.bfloat16)).any()
        compared = same(machine.live_of(q), whole.live_of(0))
        assert compared == (kind == "online" or lengths[q] > spec.live_start(lengths[q]))


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("csa", [0, 1, 3, 4, 5, 7, 8, 9]),
        ("csa", [1] * 37),
        ("hca", [127, 1, 128, 0, 129, 130]),
        ("hca", [255, 1, 257]),
        ("hca", [1] * 260),
        ("r1", [3, 0, 1]),
    ],
)
def test_chunk_edges_that_broke_engines(name, chunks):
    spec = SPECS[name]
    machine = Machine(spec, [tokens(spec, sum(chunks))])
    for n in chunks:
        machine.feed([n])
    assert same(machine.cache_of(0), machine.whole(0).cache_of(0))
    same(machine.live_of(0), machine.whole(0).live_of(0))


@pytest.mark.parametrize("name", SPECS)
def test_each_row_is_emitted_once_when_its_last_token_arrives(name):
    spec = SPECS[name]
    length = 2 * spec.window + 3
    machine = Machine(spec, [tokens(spec, length)])
    emitted = []
    for position in range(length):
        rows = machine.feed([1])
        assert rows.window.tolist() == ([position // spec.ratio] if (position + 1) % spec.ratio == 0 else [])
        emitted += rows.window.tolist()
    assert emitted == list(range(spec.visible_rows(length)))
    assert emitted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["csa", "hca", "gateless"])
def test_state_dtype_does_not_break_composition(name, dtype):
    spec = SPECS[name]
    machine = Machine(spec, [tokens(spec, 3 * spec.window)], dtype=dtype)
    for n in (1, spec.window, spec.ratio - 1, spec.window):
        machine.feed([n])
    assert same(machine.cache_of(0), machine.whole(0).cache_of(0))


@pytest.mark.parametrize("name", ["csa", "hca", "indexer"])
def test_thread_count_does_not_matter(name):
    """At real width, where torch splits the work."""
    spec = replace(SPECS[name], head_dim=512, rope_dim=64)
    gen = torch.Generator().manual_seed(0)
    kv_score = torch.randn(600, spec.projected, generator=gen)
    weights = CompressorWeights(norm=torch.ones(512), ape=torch.randn(spec.ratio, spec.width, generator=gen))
    rope = RopeTable.build(ModelConfig.FLASH, 600)
    rows = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            batch = RaggedBatch.build([0, 600], start_positions=[0])
            rows.append(condense(spec, kv_score, weights, rope, batch).values)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_same_inputs_same_bytes_every_time(name):
    spec = SPECS[name]
    results = set()
    for _ in range(20):
        machine = Machine(spec, [tokens(spec, 2 * spec.window + 5), tokens(spec, 11, 1)])
        machine.feed([spec.window + 3, 11])
        machine.feed([spec.window + 2, 0])
        results.add(machine.cache.data.numpy().tobytes())
    assert len(results) == 1
