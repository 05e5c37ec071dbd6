"""Bundles: a sequence cut, restored and gone on with anywhere is the one that never stopped, in any format."""

import random
from dataclasses import replace

import pytest
import torch

from bundles import held
from kvcondense import KvCondenseError, PagedCache, RaggedBatch, StatePool
from kvcondense.bundle import Bundle, Held, append, create, cut
from kvcondense.formats import FORMATS
from machine import SPECS, Machine, tokens

LENGTH = 20_000
MODEL = {
    (1, "main"): "csa",
    (1, "indexer"): "indexer",
    (2, "main"): "hca",
    (3, "main"): "csa",
    (3, "indexer"): "indexer",
}
"""A model of three layers: compressors by layer and part."""
KINDS = ({"page": 7}, {"paged": True}, {"max_draft": 5, "page": 1}, {"online": True, "page": 4})


class Model:
    """The compressors of one request."""

    def __init__(self, impl, seed=0, length=LENGTH, kinds=({},)):
        self.machines = {}
        for i, ((layer, part), name) in enumerate(MODEL.items()):
            spec, kind = SPECS[name], kinds[i % len(kinds)]
            if spec.overlap:
                kind = {k: v for k, v in kind.items() if k != "online"}
            sequence = tokens(spec, length, seed=10 * layer + len(part))
            self.machines[layer, part] = Machine(spec, [sequence], impl=impl, seed=seed, **kind)

    def feed(self, count, impl=None):
        for machine in self.machines.values():
            machine.impl = impl or machine.impl
            machine.feed([count])

    def held(self, key, at=None):
        machine = self.machines[key]
        if at is not None:
            machine.done[0] = at
        return held(machine)

    def write(self, file):
        for layer, part in self.machines:
            file.add(layer, part, self.held((layer, part)))

    def restore(self, bundle, at):
        for layer, part in self.machines:
            bundle.restore(layer, part, self.held((layer, part), at))


