"""Cache files in every format: resumed, converted, tampered with; and the command that converts them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sealing
from checkpoints import HIDDEN, WIDE, run, write
from kvcondense import KvCondenseError
from kvcondense.cachefile import CacheFile, first_difference
from kvcondense.cli import app
from kvcondense.files import sealed
from kvcondense.formats import FORMATS
from kvcondense.stream import HiddenFile, Sequence

TOKENS = 300
CSA, HCA = 1, 2
MAIN = [n for n, f in FORMATS.items() if f.head_dim in (None, 512)]
INDEXER = [n for n, f in FORMATS.items() if f.head_dim in (None, 128)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("wide"), model=WIDE)


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    file = tmp_path_factory.mktemp("hidden") / "h.safetensors"
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"hidden_states": x}, file)
    return file


def options(main="bf16", indexer="bf16"):
    name = next((n for n in (main, indexer) if FORMATS[n].tensor_scale), None)
    scale = {} if name is None else {"tensor_scale": 22.4 / FORMATS[name].scaled.element.largest}  # 0.05 of e4m3
    return {"format": main, "indexer_format": indexer, **scale}


@pytest.fixture(scope="module")
def plain(model, hidden, tmp_path_factory):
    return {layer: run(model, hidden, tmp_path_factory.mktemp("plain") / "bf16", layer) for layer in (CSA, HCA)}


PAIRS = [(CSA, m, "bf16") for m in MAIN] + [(CSA, "bf16", i) for i in INDEXER] + [(HCA, m, "bf16") for m in MAIN]


@pytest.mark.parametrize(("layer", "main", "indexer"), PAIRS, ids=lambda v: str(v))
def test_chunks_interruptions_and_conversion_give_the_same_file(model, hidden, plain, tmp_path, layer, main, indexer):
    chosen = options(main, indexer)
    whole = run(model, hidden, tmp_path / "whole", layer, chunk=TOKENS, **chosen).read_bytes()
    assert run(model, hidden, tmp_path / "cut", layer, 7, (1, 130, 2), **chosen).read_bytes() == whole
    wanted = {"main": main} | ({"indexer": indexer} if layer == CSA else {})
    converted = CacheFile.load(plain[layer]).convert(wanted, tensor_scale=chosen.get("tensor_scale"))
    converted.save(tmp_path / "converted")
    if main == "fp32" or indexer == "fp32":  # bits that bf16 does not have
        assert "bf16" in str(converted.header())
    else:
        assert (tmp_path / "converted").read_bytes() == whole
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("main", [n for n in MAIN if n != "bf16"])
def test_converting_back_keeps_the_values_and_says_what_happened(model, hidden, tmp_path, main):
    chosen = options(main)
    out = run(model, hidden, tmp_path / "out", **chosen)
    file = CacheFile.load(out)
    back = file.convert({"main": "fp32"})
    slots = torch.arange(TOKENS // 4)
    assert torch.equal(back.parts["main"].cache.decode_rows(slots), file.parts["main"].cache.decode_rows(slots))
    assert back.parts["main"].converted_from == (() if main == "fp32" else (main,))
    assert back.parts["indexer"] is file.parts["indexer"]
    back.save(tmp_path / "back")
    again = CacheFile.load(tmp_path / "back")
    assert again.header() == back.header()
    twice = again.convert({"main": "bf16"})
    assert twice.parts["main"].converted_from == back.parts["main"].converted_from
    if main != "fp32":
        with pytest.raises(KvCondenseError, match=r"parts\.main\.converted_from"):
            Sequence.start(model, CSA, format="fp32", indexer_format="bf16").resume(tmp_path / "back")


def test_every_lossy_step_is_recorded(model, hidden, tmp_path):
    file = CacheFile.load(run(model, hidden, tmp_path / "out", HCA, **options("fp8_model1")))
    twice = file.convert({"main": "fp4_v41"}).convert({"main": "fp4_v41"}).convert({"main": "fp32"})
    assert twice.parts["main"].converted_from == ("fp8_model1", "fp4_v41")


@pytest.mark.parametrize("tokens", [3, 4, 7])
def test_no_row_and_one_row(model, hidden, tmp_path, tokens):
    sequence = Sequence.start(model, CSA)
    sequence.feed(HiddenFile.open(hidden, CSA), limit=tokens)
    file = sequence.file().convert({"main": "fp8_model1", "indexer": "int8_indexer"})
    file.save(tmp_path / "out")
    slots = torch.arange(tokens // 4)
    for name, part in CacheFile.load(tmp_path / "out").parts.items():
        rows = sequence.parts[name].cache.decode_rows(slots)
        assert part.cache.decode_rows(slots).shape == rows.shape == (tokens // 4, part.spec.head_dim)
        assert (part.cache.decode_rows(slots) - rows).abs().sum() < 0.1 * rows.abs().sum() or not slots.shape[0]


def test_an_interrupted_feed_leaves_no_rows_that_are_not_there_yet(model, hidden, tmp_path):
    chosen = options("fp8_model1", "int8_indexer")
    whole = run(model, hidden, tmp_path / "whole", **chosen).read_bytes()
    sequence = Sequence.start(model, CSA, **chosen)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sequence.feed(HiddenFile.open(hidden, CSA), chunk=50, progress=stop)
    sequence.save(tmp_path / "out")
    assert {k: v.shape[0] for k, v in load_file(tmp_path / "out").items() if "indexer" in k and "state" not in k} == {
        "indexer.rows": 12,
        "indexer.scales": 12,
    }
    sequence = Sequence.start(model, CSA, **chosen)
    sequence.resume(tmp_path / "out")
    assert all(c.cache.strict for c in sequence.parts.values()), "the mode is the reader's, not the file's"
    sequence.feed(HiddenFile.open(hidden, CSA))
    sequence.save(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole


def test_pages_in_the_file_are_those_of_an_engine(model, hidden, tmp_path):
    got = load_file(run(model, hidden, tmp_path / "out", **options("fp8_model1", "int8_indexer")))
    assert {k: list(v.shape) for k, v in got.items()} == {
        "main.pages": [2, 37440],
        "main.state": [4, 2048],
        "indexer.rows": [75, 128],
        "indexer.scales": [75],
        "indexer.state": [4, 512],
    }
    assert not got["main.pages"][1, 11 * 576 : 64 * 576].any(), "rows that do not exist yet are zero"
    got = load_file(run(model, hidden, tmp_path / "out", HCA, **options("fp8_model1")))
    assert list(got["main.pages"].shape) == [1, 1728]
    got = load_file(run(model, hidden, tmp_path / "out", HCA, page_tokens=128, **options("fp8_tensor")))
    assert {k: list(v.shape) for k, v in got.items() if k != "main.state"} == {"main.rows": [2, 512], "main.scales": []}


def test_options_that_do_not_fit_are_refused(model, hidden, tmp_path):
    for chosen, message in (
        ({"format": "fp8_model1"}, "indexer_format: expected a format for the indexer.s rows of 128"),
        ({"format": "mxfp4_indexer"}, "head_dim 128 for mxfp4_indexer"),
        ({"format": "fp8_tensor"}, "tensor_scale"),
        ({"format": "bf16", "tensor_scale": 1.0}, "tensor_scale"),
        ({"page_tokens": 0, "format": "fp4_v41", "indexer_format": "bf16"}, "page_tokens"),
    ):
        with pytest.raises(KvCondenseError, match=message):
            Sequence.start(model, CSA, **chosen)
    out = run(model, hidden, tmp_path / "out", HCA, **options("fp8_tensor"))
    with pytest.raises(KvCondenseError, match=r"main\.scales: expected 0\.1"):
        Sequence.start(model, HCA, format="fp8_tensor", tensor_scale=0.1).resume(out)
    out = run(model, hidden, tmp_path / "out", HCA, **options("fp8_model1"))
    with pytest.raises(KvCondenseError, match=r"parts\.main\.page_rows: expected 4, got 2"):
        Sequence.start(model, HCA, format="fp8_model1", page_tokens=512).resume(out)


def tampered(out, target, change):
    """Header and tensors changed, and sealed again, as somebody else's writer may have made them."""
    header, content = sealing.parts(out)
    change(header, content)
    sealed.save(target, header, content)
    return target


