"""Weights in every published form: FP8 under three names of scales, MLX's groups, each beside numpy; what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import weight_forms as forms
from checkpoints import CONFIG, MODEL, SCHEMES, tensors, write
from kvcondense import CompressorSpec, CompressorWeights
from kvcondense.checkpoint import compressors
from kvcondense.cli import app
from kvcondense.errors import CheckpointError
from kvcondense.weightfiles.files import StoredTensor
from kvcondense.weightfiles.settings import Settings
from kvcondense.weightfiles.storage import storage_of

SCALES = ["scale", "weight_scale", "weight_scale_inv"]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8]
BASE = "layers.1.attn.compressor."


def stored(folder, made, scheme="official", **config):
    """A folder with ``made`` in place of the matrices, and its config.json."""
    heads = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "hidden_size": forms.MODEL.hidden_size}
    content = {"config.json": {**CONFIG, **heads, **config}}
    return write(folder, scheme, change=lambda _: made, model=forms.MODEL, config=content)


def plain(scheme="official"):
    return tensors(scheme, model=forms.MODEL)


def expected(worth, scheme, layer, part):
    base = SCHEMES[scheme][0 if part == "main" else 1].format(layer)
    return np.concatenate([w for name, w in worth.items() if name.startswith(base) and "." not in name[len(base) : -7]])


def check(folder, worth, scheme="official"):
    """Every compressor is what numpy says, by both ways in."""
    found = list(compressors(folder))
    assert len(found) == 5
    for c in found:
        weights = CompressorWeights.load(folder, c.spec, c.layer, hidden_size=c.hidden_size, part=c.part)
        want = expected(worth, scheme, c.layer, c.part)
        assert np.array_equal(forms.bits_of(weights), want)
        assert np.array_equal(forms.bits_of(c.load()), want)
    return found


def load(folder, layer=1, part="main"):
    spec = CompressorSpec.for_layer(forms.MODEL, layer, part)
    return CompressorWeights.load(folder, spec, layer, hidden_size=forms.MODEL.hidden_size, part=part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCALES)
def test_fp8_is_the_code_times_the_scale_of_its_block(tmp_path, kind, dtype):
    made, worth = forms.fp8(plain(), kind, dtype)
    assert made[BASE + "wkv." + kind].shape == (8, 3)
    found = check(stored(tmp_path, made), worth)
    assert {c.storage.partition(" (")[0] for c in found} == {"F8_E4M3, a scale per 128x128"}
    assert f"({kind}, " in found[0].storage


def renamed(official, leaves):
    """A compressor's official tensors in FP8 under other leaves, with weight_scale_inv."""
    stems = [leaf.removesuffix("weight") for leaf in leaves[:-2]]
    out = {leaves[-2]: official["ape"], leaves[-1]: official["norm.weight"]}
    if len(stems) == 1:
        halves = [official[f"{role}.weight"].view(torch.uint8) for role in ("wkv", "wgate")]
        scales = torch.cat([official["wkv.scale"], official["wgate.scale"]])
        return {**out, leaves[0]: torch.cat(halves).view(torch.float8_e4m3fn), stems[0] + "weight_scale_inv": scales}
    for stem, role in zip(stems, ("wkv", "wgate"), strict=True):
        out |= {stem + "weight": official[f"{role}.weight"], stem + "weight_scale_inv": official[f"{role}.scale"]}
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_in_every_scheme_is_the_official_one_bit_for_bit(tmp_path, scheme):
    made, worth = forms.fp8(plain())
    out = {}
    for ours, official in zip(SCHEMES[scheme][:2], SCHEMES["official"][:2], strict=True):
        for layer in (1, 2, 3):
            start = official.format(layer)
            of = {name.removeprefix(start): t for name, t in made.items() if name.startswith(start)}
            if of:
                out |= {ours.format(layer) + leaf: t for leaf, t in renamed(of, SCHEMES[scheme][2].split()).items()}
    found = list(compressors(stored(tmp_path, out, scheme)))
    assert [(c.layer, c.part) for c in found] == [(1, "main"), (1, "indexer"), (2, "main"), (3, "main"), (3, "indexer")]
    for c in found:
        assert np.array_equal(forms.bits_of(c.load()), expected(worth, "official", c.layer, c.part))


