"""Readers of what is kept of requests: cache files, snapshots and bundles, of all schemas; see foreign_files."""

import contextlib
import json
import re
from dataclasses import replace

import torch
from safetensors.torch import save_file

import alterations
import checkpoints
from foreign_files import TINY, Reader, digest, tiny_config
from kvcondense import KvCondenseError, OnlineState, RaggedBatch, StatePool
from kvcondense.bundle import Bundle, Held, append, create, cut
from kvcondense.cachefile import CacheFile, CachePart, empty_cache
from kvcondense.formats import get_format
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.snapshot import earlier, load_live, save_live
from kvcondense.stream import HiddenFile, Sequence
from machine import SPECS, Machine, tokens

TENSOR_SCALE = 0.05

CACHES = (
    ("csa", 13, "bf16", 4), ("csa", 0, "fp32", 4), ("r8", 8, "bf16", 4), ("csa", 4, "fp8_tensor", 4),
    ("indexer", 9, "int8_indexer", 128), ("indexer", 9, "fp8_indexer_pow2_16x16", 128), ("r1", 3, "bf16", 4),
    ("r8", 9, "fp8_model1_two_buffers", 512), ("csa", 5, "fp4_v41", 512),
)  # fmt: skip


def cache_file(name, position, fmt, head_dim):
    """A small cache file's contents, rows of random numbers."""
    gen = torch.Generator().manual_seed(position)
    spec = replace(SPECS[name], head_dim=head_dim, rope_dim=64 if head_dim == 512 else min(4, head_dim))
    n, live = spec.visible_rows(position), spec.seed_rows(position)
    scale = TENSOR_SCALE if get_format(fmt).tensor_scale else None
    cache = empty_cache(spec, get_format(fmt), n, tensor_scale=scale, page_tokens=64)
    rows = torch.randn(n, head_dim, generator=gen)
    cache.put(torch.arange(n), cache.encode(rows))
    state = torch.randn(live, spec.state_dim, generator=gen)
    sha = {"w": "0" * 64, "ape": "1" * 64, "norm": "2" * 64}
    return CacheFile(1, position, "3" * 64, {"main": CachePart(spec, sha, cache, state)})


class Caches(Reader):
    """Cache files of schema 3: loaded, decoded, converted, saved again."""

    sealed = True
    weight = 2

    def made(self):
        out = []
        for one in CACHES:
            cache_file(*one).save(self.folder / "made")
            out.append((self.folder / "made").read_bytes())
        return out

    def alter(self, chance, which):
        data = self.seeds[which]
        if chance.random() < 0.5:
            return alterations.of_bytes(chance, data, self.seeds), True
        return self.coaxed(alterations.of_sealed(chance, data), chance), False

    def coaxed(self, data, chance):
        """The file, its tensors of the shapes and types that the reader's errors ask for: to get further into it."""
        for _ in range(chance.choice((0, 6))):
            try:
                self.load(self.put(data))
            except KvCondenseError as error:
                fitted = fitting(data, error)
                if fitted is None:
                    break
                data = fitted
            except Exception:  # it is seen when it is read
                break
            else:
                break
        return data

    def load(self, path):
        return CacheFile.load(path)

    def read(self, data, which):
        return self.used(self.load(self.put(data)))

    def used(self, file):
        said = [json.dumps(file.header(), sort_keys=True)]
        for part in file.parts.values():
            n = part.spec.visible_rows(file.position)
            assert part.state.dtype == torch.float32
            fields = part.cache.get(torch.arange(n))
            said += [part.state, *(fields[k] for k in sorted(fields)), part.cache.decode_rows(torch.arange(n))]
        saved = self.folder / "saved"
        file.save(saved)
        assert digest(json.dumps(CacheFile.load(saved).header(), sort_keys=True)) == digest(said[0])
        for fmt in ("bf16", "fp8_tensor", "int8_indexer", "fp8_model1"):
            with contextlib.suppress(KvCondenseError):
                file.convert(dict.fromkeys(file.parts, fmt), tensor_scale=TENSOR_SCALE, strict=False)
        return {digest(*said)}


def fitting(data, error):
    """The sealed file with the tensor that an error speaks of as the error wants it; None if it speaks of none."""
    try:
        header, tensors = alterations.unsealed_parts(data)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # altered too much
        return None
    name = error.argument.rpartition(" ")[2]
    shape = re.fullmatch(r"shape (\[[\d, ]*\])", error.expected)
    stored = tensors.get(name)
    if shape and stored:
        tensors[name] = alterations.sized(stored.dtype, json.loads(shape[1]), stored.data)
    elif error.expected in alterations.SPELT and stored:
        tensors[name] = alterations.sized(alterations.SPELT[error.expected], stored.shape, stored.data)
    elif error.expected == "a tensor" and name:
        tensors[name] = alterations.Stored("F32", [0], b"")
    else:
        return None
    return None if tensors[name] is None else alterations.sealed(header, tensors)


