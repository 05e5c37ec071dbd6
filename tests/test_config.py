"""ModelConfig and CompressorSpec: published constants, both spellings of config.json, and what is refused."""

import json
from dataclasses import replace

import pytest

from checkpoints import CONFIG as TINY
from kvcondense import CompressorSpec, KvCondenseError, ModelConfig

FLASH_JSON = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "rms_norm_eps": 1e-6,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": TINY["rope_scaling"],
    "max_position_embeddings": 1048576,
}


def load(tmp_path, data):
    folder = tmp_path / "flash"
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return ModelConfig.from_json(file)


def without(key):
    return {k: v for k, v in FLASH_JSON.items() if k != key}


@pytest.mark.parametrize(
    ("config", "csa", "hca"), [(ModelConfig.FLASH, 21, 20), (ModelConfig.PRO, 30, 31), (ModelConfig.DEMO, 3, 2)]
)
def test_published_layer_counts(config, csa, hca):
    ratios = [config.compress_ratios[i] for i in config.compressor_layers]
    assert (ratios.count(4), ratios.count(128)) == (csa, hca)
    assert len(config.compress_ratios) == config.num_hidden_layers + 1
    assert max(config.compressor_layers) < config.num_hidden_layers


def test_v41_owns_four_compressors():
    config = ModelConfig.V41_FLASH
    assert config.compressor_layers == (2, 8, 14, 20)
    ratio2, ratio1 = CompressorSpec.for_layer(config, 8), CompressorSpec.for_layer(config, 20)
    assert (ratio2.ratio, ratio2.has_gate, ratio2.has_ape, ratio2.overlap, ratio2.eps) == (2, True, False, False, 1e-20)
    assert (ratio1.ratio, ratio1.has_gate, ratio1.projected) == (1, False, 512)
    with pytest.raises(KvCondenseError, match="a layer that owns a compressor"):
        CompressorSpec.for_layer(config, 3)
    for build in (CompressorSpec.csa, CompressorSpec.hca, CompressorSpec.indexer):
        with pytest.raises(KvCondenseError, match="config"):
            build(config)


def test_official_spelling_is_the_preset(tmp_path):
    assert load(tmp_path, FLASH_JSON) == ModelConfig.FLASH


def test_v41_spelling_is_the_preset(tmp_path):
    text = {
        **FLASH_JSON,
        "model_type": "deepseek_v41_text",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_nextn_predict_layers": 3,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
        "kv_source_layer_ids": [2, 8, 14, 20],
        "rms_norm_eps": 1e-20,
    }
    config = load(tmp_path, {"model_type": "deepseek_v41", "text_config": text})
    assert replace(config, name="v41") == ModelConfig.V41_FLASH


def test_transformers_spelling_is_the_preset(tmp_path):
    transformers = pytest.importorskip("transformers")
    c = transformers.DeepseekV4Config(
        layer_types=["sliding_attention"] * 2
        + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
        + ["compressed_sparse_attention"],
        rope_parameters={"rope_type": "yarn", **{k: v for k, v in FLASH_JSON["rope_scaling"].items() if k != "type"}},
    )
    c.save_pretrained(tmp_path)
    config = ModelConfig.from_json(tmp_path / "config.json")
    flash = replace(ModelConfig.FLASH, name=config.name, compress_ratios=ModelConfig.FLASH.compress_ratios[:43])
    assert config == flash


def test_derived_integers_of_flash():
    csa, hca, indexer = (f(ModelConfig.FLASH) for f in (CompressorSpec.csa, CompressorSpec.hca, CompressorSpec.indexer))
    assert (csa.window, csa.width, csa.state_dim, csa.overlap, csa.rotate) == (8, 1024, 2048, True, False)
    assert (hca.window, hca.width, hca.state_dim, hca.overlap, hca.rotate) == (128, 512, 1024, False, False)
    assert (indexer.window, indexer.width, indexer.head_dim, indexer.rotate) == (8, 256, 128, True)
    assert [csa.live_start(n) for n in (0, 3, 4, 7, 8, 11)] == [0, 0, 0, 0, 4, 4]
    assert [hca.live_start(n) for n in (0, 127, 128, 255, 256)] == [0, 0, 128, 128, 256]
    assert [csa.visible_rows(n) for n in (0, 3, 4, 1 << 20)] == [0, 0, 1, 1 << 18]
    assert hash(csa) == hash(CompressorSpec.csa(ModelConfig.FLASH))


@pytest.mark.parametrize("ratio", [0, 1])
def test_v4_ratio_zero_and_one_mean_none(ratio):
    config = replace(ModelConfig.DEMO, compress_ratios=(ratio, *ModelConfig.DEMO.compress_ratios[1:]))
    assert not config.owns_compressor(0)
    assert not config.owns_compressor(7)  # the MTP entry


