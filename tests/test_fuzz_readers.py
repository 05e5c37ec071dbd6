"""36 000 altered inputs into every reader, every flipped bit of small files, and readers that are caught."""

import json
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import alterations
import fuzz_readers
from foreign_files import Reader
from foreign_requests import cache_file
from kvcondense import RaggedBatch, StatePool
from kvcondense.cachefile import CacheFile
from kvcondense.errors import CheckpointError, IntegrityWarning, KvCondenseError
from kvcondense.snapshot import load_live, save_live
from machine import SPECS, Machine, tokens

INPUTS = 36_000


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Two halves, for two workers.
@pytest.mark.parametrize("part", [0, 1])
def test_readers_of_altered_files(tmp_path, part):
    readers = fuzz_readers.READERS[part::2]
    found = fuzz_readers.run(INPUTS // 2, 1 + part, readers=readers, failed=tmp_path)
    assert sum(t.inputs for t in found.values()) == INPUTS // 2
    for name, tally in found.items():
        assert tally.inputs >= 1000, name
        assert 0 < tally.accepted < 0.9 * tally.inputs, f"{name}: {tally}"


def test_every_input_can_be_made_again():
    seen = []

    class Seeing(Bad):
        def read(self, data, which):
            seen.append(data)
            return set()

    for _ in range(2):
        fuzz_readers.run(50, 7, readers=[Seeing])
    assert seen[1:51] == seen[52:]


class Bad(Reader):
    """A reader of JSON, whose faults are below."""

    sealed = True

    def made(self):
        return [b'{"size": 3, "name": "a"}']

    def read(self, data, which):
        try:
            value = json.loads(data)
        except ValueError as error:
            raise KvCondenseError("input", "JSON", "other") from error
        if not isinstance(value, dict) or not isinstance(value.get("size"), int):
            raise KvCondenseError("input", "a size", "none")
        return self.fault(value, data == self.seeds[0])

    def fault(self, value, whole):
        return {value["size"]}


class Unbounded(Bad):
    def fault(self, value, whole):
        return set() if whole else {int(np.ones(40_000_000)[value["size"] % 2])}


class Endless(Bad):
    def fault(self, value, whole):
        while not whole:
            pass
        return set()


class Slow(Bad):
    def fault(self, value, whole):
        begun = time.process_time()
        while not whole and time.process_time() - begun < 0.3:
            pass
        return set()


class Undocumented(Bad):
    def fault(self, value, whole):
        return {value["name"]}


class Greedy(Bad):
    def fault(self, value, whole):
        return set() if whole else {torch.empty(1 << 40).shape}


class Noisy(Bad):
    def fault(self, value, whole):
        if not whole:
            warnings.warn("what", RuntimeWarning, stacklevel=1)
        return set()


class Deep(Bad):
    def made(self):
        return [b"[[1]]"]

    def read(self, data, which):
        try:
            json.loads(data)
        except ValueError as error:
            raise KvCondenseError("input", "JSON", "other") from error
        return set()

    def alter(self, chance, which):
        return self.json(chance, which), False


FAULTY = {
    Bad: "damage was not noticed",
    Unbounded: r"the process grew by 30\d MiB",
    Endless: "no end after",
    Slow: "it took 0",
    Undocumented: "KeyError",
    Greedy: "can't allocate memory",
    Noisy: "RuntimeWarning: what",
    Deep: "RecursionError",
}


@pytest.mark.parametrize("reader", FAULTY, ids=lambda r: r.__name__)
def test_a_bad_reader_is_caught_and_its_input_kept(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_readers, "_STOP_SECONDS", 1.0)
    if reader is Slow:
        monkeypatch.setattr(fuzz_readers, "MOST_SECONDS", 0.2)
    with pytest.raises(fuzz_readers.ReaderError, match=FAULTY[reader]):
        fuzz_readers.run(3000, 1, readers=[reader], failed=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(f"{reader.__name__}-1-")


def flips(data):
    """Every bit of every byte, one by one: (which, the bytes)."""
    changed = bytearray(data)
    for bit in range(8 * len(data)):
        changed[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(changed)
        changed[bit // 8] ^= 1 << bit % 8


def content(file):
    """All that a cache file says."""
    part = file.parts["main"]
    return json.dumps(file.header(), sort_keys=True), part.cache.data.tolist(), part.state.tolist()


def small_cache(path):
    file = cache_file("r8", 9, "bf16", 2)
    file.save(path)
    return path.read_bytes()


def test_every_flipped_bit_of_a_cache_file_is_noticed(tmp_path):
    path = tmp_path / "cache"
    data = small_cache(path)
    whole, harmless = content(CacheFile.load(path)), 0
    for bit, changed in flips(data):
        path.unlink()
        path.write_bytes(changed)
        try:
            found = CacheFile.load(path)
        except CheckpointError:
            continue
        harmless += 1
        assert content(found) == whole, f"bit {bit}"
    assert len(data) < 1500
    assert harmless <= 8 * 8, "blanks that fill the header up to a multiple of 8"


def test_what_is_noticed_of_a_cache_file_without_digests(tmp_path):
    """Schema 2: that a file is whole, its types and its shapes. Not its numbers, nor a digit of its header."""
    path = tmp_path / "cache"
    small_cache(path)
    header, tensors = alterations.unsealed_parts(path.read_bytes())
    header["schema"] = 2
    header["parts"]["main"]["weights_sha256"] = "0" * 64
    data = alterations.joined({"kvcondense": json.dumps(header)}, tensors)
    body = len(data) - sum(len(t.data) for t in tensors.values())
    noticed = [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IntegrityWarning)
        for bit, changed in flips(data):
            path.unlink()
            path.write_bytes(changed)
            try:
                CacheFile.load(path)
            except KvCondenseError:
                noticed[bit >= 8 * body] += 1
    assert noticed[1] == 0, "of tensors nothing"
    assert noticed[0] > 0.5 * 8 * body, "of the header, names, sizes and grammar"


@pytest.mark.parametrize(("spec", "kind"), [("csa", "ring"), ("r8", "online")])
def test_every_flipped_bit_of_a_snapshot_is_noticed(spec, kind):
    spec = replace(SPECS[spec], head_dim=2, rope_dim=2)
    machine = Machine(spec, [tokens(spec, 20)], online=kind == "online")
    machine.feed([5])
    payload = save_live(spec, machine.state, machine.at(0), ape=machine.weights.ape, impl="reference")
    at, noticed = RaggedBatch.at(5, state_slot=0), 0
    for bit, changed in flips(payload):
        state = StatePool.ring(spec, 1) if kind == "ring" else type(machine.state).allocate(spec, 1)
        try:
            load_live(spec, state, at, changed, ape=machine.weights.ape, impl="reference")
        except KvCondenseError:
            noticed += 1
        else:
            assert save_live(spec, state, at, impl="reference") == payload, f"bit {bit}"
    assert noticed > 8 * len(payload) - 64
