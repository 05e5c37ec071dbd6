"""Walking through all compressors of a model directory: every naming and sharding, headers alone, clear errors."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from checkpoints import HIDDEN, MODEL, SCHEMES, write
from kvcondense import CompressorSpec, CompressorWeights
from kvcondense.checkpoint import compressors
from kvcondense.cli import app
from kvcondense.errors import CheckpointError
from kvcondense.files.tensors import TensorFile
from kvcondense.weightfiles import files as module

EXPECTED = [(1, "main"), (1, "indexer"), (2, "main"), (3, "main"), (3, "indexer")]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_compressors_are_found_and_load(tmp_path, scheme, shards):
    folder = write(tmp_path, scheme, shards=shards)
    found = list(compressors(folder))
    assert [(c.layer, c.part) for c in found] == EXPECTED
    for c in found:
        assert c.spec == CompressorSpec.for_layer(MODEL, c.layer, c.part)
        weights = c.load()
        expected = CompressorWeights.load(folder, c.spec, c.layer, hidden_size=HIDDEN, part=c.part)
        for name in ("w", "ape", "norm"):
            assert torch.equal(getattr(weights, name), getattr(expected, name))
        rows = {"wkv": c.spec.width, "wkv_wgate": 2 * c.spec.width}
        matrix = "wkv" if "wkv" in c.tensors else "wkv_wgate"
        assert c.tensors[matrix].shape == (rows[matrix], HIDDEN)
        assert (c.tensors[matrix].dtype, c.tensors["ape"].dtype, c.storage) == ("BF16", "F32", "BF16")
        assert c.tensors[matrix].bytes == 2 * rows[matrix] * HIDDEN
        assert c.prefix == SCHEMES[scheme][0].partition("layers.")[0]
        known = scheme.partition(",")[0]
        assert c.scheme == ("official" if known == "saved by transformers" else known)
        assert c.bytes == sum(t.bytes for t in c.tensors.values()) > 0


def test_listing_reads_no_tensor(tmp_path, monkeypatch):
    folder = write(tmp_path, "official", shards=3)

    def read(*_):
        pytest.fail("a tensor was read")

    monkeypatch.setattr(TensorFile, "read", read)
    monkeypatch.setattr(TensorFile, "slice", read)
    assert len(list(compressors(folder, MODEL))) == len(EXPECTED)


def test_sizes_follow_from_names_of_types():
    assert [module.bits(d) for d in ("BF16", "F32", "F8_E4M3", "I64", "BOOL")] == [16, 32, 8, 64, 8]


def test_the_command_lists_them(tmp_path):
    folder = write(tmp_path, "transformers", shards=3)
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["info", "--checkpoint", str(folder), "--json", str(report)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["layer", "part", "ratio", "window", "head_dim", "wkv", "wgate", "ape", "norm", "bytes"]
    assert re.match(r"1\s+main\s+4\s+8\s+16\s+32x32 BF16\s+32x32 BF16\s+4x32 F32\s", lines[1])
    record = json.loads(report.read_text())
    assert [(c["layer"], c["part"]) for c in record["compressors"]] == EXPECTED
    assert f"5 compressors, {sum(c['bytes'] for c in record['compressors'])} bytes" in result.output


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        list(compressors(tmp_path))
    folder = write(tmp_path, change=lambda t: {k: v for k, v in t.items() if k != "layers.3.attn.compressor.ape"})
    walk = compressors(folder)
    assert [next(walk).layer for _ in range(3)] == [1, 1, 2]
    with pytest.raises(CheckpointError, match="layers.3.attn.compressor.ape"):
        next(walk)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "compress_ratios": [0] * 5}))
    result = CliRunner().invoke(app, ["info", "--checkpoint", str(folder)])
    assert result.exit_code == 2
    assert "--checkpoint: expected a model with compressors" in result.output
