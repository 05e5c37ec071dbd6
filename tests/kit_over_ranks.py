"""One rank of a kit whose engine deals prefills out over processes: python kit_over_ranks.py RANK RANKS FILE.

Rank 0 plays the histories and decodes; the others take their part of every prefill until they are told to stop.
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
from kvcondense.layout.snapshot import import_live
from kvcondense.parallel import Segment, Shards, condense_shard, round_robin, zigzag
from kvcondense.stages.store import scatter


def dealt(lengths, ranks, turn):
    """Segments by rank: as engines deal them, and at random."""
    if turn % 3 < 2:
        return zigzag(lengths, ranks) if turn % 3 else round_robin(lengths, ranks, 3)
    chance, found = random.Random(turn), [[] for _ in range(ranks)]
    for sequence, length in enumerate(lengths):
        cut = chance.randint(0, length)
        for a, b in ((0, cut), (cut, length)):
            found[chance.randrange(ranks)].append(Segment(sequence, a, b - a))
    return found


def part(spec, weights, rope, tokens, segments, decoders):
    """What a rank does for a prefill: (sequence, window, row) of its windows, and the states it is to decode on."""
    shards = Shards.agree_on(segments, decode_ranks=decoders, timeout=30)
    done = condense_shard(spec, tokens, weights, rope, shards, impl="reference")
    return (done.sequence, done.rows.window, done.rows.values), done.live


class Ranked(BackendAdapter):
    """Requests that begin at 0 without drafts go to all ranks; their states come back to rank 0, which goes on."""

    def __init__(self, ranks, skip_state=False):
        super().__init__("reference", capabilities=Capabilities())
        self.ranks, self.turn, self.prefills, self.skip_state = ranks, 0, 0, skip_state

    def step(self, kv_score, batch):
        batch = batch.checked()
        fresh = batch.active & (batch.start_positions == 0) & (batch.draft_rows == 0)
        if fresh.any() and batch.state_slots is not None:
            super().step(kv_score, replace(batch, start_positions=torch.where(fresh, -1, batch.start_positions)))
            self._prefill(kv_score, batch, fresh.nonzero()[:, 0].tolist())
        else:
            super().step(kv_score, batch)

    def _prefill(self, kv_score, batch, requests):
        s, bounds = self.setup, batch.query_start_loc.tolist()
        tokens = [kv_score[bounds[q] : bounds[q + 1]] for q in requests]
        segments = dealt([len(t) for t in tokens], self.ranks, self.turn)
        self.turn, self.prefills = self.turn + 1, self.prefills + 1
        decoders = {q: 0 for q, some in enumerate(tokens) if len(some)}
        parts = [torch.cat([kv_score[:0], *(tokens[q][a : a + n] for q, a, n in mine)]) for mine in segments]
        jobs = [(s.spec, s.weights, s.rope, *job, decoders) for job in zip(parts, segments, strict=True)]
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
        self.owned.reset(batch.state_slots[requests].tolist())
        for q, state in live.items():
            if not self.skip_state:
                at = RaggedBatch.at(len(tokens[q]), state_slot=int(batch.state_slots[requests[q]]))
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
    assert sum(engine.prefills for engine in made) > 30
    composition = next(i for i in INVARIANTS if i.name == "I1 composition")
    assert not check(composition, lambda: make(skip_state=True)).passed, "a lost state is seen"
    dist.scatter_object_list([None], [None] * ranks, src=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    rank, ranks = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=ranks, timeout=limit)
    main(rank, ranks)
    sys.stdout.write(f"rank {rank}: kit ok\n")
