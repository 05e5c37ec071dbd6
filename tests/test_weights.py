"""Loading compressors from checkpoints: every naming scheme, shards, and every way a file can be wrong."""

import json
from dataclasses import replace

import pytest
import torch

from checkpoints import HIDDEN, MODEL, SCHEMES, tensors, write
from kvcondense import CompressorSpec, CompressorWeights, KvCondenseError

CSA, HCA = 1, 2


def load(folder, layer=CSA, part="main", **changes):
    spec = CompressorSpec.for_layer(MODEL, layer, part, **changes)
    return CompressorWeights.load(folder, spec, layer, hidden_size=HIDDEN, part=part)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("layer", "part"), [(CSA, "main"), (CSA, "indexer"), (HCA, "main"), (3, "main")])
def test_all_schemes_load_the_same_tensors(tmp_path, scheme, shards, layer, part):
    got = load(write(tmp_path, scheme, shards=shards), layer, part)
    base = SCHEMES["official"][0 if part == "main" else 1].format(layer)
    want = {name.removeprefix(base): t for name, t in tensors().items() if name.startswith(base)}
    assert torch.equal(got.w, torch.cat([want["wkv.weight"], want["wgate.weight"]]))
    assert torch.equal(got.ape, want["ape"])
    assert torch.equal(got.norm, want["norm.weight"].float())
    assert (got.w.dtype, got.ape.dtype, got.norm.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def dropped(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


def changed(name, value):
    return lambda t: {**t, name: value}


MAIN = "layers.1.attn.compressor."
WRONG = {
    "missing wkv": (MAIN + "wkv.weight", dropped(MAIN + "wkv.weight"), "a missing tensor"),
    "missing gate": (MAIN + "wgate.weight", dropped(MAIN + "wgate.weight"), "a missing tensor"),
    "missing ape": (MAIN + "ape", dropped(MAIN + "ape"), "a missing tensor"),
    "missing norm": (MAIN + "norm.weight", dropped(MAIN + "norm.weight"), "a missing tensor"),
    "extra bias": (MAIN + "wkv.bias", changed(MAIN + "wkv.bias", torch.ones(3)), "an extra tensor"),
    "fp8 scale": (MAIN + "wkv.scale", changed(MAIN + "wkv.scale", torch.ones(3)), "an extra tensor"),
    "wkv rows": (MAIN + "wkv.weight", changed(MAIN + "wkv.weight", torch.ones(16, HIDDEN)), r"shape \[32, 32\]"),
    "wkv transposed": (MAIN + "wgate.weight", changed(MAIN + "wgate.weight", torch.ones(HIDDEN, 16)), "shape"),
    "ape rows": (MAIN + "ape", changed(MAIN + "ape", torch.ones(8, 32)), r"shape \[4, 32\]"),
    "norm dims": (MAIN + "norm.weight", changed(MAIN + "norm.weight", torch.ones(1, 16)), r"shape \[16\]"),
    "int weights": (
        MAIN + "wkv.weight",
        changed(MAIN + "wkv.weight", torch.ones(32, HIDDEN, dtype=torch.int8)),
        "int8",
    ),
    "other layers only": (
        "compressor of layer 1",
        lambda t: {k: v for k, v in t.items() if ".1." not in k},
        "none of them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(tmp_path, case):
    name, change, message = WRONG[case]
    with pytest.raises(KvCondenseError, match=message) as caught:
        load(write(tmp_path, change=change))
    assert caught.value.argument == name


def test_a_spec_without_ape_finds_the_ape_extra(tmp_path):
    with pytest.raises(KvCondenseError, match="an extra tensor"):
        load(write(tmp_path), has_ape=False)


def test_v41_has_no_ape_and_ratio_one_no_gate(tmp_path):
    keep = {"wkv.weight", "norm.weight"}
    folder = write(tmp_path, change=lambda t: {k: v for k, v in t.items() if k.removeprefix(MAIN) in keep})
    spec = replace(CompressorSpec.for_layer(MODEL, CSA), has_ape=False, has_gate=False)
    got = CompressorWeights.load(folder, spec, CSA, hidden_size=HIDDEN)
    assert got.ape is None
    assert got.w.shape == (spec.projected, HIDDEN)


def test_other_files_may_lie_beside_the_model(tmp_path):
    folder = write(tmp_path)
    (folder / "result.safetensors").write_bytes(b"not a model")
    assert load(folder).w is not None
    alone = write(tmp_path / "alone")
    (alone / "model.safetensors").rename(alone / "weights.safetensors")
    assert load(alone).w is not None


def rewrite_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(edit(index)))
    return folder


FILES = {
    "no files": lambda f: (f / "model.safetensors").unlink(),
    "two files": lambda f: (
        [(f / n).write_bytes(b"") for n in ("a.safetensors", "b.safetensors")] + [(f / "model.safetensors").unlink()]
    ),
    "truncated": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
    "not safetensors": lambda f: (f / "model.safetensors").write_bytes(b"PK" + bytes(100)),
    "huge header": lambda f: (f / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
    "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_files_raise_our_error(tmp_path, case):
    folder = write(tmp_path)
    FILES[case](folder)
    with pytest.raises(KvCondenseError, match="safetensors"):
        load(folder)


INDEX = {
    "escape": (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "../secret.safetensors")}, "same folder"),
    "absolute": (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "/etc/x.safetensors")}, "same folder"),
    "pickle": (lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "model.bin")}, "same folder"),
    "no map": (lambda i: {}, "weight_map"),
    "a list": (lambda i: [], "expected object, got array"),
    "absent shard": (
        lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "model-9.safetensors")},
        "no such file",
    ),
    "wrong shard": (
        lambda i: {"weight_map": dict.fromkeys(i["weight_map"], "model-00001-of-00003.safetensors")},
        "a missing tensor",
    ),
}


@pytest.mark.parametrize("case", INDEX)
def test_broken_index_raises_our_error(tmp_path, case):
    edit, message = INDEX[case]
    folder = rewrite_index(write(tmp_path, shards=3), edit)
    with pytest.raises(KvCondenseError, match=message):
        load(folder)


def test_index_must_be_json(tmp_path):
    folder = write(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(KvCondenseError, match=r"index\.json"):
        load(folder)