def positions(count, low, seed):
    """Where to stop: anywhere, on windows' ends and beside them."""
    rng = random.Random(seed)
    found = {rng.randrange(low, LENGTH - 200) for _ in range(count - 12)}
    for boundary in rng.sample(range(low // 128 + 1, (LENGTH - 200) // 128), min(3, (LENGTH - 200 - low) // 128 - 1)):
        found |= {128 * boundary - 1, 128 * boundary, 128 * boundary + 1, 128 * boundary + 4}
    while len(found) < count:
        found.add(rng.randrange(low, LENGTH - 200))
    return sorted(found)


@pytest.mark.parametrize(("impl", "before", "after"), [("cpu", 0, 150), ("reference", 0, 150), ("triton", 19_300, 5)])
def test_cut_restored_and_gone_on_with_at_fifty_positions(impl, before, after, tmp_path):
    """Equal bits to never having stopped. Triton's interpreter is slow: its positions are the last ones."""
    path, stops = tmp_path / "all.bundle", positions(50, before, seed=len(impl))
    whole, at = Model(impl), 0
    if before:
        whole.feed(before, "cpu")
        at = before
    for number, stop in enumerate(stops):
        whole.feed(stop - at, impl)
        at = stop
        with (append if number else create)(path) as file:
            whole.write(file)
    whole.feed(stops[-1] + after - at, impl)
    with Bundle(path) as bundle:
        assert bundle.position == stops[-1]
        for number, stop in enumerate(stops):
            # Every other one is taken from a bundle that was cut there; some go back into the window that was open.
            at = stop - min(number % 3, stop % 4)
            assert bundle.restorable(at)
            source = path
            if number % 2:
                cut(bundle, source := tmp_path / "cut.bundle", at)
            there = Model(impl, seed=number, length=min(LENGTH, at + after + 1), kinds=KINDS[number % 4 :] + KINDS)
            with Bundle(source) as opened:
                assert opened.position == (at if number % 2 else stops[-1])
                there.restore(opened, at)
            there.feed(after)
            for key, machine in there.machines.items():
                original = whole.machines[key]
                assert torch.equal(machine.cache_of(0), original.cache_of(0)[: (at + after) // machine.spec.ratio])
                if machine.online:
                    continue  # its running values and a ring's rows are compared where they become rows
                live = tokens(machine.spec, LENGTH, seed=10 * key[0] + len(key[1]))
                rows = machine.live_of(0).view(torch.float32)
                low, n = machine.spec.live_start(at + after), machine.spec.width
                assert torch.equal(rows[:, :n], live[low : at + after, :n])


WIDE = replace(SPECS["csa"], head_dim=512, rope_dim=64)
NARROW = replace(SPECS["csa"], head_dim=128, rope_dim=64)


def stepped(spec, fmt, page, at=300):
    """A cache with rows in a format, and the state behind them."""
    scale = 0.05 if FORMATS[fmt].tensor_scale else None
    page = -(-page // FORMATS[fmt].tile) * FORMATS[fmt].tile
    cache = PagedCache.allocate(spec.head_dim, -(-(at // 4) // page) + 2, page, format=fmt, tensor_scale=scale)
    state = StatePool.ring(spec, 2)
    rows = torch.randn(at // 4, spec.head_dim, generator=torch.Generator().manual_seed(1))
    pages = torch.randperm(cache.data.shape[0] - 1)[: -(-(at // 4) // page)]
    return Held(spec, state, RaggedBatch.at(at, state_slot=1), cache, pages), rows


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_moves_to_other_pages_and_converts(name, tmp_path):
    spec = NARROW if FORMATS[name].head_dim == 128 else WIDE
    one, rows = stepped(spec, name, 64)
    two, _ = stepped(spec, name, 16)
    one.cache.put(one.slots(0, 75), one.cache.encode(rows))
    one.state.data.normal_()
    one.state.tags.copy_(torch.cat([torch.full((8,), -1), torch.arange(296, 304)]).roll(0)[: one.state.tags.shape[0]])
    one.state.tags[8:] = torch.tensor([296, 297, 298, 299, -1, -1, -1, -1]).roll(296 % 8)
    with create(tmp_path / "b") as file:
        file.add(3, "main", one)
    with Bundle(tmp_path / "b") as bundle:
        assert bundle.restore(3, "main", two).converted_from == ()
        a, b = one.cache.get(one.slots(0, 75)), two.cache.get(two.slots(0, 75))
        assert all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)
        other, _ = stepped(spec, "fp32" if name != "fp32" else "bf16", 8)
        with pytest.raises(KvCondenseError, match="convert=True"):
            bundle.restore(3, "main", other)
        lost = bundle.restore(3, "main", other, convert=True).converted_from
        assert lost == (() if name == "fp32" else (name,))
        expected, got = (h.cache.decode_rows(h.slots(0, 75)) for h in (one, other))
        assert torch.equal(got, expected if name != "fp32" else expected.bfloat16().float())
        if name != "fp32":
            cut(bundle, tmp_path / "c", 300, {"main": "fp32"})
            with Bundle(tmp_path / "c") as again:
                assert again.member(3, "main").converted_from == (name,)
                assert torch.equal(again.rows(3, "main", 75)["rows"].float(), expected)


def test_a_row_that_the_new_format_cannot_hold_stops_before_anything_is_written(tmp_path):
    one, rows = stepped(NARROW, "fp32", 8)
    rows[70, 3] = float("inf")
    one.cache.put(one.slots(0, 75), one.cache.encode(rows))
    state = replace(one, state=StatePool(one.state.data.normal_(), one.state.layout))
    with create(tmp_path / "b") as file:
        file.add(3, "main", state)
    other, _ = stepped(NARROW, "fp8_indexer_pow2", 8)
    strict = replace(other, cache=replace(other.cache, strict=True))
    before = other.state.data.clone().view(torch.int32), other.cache.data.clone()
    with Bundle(tmp_path / "b") as bundle, pytest.raises(KvCondenseError, match="row"):
        bundle.restore(3, "main", strict, convert=True)
    assert torch.equal(other.state.data.view(torch.int32), before[0])
    assert torch.equal(other.cache.data, before[1])


def test_other_kinds_of_state_and_dtype(tmp_path):
    spec = SPECS["hca"]
    online = Machine(spec, [tokens(spec, 300)], online=True)
    online.feed([200])
    with create(tmp_path / "b") as file:
        file.add(2, "main", held(online))
    ring = Machine(spec, [tokens(spec, 300)])
    with Bundle(tmp_path / "b") as bundle:
        assert [p for p in range(201) if bundle.restorable(p)] == [0, *range(128, 201)]
        ring.done[0] = 200
        with pytest.raises(KvCondenseError, match="cannot go on from running values"):
            bundle.restore(2, "main", held(ring))
        ring.done[0] = 128  # nothing is needed there
        bundle.restore(2, "main", held(ring))
    ring.feed([150])
    assert torch.equal(ring.cache_of(0), ring.whole(0).cache_of(0))
    half = Machine(spec, [tokens(spec, 300)], dtype=torch.bfloat16)
    ring.feed([5])
    with create(tmp_path / "c") as file:
        file.add(2, "main", held(ring))
    half.done[0] = 283
    with Bundle(tmp_path / "c") as bundle:
        with pytest.raises(KvCondenseError, match="convert=True"):
            bundle.restore(2, "main", held(half))
        bundle.restore(2, "main", held(half), convert=True)