class OldCaches(Caches):
    """Cache files of schema 2, which had no digests."""

    sealed = False
    weight = 1

    def made(self):
        out = []
        for data in super().made():
            header, tensors = alterations.unsealed_parts(data)
            header["schema"] = 2
            for part in header["parts"].values():
                part["weights_sha256"] = "0" * 64
            out.append(alterations.joined({"kvcondense": json.dumps(header)}, tensors))
        return out

    def alter(self, chance, which):
        if chance.random() < 0.5:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), False
        return alterations.of_sealed(chance, self.seeds[which], digests=False), False


class Resumed(Reader):
    """Cache files from which a sequence goes on."""

    weight = 1

    sealed = True

    def made(self):
        model = checkpoints.write(self.folder / "model", model=TINY, config={"config.json": tiny_config()})
        x = torch.randn(11, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        save_file({"hidden_states": x}, self.folder / "hidden")
        self.sequence = Sequence.start(model, 1)
        self.sequence.feed(HiddenFile.open(self.folder / "hidden", 1))
        self.sequence.save(self.folder / "made")
        return [(self.folder / "made").read_bytes()]

    def alter(self, chance, which):
        if chance.random() < 0.3:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), True
        return alterations.of_sealed(chance, self.seeds[which]), False

    def read(self, data, which):
        self.sequence.torn = False
        self.sequence.resume(self.put(data))
        parts = [t for c in self.sequence.parts.values() for t in (c.cache.data, c.state.data)]
        return {digest(self.sequence.position, self.sequence.last_hidden, *parts)}


LIVE = (
    ("csa", "ring", 6), ("csa", "paged", 8), ("r8", "online", 13), ("r8", "ring", 8), ("r8", "online", 16),
    ("r2", "ring", 3), ("gateless", "ring", 7), ("r1", "ring", 2),
)  # fmt: skip


class Snapshots(Reader):
    """Snapshots of schema 2: into a ring, pages and an online state, and as they were earlier."""

    sealed = True
    weight = 1

    def made(self):
        out, self.specs = [], []
        for name, kind, position in LIVE:
            machine = Machine(SPECS[name], [tokens(SPECS[name], 20)], **{} if kind == "ring" else {kind: True})
            machine.feed([position])
            self.specs.append((machine.spec, position, machine.weights.ape))
            ape = None if kind != "online" else machine.weights.ape
            out.append(save_live(machine.spec, machine.state, machine.at(0), ape=ape, impl="reference"))
        return out

    def alter(self, chance, which):
        if chance.random() < 0.5:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), True
        data = alterations.of_sealed(chance, self.seeds[which])
        for _ in range(chance.choice((0, 3))):
            try:
                earlier(data, 0)
            except KvCondenseError as error:
                data = fitting(data, error) or data
            except Exception:
                break
        return data, False

    def read(self, data, which):
        spec, position, ape = self.specs[which]
        said, refused = [], None
        for kind in ("ring", "paged", "online")[: 2 + (not spec.overlap)]:
            for convert in (False, True):
                state, at = _room(spec, kind, position)
                before = digest(*state.tensors.values())
                try:
                    load_live(spec, state, at, data, ape=ape, convert=convert, impl="reference")
                except KvCondenseError as error:
                    assert digest(*state.tensors.values()) == before, "something was written before the error"
                    refused = error
                else:
                    said.append(save_live(spec, state, at, ape=ape, impl="reference"))
        for to in (0, 1, position - position % spec.ratio, position):
            try:
                said.append(earlier(data, to))
            except KvCondenseError as error:
                refused = error
        if refused is not None and not said:
            raise refused
        return {digest(one) for one in said if one != data}  # a payload given back is checked by whom it is given to


class OldSnapshots(Snapshots):
    """Snapshots of schema 1, which had no digests."""

    sealed = False
    weight = 1

    def made(self):
        out = []
        for data in super().made():
            header, tensors = alterations.unsealed_parts(data)
            out.append(alterations.joined({"kvcondense": json.dumps({**header, "schema": 1})}, tensors))
        return out

    def alter(self, chance, which):
        if chance.random() < 0.5:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), False
        return alterations.of_sealed(chance, self.seeds[which], digests=False), False


def _room(spec, kind, position):
    """An empty state of one request, and where it is to stand."""
    if kind == "paged":
        return StatePool.paged(spec, 6, 5), RaggedBatch.at(position, state_pages=[0, 1, 2, 3, 4])
    state = OnlineState.allocate(spec, 1) if kind == "online" else StatePool.ring(spec, 1)
    return state, RaggedBatch.at(position, state_slot=0)


BUNDLED = (
    (("csa", "bf16", 4),), (("csa", "bf16", 4), ("indexer", "int8_indexer", 128)), (("r8", "fp8_tensor", 4),),
)  # fmt: skip