def main_part(**changes):
    return lambda h, t: h["parts"]["main"].update(changes)


def spec(**changes):
    return lambda h, t: h["parts"]["main"]["spec"].update(changes)


TAMPER = {
    "parts type": (lambda h, t: h.update(parts=[]), "parts"),
    "part type": (lambda h, t: h["parts"].update(main=3), r"parts\.main"),
    "layer": (lambda h, t: h.update(layer="1"), "layer"),
    "digest": (lambda h, t: h.update(last_hidden_sha256=None), "last_hidden"),
    "format": (main_part(format="fp9"), r"parts\.main format"),
    "format of another head_dim": (main_part(format="mxfp4_indexer"), "head_dim 128"),
    "format that the tensors are not": (main_part(format="bf16"), r"main\.rows"),
    "page rows type": (main_part(page_rows=True), "page_rows"),
    "page rows": (main_part(page_rows=0), "page_rows"),
    "other page rows": (main_part(page_rows=32), r"main\.pages"),
    "huge page rows": (main_part(page_rows=1 << 60), r"main\.pages"),
    "spec missing": (lambda h, t: h["parts"]["main"].pop("spec"), "spec"),
    "spec entry": (lambda h, t: h["parts"]["main"]["spec"].pop("eps"), "spec"),
    "ratio 0": (spec(ratio=0), "ratio"),
    "ratio type": (spec(ratio=4.0), "ratio"),
    "other ratio": (spec(ratio=8), r"main\.(state|pages)"),
    "overlap type": (spec(overlap=1), "overlap"),
    "rounding": (spec(rounding="none"), "rounding"),
    "eps": (spec(eps="x"), "eps"),
    "converted from nowhere": (main_part(converted_from=["x"]), "format"),
    "converted from a list": (main_part(converted_from=[["bf16"]]), "converted_from"),
    "converted type": (main_part(converted_from="bf16"), "converted_from"),
    "pages dtype": (lambda h, t: t.update({"main.pages": t["main.pages"].view(torch.int8)}), r"main\.pages"),
    "pages short": (lambda h, t: t.update({"main.pages": t["main.pages"][:1].clone()}), r"main\.pages"),
    "no scales": (lambda h, t: t.pop("indexer.scales"), r"indexer\.scales"),
}


