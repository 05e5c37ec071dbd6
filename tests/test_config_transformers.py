"""A config.json means what transformers' DeepseekV4Config reads in it, wherever that one opens it, RoPE included."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcondense import ModelConfig, RopeTable
from kvcondense.rope_table import inverse_frequencies
from model_files import FORMS, RATES, TYPES, YARN, made, official, without

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "DeepseekV4Config"):
    pytest.skip("transformers without DeepSeek-V4", allow_module_level=True)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding  # noqa: E402

POSITIONS = torch.tensor([0, 4095, 65536, 1048575])
ELSEWHERE = ("inference", "inference, all keys", "no model_type", "nested in rope_scaling", "vllm")
"""Forms that transformers does not open, reads as those of another model, or cannot make frequencies of."""
ALONE = ("nulls", "nested, no attention_factor", "flat, mscale null")
"""With attention_factor null (or absent in a nested block) transformers scales cos and sin by 0.1 ln(factor) + 1."""


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")


def theirs(folder, data):
    """transformers' config of a file; of a multimodal one, of its text_config, which has to have the type."""
    (folder / "config.json").write_text(json.dumps(data))
    return transformers.DeepseekV4Config.from_pretrained(folder)


def readable(data):
    """The file for transformers, which takes no null for a number, and enters a text_config of its own type only where
    the file as a whole is of another."""
    if data.get("text_config"):
        return {**data, "model_type": "vlm", "text_config": {**data["text_config"], "model_type": "deepseek_v4"}}
    return {k: v for k, v in data.items() if k != "num_nextn_predict_layers" or v is not None}


def ratios_of(config):
    """Compress ratio of every layer, as transformers' layers take it."""
    return tuple(0 if t == TYPES[0] else config.compress_rates[t] for t in config.layer_types)


def assert_same(ours, config):
    n = ours.num_hidden_layers
    assert (n, ours.hidden_size) == (config.num_hidden_layers, config.hidden_size)
    assert tuple(0 if r == 1 else r for r in ours.compress_ratios[:n]) == ratios_of(config)
    assert ours.overlap_ratios == (config.compress_rates["compressed_sparse_attention"],)
    assert (ours.head_dim, ours.index_head_dim) == (config.head_dim, config.index_head_dim)
    assert ours.rope_dim == config.qk_rope_head_dim
    assert ours.eps == config.rms_norm_eps
    assert ours.max_positions == config.max_position_embeddings
    block = config.rope_parameters["compress"]
    assert ours.compress_rope_theta == block["rope_theta"]
    assert (block["rope_type"] == "yarn") == (ours.yarn is not None)
    if ours.yarn is not None:
        assert ours.yarn.factor == block["factor"]
        assert ours.yarn.original_max_positions == block["original_max_position_embeddings"]
        assert (ours.yarn.beta_fast, ours.yarn.beta_slow) == (block.get("beta_fast") or 32, block.get("beta_slow") or 1)


def assert_same_rope(ours, config, scale=1.0):
    """cos and sin in fp32 at POSITIONS.

    transformers forms 1 / (factor * theta^k), this library (1 / theta^k) / factor, as DeepSeek's code does: equal for
    powers of two, else within 2 ulp of inv, 2^-22 of it. The fp32 angle p * inv is then off by 2^-22 of itself and one
    more rounding, 2^-24, of both, and so are cos and sin at most; 2^-22 more for cos and sin themselves.
    """
    rotary = DeepseekV4RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), POSITIONS[None], layer_type="compress")
    angle = torch.outer(POSITIONS.float(), inverse_frequencies(ours))  # as RopeTable.build
    bound = 2**-22 * (1 + 1.5 * angle.double().abs())
    for mine, other in ((angle.cos(), cos[0]), (angle.sin(), sin[0])):
        assert mine.shape == other.shape
        assert ((mine.double() - other.double() / scale).abs() <= bound).all()


