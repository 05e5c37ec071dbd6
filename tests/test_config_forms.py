"""Every form of config.json opens and means the same; what is unknown, contradictory or no number raises by name."""

import copy
import json
import random
from dataclasses import replace

import pytest

from kvcondense import CompressorSpec, KvCondenseError, ModelConfig, RopeTable
from kvcondense.config import Yarn
from kvcondense.config.values import FACTOR
from kvcondense.rope_table import inverse_frequencies
from model_files import FORMS, MTP, RATES, RATIOS, YARN, flat, inference, made, multimodal, nested, official, without

PRESETS = {"flash": ModelConfig.FLASH, "pro": ModelConfig.PRO}


def load(tmp_path, data, name="config.json"):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return ModelConfig.from_json(file)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_model(form, name, tmp_path):
    got = load(tmp_path, made(form, official(name)))
    ratios = RATIOS[name] if form.startswith("types") and form != "types and ratios" else RATIOS[name] + MTP[name]
    assert got == replace(PRESETS[name], name=got.name, compress_ratios=tuple(ratios))
    assert (got.compressor_layers, got.mtp_compressor_layers) == (PRESETS[name].compressor_layers, ())


def test_today_s_releases_list_more_ratios_than_layers(tmp_path):
    flash, pro = (load(tmp_path, official(name)) for name in PRESETS)
    assert (len(flash.compress_ratios), len(pro.compress_ratios)) == (46, 64)
    assert not flash.owns_compressor(45)
    assert [flash.mtp_index(layer) for layer in (42, 43, 45)] == [None, 0, 2]
    with pytest.raises(KvCondenseError, match=r"layer: expected 0..45"):
        flash.owns_compressor(46)


def test_compressors_of_mtp_layers_are_reachable(tmp_path):
    config = load(tmp_path, official(compress_ratios=[*RATIOS["flash"], 4, 128, 0]))
    assert config.compressor_layers == ModelConfig.FLASH.compressor_layers
    assert config.mtp_compressor_layers == (43, 44)
    assert CompressorSpec.parts_of_layer(config, 43) == ("main", "indexer")
    assert CompressorSpec.for_layer(config, 44) == CompressorSpec.hca(config)
    with pytest.raises(KvCondenseError, match="41, 42, 43, 44"):
        CompressorSpec.for_layer(config, 45)


@pytest.mark.parametrize("form", ["official", "types and ratios", "inference", "text_config"])
def test_a_model_cut_to_its_first_layers(form, tmp_path):
    data = json.loads(json.dumps(made(form, official())).replace(": 43,", ": 4,"))
    config = load(tmp_path, data)
    assert config.num_hidden_layers == 4
    assert config.compressor_layers == (2, 3)
    assert config.mtp_compressor_layers == tuple(range(4, 43))