@pytest.mark.parametrize("case", TAMPER)
def test_tampered_files_are_refused(model, hidden, tmp_path, case):
    change, message = TAMPER[case]
    out = run(model, hidden, tmp_path / "out", **options("fp8_model1", "int8_indexer"))
    CacheFile.load(tampered(out, tmp_path / "same", lambda h, t: None))
    with pytest.raises(KvCondenseError, match=message):
        CacheFile.load(tampered(out, tmp_path / "bad", change))


def invoke(*words, status=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_the_command_converts(model, hidden, plain, tmp_path):
    wanted = run(model, hidden, tmp_path / "wanted", **options("fp8_model1", "mxfp4_indexer"))
    words = ["--format", "fp8_model1", "--indexer-format", "mxfp4_indexer", "--json", tmp_path / "j"]
    text = invoke("convert", plain[CSA], "--out", tmp_path / "out", *words)
    assert (tmp_path / "out").read_bytes() == wanted.read_bytes()
    assert "fp8_model1 in pages of 64, 74880 bytes" in text
    assert json.loads((tmp_path / "j").read_text()) == CacheFile.load(wanted).header()
    text = invoke("convert", wanted, "--out", tmp_path / "out", "--format", "bf16")
    assert CacheFile.load(tmp_path / "out").parts["main"].converted_from == ("fp8_model1",)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--format mxfp4_indexer",
        "--format fp8_tensor",
        "--format fp8_tensor --tensor-scale 0.0001",
        "--format none",
        "--indexer-format fp8_model1",
    ],
)
def test_the_command_refuses_and_writes_nothing(plain, tmp_path, words):
    before = plain[CSA].read_bytes()
    invoke("convert", plain[CSA], "--out", tmp_path / "out", *words.split(), status=2)
    assert not list(tmp_path.iterdir())
    assert plain[CSA].read_bytes() == before


def test_saturating_is_asked_for(plain, tmp_path):
    words = ["--format", "fp8_tensor", "--tensor-scale", "0.001"]
    invoke("convert", plain[CSA], "--out", tmp_path / "out", *words, "--saturate")
    file = CacheFile.load(tmp_path / "out")
    assert file.parts["main"].cache.decode_rows(torch.arange(75)).abs().max() == pytest.approx(0.448)


def test_an_unknown_part_cannot_be_converted(plain):
    with pytest.raises(KvCondenseError, match="part: expected one of main"):
        CacheFile.load(plain[HCA]).convert({"indexer": "bf16"})


def test_first_difference():
    assert first_difference({"a": [1], "b": {"c": 2}}, {"a": [1], "b": {"c": 2}}) is None
    assert first_difference({"b": {"c": 2}}, {"b": {"c": 3}}) == ("b.c", "2", "3")
    assert first_difference({"b": {}}, {"b": {"c": 3}}) == ("b.c", "nothing", "3")
    assert first_difference({"b": 1}, {}) == ("b", "1", "nothing")
