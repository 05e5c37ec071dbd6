"""One rank of tests/test_parallel.py, which over_ranks.py starts with a scenario; prints what it found."""

import contextlib
import itertools
import random
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kvcondense import CompressorWeights, PagedCache, RaggedBatch, StatePool, condense
from kvcondense.errors import RangeError, RankError
from kvcondense.layout.snapshot import export_live
from kvcondense.module import Compressor
from kvcondense.parallel import Segment, Shards, condense_shard, round_robin, traffic, zigzag
from kvcondense.spec import Rounding
from machine import SPECS, rope, weights

TOKENS = 300
CUTS = {2: ([130], [0], [300], [128], [257]), 4: ([100, 128, 131], [1, 2, 3], [128, 128, 256], [299, 300, 300])}


def whole(spec, kv_score, w):
    """A single rank's rows, bytes and state."""
    pool, cache = StatePool.ring(spec, 1), PagedCache.allocate(spec.head_dim, 40, 8)
    slots = torch.arange(TOKENS) // spec.ratio
    batch = RaggedBatch.build([0, TOKENS], start_positions=[0], state_slots=[0], slot_mapping=slots)
    rows = condense(spec, kv_score, w, rope(spec, 512), batch, state=pool, cache=cache)
    return rows, cache, export_live(spec, pool, RaggedBatch.at(TOKENS, state_slot=0))


