"""Bundles: a sequence cut, restored and gone on with anywhere is the one that never stopped; damage is noticed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcondense import CompressorSpec, KvCondenseError, PagedCache, RaggedBatch, StatePool
from kvcondense.bundle import Bundle, Held, append, create, cut
from kvcondense.errors import CheckpointError, IntegrityWarning, RangeError
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


def held(machine, q=0):
    return Held(
        machine.spec,
        machine.state,
        machine.at(q),
        machine.cache,
        machine.table[q],
        machine.weights.ape,
        machine.impl,
    )


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


class Small:
    """One compressor with few channels, so that its bundle is small."""

    def __init__(self, folder, spec=SPECS["csa"], stops=(6, 9), **options):
        self.machine = Machine(spec, [tokens(spec, 40)], **options)
        self.path = folder / "small.bundle"
        for number, stop in enumerate(stops):
            self.machine.feed([stop - self.machine.done[0]])
            with (append if number else create)(self.path, {"model": "small", "stop": str(stop)}) as file:
                file.add(0, "main", held(self.machine))


def content(path):
    """All that a bundle says."""
    with Bundle(path) as bundle:
        bundle.check()
        member = bundle.member(0, "main")
        rows = bundle.rows(0, "main", member.spec.visible_rows(bundle.position))
        states = [bundle.state(0, "main", c.position) for c in bundle.commits]
        return {k: v.tolist() for k, v in rows.items()}, states, bundle.about, bundle.members, bundle.position


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    spec = replace(SPECS["csa"], head_dim=2, rope_dim=2)
    small = Small(tmp_path, spec)
    data, whole, noticed = small.path.read_bytes(), content(small.path), 0
    assert len(data) < 12_000
    bad = tmp_path / "bad.bundle"
    bad.write_bytes(data)
    with bad.open("r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ (1 << i % 8)]), i)
            try:
                found = content(bad)
            except CheckpointError:
                noticed += 1
            else:
                assert found == whole, f"byte {i}"
            os.pwrite(file.fileno(), bytes([byte]), i)
    assert noticed > 0.9 * len(data), "only what lies between pieces is of no account"


def test_an_append_writes_behind_what_is_there(tmp_path):
    small = Small(tmp_path, stops=(6,))
    before = small.path.read_bytes()
    small.machine.feed([5])
    with append(small.path) as file:
        file.add(0, "main", held(small.machine))
    after = small.path.read_bytes()
    assert after[1024 : len(before)] == before[1024:]
    assert after[:512] == before[:512], "the older mark stays"
    with Bundle(small.path) as bundle:
        assert [c.position for c in bundle.commits] == [6, 11]
        assert bundle.about == {}
        assert [p for p in range(12) if bundle.restorable(p)] == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
        assert [bundle.nearest(p) for p in (3, 7, 99)] == [3, 6, 11]


ENDLESS = """
import sys
sys.path[:0] = sys.argv[2:]
from test_bundle import SPECS, Machine, append, held, tokens
machine = Machine(SPECS["csa"], [tokens(SPECS["csa"], 40_000)])
machine.feed([9])
while True:
    machine.feed([5])
    with append(sys.argv[1]) as file:
        file.add(0, "main", held(machine))
    print(machine.done[0], flush=True)