@pytest.mark.parametrize(
    ("block", "config", "text"),
    [
        ((64, 64), {}, "a scale per 64x64"),
        ((32, 32), {"quantization_config": {"weight_block_size": [32, 32]}}, "a scale per 32x32"),
        ((96, 80), {"quantization_config": {"weight_block_size": [96, 80]}}, "a scale per 96x80"),
        ("channel", {}, "a scale per 1x320"),
        ("tensor", {}, "one scale"),
    ],
)
def test_other_blocks(tmp_path, block, config, text):
    made, worth = forms.fp8(plain(), "weight_scale", block=block)
    found = check(stored(tmp_path, made, **config), worth)
    assert all(text in c.storage for c in found)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (1024, 32), (16, 64), (1024, 1), (1, 1), (8,), (8, 32, 1)])
def test_scales_of_flash_base(shape):
    """[8, 32] for [1024, 4096]; other shapes are another square block, a row's, all's, or none, transposed ones too."""
    weight = StoredTensor("wkv.weight", Path("model.safetensors"), (1024, 4096), "F8_E4M3", 1 << 22)
    scale = StoredTensor("wkv.scale", Path("model.safetensors"), shape, "F8_E8M0", 256)
    known = {(8, 32): "128x128", (16, 64): "64x64", (1024, 1): "1x4096", (1, 1): "4096x4096"}
    tensors = {"wkv": weight, "wkv.scale": scale}
    if shape in known:
        assert storage_of(tensors, "wkv", (1024, 4096), Settings()).text.startswith(
            f"F8_E4M3, a scale per {known[shape]} "
        )
        return
    with pytest.raises(CheckpointError, match=r"wkv.scale: expected shape \[8, 32\]"):
        storage_of(tensors, "wkv", (1024, 4096), Settings())


def with_value(kind, value):
    def change(made):
        scale = made[BASE + f"wkv.{kind}"].clone()
        scale[1, 2] = value
        return {**made, BASE + f"wkv.{kind}": scale}

    return change


def without(name):
    return lambda made: {k: v for k, v in made.items() if k != name}


def to(name, value):
    return lambda made: {**made, name: value(made[BASE + "wkv.scale"]) if callable(value) else value}


