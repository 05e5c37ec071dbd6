"""One rank of a kit whose engine deals prefills out over processes.

Rank 0 plays the histories, holds the states and decodes; the others take their part of every prefill and of every chunk
that goes on from a state, until they are told to stop.
"""

import random
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from kvcondense import Plan, RaggedBatch
from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.invariants import INVARIANTS, check
from kvcondense.conformance.own import BackendAdapter
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.parallel import Segment, Shards, condense_shard, round_robin, zigzag
from kvcondense.stages.store import scatter


def dealt(starts, lengths, ranks, turn):
    """Segments by rank: as engines deal them, and at random."""
    if turn % 3 < 2:
        return zigzag(lengths, ranks, starts=starts) if turn % 3 else round_robin(lengths, ranks, 3, starts=starts)
    chance, found = random.Random(turn), [[] for _ in range(ranks)]
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        cut = chance.randint(0, length)
        for a, b in ((0, cut), (cut, length)):
            found[chance.randrange(ranks)].append(Segment(sequence, start + a, b - a))
    return found


def part(spec, weights, rope, tokens, segments, decoders, states):
    """What a rank does for a prefill: (sequence, window, row) of its windows, and the states it is to decode on."""
    holds, held = ({q: state[i] for q, state in states.items()} for i in (0, 1))
    shards = Shards.agree_on(segments, holds=holds, decode_ranks=decoders, timeout=30)
    done = condense_shard(spec, tokens, weights, rope, shards, held=held, impl="reference")
    return (done.sequence, done.rows.window, done.rows.values), done.live


class Ranked(BackendAdapter):
    """Prefills and chunks without drafts go to all ranks; their states come from rank 0, and back to it."""

    def __init__(self, ranks, skip_state=False):
        super().__init__("reference", capabilities=Capabilities())
        self.ranks, self.turn, self.chunks, self.skip_state = ranks, 0, 0, skip_state

    def step(self, kv_score, batch):
        batch = batch.checked()
        long = (batch.start_positions == 0) | (batch.lengths > 4)
        shared = batch.active & long & (batch.draft_rows == 0)
        if shared.any() and batch.state_slots is not None:
            super().step(kv_score, replace(batch, start_positions=torch.where(shared, -1, batch.start_positions)))
            self._prefill(kv_score, batch, shared.nonzero()[:, 0].tolist())
        else:
            super().step(kv_score, batch)

    def _prefill(self, kv_score, batch, requests):
        s, bounds = self.setup, batch.query_start_loc.tolist()
        tokens = [kv_score[bounds[q] : bounds[q + 1]] for q in requests]
        starts, slot = batch.start_positions[requests].tolist(), batch.state_slots[requests].tolist()
        segments = dealt(starts, [len(t) for t in tokens], self.ranks, self.turn)
        places = [RaggedBatch.at(p, state_slot=slot[i]) for i, p in enumerate(starts)]
        states = {i: (p, export_live(s.spec, self.owned, places[i])) for i, p in enumerate(starts) if p}
        self.turn, self.chunks = self.turn + 1, self.chunks + len(states)
        decoders = {i: 0 for i, some in enumerate(tokens) if i in states or len(some)}
        parts = [
            torch.cat([kv_score[:0], *(tokens[i][a - starts[i] : a - starts[i] + n] for i, a, n in mine)])
            for mine in segments
        ]
        held = [states, *({} for _ in segments[1:])]
        jobs = [
            (s.spec, s.weights, s.rope, rows, mine, decoders, some)
            for rows, mine, some in zip(parts, segments, held, strict=True)
        ]
        told = [None]
        dist.scatter_object_list(told, jobs, src=0)
        found = [None] * self.ranks
        rows, live = part(*told[0])
        dist.gather_object(rows, found, dst=0)
        plan = Plan.build(s.spec, batch, page_rows=s.page_rows)
        place = zip(plan.window_request.tolist(), plan.window_index.tolist(), plan.window_slot, strict=True)
        slots = {(q, c): slot for q, c, slot in place}
        for sequence, window, values in found:
            for q, c, row in zip(sequence.tolist(), window.tolist(), values, strict=True):
                scatter(row[None], slots[requests[q], c][None], self.cache)
        self.owned.reset(slot)
        for i, state in live.items():
            if not self.skip_state:
                at = RaggedBatch.at(starts[i] + len(tokens[i]), state_slot=slot[i])
                import_live(s.spec, self.owned, at, state)


def main(rank, ranks):
    if rank:
        while True:
            told = [None]
            dist.scatter_object_list(told, None, src=0)
            if told[0] is None:
                return
            dist.gather_object(part(*told[0])[0], None, dst=0)
    made = []

    def make(**changes):
        made.append(Ranked(ranks, **changes))
        return made[-1]

    for invariant in INVARIANTS:
        if invariant.name in ("I1 composition", "I3 isolation", "I8 portability"):
            outcome = check(invariant, make)
            assert outcome.passed, outcome
            assert not outcome.skipped
    assert sum(engine.turn for engine in made) > 30
    assert sum(engine.chunks for engine in made) > 30
    composition = next(i for i in INVARIANTS if i.name == "I1 composition")
    assert not check(composition, lambda: make(skip_state=True)).passed, "a lost state is seen"
    dist.scatter_object_list([None], [None] * ranks, src=0)


def start(rank, ranks, file):
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=limit)
    main(rank, ranks)
    sys.stdout.write(f"rank {rank}: kit ok\n")