BAD = {
    "not json": ("{", "JSON"),
    "a list": ("[1]", "JSON object"),
    "other model": ({**FLASH_JSON, "model_type": "llama"}, "model_type"),
    "no model_type": (without("model_type"), "model_type"),
    "no eps": (without("rms_norm_eps"), "rms_norm_eps"),
    "no theta": (without("compress_rope_theta"), "RoPE base"),
    "no ratios": (without("compress_ratios"), "compress_ratios or layer_types"),
    "no head_dim": (without("head_dim"), "head_dim"),
    "no rope dim": (without("qk_rope_head_dim"), "qk_rope_head_dim"),
    "no positions": (without("max_position_embeddings"), "max_position_embeddings"),
    "short ratios": ({**FLASH_JSON, "compress_ratios": [4, 128]}, "43 entries"),
    "negative ratio": ({**FLASH_JSON, "compress_ratios": [-4, *[0] * 42]}, r"compress_ratios\[0\]"),
    "float ratio": ({**FLASH_JSON, "compress_ratios": [4.0, *[0] * 42]}, r"compress_ratios\[0\]"),
    "bool ratio": ({**FLASH_JSON, "compress_ratios": [True, *[0] * 42]}, r"compress_ratios\[0\]"),
    "ratios no list": ({**FLASH_JSON, "compress_ratios": "4,128"}, "a list"),
    "text eps": ({**FLASH_JSON, "rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "zero eps": ({**FLASH_JSON, "rms_norm_eps": 0.0}, "eps"),
    "nan theta": ({**FLASH_JSON, "compress_rope_theta": float("nan")}, "compress_rope_theta"),
    "linear rope": ({**FLASH_JSON, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
    "yarn without beta": ({**FLASH_JSON, "rope_scaling": {"type": "yarn", "factor": 2}}, "original_max"),
    "mscale": (
        {**FLASH_JSON, "rope_scaling": {**FLASH_JSON["rope_scaling"], "attention_factor": 1.28}},
        "attention_factor",
    ),
    "rope spellings disagree": ({**FLASH_JSON, "partial_rotary_factor": 0.25}, "spellings that agree"),
    "thetas disagree": (
        {**FLASH_JSON, "rope_parameters": {"compress": {"rope_theta": 1e4, "rope_type": "default"}}},
        "spellings that agree",
    ),
    "ratios disagree with types": (
        {**FLASH_JSON, "layer_types": ["sliding_attention"] * 43, "compress_rates": {}},
        "agree",
    ),
    "unknown layer type": (
        {**without("compress_ratios"), "layer_types": ["linear"] * 43, "compress_rates": {}},
        r"layer_types\[0\]",
    ),
    "huge hidden text": ({**FLASH_JSON, "hidden_size": "4096"}, "hidden_size"),
    "v41 without sources": ({**FLASH_JSON, "model_type": "deepseek_v41"}, "kv_source_layer_ids"),
    "v41 source without ratio": (
        {**FLASH_JSON, "model_type": "deepseek_v41", "kv_source_layer_ids": [0]},
        "kv_source_layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config_is_refused_by_name(case, tmp_path):
    data, message = BAD[case]
    with pytest.raises(KvCondenseError, match=message):
        load(tmp_path, data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 0), ("ratio", 4.0), ("ratio", True), ("head_dim", 0), ("rope_dim", 3), ("rope_dim", 128),
        ("rope_dim", -2), ("eps", 0.0), ("eps", -1e-6), ("eps", float("nan")), ("eps", 1), ("rounding", "fused"),
    ],
)  # fmt: skip
def test_bad_spec_is_refused_by_name(field, value):
    good = {"ratio": 4, "head_dim": 64, "eps": 1e-6, "rope_dim": 16}
    with pytest.raises(KvCondenseError, match=field):
        CompressorSpec(**{**good, field: value})


def test_rotate_needs_a_power_of_two():
    with pytest.raises(KvCondenseError, match="power of two"):
        CompressorSpec(ratio=4, head_dim=48, eps=1e-6, rope_dim=16, rotate=True)


def test_eps_has_no_default():
    with pytest.raises(TypeError, match="eps"):
        CompressorSpec(ratio=4, head_dim=64, rope_dim=16)


@pytest.mark.parametrize(("layer", "part"), [(0, "main"), (3, "indexer"), (99, "main"), (-1, "main"), (2, "query")])
def test_for_layer_refuses_what_a_layer_does_not_have(layer, part):
    with pytest.raises(KvCondenseError, match="layer|part"):
        CompressorSpec.for_layer(ModelConfig.FLASH, layer, part)