WRONG = {
    "no scale": (without(BASE + "wkv.scale"), BASE + "wkv.scale", "a missing tensor"),
    "NaN": (with_value("scale", float("nan")), BASE + "wkv.scale", "NaN or infinity"),
    "infinity": (with_value("scale", float("inf")), BASE + "wkv.scale", "NaN or infinity"),
    "too large": (with_value("scale", 3e38), BASE + "wkv.weight", "NaN or infinity"),
    "transposed": (to(BASE + "wkv.scale", lambda s: s.T.contiguous()), BASE + "wkv.scale", r"shape \[3, 8\]"),
    "one short": (to(BASE + "wkv.scale", lambda s: s[:7].contiguous()), BASE + "wkv.scale", r"shape \[7, 3\]"),
    "integers": (to(BASE + "wkv.scale", lambda s: s.to(torch.int32)), BASE + "wkv.scale", "I32"),
    "two scales": (to(BASE + "wkv.weight_scale", lambda s: s.clone()), BASE + "wkv.weight_scale", "an extra tensor"),
    "plain, with one": (to(BASE + "wkv.weight", torch.ones(1024, 320)), BASE + "wkv.scale", "an extra tensor"),
    "e5m2": (to(BASE + "wkv.weight", torch.ones(1024, 320).to(torch.float8_e5m2)), BASE + "wkv.weight", "F8_E5M2"),
    "fnuz": (to(BASE + "wkv.weight", torch.ones(1024, 320).to(torch.float8_e4m3fnuz)), BASE + "wkv.weight", "FNUZ"),
    "FP8 ape": (to(BASE + "ape", torch.ones(4, 1024).to(torch.float8_e4m3fn)), BASE + "ape", "F8_E4M3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_scales_are_named(tmp_path, case):
    change, name, message = WRONG[case]
    folder = stored(tmp_path, change(forms.fp8(plain())[0]))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert caught.value.argument == name


def test_255_is_no_scale(tmp_path):
    made, _ = forms.fp8(plain(), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="wkv.scale: expected finite"):
        load(stored(tmp_path, with_value("scale", 255)(made)))


@pytest.mark.parametrize("block", [[64, 64], [128], "128", [0, 128], {"rows": 128}, [128, True]])
def test_a_block_size_that_disagrees_or_is_none(tmp_path, block):
    folder = stored(tmp_path, forms.fp8(plain())[0], quantization_config={"weight_block_size": block})
    with pytest.raises(CheckpointError, match="weight_block_size|config.json"):
        load(folder)


def test_a_block_across_both_halves_of_a_fused_matrix_is_refused(tmp_path):
    """Scales of one half after the other, or of the whole: their number may be the same."""
    made, _ = forms.fp8(tensors("vllm", model=forms.MODEL), block=(192, 128))
    folder = stored(tmp_path, made, "vllm", quantization_config={"weight_block_size": [192, 128]})
    with pytest.raises(CheckpointError, match="whole number of blocks of 192 rows"):
        load(folder)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx_is_the_code_times_the_scale_plus_the_bias_of_its_group(tmp_path, bits):
    made, worth = forms.mlx(plain("saved by transformers"), bits)
    folder = stored(tmp_path, made, quantization={"group_size": 64, "bits": bits})
    found = check(folder, worth, "saved by transformers")
    assert {(c.scheme, c.prefix, c.storage) for c in found} == {
        ("official", "model.", f"MLX {bits}-bit, groups of 64 (F16)")
    }


def test_mlx_modules_of_their_own(tmp_path):
    made, worth = forms.mlx(plain(), 4, own=[("1.attn.compressor.wkv.weight", 8)])
    own = {BASE + "wkv": {"group_size": 64, "bits": 8}, "head": False}
    found = check(stored(tmp_path, made, quantization={"group_size": 64, "bits": 4, "mode": "affine", **own}), worth)
    assert found[0].storage == "MLX 8-bit, groups of 64 (F16) and MLX 4-bit, groups of 64 (F16)"


MLX_WRONG = {
    "no biases": (without(BASE + "wkv.biases"), {}, BASE + "wkv.biases"),
    "no scales": (without(BASE + "wkv.scales"), {}, BASE + "wkv.scales"),
    "neither": (lambda m: without(BASE + "wkv.biases")(without(BASE + "wkv.scales")(m)), {}, BASE + "wkv.scales"),
    "nothing in config.json": (lambda m: m, {"quantization": None}, BASE + "wkv"),
    "mxfp4": (lambda m: m, {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, BASE + "wkv"),
    "other bits": (lambda m: m, {"quantization": {"group_size": 64, "bits": 8}}, BASE + "wkv.weight"),
    "bits 7": (lambda m: m, {"quantization": {"group_size": 64, "bits": 7}}, BASE + "wkv"),
    "groups of text": (lambda m: m, {"quantization": {"group_size": "64", "bits": 4}}, BASE + "wkv"),
    "other groups": (lambda m: m, {"quantization": {"group_size": 32, "bits": 4}}, BASE + "wkv.scales"),
}


@pytest.mark.parametrize("case", MLX_WRONG)
def test_wrong_mlx_matrices_are_named(tmp_path, case):
    change, config, name = MLX_WRONG[case]
    made, _ = forms.mlx(plain())
    folder = stored(tmp_path, change(made), **{"quantization": {"group_size": 64, "bits": 4}, **config})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.argument == name


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx_of_the_package_itself(tmp_path, bits):
    mx = pytest.importorskip("mlx.core")
    made, worth = dict(plain()), {}
    for name, weight in plain().items():
        if forms.is_matrix(name):
            w, scales, biases = mx.quantize(mx.array(weight.float().numpy()), group_size=64, bits=bits)
            stem = name.removesuffix("weight")
            arrays = {name: w, stem + "scales": scales, stem + "biases": biases}
            made |= {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
            worth[name] = forms.bf16(np.array(mx.dequantize(w, scales, biases, group_size=64, bits=bits)))
    folder = stored(tmp_path, made, quantization={"group_size": 64, "bits": bits})
    for c in compressors(folder):
        got, want = (
            x.view(np.int16).astype(np.int64)
            for x in (forms.bits_of(c.load()), expected(worth, "official", c.layer, c.part))
        )
        assert abs(got - want).max() <= 1  # it may fuse the product and the sum
        assert (got == want).mean() > 0.999


def command(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


def compressed(tmp_path, folder, name):
    hidden, out = tmp_path / "h.safetensors", tmp_path / f"{name}.safetensors"
    x = torch.randn(40, forms.MODEL.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
    save_file({"hidden_states": x}, hidden)
    command("compress", "--checkpoint", folder, "--layer", 1, "--hidden", hidden, "--out", out)
    return out.read_bytes()


@pytest.mark.parametrize("kind", SCALES)
def test_info_and_compress_take_fp8(tmp_path, kind):
    made, _ = forms.fp8(plain(), kind)
    folder, report = stored(tmp_path / "model", made), tmp_path / "report.json"
    text = command("info", "--checkpoint", folder, "--json", report)
    assert "names: official\n" in text
    assert f"stored as: F8_E4M3, a scale per 128x128 ({kind}, F32)\n" in text
    found = json.loads(report.read_text())["compressors"]
    assert {(c["scheme"], c["prefix"]) for c in found} == {("official", "")}
    assert all(c["storage"].startswith("F8_E4M3") and f"wkv.{kind}" in c["tensors"] for c in found)
    decoded = {**made, **{n: load_bf16(folder, n) for n in made if forms.is_matrix(n)}}
    decoded = {n: t for n, t in decoded.items() if not n.endswith(kind)}
    same = stored(tmp_path / "decoded", decoded)
    assert compressed(tmp_path, folder, "fp8") == compressed(tmp_path, same, "bf16")


def test_compress_takes_mlx(tmp_path):
    made, _ = forms.mlx(plain())
    folder = stored(tmp_path / "model", made, quantization={"group_size": 64, "bits": 4})
    assert "stored as: MLX 4-bit, groups of 64 (F16)\n" in command("info", "--checkpoint", folder)
    decoded = {n: load_bf16(folder, n) if forms.is_matrix(n) else t for n, t in made.items()}
    decoded = {n: t for n, t in decoded.items() if not n.endswith(("scales", "biases"))}
    same = stored(tmp_path / "decoded", decoded)
    assert compressed(tmp_path, folder, "mlx") == compressed(tmp_path, same, "bf16")


def load_bf16(folder, name):
    layer, part = int(name.split(".")[1]), "indexer" if "indexer" in name else "main"
    halves = load(folder, layer, part).w.chunk(2)
    return halves["wgate" in name].clone()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_info_and_compress_take_every_scheme(tmp_path, scheme):
    official, folder = stored(tmp_path / "official", plain()), stored(tmp_path / "model", plain(scheme), scheme)
    text = command("info", "--checkpoint", folder)
    prefix = SCHEMES[scheme][0].partition("layers.")[0]
    known = {"saved by transformers": "official"}.get(scheme, scheme.partition(",")[0])
    assert f"names: {known}{f', prefix {prefix}' if prefix else ''}\n" in text
    assert "stored as: BF16\n" in text
    assert compressed(tmp_path, folder, "one") == compressed(tmp_path, official, "other")


def test_automodels_mtp_layers(tmp_path):
    """mtp.layers.0 is the first MTP layer, not layer 0 behind a prefix."""
    made = {n.replace("model.layers.3.", "mtp.layers.0."): t for n, t in tensors("automodel").items()}
    config = {**CONFIG, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 4]}
    found = list(compressors(write(tmp_path, "automodel", change=lambda _: made, config={"config.json": config})))
    assert [(c.layer, c.part, c.mtp, c.prefix) for c in found][-2:] == [(3, "main", 0, ""), (3, "indexer", 0, "")]


def test_an_unknown_scheme_is_shown(tmp_path):
    names = [f"blocks.{i}.compressor.w{k}.weight" for i in range(1, 9) for k in ("kv", "gate")]
    folder = write(tmp_path, change=lambda _: {name: torch.ones(2, 2) for name in names})
    text = " ".join(command("info", "--checkpoint", folder, status=2).split())
    assert "a known scheme of names: official, transformers, vllm" in text
    assert "blocks.1.compressor.wkv.weight" in text.replace("compressor. ", "compressor.")
    assert "and 10 more" in text


def test_one_leaf_of_another_name_is_shown(tmp_path):
    """A scheme that is known but for a layer."""
    made = {n: t for n, t in tensors("tensorrt-llm").items() if ".1." not in n}
    made["model.layers.1.self_attn.compressor.both.weight"] = torch.ones(2, 2)
    text = command("info", "--checkpoint", write(tmp_path, change=lambda _: made), status=2)
    assert "an unknown scheme: model.layers.1.self_attn.compressor.both.weight" in " ".join(text.split())
    assert " blk.1.attn_compressor_kv.weight" in " ".join(text.split())


def test_no_compressor_at_all(tmp_path):
    folder = write(tmp_path, change=lambda _: {"embed.weight": torch.ones(2, 2)})
    assert "no name that looks like one" in " ".join(command("info", "--checkpoint", folder, status=2).split())


def test_two_prefixes_are_one_too_many(tmp_path):
    both = {**tensors("official"), **tensors("vllm, multimodal")}
    folder = write(tmp_path, change=lambda _: both)
    spec = CompressorSpec.for_layer(MODEL, 1)
    with pytest.raises(CheckpointError, match="one prefix before layers.N, got '', 'language_model.model.'"):
        CompressorWeights.load(folder, spec, 1, hidden_size=MODEL.hidden_size)
