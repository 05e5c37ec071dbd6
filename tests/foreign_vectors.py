"""Readers of test vectors and of what somebody returned for them; see foreign_files."""

import contextlib
import json

from safetensors.torch import save

import alterations
from foreign_files import Reader, digest
from kvcondense import KvCondenseError
from kvcondense.conformance.own import load_factory
from kvcondense.conformance.vectors import compared, made, played, schema

NAMES = (
    "I6-emission-csa-1",
    "I12-fail-closed-r2",
    "I4-inert-request-indexer-0",
    "I9-bytes-fp8_model1",
    "I8-fork-fused-0",
)


def some():
    """A few vectors, made once for all readers."""
    if not _MADE:
        _MADE.extend((v, e) for v, e in made.vectors() if v.name in NAMES)
    return _MADE


_MADE = []


class Vectors(Reader):
    """The JSON of vectors; some of them are played, whatever they ask for by now."""

    weight = 2
    playing = 20

    def made(self):
        self.read_ = 0
        self.given = [expected for _, expected in some()]
        return [vector.to_json().encode() for vector, _ in some()]

    def alter(self, chance, which):
        return self.json(chance, which), False

    def read(self, data, which):
        vector = schema.Vector.from_json(data.decode("utf-8"), "v") if _utf8(data) else _refused()
        self.read_ += 1
        if self.read_ % self.playing == 0 and vector.num_pages < 1000 and len(vector.ops) < 20:
            with contextlib.suppress(KvCondenseError):
                played.outputs(vector, self.given[which], load_factory("reference"))
        assert schema.Vector.from_json(vector.to_json(), "v") == vector
        return {digest(vector)}


def _utf8(data):
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _refused():
    raise KvCondenseError("v", "text", "bytes")


class VectorIndex(Reader):
    """index.json."""

    def made(self):
        entry = {"json": "0" * 64, "safetensors": "1" * 64, "invariant": "I1", "bug_class": "B1"}
        whole = {"schema": 1, "made_by": "x", "vectors": {"a-1": entry, "b_2": entry}}
        return [json.dumps(whole).encode()]

    def alter(self, chance, which):
        return self.json(chance, which), False

    def read(self, data, which):
        del which
        self.put(data, "index.json")
        found = schema.index(self.folder)
        assert all("/" not in name for name in found)
        return {digest(sorted(found.items(), key=str))}


class VectorOutputs(Reader):
    """What an implementation wrote: compared, whatever it is."""

    def made(self):
        found = []
        for vector, expected in some():
            found.append(save(played.outputs(vector, expected, load_factory("reference"))))
        return found

    def alter(self, chance, which):
        return alterations.of_safetensors(chance, self.seeds[which], self.seeds), False

    def read(self, data, which):
        vector, expected = some()[which]
        wrong = compared.wrong(vector, expected, schema.tensors(self.put(data, "out.safetensors")))
        return {digest(wrong)}
