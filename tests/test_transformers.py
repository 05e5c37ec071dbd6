"""Against an implementation that nobody here wrote: DeepSeek-V4 of the installed transformers, prefill and decode."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcondense import CompressorSpec, CompressorWeights, ModelConfig, PagedCache, RaggedBatch, RopeTable, StatePool
from kvcondense.api import compress
from kvcondense.spec import Rounding

transformers = pytest.importorskip("transformers", minversion="5.23")
CSA, HCA, TOKENS = 1, 2, 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small fp32 model, its checkpoint as transformers saves it, and the compressors' inputs and outputs."""
    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=16,
        num_experts_per_tok=1,
        n_routed_experts=2,
        mlp_layer_types=["moe"] * 3,
        index_n_heads=2,
        index_topk=16,
        hc_mult=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in (CSA, HCA):
            main = model.model.layers[layer].self_attn.compressor
            for c in [main, *([main.indexer] if layer == CSA else [])]:
                c.gate_proj.weight.normal_(std=0.2)
                c.kv_proj.weight.normal_(std=0.2)
                c.position_bias.normal_(std=0.3)
                c.kv_norm.weight.normal_(mean=1, std=0.2)
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    inputs = {CSA: [], HCA: []}
    for layer in inputs:
        module = model.model.layers[layer].self_attn.compressor
        module.register_forward_pre_hook(lambda m, args, layer=layer: inputs[layer].append(args[0][0].clone()))
    cache = transformers.DynamicCache(config=model.config)
    tokens = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # transformers' declared abilities: a prefill, then single tokens.
        model.model(tokens[:, :270], None, None, cache, use_cache=True)
        for t in range(270, TOKENS):
            model.model(tokens[:, t : t + 1], None, None, cache, use_cache=True)
    outputs = {
        (layer, part): cache.layers[layer].compressed_kv[name][0]
        for layer, part, name in ((CSA, "main", "compressor"), (CSA, "indexer", "indexer"), (HCA, "main", "compressor"))
    }
    return folder, {layer: torch.cat(x) for layer, x in inputs.items()}, outputs


def rename(folder, target):
    """The same checkpoint in the module names of transformers, as a state dict saved by hand has them."""
    table = {
        ".attn.": ".self_attn.",
        ".indexer.compressor.": ".compressor.indexer.",
        ".wkv.": ".kv_proj.",
        ".wgate.": ".gate_proj.",
        ".ape": ".position_bias",
        ".norm.weight": ".kv_norm.weight",
    }
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".compressor." in name:
            for old, new in table.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    save_file(renamed, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("names", ["official", "transformers"])
@pytest.mark.parametrize(("layer", "part"), [(CSA, "main"), (CSA, "indexer"), (HCA, "main")])
def test_rows_agree_to_1e_5_in_fp32(model, names, layer, part, tmp_path):
    folder, inputs, outputs = model
    if names == "transformers":
        folder = rename(folder, tmp_path)
    config = ModelConfig.from_json(folder / "config.json")
    # transformers has no Hadamard; fp32 all the way is the FUSED profile.
    spec = CompressorSpec.for_layer(config, layer, part, rounding=Rounding.FUSED)
    spec = CompressorSpec(**{**vars(spec), "rotate": False})
    weights = CompressorWeights.load(folder, spec, layer, hidden_size=config.hidden_size, part=part)
    rope = RopeTable.build(config, TOKENS)
    state = StatePool.ring(spec, 1)
    cache = PagedCache.allocate(spec.head_dim, 1, TOKENS // spec.ratio, format="fp32")
    done = 0
    for n in (131, 1, 5, 120, 43):
        batch = RaggedBatch.build([0, n], start_positions=[done], state_slots=[0], block_table=[[0]])
        compress(spec, inputs[layer][done : done + n], weights, rope, batch, state=state, cache=cache)
        done += n
    assert done == TOKENS
    theirs = outputs[layer, part]
    assert cache.rows[0].shape == theirs.shape
    assert (cache.rows[0] - theirs).abs().max() <= 1e-5
    assert theirs.abs().max() > 1