def equal(rank, ranks):
    """Every compressor and cut: rows, bytes in the cache, state at the end, and how little moved."""
    for name, spec in SPECS.items():
        w = weights(spec, hidden=8)
        kv_score = torch.randn(TOKENS, spec.projected, generator=torch.Generator().manual_seed(1))
        expected, stored, live = whole(spec, kv_score, w)
        for cuts in CUTS[ranks]:
            starts = [0, *cuts, TOKENS]
            begin, end = starts[rank], starts[rank + 1]
            cache = PagedCache.allocate(spec.head_dim, 40, 8)
            shards = Shards.agree_on([(0, begin, end - begin)], decode_ranks={0: len(cuts) // 2}, timeout=30)
            done = condense_shard(
                spec, kv_score[begin:end], w, rope(spec, 512), shards, cache=cache,
                slot_mapping=torch.arange(begin, end) // spec.ratio,
            )  # fmt: skip
            mine = slice(begin // spec.ratio, end // spec.ratio)
            assert torch.equal(done.rows.values, expected.values[mine]), (name, cuts)
            assert torch.equal(done.rows.window, expected.window[mine])
            assert torch.equal(cache.rows.flatten()[: cache.rows.numel()].view(-1, spec.head_dim)[mine],
                               stored.rows.flatten().view(-1, spec.head_dim)[mine])  # fmt: skip
            assert set(done.live) == ({0} if rank == len(cuts) // 2 else set())
            if done.live:
                assert torch.equal(done.live[0], live), (name, cuts)
            row = 4 * spec.state_dim
            assert done.received <= 2 * (spec.window - 1) * row
            if not spec.overlap and begin % spec.ratio == 0 and not done.live:
                assert done.received == 0
            assert done.all_gather == (TOKENS - (end - begin)) * spec.projected * 4


LENGTHS = (300, 37, 1, 128, 0, 260)
"""Of packed sequences."""


def at_random(ranks, seed):
    """Segments by rank: every sequence cut anywhere, pieces given to anybody, in any order; some of no token."""
    chance = random.Random(seed)
    found = [[] for _ in range(ranks)]
    for sequence, length in enumerate(LENGTHS):
        bounds = sorted([0, length, *(chance.randint(0, length) for _ in range(5))])
        for a, b in itertools.pairwise(bounds):
            found[chance.randrange(ranks - 1)].append(Segment(sequence, a, b - a))  # the last rank has nothing
    for segments in found:
        chance.shuffle(segments)
    return found


def deals(ranks):
    """Name -> segments by rank."""
    return {
        "zigzag": zigzag(LENGTHS, ranks),
        "in turn": round_robin(LENGTHS, ranks),
        "in turn, 5": round_robin(LENGTHS, ranks, 5),
        "in turn, 64": round_robin(LENGTHS, ranks, 64),
        **{f"at random, {seed}": at_random(ranks, seed) for seed in range(3)},
    }


def cut(parts, segments):
    """The segments' part of tensors by sequence, one behind the other."""
    return torch.cat([parts[0][:0], *(parts[s.sequence][s.start : s.end] for s in segments)])


def packed(rank, ranks):
    """Several sequences, dealt in every way: rows, bytes and states are those of one rank; how much moved."""
    for name, spec in SPECS.items():
        w, gen = weights(spec, hidden=8), torch.Generator().manual_seed(1)
        tokens = [torch.randn(n, spec.projected, generator=gen) for n in LENGTHS]
        pool, cache = StatePool.ring(spec, len(LENGTHS)), PagedCache.allocate(spec.head_dim, 240, 8)
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
        slots = [torch.arange(n) // spec.ratio + 320 * i for i, n in enumerate(LENGTHS)]
        batch = RaggedBatch.build(
            offsets, start_positions=[0] * len(LENGTHS), state_slots=list(range(len(LENGTHS))),
            slot_mapping=torch.cat(slots),
        )  # fmt: skip
        expected = condense(spec, torch.cat(tokens), w, rope(spec, 512), batch, state=pool, cache=cache)
        for how, segments in deals(ranks).items():
            own, decoder = PagedCache.allocate(spec.head_dim, 240, 8), {0: ranks - 1, 3: 0}
            shards = Shards.agree_on(segments[rank], decode_ranks=decoder, timeout=30)
            assert shards.segments == tuple(map(tuple, segments))
            done = condense_shard(
                spec, cut(tokens, segments[rank]), w, rope(spec, 512), shards, cache=own,
                slot_mapping=cut(slots, segments[rank]),
            )  # fmt: skip
            places = zip(done.sequence.tolist(), done.rows.window.tolist(), strict=True)
            rows = dict(zip(places, done.rows.values, strict=True))
            ends = [s for s in segments[rank] if s.end // spec.ratio > s.start // spec.ratio]
            assert len(rows) == sum(s.end // spec.ratio - s.start // spec.ratio for s in ends)
            for e, (q, c) in enumerate(zip(expected.request.tolist(), expected.window.tolist(), strict=True)):
                if (q, c) in rows:
                    assert torch.equal(rows[q, c], expected.values[e]), (name, how, q, c)
                    slot = 320 * q + c
                    ours, theirs = (t.rows.flatten().view(-1, spec.head_dim)[slot] for t in (own, cache))
                    assert torch.equal(ours, theirs), (name, how, q, c)
            every = shards.last_ranks | decoder
            assert set(done.live) == {s for s, k in every.items() if k == rank}
            for s, live in done.live.items():
                whole_state = export_live(spec, pool, RaggedBatch.at(LENGTHS[s], state_slot=s))
                assert torch.equal(live, whole_state), (name, how, s)
            most = (len(ends) + len(done.live)) * (spec.window - 1) * 4 * spec.state_dim
            assert done.received <= most
            told = torch.tensor([done.received, done.sent, done.all_gather])
            dist.all_reduce(told)
            moved, gathered = traffic(spec, segments, decoder)
            assert told.tolist() == [moved, moved, gathered], (name, how)
            assert done.all_gather == (sum(LENGTHS) - shards.tokens) * spec.projected * 4


def merged(rank, ranks):
    """Windows pooled where their tokens are: one rank's rows in fp64, close in fp32, the same in every run."""
    chosen = {how: deals(ranks)[how] for how in ("in turn", "in turn, 5", "at random, 0")}
    for name, spec in SPECS.items():
        plain = replace(spec, rounding=Rounding.FUSED)
        for how, segments in chosen.items():
            merged_one(plain, 300.0, torch.float64, segments, rank, f"{name}, {how}")
        merged_one(plain, 1.0, torch.float32, chosen["at random, 0"], rank, name)
        if spec.ratio > 3:  # else a rank has a row or two of a window, which are less than three numbers a channel
            assert traffic(spec, chosen["in turn"], statistics=True) < traffic(spec, chosen["in turn"])


def merged_slots(rank, ranks):
    """Slots of merged windows are checked before anything is written."""
    spec, w = SPECS["csa"], weights(SPECS["csa"], hidden=8)
    segments = round_robin([12], ranks)
    x = torch.randn(12, spec.projected, generator=torch.Generator().manual_seed(1))
    shards, part = Shards.agree_on(segments[rank], timeout=30), cut([x], segments[rank])
    for bad in (99, -2, 0):  # beyond the cache, no slot at all, another row's
        slots = cut([torch.arange(12) // 4], segments[rank])
        last = [t for t, s in enumerate(segments[rank]) if s.start == 11]
        slots[last] = bad
        cache = PagedCache.allocate(spec.head_dim, 1, 8)
        cache.data.fill_(7)
        expected = last and (bad != 0 or any(s.start == 3 for s in segments[rank]))
        with pytest.raises(RangeError) if expected else contextlib.nullcontext():
            condense_shard(spec, part, w, rope(spec, 64), shards, cache=cache, slot_mapping=slots, statistics=True)
        if expected:
            assert bool((cache.data == 7).all())


def merged_one(spec, scale, dtype, segments, rank, what):
    """One compressor, one deal."""
    w, gen = weights(spec, hidden=8), torch.Generator().manual_seed(1)
    tokens = [torch.randn(n, spec.projected, generator=gen, dtype=torch.float64) for n in LENGTHS]
    if spec.has_gate:
        for t in tokens:
            t[:, spec.width :] *= scale
            t[::2, spec.width] = float("-inf")  # dealt in turn, a part without weight
    tokens = [t.to(dtype) for t in tokens]
    slots = [torch.arange(n) // spec.ratio + 320 * i for i, n in enumerate(LENGTHS)]
    batch = RaggedBatch.build(
        torch.tensor([0, *LENGTHS]).cumsum(0), start_positions=[0] * len(LENGTHS), state_slots=range(len(LENGTHS))
    )
    pool, angles = StatePool.ring(spec, len(LENGTHS), dtype=dtype), rope(spec, 512)
    rows = condense(spec, torch.cat(tokens), w, angles, batch, state=pool)
    expected = dict(zip(zip(rows.request.tolist(), rows.window.tolist(), strict=True), rows.values, strict=True))
    shards, part, where = (
        Shards.agree_on(segments[rank], timeout=30),
        cut(tokens, segments[rank]),
        cut(slots, segments[rank]),
    )
    runs = []
    for _ in range(2):
        own = PagedCache.allocate(spec.head_dim, 240, 8)
        given = {"cache": own, "slot_mapping": where, "statistics": True}
        runs.append(condense_shard(spec, part, w, angles, shards, **given))
    done = runs[0]
    assert torch.equal(done.rows.values.nan_to_num(7), runs[1].rows.values.nan_to_num(7)), what
    places = list(zip(done.sequence.tolist(), done.rows.window.tolist(), strict=True))
    assert len(set(places)) == len(places)
    for place, row, slot in zip(places, done.rows.values, done.rows.slot.tolist(), strict=True):
        one, limit = expected[place], 1e-11 if dtype == torch.float64 else 2e-5
        assert torch.equal(row.isnan(), one.isnan()), (what, place)
        far = (row - one).nan_to_num(0).abs().max() / one.nan_to_num(1).abs().max()
        assert far <= limit, (what, place, far)
        assert slot == 320 * place[0] + place[1]
        stored = own.rows.flatten().view(-1, spec.head_dim)[slot]
        assert torch.equal(stored.nan_to_num(7), row.float().bfloat16().nan_to_num(7)), (what, place)
    told = torch.tensor([len(places), done.received, done.sent])
    dist.all_reduce(told)
    moved = traffic(spec, segments, statistics=True)[0] * dtype.itemsize // 4
    assert told.tolist() == [len(expected), moved, moved], what
    for s, live in done.live.items():
        assert torch.equal(live, export_live(spec, pool, RaggedBatch.at(LENGTHS[s], state_slot=s))), what


def train_packed(rank, ranks):
    """Loss, rows and gradients of packed documents, dealt in every way, are those of one rank."""
    for name, spec in SPECS.items():
        spec = replace(spec, rounding=Rounding.FUSED)
        gen = torch.Generator().manual_seed(2)
        x = [torch.randn(n, 8, generator=gen, dtype=torch.float64) for n in LENGTHS]
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
        alone, whole_x = compressor(spec), torch.cat(x).requires_grad_()
        rows = alone(whole_x, RaggedBatch.build(offsets, start_positions=[0] * len(LENGTHS)))
        target = torch.randn(rows.shape, generator=gen, dtype=torch.float64)
        (rows * target).sum().backward()
        windows = [(q, c) for q, n in enumerate(LENGTHS) for c in range(n // spec.ratio)]
        where = dict(zip(windows, range(len(rows)), strict=True))
        given = whole_x.grad.split(LENGTHS)
        for how, segments in deals(ranks).items():
            part = cut(x, segments[rank]).requires_grad_()
            model = DistributedDataParallel(compressor(spec))
            found = model(part, Shards.agree_on(segments[rank], timeout=30))
            mine = [
                where[s.sequence, c] for s in segments[rank] for c in range(s.start // spec.ratio, s.end // spec.ratio)
            ]
            torch.testing.assert_close(found, rows[mine], rtol=1e-11, atol=1e-12)
            ((found * target[mine]).sum() * ranks).backward()
            torch.testing.assert_close(part.grad, cut(given, segments[rank]) * ranks, rtol=1e-9, atol=1e-11)
            for (key, ours), one in zip(model.named_parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(
                    ours.grad, one.grad, rtol=1e-9, atol=1e-10, msg=lambda m, k=f"{name} {how} {key}": f"{k} {m}"
                )


def overlap(rank, ranks):
    """Position 3 of sequence 7 lies on both ranks."""
    refuses(rank, ranks, lambda: Shards.agree_on([(7, 3 * rank, 4)], timeout=30), 1, "sequence 7 from position 4")


def compressor(spec, rope_rows=512):
    """In fp64, with the same parameters on every rank."""
    w = weights(spec, hidden=8)
    double = CompressorWeights(norm=w.norm.double(), ape=None if w.ape is None else w.ape.double(), w=w.w.double())
    return Compressor(spec, double, rope(spec, rope_rows))


def train(rank, ranks, wrap=DistributedDataParallel):
    """Loss, rows and gradients of a wrapped module on shards are those of the sequence on one rank."""
    for name, spec in SPECS.items():
        spec = replace(spec, rounding=Rounding.FUSED)
        gen = torch.Generator().manual_seed(2)
        x = torch.randn(TOKENS, 8, generator=gen, dtype=torch.float64)
        target = torch.randn(TOKENS // spec.ratio, spec.head_dim, generator=gen, dtype=torch.float64)
        alone, whole_x = compressor(spec), x.clone().requires_grad_()
        rows = alone(whole_x, RaggedBatch.build([0, TOKENS], start_positions=[0]))
        (rows * target).sum().backward()
        for cuts in CUTS[ranks]:
            starts = [0, *cuts, TOKENS]
            begin, end = starts[rank], starts[rank + 1]
            mine, part = slice(begin // spec.ratio, end // spec.ratio), x[begin:end].clone().requires_grad_()
            model = wrap(compressor(spec))
            found = model(part, Shards.agree(begin, end - begin, timeout=30))
            torch.testing.assert_close(found, rows[mine], rtol=1e-11, atol=1e-12)
            ((found * target[mine]).sum() * ranks).backward()  # the wrapper takes the mean over ranks
            torch.testing.assert_close(part.grad, whole_x.grad[begin:end] * ranks, rtol=1e-9, atol=1e-11)
            for (key, ours), one in zip(model.named_parameters(), alone.parameters(), strict=True):
                grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
                torch.testing.assert_close(
                    grad, one.grad, rtol=1e-9, atol=1e-10, msg=lambda m, k=f"{name} {key}": f"{k} {m}"
                )


def train_fsdp(rank, ranks):
    """The same with parameters that lie on the ranks in pieces."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    train(rank, ranks, wrap=lambda module: fully_shard(module, mesh=mesh))


def train_mesh(rank, ranks):
    """A mesh of data by tensor parallel ranks: parameters whole on each of the latter, in pieces on the former (FSDP2).

    Tensor parallel ranks do the same with the same packed documents, or share the documents out among themselves.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    data, part = rank // 2, rank % 2
    for name in ("csa", "hca"):
        spec, gen = replace(SPECS[name], rounding=Rounding.FUSED), torch.Generator().manual_seed(3)
        x = [[torch.randn(n, 8, generator=gen, dtype=torch.float64) for n in (150, 33)] for _ in range(ranks // 2)]
        offsets = torch.tensor([0, 150, 183])
        batch, alone = RaggedBatch.build(offsets, start_positions=[0, 0]), compressor(spec)
        given = [torch.cat(documents).requires_grad_() for documents in x]
        rows = [alone(t, batch) for t in given]
        target = torch.randn(rows[0].shape, generator=gen, dtype=torch.float64)
        (sum((r * target).sum() for r in rows) / len(rows)).backward()
        windows = [(q, c) for q, n in enumerate((150, 33)) for c in range(n // spec.ratio)]
        for segments in (None, [[Segment(0, 0, 67), Segment(1, 20, 13)], [Segment(0, 67, 83), Segment(1, 0, 20)]]):
            model = fully_shard(distribute_module(compressor(spec), mesh["tensor"]), mesh=mesh["data"])
            mine = torch.cat(x[data]) if segments is None else cut(x[data], segments[part])
            mine = mine.requires_grad_()
            if segments is None:
                found, which = model(mine, batch), list(range(len(windows)))
                wanted = given[data].grad
            else:
                found = model(mine, Shards.agree_on(segments[part], group=mesh["tensor"].get_group(), timeout=30))
                which = [
                    windows.index((s.sequence, c))
                    for s in segments[part]
                    for c in range(s.start // spec.ratio, s.end // spec.ratio)
                ]
                wanted = cut(given[data].grad.split((150, 33)), segments[part])
            torch.testing.assert_close(found, rows[data][which], rtol=1e-11, atol=1e-12)
            (found * target[which]).sum().backward()
            torch.testing.assert_close(mine.grad, wanted * (ranks // 2), rtol=1e-9, atol=1e-11)
            for (key, ours), one in zip(model.named_parameters(), alone.parameters(), strict=True):
                what = f"{name} {key} {'shared out' if segments else 'the same'}"
                torch.testing.assert_close(
                    ours.grad.full_tensor(), one.grad, rtol=1e-9, atol=1e-10, msg=lambda m, w=what: f"{w} {m}"
                )


def silent_backward(rank, ranks):
    """Rank 1 ends before its backward, for which rank 0 waits."""
    spec = SPECS["csa"]
    model, x = compressor(spec), torch.randn(150, 8, dtype=torch.float64)
    rows = model(x, shards_of(rank, timeout=5.0))
    if rank == 1:
        sys.stdout.flush()
        raise SystemExit(0)
    refuses(rank, ranks, lambda: rows.sum().backward(), 1, GONE)


GONE = "an answer|a connection"
"""A rank that ended is noticed when it is sent to or when it is waited for, whichever comes first."""


def refuses(rank, ranks, run, named, word):
    """The call raises RankError that names one rank, and soon."""
    del ranks
    start = time.monotonic()
    with pytest.raises(RankError, match=word) as caught:
        run()
    assert caught.value.argument == f"rank {named}", f"rank {rank}: {caught.value}"
    assert time.monotonic() - start < 20


def shards_of(rank, timeout=30.0):
    return Shards.agree(150 * rank, 150, timeout=timeout)


def silent(rank, ranks):
    """Rank 1 does not call."""
    if rank == 1:
        time.sleep(8)
    else:
        refuses(rank, ranks, lambda: shards_of(rank, timeout=1.5), 1, "within 1.5 s")


def dead(rank, ranks):
    """Rank 1 ends after the shards were agreed upon, before rows are exchanged."""
    shards = shards_of(rank, timeout=timedelta(seconds=5))
    if rank == 1:
        sys.stdout.flush()
        raise SystemExit(0)
    spec = SPECS["csa"]
    kv_score = torch.zeros(150, spec.projected)
    refuses(rank, ranks, lambda: condense_shard(spec, kv_score, weights(spec), rope(spec, 512), shards), 1, GONE)


def gap(rank, ranks):
    """Rank 1's shard begins too late: both say so."""
    refuses(rank, ranks, lambda: Shards.agree(151 * rank, 150, timeout=30), 1, "from position 150")


def others(rank, ranks):
    """Rank 1 has another ape."""
    spec = SPECS["csa"]
    w = weights(spec)
    if rank == 1:
        w = replace(w, ape=w.ape + 1)
    shards = shards_of(rank)
    kv_score = torch.zeros(150, spec.projected)
    refuses(rank, ranks, lambda: condense_shard(spec, kv_score, w, rope(spec, 512), shards), 1 - rank, "ape")


def start(rank, ranks, file, scenario):
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=limit)
    globals()[scenario](rank, ranks)
    sys.stdout.write(f"rank {rank}: {scenario} ok\n")
