"""A model of several layers for tests of hosted states: a machine for each, and one HostedStates for all."""

import torch

from kvcondense import StatePool
from kvcondense.layout.hosted import HostedStates
from machine import SPECS, Machine, same, tokens

DRAFTS, LENGTH, REQUESTS = 3, 400, 4
LAYERS = {
    "0 csa": ("csa", {}),
    "0 indexer": ("indexer", {"dtype": torch.bfloat16}),
    "1 ring": ("hca", {}),
    "2 online": ("hca", {"online": True}),
    "3 online": ("r8", {"online": True}),
    "4 raw": ("csa", {}),
    "5 gateless": ("gateless", {}),
}


class Model:
    """A machine for each layer, all fed alike; request q has the same slot in all, and state on the host or not."""

    def __init__(self, impl="auto", layers=tuple(LAYERS), seed=0, length=LENGTH, host_slots=REQUESTS):
        self.machines = {}
        for name in layers:
            spec, options = LAYERS[name]
            sequences = [tokens(SPECS[spec], length, seed=97 * q + len(self.machines)) for q in range(REQUESTS)]
            m = Machine(SPECS[spec], sequences, max_draft=DRAFTS, impl=impl, seed=seed, **options)
            self.machines[name] = m
            if name == "4 raw":  # an engine's memory: kv and scores apart, gaps between slots, no tags
                slots, rows = m.state.layout.num_slots, m.state.layout.ring_rows
                storage = torch.full((slots, 2 * rows + 1, m.spec.width), float("nan"))
                kv, score = storage[:, :rows], storage[:, rows : 2 * rows]
                m.state = StatePool.wrap(kv, score=score, paged=False, raw_scores=True)
        self.hosted = HostedStates({name: (m.spec, m.state) for name, m in self.machines.items()}, host_slots)

    @property
    def any(self):
        return next(iter(self.machines.values()))

    def slot(self, q):
        return int(self.any.slots[q])

    def free(self):
        """A slot that no request has had."""
        return min(set(range(REQUESTS + 2)) - set(self.any.slots.tolist()))

    def feed(self, counts, **options):
        for m in self.machines.values():
            m.feed(counts, **options)

    def out(self, q, whole=False):
        self.hosted.swap_out(("request", q), self.slot(q), None if whole else self.any.done[q])

    def back(self, q, slot):
        self.hosted.swap_in(("request", q), slot)
        for m in self.machines.values():
            m.slots[q] = slot

    def check(self, other, away=()):
        for name, m in self.machines.items():
            for q in range(REQUESTS):
                same(m.cache_of(q), other.machines[name].cache_of(q))
                if q not in away:
                    same(m.live_of(q), other.machines[name].live_of(q))
