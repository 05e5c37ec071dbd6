"""Hostile metadata through every door, by a seed: an error and nothing written, or what the reference does. No crash.

``python tests/fuzz.py --calls 200000 --seconds 600`` runs longer than the suite does (``make fuzz``).
"""

import argparse
import random
import sys
import time
from dataclasses import replace

import torch

from guarded import guarded
from kvcondense import KvCondenseError, PagedCache, RaggedBatch, RopeTable, StatePool, condense, ops, training
from kvcondense.api import Job, compress_many
from kvcondense.bound import bind
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.online import OnlineLayout, OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.prepared import prepare
from machine import SPECS, rope, weights

SMALL, LARGE = (-7, -2, -1, 0, 1, 2, 3, 4, 7, 8, 31), (2**16, 2**31 - 1, 2**31, 2**40, 2**62 + 1, 2**63 - 1)
HOSTILE = (*SMALL, *LARGE, *(-n - 1 for n in LARGE))
TOKENS, POSITIONS, HIDDEN = 24, 64, 64
DOORS = ("condense", "condense with a plan", "compress", "bound", "prepared", "operator", "static", "training")
KINDS = (("csa", "ring"), ("csa", "paged"), ("r8", "ring"), ("r8", "online"), ("r2", "paged"), ("r1", "ring"))


class Layer:
    """One compressor with buffers that end at unmapped pages, and a twin that the reference works on."""

    def __init__(self, name, kind):
        self.spec, self.kind = SPECS[name], kind
        w = weights(self.spec, hidden=HIDDEN)
        self.weights = replace(w, norm=guarded(w.norm), ape=None if w.ape is None else guarded(w.ape), w=w.w.bfloat16())
        table = rope(self.spec, POSITIONS)
        self.rope = None if table is None else RopeTable(guarded(table.cos), guarded(table.sin))
        self.state, self.cache = self._memory(guarded)
        self.twin, self.twin_cache = self._memory(torch.clone)
        gen = torch.Generator().manual_seed(1)
        self.tokens = {n: guarded(torch.randn(n, self.spec.projected, generator=gen)) for n in (0, 5, TOKENS)}
        self.hidden = {n: torch.randn(n, HIDDEN, generator=gen).bfloat16() for n in self.tokens}
        self.held = {}

    def _memory(self, place):
        spec = self.spec
        if self.kind == "online":
            like = OnlineState.allocate(spec, 3, 4)
            parts = [place(torch.zeros_like(t)) for t in (like.acc, like.folded, like.log)]
            state = OnlineState(*parts, OnlineLayout(3, 4))
        elif self.kind == "paged":
            state = StatePool(place(torch.zeros(9, 8, spec.state_dim)), PagedLayout(9, 8))
        else:
            ring = StatePool.ring(spec, 3, spec.required_ring_rows(4))
            state = StatePool(place(torch.zeros_like(ring.data)), ring.layout)
        cache = PagedCache.allocate(spec.head_dim, 4, 8)
        return state, replace(cache, data=place(cache.data))

    def memory(self, twin=False):
        owners = (self.twin, self.twin_cache) if twin else (self.state, self.cache)
        return [t for owner in owners for t in owner.tensors.values()]

    def fill(self, seed):
        """Both memories alike; nothing of a step before is left."""
        gen = torch.Generator().manual_seed(seed % 17)
        for a, b in zip(self.memory(), self.memory(twin=True), strict=True):
            b.copy_(torch.randn(a.shape, generator=gen).abs() if a.is_floating_point() else torch.zeros_like(a))
            a.copy_(b)


