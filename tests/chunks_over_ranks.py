"""One rank of tests/test_parallel_chunks.py, of four, which over_ranks.py starts; prints what it found.

Groups of 2, 3 and 4 of its processes run sequences chunk after chunk; states change hands, pools and are decoded on.
"""

import itertools
import random
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from kvcondense.errors import RankError
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.parallel import Segment, Shards, condense_shard, exchange, round_robin, traffic, zigzag
from kvcondense.spec import Rounding
from machine import SPECS, rope, weights

GROUPS = ([1, 3], [0, 2, 3], [0, 1, 2, 3])
REACH = 96  # cache rows for each sequence, in pages of 8


@dataclass
class Case:
    """Sequences of one compressor, and what one process makes of them in a single call."""

    spec: object
    tokens: list  # [n, projected] each
    statistics: bool

    def __post_init__(self):
        self.weights, self.rope = weights(self.spec, hidden=8), rope(self.spec, 512)
        lengths = [len(t) for t in self.tokens]
        wide = self.tokens[0].dtype == torch.float64
        self.dtype, self.impl = (torch.float64, "reference") if wide else (torch.float32, "auto")
        pool = StatePool.ring(self.spec, len(lengths), dtype=self.dtype)
        self.cache = self.pages()
        batch = RaggedBatch.build(
            torch.tensor([0, *lengths]).cumsum(0), start_positions=[0] * len(lengths),
            state_slots=range(len(lengths)),
            slot_mapping=torch.cat([self.slots(q, 0, n) for q, n in enumerate(lengths)]),
        )  # fmt: skip
        rows = self.condense(torch.cat(self.tokens), batch, pool, self.cache)
        places = zip(rows.request.tolist(), rows.window.tolist(), strict=True)
        self.rows = dict(zip(places, rows.values, strict=True))
        self.live = [export_live(self.spec, pool, RaggedBatch.at(n, state_slot=q)) for q, n in enumerate(lengths)]

    def condense(self, given, batch, pool, cache):
        return condense(self.spec, given, self.weights, self.rope, batch, state=pool, cache=cache, impl=self.impl)

    def pages(self):
        cache = PagedCache.allocate(self.spec.head_dim, len(self.tokens) * REACH // 8, 8)
        cache.data.fill_(7)
        return cache

    def slots(self, sequence, first, end):
        """A row of its own for every window of every sequence, for these positions."""
        return torch.arange(first, end) // self.spec.ratio + REACH * sequence

    def check(self, place, row):
        """A finished row is one process's: to the bit, or, merged from statistics, within the bound."""
        one = self.rows[place]
        if not self.statistics:
            assert torch.equal(row, one), place
        else:
            limit = 1e-11 if self.dtype == torch.float64 else 2e-5
            assert (row - one).abs().max() <= limit * one.abs().max(), place


def cases(size, chance):
    """Compressors with and without overlap, tokens of every type, rows and statistics."""
    types = itertools.cycle([torch.float32, torch.bfloat16])
    kinds = [(name, next(types), False) for name in (*SPECS, "csa", "hca", "hca")]
    kinds += [(name, next(types), True) for name in ("csa", "hca", "gateless", "hca", "csa")]
    kinds += [(name, torch.float64, True) for name in ("hca", "r2-overlap", "csa")]
    for turn, (name, dtype, statistics) in enumerate(kinds):
        if turn % len(GROUPS) == size % len(GROUPS):  # each of them in one group of processes
            spec = replace(SPECS[name], rounding=Rounding.FUSED) if statistics else SPECS[name]
            longest = 300 if spec.ratio > 8 else 45
            gen = torch.Generator().manual_seed(turn)
            lengths = [chance.randint(longest // 2, longest), chance.randint(1, longest), 1, spec.ratio * 2]
            yield Case(spec, [torch.randn(n, spec.projected, generator=gen).to(dtype) for n in lengths], statistics)


def dealt(how, starts, lengths, ranks, chance):
    """Segments by rank of chunks: as engines deal them, or cut anywhere, given to anybody, in any order."""
    if how == "zigzag":
        return zigzag(lengths, ranks, starts=starts)
    if how == "in turn":
        return round_robin(lengths, ranks, chance.choice([1, 1, 3, 8]), starts=starts)
    found = [[] for _ in range(ranks)]
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        bounds = sorted([0, length, *(chance.randint(0, length) for _ in range(3))])
        for a, b in itertools.pairwise(bounds):
            found[chance.randrange(ranks)].append(Segment(sequence, start + a, b - a))
    for segments in found:
        chance.shuffle(segments)
    return found


class Rank:
    """What one process keeps while a case runs."""

    def __init__(self, case, group):
        self.case, self.group, self.cache = case, group, case.pages()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.state, self.emitted = {}, {}  # {sequence: (position, rows)}; {(sequence, window): row}
        self.pool = StatePool.ring(case.spec, len(case.tokens), dtype=case.dtype)

    def chunk(self, segments, decoders, after):
        """Condense; keep the states of sequences that this rank gets."""
        case, mine = self.case, segments[self.rank]
        shards = Shards.agree_on(
            mine, holds={q: p for q, (p, _) in self.state.items()}, decode_ranks=decoders, group=self.group, timeout=30
        )
        assert {h.sequence: h.position for h in shards.own_holds} == {q: p for q, (p, _) in self.state.items()}
        parts = [case.tokens[s.sequence][s.start : s.end] for s in mine]
        slots = [case.slots(s.sequence, s.start, s.end) for s in mine]
        held = {q: rows for q, (_, rows) in self.state.items()}
        before = {q: rows.clone() for q, rows in held.items()}
        done = None
        with counted() as sent:
            for _ in range(1 + case.statistics):  # statistics: twice, whoever answers first
                time.sleep(case.statistics * random.random() * 2e-3)
                again = condense_shard(
                    case.spec, torch.cat([case.tokens[0][:0], *parts]), case.weights, case.rope, shards,
                    cache=self.cache, slot_mapping=torch.cat([torch.zeros(0, dtype=torch.int64), *slots]), held=held,
                    statistics=case.statistics, impl=case.impl,
                )  # fmt: skip
                assert done is None or torch.equal(done.rows.values, again.rows.values)
                done = again
        assert sent.bytes == done.sent * (1 + case.statistics)
        assert all(torch.equal(held[q], rows) for q, rows in before.items()), "held rows are read, not kept"
        for q, c, row in zip(done.sequence.tolist(), done.rows.window.tolist(), done.rows.values, strict=True):
            self.emit((q, c), row)
        self.state = {q: (after[q], rows) for q, rows in done.live.items()}
        assert shards.held_after == {q: p for q, (p, _) in self.state.items()}
        told = torch.tensor([done.sent, done.received])
        dist.all_reduce(told, group=self.group)
        by_rank = [{h.sequence: h.position for h in shards.holds if h.rank == k} for k in range(self.ranks)]
        moved = traffic(case.spec, segments, decoders, holds=by_rank, statistics=case.statistics)[0]
        assert told.tolist() == [moved * case.dtype.itemsize // 4] * 2

    def emit(self, place, row):
        self.case.check(place, row)
        assert place not in self.emitted, place
        self.emitted[place] = row

    def decode(self, sequence, many):
        """Go on alone, in a pool, as the rank that decodes does."""
        case, (position, rows) = self.case, self.state[sequence]
        import_live(case.spec, self.pool, RaggedBatch.at(position, state_slot=sequence), rows)
        end = position + many
        batch = RaggedBatch.build(
            [0, many], start_positions=[position], state_slots=[sequence],
            slot_mapping=case.slots(sequence, position, end),
        )  # fmt: skip
        given = case.tokens[sequence][position:end]
        found = case.condense(given, batch, self.pool, self.cache)
        for c, row in zip(found.window.tolist(), found.values, strict=True):
            self.emit((sequence, c), row)
        self.state[sequence] = end, export_live(case.spec, self.pool, RaggedBatch.at(end, state_slot=sequence))

    def finish(self):
        """Every row was emitted once, by somebody, nothing else was stored; states are one process's."""
        case = self.case
        stored = self.cache.rows.flatten().view(-1, case.spec.head_dim)
        whole = case.cache.rows.flatten().view(-1, case.spec.head_dim)
        for (q, c), row in self.emitted.items():
            wanted = row.to(torch.bfloat16) if case.statistics else whole[REACH * q + c]
            assert torch.equal(stored[REACH * q + c], wanted), (q, c)
        untouched = torch.ones(len(stored), dtype=torch.bool)
        untouched[[REACH * q + c for q, c in self.emitted]] = False
        assert torch.equal(stored[untouched], case.pages().rows.flatten().view(-1, case.spec.head_dim)[untouched])
        for q, (position, rows) in self.state.items():
            assert position == len(case.tokens[q])
            assert torch.equal(rows, case.live[q]), q
        totals = torch.tensor([len(self.emitted), len(self.state)])
        dist.all_reduce(totals, group=self.group)
        assert totals.tolist() == [len(case.rows), len(case.tokens)]


class counted:  # noqa: N801
    """Bytes of numbers that this process sends, counted where they leave."""

    def __enter__(self):
        self.bytes, self.real = 0, exchange.exchange

        def count(sends, *rest):
            self.bytes += sum(t.numel() * t.itemsize for t in sends.values() if t.is_floating_point())
            self.real(sends, *rest)

        exchange.exchange = count
        return self

    def __exit__(self, *_):
        exchange.exchange = self.real


def play(case, group, chance):
    """One case: chunks until every sequence is done; all ranks draw the same numbers."""
    rank, totals = Rank(case, group), [len(t) for t in case.tokens]
    begun, turn = [0] * len(totals), 0
    while begun != totals:
        left = [n - a for n, a in zip(totals, begun, strict=True)]
        lengths = [min(chance.choice([0, 1, n // 3, n // 2, n]), n) for n in left]
        if turn < 2:
            lengths = [min(n, -(-total // 3)) for n, total in zip(lengths, totals, strict=True)]
        segments = dealt(("zigzag", "in turn", "anyhow")[turn % 3], begun, lengths, rank.ranks, chance)
        begun, turn = [a + n for a, n in zip(begun, lengths, strict=True)], turn + 1
        named = {q: chance.randrange(rank.ranks) for q, end in enumerate(begun) if end and chance.random() < 0.5}
        rank.chunk(segments, named, begun)
        for q, end in enumerate(begun):
            many = chance.choice([0, 0, 1, 5])
            if end and many <= totals[q] - end:
                begun[q] += many
                if q in rank.state and many:
                    rank.decode(q, many)
    rank.finish()
    return turn


def refuse(group):
    """What cannot be agreed upon: the same error on all ranks, which names one. Nobody waits: they agree afterwards."""
    rank = dist.get_rank(group)
    segments = [(0, 10 + 4 * rank, 4)]
    for holds, decoders, named, word in (
        ({}, {}, 0, "or a rank that holds its state at 10"),
        ({0: 10} if rank < 2 else {}, {}, 1, "one rank that holds sequence 0"),
        ({0: 9} if rank == 1 else {}, {}, 1, "the state of sequence 0 at position 10"),
        ({0: 10} if rank == 1 else {}, {0: int(rank == 1)}, 1, "decode_ranks of rank 0"),
    ):
        with pytest.raises(RankError, match=word) as caught:
            Shards.agree_on(segments, holds=holds, decode_ranks=decoders, group=group, timeout=30)
        assert caught.value.argument == f"rank {named}", caught.value
    Shards.agree_on(segments, holds={0: 10} if rank == 1 else {}, group=group, timeout=30)


def main(rank):
    groups = [dist.new_group(ranks) for ranks in GROUPS]
    for size, (ranks, group) in enumerate(zip(GROUPS, groups, strict=True)):
        if rank in ranks:
            chance = random.Random(size)
            turns = [play(case, group, chance) for case in cases(size, chance)]
            assert min(turns) >= 3, turns
            refuse(group)
    dist.barrier()


def start(rank, ranks, file):
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=limit)
    main(rank)
    sys.stdout.write(f"rank {rank}: chunks ok\n")