class Bundles(Reader):
    """Bundles: checked, restored, cut, converted and added to."""

    sealed = True
    weight = 2
    quiet = True
    verify, recover = True, False

    def made(self):
        out = []
        for members in BUNDLED:
            path = self.folder / "made"
            path.unlink(missing_ok=True)
            for number, stop in enumerate((6, 9)):
                with (append if number else create)(path, {"model": "small"}) as file:
                    for name, fmt, head_dim in members:
                        file.add(0, "main" if name != "indexer" else name, self.held(name, fmt, head_dim, stop))
            out.append(path.read_bytes())
        return out

    def held(self, name, fmt, head_dim, stop):
        spec = replace(SPECS[name], head_dim=head_dim, rope_dim=4)
        cache = PagedCache.allocate(head_dim, 8, 2, format=fmt, tensor_scale=_scale(fmt))
        gen = torch.Generator().manual_seed(head_dim)
        cache.put(torch.arange(16), cache.encode(torch.randn(16, head_dim, generator=gen)))
        state = StatePool.ring(spec, 1)
        state.data.normal_(generator=gen)
        at = RaggedBatch.at(stop, state_slot=0)
        import_live(spec, state, at, export_rows(spec, state, stop))
        return Held(spec, state, at, cache, range(8))

    def alter(self, chance, which):
        if chance.random() < 0.5:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), True
        return self.coaxed(alterations.of_bundle(chance, self.seeds[which]), chance), False

    def coaxed(self, data, chance):
        """With rows of the sizes that the reader's errors ask for."""
        for _ in range(chance.choice((0, 4))):
            try:
                with Bundle(self.put(data)):
                    break
            except KvCondenseError as error:
                wanted = re.fullmatch(r"(\d+) bytes for \d+ rows", error.expected)
                which = re.search(r"commit (\d+) layer", error.argument)
                if wanted is None or which is None or int(wanted[1]) > 1 << 16:
                    break
                try:
                    commits = alterations.pieces(data)
                    for blob in commits[int(which[1])].blobs:
                        blob[0] = bytes(int(wanted[1]))
                except (KeyError, IndexError, TypeError, ValueError, RecursionError):  # altered too much
                    break
                data = alterations.bundle(commits)
            except Exception:  # it is seen when it is read
                break
        return data

    def read(self, data, which):
        path = self.put(data)
        said = []
        with Bundle(path, verify=self.verify, recover=self.recover) as file:
            said.append(digest(file.position, file.about, file.members))
            for to in {*(c.position for c in file.commits), 0, 4, file.position}:
                file.restorable(to)
                file.nearest(to)
            for act in (self.check, self.restore, self.cut):
                with contextlib.suppress(KvCondenseError):
                    said += act(file)
        with contextlib.suppress(KvCondenseError), append(path) as file:
            for name, fmt, head_dim in BUNDLED[which]:
                file.add(0, "main" if name != "indexer" else name, self.held(name, fmt, head_dim, 12))
        return set(said)

    def check(self, file):
        file.check()
        return []

    def restore(self, file):
        said = []
        for (layer, part), member in file.members.items():
            to = file.nearest(min(file.position, 9))
            count = member.spec.visible_rows(to)
            fields = file.rows(layer, part, count)
            said.append(digest(part, *(fields[k] for k in sorted(fields))))
            if to > 64 or member.spec.state_dim > 1 << 12:
                continue
            for fmt in (member.format.name, "fp32"):
                scale = member.tensor_scale if fmt == member.format.name else None
                cache = PagedCache.allocate(member.spec.head_dim, 65, 16, format=fmt, tensor_scale=scale)
                state = StatePool.ring(member.spec, 1) if member.spec.window < 1 << 10 else None
                if state is None:
                    continue
                held = Held(member.spec, state, RaggedBatch.at(to, state_slot=0), cache, range(65))
                file.restore(layer, part, held, convert=True)
                said.append(digest(part, cache.data, save_live(member.spec, state, held.batch)))
        return said

    def cut(self, file):
        made = self.folder / "cut"
        for formats in ({}, {"main": "fp32"}, {"main": "int8_indexer", "indexer": "bf16"}):
            with contextlib.suppress(KvCondenseError):
                cut(file, made, file.nearest(9), formats)
                with Bundle(made) as again:
                    again.check()
        return []


class UncheckedBundles(Bundles):
    """The same without looking at digests of rows and states."""

    sealed = quiet = False
    weight = 1
    verify = False


class RecoveredBundles(Bundles):
    """The same where one mark may be damaged."""

    weight = 1
    quiet = False
    recover = True

    def read(self, data, which):
        found = super().read(data, which)
        return found | {f"as of {which}"}


def _scale(fmt):
    return TENSOR_SCALE if get_format(fmt).tensor_scale else None


def export_rows(spec, state, stop):
    """Any rows that a request at ``stop`` may have."""
    return state.data[: spec.seed_rows(stop)].clone()
