"""info, plan and compress on model directories of every form: 46 and 64 ratios, every RoPE, text_config, DeepSeek's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints import HIDDEN, write
from kvcondense.checkpoint import compressors
from kvcondense.cli import app
from model_files import RATIOS, SMALL, made, official, tensors, without

FORMS = ["official", "flat", "vllm", "nested", "text_config", "text_config, flat", "inference"]
TOKENS = 300


def command(*words, status=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


def report(tmp_path, *words):
    file = tmp_path / "report.json"
    command(*words, "--json", file)
    return json.loads(file.read_text())


def official_names(layers):
    return lambda layer: f"layers.{layer}." if layer < layers else f"mtp.{layer - layers}."


def model(folder, form="official", name="flash", mtp=(0, 0, 0), scheme=None, **changes):
    """A directory whose checkpoint has every compressor of the list of ratios."""
    ratios = [*RATIOS[name], *mtp]
    data = made(form, official(name, **{**SMALL, "compress_ratios": ratios, **changes}))
    owners = [i for i, r in enumerate(ratios) if r > 1]
    scheme = scheme or official_names(len(RATIOS[name]))
    where = "inference/config.json" if form == "inference" else "config.json"
    return write(folder, change=lambda _: tensors(ratios, owners, scheme), config={where: data})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "csa", "hca"), [("flash", 21, 20), ("pro", 30, 31)])
def test_info_and_plan_of_a_release(form, name, csa, hca, tmp_path):
    folder = model(tmp_path / "model", form, name)
    found = report(tmp_path, "info", "--checkpoint", folder)["compressors"]
    assert len(found) == 2 * csa + hca
    assert {c["mtp"] for c in found} == {None}
    plan = report(tmp_path, "plan", "--model", folder, "--context", 4096, "--format", "bf16,bf16")
    assert [c["layers"] for c in plan["compressors"]] == ([csa, csa, hca] if name == "flash" else [hca, csa, csa])
    assert (plan["model"], plan["main_layers"], plan["mtp_compressors"]) == (
        "model",
        csa + hca + 2 * (name == "flash"),
        {},
    )


@pytest.mark.parametrize("scheme", [official_names(43), lambda layer: f"model.layers.{layer}."])
def test_compressors_of_mtp_layers(scheme, tmp_path):
    """Named as in official files, or numbered on from the main layers."""
    folder = model(tmp_path / "model", mtp=(4, 128, 0), scheme=scheme)
    text = command("info", "--checkpoint", folder)
    assert "of MTP layers: 43, 44" in text
    assert [(c.layer, c.part, c.mtp) for c in compressors(folder)][-3:] == [
        (43, "main", 0),
        (43, "indexer", 0),
        (44, "main", 1),
    ]
    text = command("plan", "--model", folder, "--context", 4096, "--format", "bf16,bf16")
    for line in ("CSA of layer 43", "indexer of layer 43", "HCA of layer 44"):
        assert f"not counted: {line}, past the 43 main ones" in " ".join(text.split())
    assert "CSA: 21 layers" in text
    hidden, out = states(tmp_path), tmp_path / "out.safetensors"
    assert "layer 43: 300 tokens" in command(
        "compress", "--checkpoint", folder, "--layer", 43, "--hidden", hidden, "--out", out
    )
    command("compress", "--checkpoint", folder, "--layer", 45, "--hidden", hidden, "--out", out, status=2)


def test_a_model_cut_to_its_first_layers(tmp_path):
    """The list of ratios is the whole model's; entries past the layers count as far as the checkpoint has them."""
    cut = lambda t: {k: v for k, v in t.items() if k.split(".")[1] in "0123"}  # noqa: E731
    data = official(**SMALL, num_hidden_layers=4)
    whole = tensors(data["compress_ratios"], [2, 3, 4], official_names(43))
    folder = write(tmp_path / "model", change=lambda _: cut(whole), config={"config.json": data})
    found = report(tmp_path, "info", "--checkpoint", folder)["compressors"]
    assert [(c["layer"], c["part"]) for c in found] == [(2, "main"), (2, "indexer"), (3, "main")]
    text = " ".join(command("plan", "--model", folder, "--context", 4096, "--format", "bf16,bf16").split())
    assert "CSA: 1 layers" in text
    assert "HCA of 19 layers, 5 to 41, past the 4 main ones" in text


def test_half_a_compressor_of_an_mtp_layer_is_named(tmp_path):
    ratios = [*RATIOS["flash"], 4]
    owners = [i for i, r in enumerate(ratios) if r > 1]
    whole = tensors(ratios, owners, official_names(43))
    folder = write(
        tmp_path / "model",
        change=lambda _: without(whole, "mtp.0.attn.indexer.compressor.ape"),
        config={"config.json": official(**SMALL, compress_ratios=ratios)},
    )
    assert "mtp.0.attn.indexer.compressor.ape" in command("info", "--checkpoint", folder, status=2)


def states(tmp_path):
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"hidden_states": x}, tmp_path / "h.safetensors")
    return tmp_path / "h.safetensors"


def test_compress_turns_alike_in_every_form(tmp_path):
    hidden, made_rows = states(tmp_path), {}
    ratios = RATIOS["flash"]
    gen = torch.Generator().manual_seed(1)
    noise = {
        k: torch.randn(v.shape, generator=gen).to(v.dtype) for k, v in tensors(ratios, [2], official_names(43)).items()
    }
    plain = official(**SMALL, rope_scaling=None)
    for form in [*FORMS, "no YaRN"]:
        data = plain if form == "no YaRN" else made(form, official(**SMALL))
        where = "inference/config.json" if form == "inference" else "config.json"
        folder = write(tmp_path / form.replace(", ", " "), change=lambda _: noise, config={where: data})
        out = tmp_path / f"{form}.safetensors"
        words = ["--layer", 2, "--hidden", hidden, "--out", out, "--format", "fp32", "--rounding", "fused"]
        command("compress", "--checkpoint", folder, *words)
        made_rows[form] = load_file(out)["main.rows"]
    other = made_rows.pop("no YaRN")
    assert all(torch.equal(rows, made_rows["official"]) for rows in made_rows.values())
    assert not torch.equal(other, made_rows["official"])


@pytest.mark.parametrize(("words", "key"), [("info --checkpoint", "linear"), ("plan --model", "linear")])
def test_commands_name_what_they_do_not_understand(words, key, tmp_path):
    data = official(**SMALL, rope_scaling={"type": "linear", "factor": 16})
    folder = write(tmp_path / "model", config={"config.json": data})
    text = " ".join(command(*words.split(), folder, status=2).split())
    assert "rope_scaling.type" in text
    assert key in text


def test_the_json_of_a_command_is_no_config_that_it_reads(tmp_path):
    folder = model(tmp_path / "model", "inference")
    file = folder / "inference" / "config.json"
    before = file.read_bytes()
    text = command("plan", "--model", folder, "--context", 64, "--json", file, status=2)
    assert "--model reads" in " ".join(text.split())
    assert file.read_bytes() == before
