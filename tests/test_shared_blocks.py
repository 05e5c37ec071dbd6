"""Compressors of a layer whose states and caches are blocks of one memory: done together, and what is refused."""

from dataclasses import replace

import pytest
import torch

from kvcondense import PagedCache, RaggedBatch, StatePool
from kvcondense.api import Job, compress_many
from kvcondense.bound import bind, compress_together
from kvcondense.errors import KvCondenseError, ShapeError, UnsupportedError
from machine import SPECS, rope, weights

HIDDEN, BLOCKS, STRIDE, STEP = 64, 30, 512, 12
"""STRIDE: fp32 elements from block to block; rows of states and of caches begin at a block's first byte."""
ORDER = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))
TABLES = dict(zip(("csa", "csa cache", "indexer", "indexer cache"), ORDER.split([6, 3, 12, 9]), strict=True))


def blocks(memory, rows, size, dtype=torch.float32, *, stride=STRIDE, count=BLOCKS):
    typed, each = memory.view(dtype), 4 // dtype.itemsize
    return typed.as_strided((count, rows, size), (stride * each, size, 1))


def job(name, start, state, cache, shared):
    """A job of a step of 12 tokens, with its states and its rows in these memories."""
    spec = SPECS[name]
    batch = RaggedBatch.build(
        [0, STEP], start_positions=[start], state_block_table=TABLES[name][None],
        block_table=TABLES[f"{name} cache"][None, :3],
    )  # fmt: skip
    pool = StatePool.wrap(blocks(state, 4 if name == "csa" else 2, spec.state_dim), paged=True)
    pages = PagedCache.wrap(blocks(cache, 2, spec.head_dim, torch.bfloat16))
    w = weights(spec, hidden=HIDDEN)
    w = replace(w, w=w.w.bfloat16())
    return Job(spec, w, rope(spec, 64), batch, None, pool, pages, False, shared)


def memory():
    return torch.zeros(BLOCKS, STRIDE)


@pytest.mark.parametrize("impl", ["cpu", "reference", "triton"])
def test_two_compressors_in_one_memory_leave_what_they_leave_in_two_each(impl):
    one, four = memory(), [memory() for _ in range(4)]
    x = torch.randn(2 * STEP, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    for start in (0, STEP):
        part = x[start : start + STEP]
        shared = compress_many(part, [job(n, start, one, one, True) for n in ("csa", "indexer")], impl=impl)
        apart = [job("csa", start, *four[:2], False), job("indexer", start, *four[2:], False)]
        for a, b in zip(shared, compress_many(part, apart, impl=impl), strict=True):
            assert torch.equal(a.values, b.values)
    for part, (name, table) in zip(four, TABLES.items(), strict=True):
        assert torch.equal(one[table], part[table]), name
        assert bool(part[table].any()), name


def test_memory_that_is_shared_otherwise_is_refused():
    one, other = memory(), memory()
    x = torch.zeros(STEP, HIDDEN, dtype=torch.bfloat16)
    main, indexer = (job(n, 0, one, one, True) for n in ("csa", "indexer"))
    spec = indexer.spec
    wide = StatePool.wrap(blocks(one, 2, spec.state_dim, stride=2 * STRIDE, count=BLOCKS // 2), paged=True)
    cases = [
        (KvCondenseError, "memory of state of job 0", [job("csa", 0, one, other, False), indexer]),
        (KvCondenseError, "memory of state of job 0", [main, job("indexer", 0, one, other, False)]),
        (KvCondenseError, "state of job 1: expected memory of its own", [main, main]),
        (KvCondenseError, "state of job 1: expected memory of its own", [main, replace(main, cache=indexer.cache)]),
        (KvCondenseError, "cache of job 1: expected memory of its own", [main, replace(indexer, cache=main.cache)]),
        (
            ShapeError,
            "bytes apart|bytes of the memory's first",
            [main, replace(indexer, state=wide, cache=job("csa", 0, one, other, True).cache)],
        ),
        (KvCondenseError, "state_block_table of job 0", [main, replace(indexer, batch=main.batch)]),
    ]
    for error, match, jobs in cases:
        with pytest.raises(error, match=match):
            compress_many(x, jobs)
        assert not one.any()
        assert not other.any()
    with pytest.raises(KvCondenseError, match="x: expected memory that no step writes"):
        compress_many(one[:STEP, :HIDDEN], [main, indexer])


def test_bound_ones_too():
    one, x = memory(), torch.randn(STEP, HIDDEN).bfloat16()
    jobs = [job(n, 0, one, one, True) for n in ("csa", "indexer")]
    bound = [bind(j.spec, j.weights, j.rope, state=j.state, cache=j.cache, shared_blocks=True) for j in jobs]
    rows = compress_together(bound, x, [b.plan(j.batch) for b, j in zip(bound, jobs, strict=True)])
    assert [r.values.shape[0] for r in rows] == [3, 3]
    assert bool(one.any())


def test_a_job_that_cannot_be_projected_keeps_the_others_from_writing():
    states = [memory() for _ in range(4)]
    x = torch.randn(STEP, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    main, indexer = job("csa", 0, *states[:2], False), job("indexer", 0, *states[2:], False)
    assert indexer.weights.w is not None
    wide = replace(indexer, weights=replace(indexer.weights, w=indexer.weights.w.float()))
    with pytest.raises(UnsupportedError, match="bf16"):
        compress_many(x, [main, wide], impl="cpu")
    assert not any(bool(part.any()) for part in states)