def metadata(chance, layer):
    """Arguments of a batch: legal, but for some values that are anything."""
    requests = chance.randrange(0, 4)
    lengths = [chance.choice((0, 1, 1, 2, 3, 8)) for _ in range(requests)]
    offsets = [sum(lengths[:i]) for i in range(requests + 1)]
    starts = [chance.choice((0, 0, 1, 3, 4, 8, 30, -1)) for _ in range(requests)]
    if layer.kind == "online":
        starts = [s // layer.spec.ratio * layer.spec.ratio for s in starts]
    given = {"query_start_loc": offsets, "start_positions": starts,
             "draft_rows": [chance.randrange(min(n, 3) + 1) for n in lengths]}  # fmt: skip
    if layer.kind == "paged":
        pages = chance.sample(range(9), 9)
        given["state_block_table"] = [pages[3 * i : 3 * i + 3] for i in range(requests)] or torch.zeros(0, 3, dtype=int)
    else:
        given["state_slots"] = chance.sample(range(3), requests)
    if chance.random() < 0.5:
        given["slot_mapping"] = chance.sample(range(32), offsets[-1])
    elif requests:
        pages = chance.sample(range(4), 4)
        given["block_table"] = [[pages[i], pages[3]] for i in range(requests)]
    for value in given.values():
        if isinstance(value, list) and value and chance.random() < 0.12:
            target = chance.choice(value) if isinstance(value[0], list) else value
            if target:
                target[chance.randrange(len(target))] = chance.choice(HOSTILE)
            if chance.random() < 0.2:
                value.append(value[-1])
    return given


def batch_of(given, checked):
    """As a caller makes it, or, unchecked, as the fields of a captured batch may come to be."""
    if checked:
        return RaggedBatch.build(given["query_start_loc"], **{k: v for k, v in given.items() if k != "query_start_loc"})
    return RaggedBatch(**{k: torch.as_tensor(v, dtype=torch.int64) for k, v in given.items()})


def call(chance, layer, backend):
    """One call of one door; (door, batch or None, what it raised or None)."""
    door, rows = chance.choice(DOORS), chance.choice((TOKENS, TOKENS, TOKENS, 5, 0))
    if layer.kind != "ring" and door == "training":
        door = "condense"
    s, x, hidden, given = layer.spec, layer.tokens[rows], layer.hidden[rows], metadata(chance, layer)
    memory = {"state": layer.state, "cache": layer.cache}
    batch = None
    if door == "static":
        operator = ops.bind(s, layer.weights, layer.rope, **memory, impl=backend)
        shape = {"max_tokens": TOKENS, "max_draft": 4, "max_positions": POSITIONS, "cache_rows": 32, "page_rows": 8}
        unchecked = batch_of(given, False)
        sizes = {len(v) for k, v in given.items() if k not in ("query_start_loc", "slot_mapping")}
        if sizes == {len(given["query_start_loc"]) - 1}:
            operator(layer.tokens[TOKENS], Plan.build_static(s, unchecked, state_layout=layer.state.layout, **shape))
        return door, None
    batch = batch_of(given, True)
    bound = bind(s, layer.weights, layer.rope, **memory, impl=backend)
    if door == "condense":
        condense(s, x, layer.weights, layer.rope, batch, **memory, impl=backend)
    elif door == "condense with a plan":
        condense(s, x, layer.weights, layer.rope, batch, plan=bound.plan(batch), **memory, impl=backend)
    elif door == "compress":
        compress_many(hidden, [Job(s, layer.weights, layer.rope, batch, None, **memory)], impl=backend)
    elif door == "bound":
        bound.condense(x, bound.plan(batch))
    elif door == "prepared":
        prepare(bound, x).run(bound.plan(batch))
    elif door == "operator":
        ops.bind(s, layer.weights, layer.rope, **memory, impl=backend)(x, bound.plan(batch))
    else:
        training.condense(s, x, layer.weights, layer.rope, batch)
        return door, None
    return door, (batch, x, hidden)


def check(layer, door, used, backend):
    """What a call that went through has written is what the reference writes."""
    batch, x, hidden = used
    twin = {"state": layer.twin, "cache": layer.twin_cache}
    if door == "compress":
        compress_many(hidden, [Job(layer.spec, layer.weights, layer.rope, batch, None, **twin)], impl="reference")
    else:
        condense(layer.spec, x, layer.weights, layer.rope, batch, **twin, impl="reference")
    for a, b in zip(layer.memory(), layer.memory(twin=True), strict=True):
        a, b = (t.view(torch.bfloat16) if t.dtype is torch.uint8 else t for t in (a, b))
        assert torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2e-2, equal_nan=True), (door, backend)


def run(calls, seed, seconds=float("inf"), backend="cpu", say=lambda text: None):
    """(calls, those that raised, those compared). Raises AssertionError at the first that does something else."""
    chance, begun = random.Random(seed), time.perf_counter()
    layers = [Layer(*kind) for kind in KINDS]
    raised = compared = done = 0
    for number in range(calls):
        if time.perf_counter() - begun > seconds:
            break
        layer = layers[number % len(layers)]
        layer.fill(number)
        done += 1
        try:
            door, used = call(chance, layer, backend)
        except KvCondenseError:
            raised += 1
            for a, b in zip(layer.memory(), layer.memory(twin=True), strict=True):
                assert torch.equal(a, b), "something was written before the error"
            continue
        if used is not None and number % 4 == 0:
            check(layer, door, used, backend)
            compared += 1
        if number % 10_000 == 9_999:
            say(f"{number + 1} calls, {raised} raised, {compared} compared, {time.perf_counter() - begun:.0f} s")
    return done, raised, compared


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backend", default="cpu", help="cpu, reference, or triton under TRITON_INTERPRET=1")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done, raised, compared = run(given.calls, given.seed, given.seconds, given.backend, lambda t: print(t, flush=True))
    print(f"seed {given.seed}: {done} calls, {raised} raised, {compared} compared with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