def test_v41_in_both_of_its_spellings(tmp_path):
    v41 = ModelConfig.V41_FLASH
    data = official(
        model_type="deepseek_v41_text", hidden_size=5120, num_hidden_layers=40, rms_norm_eps=1e-20,
        num_nextn_predict_layers=3, compress_ratios=list(v41.compress_ratios), kv_source_layer_ids=[2, 8, 14, 20],
    )  # fmt: skip
    outside = {"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}
    own = inference(data, norm_eps=1e-20, kv_source_layers=[2, 8, 14, 20])
    files = [{**outside, "text_config": data}, {**outside, "text_config": without(data, "model_type")}, own]
    assert [replace(load(tmp_path, file), name="v41") for file in files] == [v41] * 3
    with pytest.raises(KvCondenseError, match="rms_norm_eps"):
        load(tmp_path, without(own, "norm_eps"))
    with pytest.raises(KvCondenseError, match="'layer_types'"):
        load(tmp_path, {**data, "layer_types": ["sliding_attention"] * 40})
    cut = load(tmp_path, {**data, "num_hidden_layers": 4})
    assert (cut.compressor_layers, cut.mtp_compressor_layers) == ((2,), (8, 14, 20))


def test_inference_config_without_yarn(tmp_path):
    off = inference(official(), original_seq_len=0)
    assert (load(tmp_path, off).yarn, load(tmp_path, off).max_positions) == (None, 4096)
    assert load(tmp_path, {**off, "max_seq_len": 512}).max_positions == 512
    for missing in (("original_seq_len",), ("original_seq_len", "rope_factor")):
        with pytest.raises(KvCondenseError, match="original_seq_len"):
            load(tmp_path, without(off, *missing))


def test_a_folder_has_its_config_or_deepseek_s_below_it(tmp_path):
    load(tmp_path, inference(official("pro")), "model/inference/config.json")
    pro = ModelConfig.from_json(tmp_path / "model")
    assert (pro.name, pro.hidden_size) == ("model", 7168)
    load(tmp_path, official("flash"), "model/config.json")
    assert ModelConfig.from_json(str(tmp_path / "model")).hidden_size == 4096
    with pytest.raises(KvCondenseError, match="a folder without"):
        ModelConfig.from_json(tmp_path)


def test_a_byte_order_mark_and_a_key_that_stands_there_twice(tmp_path):
    text = json.dumps(official())
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert ModelConfig.from_json(tmp_path).hidden_size == 4096
    load(tmp_path, text[:-1] + ', "head_dim": 512}')
    with pytest.raises(KvCondenseError, match="'head_dim': expected one value, got 512 and 256"):
        load(tmp_path, text[:-1] + ', "head_dim": 256}')


ROPE = official()["rope_scaling"]
REFUSED = {
    "unknown key in rope_scaling": (official(rope_scaling={**ROPE, "low_freq_factor": 1}), "rope_scaling.*low_freq"),
    "unknown key in flat": (flat(official(), short_factor=[1.0]), "rope_parameters.*short_factor"),
    "unknown key in nested": (nested(official(), alpha=2), "rope_parameters.compress.*alpha"),
    "unknown label": ({**official(), "rope_parameters": {"main": {}, "compress": {}, "third": {}}}, "third"),
    "unknown rope type": (flat(official(), "longrope"), "rope_type.*longrope"),
    "main alone": ({**without(official(), "rope_scaling"), "rope_parameters": {"main": {}}}, "compress"),
    "a list for a block": (official(rope_scaling=[YARN]), "rope_scaling: expected an object"),
    "false for a block": (official(rope_scaling=False), "rope_scaling: expected an object"),
    "text for main": ({**official(), "rope_parameters": {"main": "x", "compress": {}}}, "rope_parameters.main"),
    "types disagree": (
        official(rope_scaling={**ROPE, "rope_type": "default"}),
        "rope_scaling.rope_type.*rope_scaling.type",
    ),
    "yarn without a type": (official(rope_scaling=without(ROPE, "type")), "rope_type.*beside factor"),
    "factor without yarn": (official(rope_scaling={**ROPE, "type": "default"}), "rope_scaling.factor.*default"),
    "no factor": (official(rope_scaling=without(ROPE, "factor")), "rope_scaling.factor"),
    "factor null": (flat(official(), factor=None), "rope_parameters.factor"),
    "no original length": (flat(official(), original_max_position_embeddings=None), "original_max_position"),
    "half an original length": (flat(official(), original_max_position_embeddings=0.5), "original_max_position"),
    "broken original length": (flat(official(), original_max_position_embeddings=65536.5), "whole number"),
    "original lengths disagree": (official(original_max_position_embeddings=4096), "65536"),
    "attention_factor 1.277": (flat(official(), attention_factor=1.277), "rope_parameters.attention_factor"),
    "attention_factor true": (flat(official(), attention_factor=True), "rope_parameters.attention_factor"),
    "mscale alone": (official(rope_scaling={**ROPE, "mscale": 1.0}), "rope_scaling.mscale"),
    "not truncated": (nested(official(), truncate=False), "rope_parameters.compress.truncate"),
    "yarn scaling off": (flat(official(), apply_yarn_scaling=False), "apply_yarn_scaling"),
    "betas turned round": (official(rope_scaling={**ROPE, "beta_fast": 1, "beta_slow": 32}), "beta_fast.*beta_slow"),
    "blocks disagree": (
        {**official(), "rope_parameters": {**ROPE, "factor": 8}},
        "rope_scaling: .*rope_parameters: ",
    ),
    "a block says default": (
        {**official(), "rope_parameters": {"rope_type": "default"}},
        "rope_scaling: .*rope_parameters: None",
    ),
    "inference keys disagree": (
        {**official(), "rope_factor": 40, "original_seq_len": 65536},
        "rope_scaling: .*original_seq_len: ",
    ),
    "bases disagree": (
        {**nested(official()), "compress_rope_theta": 40000},
        "compress_rope_theta: .*compress.rope_theta: ",
    ),
    "flat base alone": (without(flat(official()), "compress_rope_theta"), "compress_rope_theta"),
    "channels disagree": (flat(official(), rope_dim=32), "qk_rope_head_dim: 64; rope_parameters.rope_dim: 32"),
    "odd channels": (official(qk_rope_head_dim=63), "qk_rope_head_dim"),
    "more channels than a head": (official(qk_rope_head_dim=1024), "qk_rope_head_dim"),
    "sizes disagree": (official(dim=1024), "hidden_size: 4096; dim: 1024"),
    "few ratios": (official(compress_ratios=RATIOS["flash"][:-1]), "at least 43 entries"),
    "few types": ({**official(), "layer_types": ["sliding_attention"] * 42}, "agree|layer_types"),
    "huge ratio": (official(compress_ratios=[1 << 21] * 43), r"compress_ratios\[0\]"),
    "null ratio": (official(compress_ratios=[None] * 43), r"compress_ratios\[0\]"),
    "unknown rate": ({**official(), "compress_rates": {**RATES, "linear": 2}}, "compress_rates.*linear"),
    "rate of one": ({**official(), "compress_rate_csa": 1}, "compress_rate_csa"),
    "rates disagree": ({**official(), "compress_rates": RATES, "compress_rate_hca": 64}, "compress_rate_hca: 64"),
    "rate is not the ratio": (
        {**official(), "compress_rate_hca": 64},
        r"compress_ratios\[3\]: 128.*compress_rate_hca: 64",
    ),
    "ratios disagree with types": (
        {**made("types and ratios", official()), "compress_ratios": [0] * 43},
        r"compress_ratios\[2\]: 0; layer_types\[2\]: 4",
    ),
    "rope beside text_config": (
        {**multimodal(official()), "rope_scaling": {**YARN, "factor": 8}},
        "text_config.rope_scaling",
    ),
    "ratios beside text_config": (
        {**multimodal(made("types", official())), "compress_ratios": RATIOS["flash"]}, "text_config.compress_ratios",
    ),
    "generations disagree": (
        {**multimodal(official(), "deepseek_v41_text")},
        "text_config.model_type: 'v4.1'; model_type: 'v4'",
    ),
    "text_config of another model": (multimodal(official(), "llama"), "llama"),
    "no known type at all": ({**multimodal(official()), "architectures": ["X"], "model_type": "x"}, "model_type"),
    "text_config a list": ({**official(), "text_config": []}, "text_config"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_named(case, tmp_path):
    data, message = REFUSED[case]
    with pytest.raises(KvCondenseError, match=message) as caught:
        load(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


WRONG = {
    "zero": "0", "negative": "-1", "subnormal": "1e-310", "tiny": "1e-30", "nan": "NaN", "inf": "Infinity",
    "huge": "1e308", "digits": "9" * 4000, "too many digits": "9" * 5000, "bool": "true", "text": '"16"',
    "list": "[16]", "object": '{"a": 1}',
}  # fmt: skip
NUMBERS = {
    "hidden_size": official, "num_hidden_layers": official, "head_dim": official, "qk_rope_head_dim": official,
    "index_head_dim": official, "max_position_embeddings": official, "rms_norm_eps": official,
    "compress_rope_theta": official, "rope_factor": lambda: inference(official()),
    "original_seq_len": lambda: inference(official()), "dim": lambda: inference(official()),
    "partial_rotary_factor": lambda: nested(official()),
}  # fmt: skip
ALLOWED = {("original_seq_len", "zero"), ("rms_norm_eps", "tiny")}
"""No YaRN, and an eps between V4.1's 1e-20 and the least normal fp32."""


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_are_bounded(wrong, tmp_path):
    cases = [(key, form(), key) for key, form in NUMBERS.items() if (key, wrong) not in ALLOWED]
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        cases.append((key, flat(official(), **{key: "X"}), f"rope_parameters.{key}"))
        cases.append((key, nested(official(), **{key: "X"}), f"rope_parameters.compress.{key}"))
        cases.append((key, official(rope_scaling={**YARN, key: "X"}), f"rope_scaling.{key}"))
    for key, data, name in cases:
        data = copy.deepcopy(data)
        if key in data:
            data[key] = "X"
        with pytest.raises(KvCondenseError) as caught:
            load(tmp_path, json.dumps(data).replace('"X"', WRONG[wrong]))
        message = str(caught.value)
        assert message.startswith(str(tmp_path / "config.json")), message
        # json itself refuses integers of more than 4300 digits, and knows no key.
        assert name.rpartition(".")[2] in message or wrong == "too many digits", (name, message)
        assert len(message) < 2000


@pytest.mark.parametrize("value", [0, -1.0, 1e-310, float("nan"), float("inf"), True, "16", None, 10**400])
def test_a_yarn_made_by_hand_is_bounded(value):
    for field in ("factor", "original_max_positions", "beta_fast", "beta_slow"):
        with pytest.raises(KvCondenseError, match=field):
            replace(ModelConfig.FLASH.yarn, **{field: value})


def test_tables_are_finite_at_the_bounds():
    for factor in FACTOR:
        for theta in (2.0, 1e18):
            config = replace(ModelConfig.FLASH, yarn=Yarn(factor, 65536, 32.0, 1.0), compress_rope_theta=theta)
            assert RopeTable.build(config, 4).cos.isfinite().all()
            assert (inverse_frequencies(config) > 0).all()


@pytest.mark.parametrize("depth", [400, 980, 100_000])
def test_depth_is_no_way_in(depth, tmp_path):
    deep = "[" * depth + "]" * depth
    for text in (
        deep,
        json.dumps(official(rope_scaling="X")).replace('"X"', deep),
        json.dumps({**multimodal(official()), "rope_scaling": "X"}).replace('"X"', deep),
        json.dumps(official(head_dim="X", dim="X")).replace('"X"', deep),
        '{"a": X, "a": X}'.replace("X", deep),
    ):
        with pytest.raises(KvCondenseError) as caught:
            load(tmp_path, text)
        assert len(str(caught.value)) < 2000


def parts(value, path=()):
    """Every place in a file, two of a list: most of it would be ratios."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from parts(part, (*path, key))


def mutated(rng, data):
    """One to three changes: a value of another kind, a key that is gone, doubled or moved, a list cut or grown."""
    values = [
        0, -1, 1, 2, 3, 7, 1e-310, 1e308, float("nan"), float("inf"), -0.0, 10**30, True, False, None, "", "yarn",
        "default", "x" * 3000, [], {}, [[]], {"": {}}, [1] * 43, ["sliding_attention"] * 43, {"compress": {}},
        {"main": {}, "compress": dict(YARN)}, dict(YARN), 0.5, 43.0, "4",
    ]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        place = rng.choice(list(parts(data)))
        holder = data
        for key in place[:-1]:
            holder = holder[key]
        key, what = place[-1], rng.randrange(5)
        if what == 0 or isinstance(holder, list):
            holder[key] = copy.deepcopy(rng.choice(values))
        elif what == 1:
            del holder[key]
        elif what == 2:
            holder[rng.choice(["unknown", "factor", "type", "rope_type", "compress", "dim", "text_config"])] = holder[
                key
            ]
        elif what == 3 and isinstance(holder[key], list):
            holder[key] = rng.choice([holder[key][: rng.randint(0, 44)], holder[key] * 2, tuple(holder[key])])
        else:
            other = rng.choice(list(data))
            holder[key] = copy.deepcopy(data[other])
        if not data:
            return data
    return data


def test_two_thousand_mutations_raise_nothing_else(tmp_path, monkeypatch):
    rng, opened, messages = random.Random(0), 0, {}
    file, texts = tmp_path / "config.json", []
    for i in range(2000):
        data = mutated(rng, made(rng.choice(list(FORMS)), official(rng.choice(["flash", "pro"]))))
        text = json.dumps(data)
        if i % 10 == 0:  # also what is no JSON any more
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(['"', "{", "]", ",", "\x00", "1", "e9"]) + text[at + 1 :]
        texts.append(text)
    monkeypatch.setattr(
        "kvcondense.config.reader.read_text", lambda *_: texts[-1]
    )  # a disk takes longer than all the rest
    file.touch()
    while texts:
        try:
            config = ModelConfig.from_json(file)
        except KvCondenseError as error:
            messages[str(error)] = type(error)
        else:
            opened += 1
            assert inverse_frequencies(config).isfinite().all()
        texts.pop()
    assert 200 < opened < 1200
    assert len(set(messages.values())) >= 5
    assert all(m.startswith(str(file)) and len(m) < 3000 for m in messages)
