"""Bundles as files: damage is noticed, appends leave what is there, kill -9 included; what does not fit is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bundles import Small, held
from kvcondense import CompressorSpec, KvCondenseError
from kvcondense.bundle import Bundle, append, create, cut
from kvcondense.errors import CheckpointError, IntegrityWarning, RangeError
from machine import SPECS, Machine, tokens


def content(path):
    """All that a bundle says."""
    with Bundle(path) as bundle:
        bundle.check()
        member = bundle.member(0, "main")
        rows = bundle.rows(0, "main", member.spec.visible_rows(bundle.position))
        states = [bundle.state(0, "main", c.position) for c in bundle.commits]
        return {k: v.tolist() for k, v in rows.items()}, states, bundle.about, bundle.members, bundle.position


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    spec = replace(SPECS["csa"], head_dim=2, rope_dim=2)
    small = Small(tmp_path, spec)
    data, whole, noticed = small.path.read_bytes(), content(small.path), 0
    assert len(data) < 12_000
    bad = tmp_path / "bad.bundle"
    bad.write_bytes(data)
    with bad.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            i, byte = bit // 8, data[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ (1 << bit % 8)]), i)
            try:
                found = content(bad)
            except CheckpointError:
                noticed += 1
            else:
                assert found == whole, f"bit {bit}"
            os.pwrite(file.fileno(), bytes([byte]), i)
    assert noticed > 0.9 * 8 * len(data), "only what lies between pieces is of no account"


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
from bundles import SPECS, Machine, append, held, tokens
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


def test_an_append_to_a_file_that_was_replaced_is_not_lost_in_silence(tmp_path):
    small = Small(tmp_path)
    small.machine.feed([4])
    with pytest.raises(CheckpointError, match="replaced meanwhile"), append(small.path) as file:  # noqa: PT012
        file.add(0, "main", held(small.machine))
        with create(small.path) as other:
            other.add(0, "main", held(small.machine))
    with Bundle(small.path) as bundle:
        assert [c.position for c in bundle.commits] == [13]
        bundle.check()


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
