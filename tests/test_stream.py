"""Streaming a file of hidden states: chunks, interruptions and resumption give the same file, byte for byte."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sealing
from checkpoints import HIDDEN, MODEL, run, write
from kvcondense import CompressorSpec, CompressorWeights, KvCondenseError, RaggedBatch, RopeTable
from kvcondense.api import compress
from kvcondense.files import sealed
from kvcondense.stream import HiddenFile, Sequence

TOKENS = 300
CSA, HCA = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model"), shards=2)


def hidden_states(tokens=TOKENS, seed=0):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    file = tmp_path_factory.mktemp("hidden") / "h.safetensors"
    save_file({f"layers.{layer}.hidden_states": hidden_states() for layer in (CSA, HCA)}, file)
    return file


@pytest.mark.parametrize("layer", [CSA, HCA])
def test_result_is_that_of_the_functions(model, hidden, tmp_path, layer):
    got = load_file(run(model, hidden, tmp_path / "out", layer))
    parts = ("main", "indexer") if layer == CSA else ("main",)
    assert set(got) == {f"{p}.{k}" for p in parts for k in ("rows", "state")}
    for part in parts:
        spec = CompressorSpec.for_layer(MODEL, layer, part)
        weights = CompressorWeights.load(model, spec, layer, hidden_size=HIDDEN, part=part)
        batch = RaggedBatch.build([0, TOKENS], start_positions=[0])
        rows = compress(spec, hidden_states(), weights, RopeTable.build(MODEL, TOKENS), batch)
        assert torch.equal(got[f"{part}.rows"], rows.values.bfloat16())
        assert got[f"{part}.rows"].shape[0] == TOKENS // spec.ratio > 0
        assert got[f"{part}.state"].shape == (TOKENS - spec.live_start(TOKENS), spec.state_dim)


@pytest.mark.parametrize("format", ["bf16", "fp32"])
@pytest.mark.parametrize("layer", [CSA, HCA])
def test_chunks_and_interruptions_do_not_show(model, hidden, tmp_path, layer, format):
    whole = run(model, hidden, tmp_path / "whole", layer, chunk=TOKENS, format=format).read_bytes()
    for name, chunk, stops in (("ones", 1, (3,)), ("odd", 7, (1, 130, 2)), ("even", 128, (128,)), ("late", 50, (299,))):
        assert run(model, hidden, tmp_path / name, layer, chunk, stops, format=format).read_bytes() == whole


@given(chunk=st.integers(1, 90), stops=st.lists(st.integers(1, 70), max_size=3))
def test_any_interruption_gives_the_same_file(model, hidden, tmp_path_factory, chunk, stops):
    folder = tmp_path_factory.mktemp("runs")
    whole = run(model, hidden, folder / "whole", chunk=TOKENS).read_bytes()
    assert run(model, hidden, folder / "cut", chunk=chunk, stops=stops).read_bytes() == whole


def test_a_file_with_only_the_further_tokens(model, hidden, tmp_path):
    whole = run(model, hidden, tmp_path / "whole").read_bytes()
    x = hidden_states()
    save_file({"hidden_states": x[None, :101].contiguous()}, tmp_path / "a")
    save_file({"hidden_states": x[101:].contiguous()}, tmp_path / "b", metadata={"first_position": "101"})
    save_file({"anything": x[101:].contiguous()}, tmp_path / "c")
    run(model, tmp_path / "a", tmp_path / "out")
    middle = (tmp_path / "out").read_bytes()
    for rest in (HiddenFile.open(tmp_path / "b", CSA), HiddenFile.open(tmp_path / "c", CSA, first_position=101)):
        (tmp_path / "out").write_bytes(middle)
        sequence = Sequence.start(model, CSA)
        sequence.resume(tmp_path / "out")
        assert sequence.feed(rest) == TOKENS - 101
        sequence.save(tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == whole


def test_a_file_that_does_not_say_where_it_starts(model, hidden, tmp_path):
    """It holds the whole sequence if the last token stands in it, else further tokens."""
    whole = run(model, hidden, tmp_path / "whole").read_bytes()
    x = hidden_states()
    save_file({"hidden_states": x[:101].contiguous()}, tmp_path / "a")
    save_file({"hidden_states": x[101:].contiguous()}, tmp_path / "rest")
    for name in ("h", "rest"):
        out = run(model, tmp_path / "a", tmp_path / "out")
        sequence = Sequence.start(model, CSA)
        sequence.resume(out)
        file = HiddenFile.open(hidden if name == "h" else tmp_path / name, CSA)
        assert sequence.locate(file) == (0 if name == "h" else 101)
        assert sequence.feed(file) == TOKENS - 101
        sequence.save(out)
        assert out.read_bytes() == whole


def test_hidden_states_that_do_not_continue_are_refused(model, hidden, tmp_path):
    run(model, hidden, tmp_path / "out", stops=())
    for name, tokens, first in (("other", 400, 0), ("short", 10, 0), ("far", 10, 500)):
        content = {"hidden_states": hidden_states(tokens, seed=9)}
        save_file(content, tmp_path / name, metadata={"first_position": str(first)})
    for file, message in (("other", "another hidden state"), ("short", "reach 300"), ("far", "reach 300")):
        sequence = Sequence.start(model, CSA)
        sequence.resume(tmp_path / "out")
        with pytest.raises(KvCondenseError, match=message):
            sequence.feed(HiddenFile.open(tmp_path / file, CSA))


def test_what_was_done_before_an_interruption_can_be_saved(model, hidden, tmp_path):
    whole = run(model, hidden, tmp_path / "whole").read_bytes()
    sequence = Sequence.start(model, CSA)
    seen = []

    def progress(tokens):
        seen.append(tokens)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sequence.feed(HiddenFile.open(hidden, CSA), chunk=33, progress=progress)
    assert sequence.position == 99
    sequence.save(tmp_path / "out")
    sequence = Sequence.start(model, CSA)
    sequence.resume(tmp_path / "out")
    sequence.feed(HiddenFile.open(hidden, CSA))
    sequence.save(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole


def test_resume_refuses_another_compressor(model, hidden, tmp_path):
    out = run(model, hidden, tmp_path / "out")
    other = write(tmp_path / "other", change=lambda t: {k: v + 1 for k, v in t.items()})
    cases = {
        "layer": Sequence.start(model, 3),
        r"parts\.main\.format": Sequence.start(model, CSA, format="fp32"),
        r"parts\.indexer\.spec\.rotate": Sequence.start(model, CSA, rotate=False),
    }
    for key, sequence in cases.items():
        with pytest.raises(KvCondenseError, match=f"out {key}: expected"):
            sequence.resume(out)
    with pytest.raises(KvCondenseError, match=r"parts\.main\.weights_sha256"):
        Sequence.start(other, CSA).resume(out)


def tampered(out, target, tensors=lambda t: t, header=lambda h: h):
    """Changed and sealed again; a header that is no object is written as it is."""
    found, content = sealing.parts(out)
    changed = header(found)
    if isinstance(changed, dict):
        sealed.save(target, changed, tensors(content))
        return target
    metadata = None if changed is None else {"kvcondense": changed if isinstance(changed, str) else json.dumps(changed)}
    save_file(tensors(content), target, metadata=metadata)
    return target


TAMPER = {
    "no header": ({"header": lambda h: None}, "header"),
    "no json": ({"header": lambda h: "{"}, "JSON"),
    "a list": ({"header": lambda h: []}, "a JSON object, got list"),
    "future schema": ({"header": lambda h: {**h, "schema": 4}}, "schema"),
    "position type": ({"header": lambda h: {**h, "position": "300"}}, "position"),
    "position sign": ({"header": lambda h: {**h, "position": -1}}, "position"),
    "position": ({"header": lambda h: {**h, "position": 301}}, r"indexer\.state"),
    "missing state": ({"tensors": lambda t: {k: v for k, v in t.items() if k != "main.state"}}, r"main\.state"),
    "short rows": ({"tensors": lambda t: {**t, "main.rows": t["main.rows"][:-1].clone()}}, r"main\.rows"),
    "state dtype": ({"tensors": lambda t: {**t, "main.state": t["main.state"].bfloat16()}}, r"main\.state"),
}


@pytest.mark.parametrize("case", TAMPER)
def test_resume_refuses_a_tampered_file(model, hidden, tmp_path, case):
    change, message = TAMPER[case]
    out = run(model, hidden, tmp_path / "out")
    sequence = Sequence.start(model, CSA)
    with pytest.raises(KvCondenseError, match=message):
        sequence.resume(tampered(out, tmp_path / "bad", **change))
    assert sequence.position == 0


HIDDEN_FILES = {
    "no such tensor": ({"a": torch.ones(3, HIDDEN), "b": torch.ones(3, HIDDEN)}, None, "a tensor called"),
    "vector": ({"hidden_states": torch.ones(3)}, None, r"\[T, D\]"),
    "batch of two": ({"hidden_states": torch.ones(2, 3, HIDDEN)}, None, r"\[1, T, D\]"),
    "width": ({"hidden_states": torch.ones(3, HIDDEN + 1)}, None, "channels"),
    "dtype": ({"hidden_states": torch.ones(3, HIDDEN, dtype=torch.int32)}, None, "^x: expected"),
    "first position": ({"hidden_states": torch.ones(3, HIDDEN)}, {"first_position": "-4"}, "first_position"),
}


@pytest.mark.parametrize("case", HIDDEN_FILES)
def test_bad_hidden_files_are_refused(model, tmp_path, case):
    content, metadata, message = HIDDEN_FILES[case]
    save_file(content, tmp_path / "h", metadata=metadata)
    with pytest.raises(KvCondenseError, match=message):
        Sequence.start(model, CSA).feed(HiddenFile.open(tmp_path / "h", CSA))


@pytest.mark.parametrize("layer", [CSA, HCA])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_sequences_too_short_for_a_row(model, tmp_path, tokens, layer):
    save_file({"hidden_states": hidden_states(tokens)}, tmp_path / "h")
    got = load_file(run(model, tmp_path / "h", tmp_path / "out", layer))
    assert got["main.rows"].shape == (0, 16)
    assert got["main.state"].shape[0] == tokens
    assert not got["main.state"].isnan().any()
    save_file({"hidden_states": hidden_states()}, tmp_path / "all")
    sequence = Sequence.start(model, layer)
    sequence.resume(tmp_path / "out")
    sequence.feed(HiddenFile.open(tmp_path / "all", layer))
    sequence.save(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == run(model, tmp_path / "all", tmp_path / "whole", layer).read_bytes()


def test_limits_are_checked(model, hidden, tmp_path):
    states = HiddenFile.open(hidden, CSA)
    for option in ({"chunk": 0}, {"limit": 0}):
        with pytest.raises(KvCondenseError, match=next(iter(option))):
            Sequence.start(model, CSA).feed(states, **option)
    save_file({"hidden_states": torch.zeros(4097, HIDDEN)}, tmp_path / "long")
    with pytest.raises(KvCondenseError, match="positions below 4096"):
        Sequence.start(model, CSA).feed(HiddenFile.open(tmp_path / "long", CSA))
    with pytest.raises(KvCondenseError, match="a model directory"):
        Sequence.start(tmp_path, CSA)
    with pytest.raises(KvCondenseError, match="layer"):
        Sequence.start(model, 0)


def test_an_interrupted_save_keeps_the_old_file(model, hidden, tmp_path, monkeypatch):
    out = run(model, hidden, tmp_path / "out")
    before = out.read_bytes()
    sequence = Sequence.start(model, CSA)
    sequence.feed(HiddenFile.open(hidden, CSA), limit=5)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sequence.save(out)
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