@st.composite
def files(draw):
    """A form of a file, with numbers that real ones do not have."""
    name = draw(st.sampled_from(["flash", "pro"]))
    layers = draw(st.integers(1, 12))
    ratios = draw(st.lists(st.sampled_from([0, 4, 128]), min_size=layers, max_size=layers + 4))
    head_dim = draw(st.sampled_from([128, 256, 512]))
    rope = {**YARN, "factor": draw(st.sampled_from([1, 2, 4, 16, 40, 2.5, 31.7]))}
    rope["original_max_position_embeddings"] = draw(st.sampled_from([512, 4096, 65536, 131072]))
    rope |= dict(
        zip(("beta_fast", "beta_slow"), draw(st.sampled_from([(32, 1), (64, 2), (16.0, 0.5), (8, 8)])), strict=True)
    )
    data = official(
        name,
        num_hidden_layers=layers,
        compress_ratios=ratios,
        num_nextn_predict_layers=draw(st.integers(0, 4)),
        head_dim=head_dim,
        qk_rope_head_dim=draw(st.sampled_from([head_dim // 8, 64, 32])),
        index_head_dim=128,
        hidden_size=draw(st.sampled_from([256, 4096])),
        compress_rope_theta=draw(st.sampled_from([160000, 40000.0, 10000, 1e6, 20.0])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_scaling=rope,
        max_position_embeddings=draw(st.sampled_from([4096, 1048576])),
    )
    form = draw(st.sampled_from([f for f in FORMS if f not in ELSEWHERE]))
    made_of = made(form, data)
    if form in ("rope_type for type", "nulls", "no betas"):  # which have a block of their own
        made_of["rope_scaling"] |= {
            k: v for k, v in rope.items() if k in ("factor", "original_max_position_embeddings")
        }
    if draw(st.booleans()) and form in ("official", "types"):
        made_of["rope_scaling"] = draw(st.sampled_from([None, {}, {"rope_type": "default"}]))
    return form, made_of


@given(files())
def test_a_file_means_what_transformers_reads_in_it(tmp_path_factory, drawn):
    form, data = drawn
    folder = tmp_path_factory.mktemp("model")
    config = theirs(folder, readable(data))
    (folder / "config.json").write_text(json.dumps(data))
    ours = ModelConfig.from_json(folder)
    assert_same(ours, config)
    scale = config_scale(config)
    assert scale == 1 or form in ALONE
    assert_same_rope(ours, config, scale)


def config_scale(config):
    return DeepseekV4RotaryEmbedding(config).compress_attention_scaling


@pytest.mark.parametrize("form", ALONE)
def test_attention_factor_null_scales_in_transformers_alone(form, tmp_path):
    """DeepSeek's code, with which the models were trained, has no such scale."""
    config = theirs(tmp_path, readable(made(form, official())))
    assert config_scale(config) == pytest.approx(1.2772588722)
    ours = ModelConfig.from_json(tmp_path)
    assert ours.yarn == ModelConfig.FLASH.yarn
    assert_same_rope(ours, config, config_scale(config))


@settings(max_examples=10)
@given(files())
def test_what_transformers_saves_is_read_back(tmp_path_factory, drawn):
    _, data = drawn
    folder = tmp_path_factory.mktemp("model")
    config = theirs(folder, readable(data))
    config.save_pretrained(folder)
    assert_same(ModelConfig.from_json(folder), config)


def test_rates_that_are_not_the_ratios_are_read_as_rates(tmp_path):
    data = made("types", official())
    data["compress_rates"] = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 4}
    config = theirs(tmp_path, data)
    ours = ModelConfig.from_json(tmp_path)
    assert_same(ours, config)
    assert ours.overlap_ratios == (8,)
    data = {**without(made("types alone", official())), "compress_rate_hca": 64}
    config = theirs(tmp_path, data)
    assert_same(ModelConfig.from_json(tmp_path), config)
    assert config.compress_rates == {**RATES, "heavily_compressed_attention": 64}


def test_the_whole_table_agrees_at_its_end(tmp_path):
    config = theirs(tmp_path, official())
    ours = ModelConfig.from_json(tmp_path)
    table = RopeTable.build(ours)
    angle = torch.outer(POSITIONS.float(), inverse_frequencies(ours))
    cos, sin = table.rows(POSITIONS)
    assert torch.equal(cos, angle.cos())
    assert torch.equal(sin, angle.sin())
    assert_same_rope(ours, config)
    assert replace(ours, name="flash", compress_ratios=ours.compress_ratios[:44]) == ModelConfig.FLASH