"""


def test_killed_while_it_is_added_to_it_is_whole(tmp_path):
    small = Small(tmp_path)
    kept = small.path.read_bytes()
    for delay in (0.0, 0.011, 0.023, 0.05):
        small.path.write_bytes(kept)
        words = [sys.executable, "-c", ENDLESS, str(small.path), *sys.path]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            said = int(child.stdout.readline())
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            said = int((child.stdout.read().split() or [said])[-1])
        with Bundle(small.path) as bundle:
            assert bundle.position >= said, "what was said to be there is there"
            bundle.check()
            at = bundle.position
        machine = Machine(SPECS["csa"], [tokens(SPECS["csa"], 40_000)])
        machine.feed([at + 3])
        with append(small.path) as file:
            file.add(0, "main", held(machine))
        with Bundle(small.path) as bundle:
            assert (bundle.position, bundle.file.unfinished) == (at + 3, 0)
            bundle.check()
            fields = bundle.rows(0, "main", (at + 3) // 4)
        assert torch.equal(fields["rows"].view(torch.int16), machine.cache_of(0))


def test_what_is_broken_off_leaves_what_was_there(tmp_path, monkeypatch):
    small = Small(tmp_path)
    before = small.path.read_bytes()
    small.machine.feed([4])

    def add():
        with append(small.path) as file:
            file.add(0, "main", held(small.machine))

    with pytest.raises(KeyboardInterrupt), append(small.path) as file:  # noqa: PT012
        file.add(0, "main", held(small.machine))
        raise KeyboardInterrupt
    assert small.path.read_bytes() == before
    with append(small.path) as file:
        file.add(0, "main", held(small.machine))
        with pytest.raises(CheckpointError, match="being written"):
            add()
        with Bundle(small.path) as bundle:
            assert bundle.position == 9, "readers see the last commit"
    shutil.copy(small.path, tmp_path / "more")
    with (tmp_path / "more").open("ab") as file:
        file.write(b"left of an append")
    with Bundle(tmp_path / "more") as bundle:
        assert bundle.file.unfinished == 17
    small.path.write_bytes(before)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcondense.bundle.container.flush", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        add()
    assert caught.value.filename == str(small.path)
    assert small.path.read_bytes() == before
    with pytest.raises(OSError, match="No space left"), create(tmp_path / "new") as file:
        file.add(0, "main", held(small.machine))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_mark_is_noticed_and_the_other_can_be_taken(damaged, tmp_path):
    small = Small(tmp_path)
    data = bytearray(small.path.read_bytes())
    data[512 * damaged + 40] ^= 4
    small.path.write_bytes(data)
    with pytest.raises(CheckpointError, match="two whole marks"):
        Bundle(small.path)
    with pytest.warns(IntegrityWarning, match="may be lost"), Bundle(small.path, recover=True) as bundle:
        assert bundle.position == (9 if damaged == 0 else 6)


def test_digests_are_looked_at_unless_told_not_to(tmp_path):
    small = Small(tmp_path)
    with Bundle(small.path) as bundle:
        at = bundle.commits[0].entries[0].rows.at
    data = bytearray(small.path.read_bytes())
    data[at] ^= 1
    small.path.write_bytes(data)
    with Bundle(small.path) as bundle:
        with pytest.raises(CheckpointError, match="the file is damaged"):
            bundle.check()
        target = Machine(SPECS["csa"], [tokens(SPECS["csa"], 40)])
        target.done[0] = 9
        before = target.state.data.view(torch.int32).clone(), target.cache.data.clone()
        with pytest.raises(CheckpointError, match="layer 0 main rows"):
            bundle.restore(0, "main", held(target))
        assert torch.equal(before[0], target.state.data.view(torch.int32))
        assert torch.equal(before[1], target.cache.data)
    with Bundle(small.path, verify=False) as bundle:
        bundle.restore(0, "main", held(target))


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


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    small = Small(tmp_path)
    machine, before = small.machine, small.path.read_bytes()
    other = Machine(SPECS["indexer"], [tokens(SPECS["indexer"], 40)])
    other.feed([12])
    with pytest.raises(RangeError, match="one after 9"), append(small.path) as file:
        file.add(0, "main", held(machine))
    machine.feed([3])
    for layer, part, what, message in (
        (0, "main", held(other), "layer 0 main spec"),
        (1, "main", held(machine), "layer 1 main: expected one of layer 0 main"),
        (-1, "main", held(machine), "layer"),
        (0, "main", replace(held(machine), pages=[]), "pages"),
        (0, "main", replace(held(machine), pages=[99]), "pages of their own"),
        (0, "main", "held", "held"),
    ):
        with pytest.raises(KvCondenseError, match=message), append(small.path) as file:
            file.add(layer, part, what)
    with pytest.raises(KvCondenseError, match="every compressor"), append(small.path):
        pass
    with pytest.raises(KvCondenseError, match="added once"), append(small.path) as file:  # noqa: PT012
        file.add(0, "main", held(machine))
        file.add(0, "main", held(machine))
    with pytest.raises(KvCondenseError, match="position: expected 12"), create(tmp_path / "x") as file:  # noqa: PT012
        file.add(0, "main", held(machine))
        other.feed([1])
        file.add(0, "indexer", held(other))
    with pytest.raises(KvCondenseError, match="about"), create(tmp_path / "x", {"a": 1}):
        pass
    assert small.path.read_bytes() == before
    with Bundle(small.path) as bundle:
        target = Machine(SPECS["csa"], [tokens(SPECS["csa"], 40)])
        for at, message in ((7, "6 is"), (10, "9 is")):
            target.done[0] = at
            with pytest.raises(RangeError, match=message):
                bundle.restore(0, "main", held(target))
            with pytest.raises(RangeError, match=message):
                cut(bundle, tmp_path / "x", at)
        with pytest.raises(KvCondenseError, match="layer 0 main"):
            bundle.restore(0, "indexer", held(target))
        with pytest.raises(KvCondenseError, match="spec"):
            bundle.restore(0, "main", held(other))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("data", [b"", b"x" * 3000, bytes(1024), bytes(1023)])
def test_other_files_are_no_bundles(data, tmp_path):
    path = tmp_path / "b"
    path.write_bytes(data)
    for call in (Bundle, lambda p: append(p).__enter__()):
        with pytest.raises(CheckpointError):
            call(path)
    for other in (tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(CheckpointError):
            Bundle(other)


def test_a_spec_is_the_one_that_was_written(tmp_path):
    small = Small(tmp_path, stops=(6,))
    with Bundle(small.path) as bundle:
        (member,) = bundle.members.values()
        assert isinstance(member.spec, CompressorSpec)
        assert member.spec == SPECS["csa"]
        assert (bundle.about, member.format.name) == ({"model": "small", "stop": "6"}, "bf16")
