"""GGUF files, written by the gguf package: every compressor beside numpy, and files that are cut short or altered."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from checkpoints import CONFIG, MODEL, SCHEMES, tensors
from checkpoints import write as write_official
from kvcondense import CompressorSpec, CompressorWeights
from kvcondense.checkpoint import compressors
from kvcondense.cli import app
from kvcondense.errors import CheckpointError, KvCondenseError, UnsupportedError
from weight_forms import bf16

LEAVES = {"wkv.weight": "kv.weight", "wgate.weight": "gate.weight", "ape": "ape.weight", "norm.weight": "norm.weight"}


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"gguf package.*kvcondense\[gguf\]"):
        list(compressors(tmp_path))


def official():
    """(layer, part, official leaf, tensor) of every compressor."""
    for name, tensor in tensors().items():
        for layer in (1, 2, 3):
            for part, base in zip(("main", "indexer"), SCHEMES["official"], strict=False):
                start = base.format(layer)
                if name.startswith(start):
                    yield layer, part, name.removeprefix(start), tensor


def write(folder, kind, ape="F32", suffix=".weight", pieces=1):
    """config.json and a model in GGUF with matrices of ``kind``; (layer, part, leaf) -> what it is worth, in fp32."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = [f"model-{i + 1:05}-of-{pieces:05}.gguf" for i in range(pieces)]
    writers = [gguf.GGUFWriter(folder / name, "deepseek4") for name in names]
    for writer in writers:
        writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
        writer.add_uint32("deepseek4.block_count", 4)
        writer.add_array("deepseek4.rates", [0, 4, 128])
        writer.add_float32("deepseek4.eps", 1e-6)
    worth = {}
    for i, (layer, part, leaf, tensor) in enumerate(official()):
        stored = {"wkv.weight": kind, "wgate.weight": kind, "ape": ape, "norm.weight": "F32"}[leaf]
        stored = "F32" if stored == "Q8_0" and tensor.shape[-1] % 32 else stored
        name = f"blk.{layer}.{'attn' if part == 'main' else 'indexer'}_compressor_{LEAVES[leaf]}"
        if leaf == "ape":
            name = name.removesuffix(".weight") + suffix
        data = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[stored])
        raw = None if stored in ("F32", "F16") else gguf.GGMLQuantizationType[stored]
        writers[i % pieces].add_tensor(name, data, raw_dtype=raw)
        worth[layer, part, leaf] = q8_0(data) if stored == "Q8_0" else tensor.float().to(DTYPES[stored]).float().numpy()
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return worth


def q8_0(data):
    """Blocks of 34 bytes: a scale in fp16, 32 codes."""
    blocks = data.reshape(data.shape[0], -1, 34)
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    return (blocks[..., 2:].copy().view(np.int8).astype(np.float32) * scale).reshape(data.shape[0], -1)


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(
    ("kind", "ape", "suffix"), [("F32", "F16", ""), ("F16", "F32", ".weight"), ("BF16", "BF16", "")]
)
def test_plain_types_stay_what_they_are(tmp_path, kind, ape, suffix, pieces):
    worth = write(tmp_path, kind, ape, suffix, pieces)
    found = list(compressors(tmp_path))
    assert len(found) == 5
    for c in found:
        weights, key = c.load(), (c.layer, c.part)
        assert (c.scheme, c.prefix, c.storage) == ("gguf", "", kind)
        assert weights.w.dtype == DTYPES[kind]
        w = np.concatenate([worth[(*key, "wkv.weight")], worth[(*key, "wgate.weight")]])
        assert np.array_equal(weights.w.float().numpy(), w)
        assert np.array_equal(weights.ape.numpy(), worth[(*key, "ape")])
        assert np.array_equal(weights.norm.numpy(), worth[(*key, "norm.weight")])


def test_quantised_types_become_bf16_and_ape_fp32(tmp_path):
    worth = write(tmp_path, "Q8_0", "Q8_0")
    for c in compressors(tmp_path):
        weights = CompressorWeights.load(
            tmp_path / "model-00001-of-00001.gguf", c.spec, c.layer, hidden_size=32, part=c.part
        )
        assert c.storage == "Q8_0"
        w = np.concatenate([worth[c.layer, c.part, "wkv.weight"], worth[c.layer, c.part, "wgate.weight"]])
        assert np.array_equal(weights.w.view(torch.int16).numpy().view(np.uint16), bf16(w))
        assert np.array_equal(weights.ape.numpy(), worth[c.layer, c.part, "ape"])


def test_bf16_is_the_official_checkpoint_bit_for_bit(tmp_path):
    write(tmp_path, "BF16")
    for c in compressors(tmp_path):
        of = {leaf: t for layer, part, leaf, t in official() if (layer, part) == (c.layer, c.part)}
        weights = c.load()
        assert torch.equal(weights.w, torch.cat([of["wkv.weight"], of["wgate.weight"]]))
        assert torch.equal(weights.ape, of["ape"])
        assert torch.equal(weights.norm, of["norm.weight"].float())


def test_info_says_gguf(tmp_path):
    write(tmp_path, "Q8_0")
    result = CliRunner().invoke(app, ["info", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "names: gguf\nstored as: Q8_0\n" in result.output


def test_compress_takes_gguf_with_the_hidden_states_beside_it(tmp_path):
    write(tmp_path, "BF16")
    write_official(tmp_path / "official")
    hidden = tmp_path / "h.safetensors"
    x = torch.randn(40, MODEL.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"hidden_states": x}, hidden)
    results = []
    for folder in (tmp_path, tmp_path / "official"):
        out = tmp_path / f"{folder.name}.out.safetensors"
        words = ["compress", "--checkpoint", folder, "--layer", 1, "--hidden", hidden, "--out", out]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        results.append(out.read_bytes())
    assert results[0] == results[1]


def load(folder):
    spec = CompressorSpec.for_layer(MODEL, 1)
    return CompressorWeights.load(folder, spec, 1, hidden_size=MODEL.hidden_size)


def test_a_file_cut_anywhere_raises_our_error(tmp_path):
    write(tmp_path, "Q8_0")
    file = next(tmp_path.glob("*.gguf"))
    whole = file.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 40)]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(tmp_path)


def test_altered_headers_raise_our_error_or_load(tmp_path):
    """Counts, lengths and types of any value: no other error, no time, no memory."""
    write(tmp_path, "F16")
    file = next(tmp_path.glob("*.gguf"))
    whole = file.read_bytes()
    refused = 0
    for i in range(0, 1600, 5):
        for value in (0, 0xFF):
            file.write_bytes(whole[:i] + bytes([value]) * 3 + whole[i + 3 :])
            try:
                load(tmp_path)
            except KvCondenseError:
                refused += 1
    assert refused > 100


def test_two_models_in_a_folder_are_one_too_many(tmp_path):
    write(tmp_path, "F16")
    file = next(tmp_path.glob("*.gguf"))
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="one GGUF model in a folder"):
        load(tmp_path)
