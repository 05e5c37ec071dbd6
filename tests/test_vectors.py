"""kvcondense vectors: what write makes, what check finds, and that files which were tampered with are not believed."""

import hashlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import KvCondenseError
from kvcondense.cli import app, names
from kvcondense.conformance.compressors import SMALL
from kvcondense.conformance.generator import values
from kvcondense.conformance.invariants import INVARIANTS
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import BackendAdapter
from kvcondense.conformance.vectors import made, schema
from kvcondense.conformance.vectors.compared import wrong
from kvcondense.conformance.vectors.played import outputs
from kvcondense.formats import FORMATS


def invoke(*words, status=0):
    result = CliRunner().invoke(app, ["vectors", *map(str, words)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "made"
    assert "vectors" in invoke("write", path)
    return path


@pytest.fixture(scope="module")
def out(folder):
    path = folder.parent / "out"
    invoke("play", folder, "--out", path, "--adapter", "cpu")
    return path


def every(folder):
    return [schema.read(folder, name, entry) for name, entry in schema.index(folder).items()]


def test_what_is_written_is_small_and_whole(folder):
    found = every(folder)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20e6
    assert {v.invariant for v, _ in found} == {i.name for i in INVARIANTS} - {"I9 codes"}, "those are the bytes"
    assert {v.format for v, _ in found} == set(FORMATS)
    assert {v.bug_class for v, _ in found} <= {m.bug_class for m in MUTANTS.values()}
    assert {word for v, _ in found for need in v.needs for word in need.split()} <= set(names.NEEDS)
    assert {need for v, _ in found for need in v.needs} <= {*names.NEEDS, *names.WHOLE_NEEDS}
    assert names.COMPRESSORS == SMALL
    assert set(FORMATS) <= set(names.NEEDS)
    assert "0x9E3779B1" in (folder / "README.md").read_text()


def test_the_same_is_written_again(folder, tmp_path):
    """By another interpreter: nothing hangs on hashes, and files of an older set go."""
    again = tmp_path / "again"
    again.mkdir()
    index = json.loads((folder / "index.json").read_text())
    index["vectors"] = {"old": index["vectors"]["I6-emission-csa-0"]}
    (again / "index.json").write_text(json.dumps(index))
    for suffix in ("json", "safetensors"):
        (again / f"old.{suffix}").write_text("x")
    subprocess.run(
        [sys.executable, "-m", "kvcondense", "vectors", "write", str(again)], check=True, capture_output=True
    )
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)
    invoke("write", tmp_path, status=2)  # a folder of something else


def test_the_generator_is_the_ten_lines_of_the_readme():
    """In plain integers, as somebody would write it who has only the README."""

    def value(k, s, i):
        x = (i * 0x9E3779B1 + k * 0x85EBCA77 + s * 0xC2B2AE3D + 0x165667B1) % 2**32
        x ^= x >> 15
        x = x * 0x2C1B3C6D % 2**32
        x ^= x >> 12
        x = x * 0x297A2D39 % 2**32
        x ^= x >> 15
        return ((x >> 8) - 2**23) / 2**22

    for seed, stream, first in ((0, 0, 0), (7, 3, 1 << 20), ((1 << 31) - 1, 9, (1 << 32) - 3)):
        found = values(seed, stream, first, 5)
        assert found.tolist() == [value(seed, stream, first + i) for i in range(5)]
    many = values(1, 2, 0, 1 << 16).double()
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 4 / 12**0.5) < 0.02
    assert float(torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1].abs()) < 0.02


def test_our_backends_outputs_are_right(folder, out, tmp_path):
    report = tmp_path / "j"
    text = invoke("check", folder, "--against", out, "--json", report)
    assert "FAIL" not in text
    found = json.loads(report.read_text())
    assert (found["right"], found["wrong"], found["left_out"]) == (len(schema.index(folder)), {}, {})


def test_a_need_is_left_out_by_any_of_its_words_or_whole(folder, out, tmp_path):
    def left(*needs):
        words = [word for need in needs for word in ("--without", need)]
        invoke("check", folder, "--against", out, *words, "--json", tmp_path / "j")
        return set(json.loads((tmp_path / "j").read_text())["left_out"])

    kinds = {v.name: [need.split()[0] for need in v.needs] for v, _ in every(folder)}
    assert left("compressor") == {name for name, kind in kinds.items() if "compressor" in kind}
    assert left("format") == {name for name, kind in kinds.items() if "format" in kind}
    assert left("compressor csa") == left("csa") != set()
    assert left("format fp4_v41", "compressor r2") == left("fp4_v41", "r2") != set()
    assert "did you mean" in invoke("check", folder, "--against", out, "--without", "compressor cas", status=2)


def test_what_is_missing_fails_unless_it_is_left_out(folder, out, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for path in out.iterdir():
        if "indexer" not in path.name and not path.name.startswith(("I7", "I9-bytes")):
            (some / path.name).write_bytes(path.read_bytes())
    assert "is missing" in invoke("check", folder, "--against", some, status=1)
    left = [word for need in ("indexer", "begins", "huge_cache", "format") for word in ("--without", need)]
    assert "FAIL" not in invoke("check", folder, "--against", some, *left)


def test_that_nothing_was_compared_is_said_with_the_reason(folder, out, tmp_path):
    everything = ["--without", "compressor", "--without", "format"]
    for line in (("check", folder, "--against", out), ("play", folder, "--out", tmp_path / "new")):
        text = " ".join(invoke(*line, *everything, status=2).split())
        assert "--without: expected needs that leave a vector to compare, got compressor, format: each of the" in text
        assert f"{len(schema.index(folder))} vectors" in text
    (tmp_path / "index.json").write_text('{"schema": 1, "vectors": {}}')
    for line in (("check", "--against", out), ("play", "--out", tmp_path / "new"), ("mutants",)):
        text = invoke(line[0], tmp_path, *line[1:], status=2)
        assert "index.json vectors: expected one at least, got none in" in text
    assert not (tmp_path / "new").exists()


def test_a_link_to_nothing_is_called_one(folder, tmp_path):
    (tmp_path / "out").mkdir()
    names = list(schema.index(folder))
    for name, target in ((names[0], "gone.safetensors"), (names[1], f"{names[1]}.safetensors")):
        (tmp_path / "out" / f"{name}.safetensors").symlink_to(target)
    invoke("check", folder, "--against", tmp_path / "out", "--json", tmp_path / "j", status=1)
    wrong = json.loads((tmp_path / "j").read_text())["wrong"]
    assert wrong[names[0]][0].endswith(f"{names[0]}.safetensors is a link to nothing: gone.safetensors")
    assert "is a link to nothing" in wrong[names[1]][0], "to itself"
    assert "is missing" in wrong[names[2]][0]
    (tmp_path / "o").symlink_to("away")
    assert "a link to nothing: away" in invoke("check", folder, "--against", tmp_path / "o", status=2)
    assert "a link to nothing: away" in invoke("check", tmp_path / "o", "--against", tmp_path / "out", status=2)


@pytest.mark.parametrize("name", [
    "ape-dropped", "eight-drafts-kept-for", "row-0-for-minus-1", "split-by-batch-size", "int32-last-page",
    "rope-clamped", "pad-unwritten", "scales-inline", "fp4-ties-down", "spare-tokens-to-last", "stale-block-table",
])  # fmt: skip
def test_a_wrong_compressor_is_caught_by_a_vector(folder, name):
    mutant = MUTANTS[name]
    for vector, expected in every(folder):
        if problems := wrong(vector, expected, outputs(vector, expected, lambda: BackendAdapter(mutant, mutant.kind))):
            assert "Error" not in problems[0]
            return
    pytest.fail("it survived")


def one(folder, out, name):
    entry = schema.index(folder)[name]
    return (*schema.read(folder, name, entry), schema.tensors(out / f"{name}.safetensors"))


def test_every_output_is_looked_at(folder, out):
    """A bit of a row, of an untouched row, of a refusal, of a page, of another run: each is told."""
    vector, expected, got = one(folder, out, "I1-composition-csa-0")
    assert wrong(vector, expected, got) == []
    assert "same tokens" in wrong(vector, expected, {**got, "rows": flip(got["rows"], -1)})[0]
    assert wrong(vector, expected, {**got, "rows": flip(got["rows"], -1)}, ["exact"]) == []
    assert "+-" in wrong(vector, expected, {**got, "rows": got["rows"] + 1})[0]
    assert "nan" in wrong(vector, expected, {**got, "rows": got["rows"] * float("nan")})[0]
    spoilt = got["untouched"].clone()
    spoilt[2, 5] ^= 1
    assert f"slot {vector.untouched[2]}" in wrong(vector, expected, {**got, "untouched": spoilt})[0]
    for name in ("rows", "untouched"):
        assert name in wrong(vector, expected, {k: v for k, v in got.items() if k != name})[0]
        assert name in wrong(vector, expected, {**got, name: got[name][1:]})[0]
    assert wrong(vector, expected, {**got, "rows": got["rows"].double()})
    assert "untouched" in wrong(vector, expected, {**got, "untouched": got["untouched"][:, :1]})[0]
    assert "untouched" in wrong(vector, expected, {**got, "untouched": got["untouched"].float()})[0]
    vector, expected, got = one(folder, out, "I12-fail-closed-r2")
    assert "was accepted" in wrong(vector, expected, {**got, "refused": got["refused"] * 0})[0]
    assert "refused" in wrong(vector, expected, {**got, "refused": got["refused"][1:]})[0]
    vector, expected, got = one(folder, out, "I10-determinism-hca-0")
    assert "another run" in wrong(vector, expected, {**got, "rows": flip(got["rows"], -1)})[0]
    vector, expected, got = one(folder, out, "I9-bytes-fp8_model1")
    pages = got["pages"].clone()
    pages[1, 3] ^= 1
    assert "page 1, byte 3" in wrong(vector, expected, {**got, "pages": pages})[0]
    assert wrong(vector, expected, {k: v for k, v in got.items() if k != "pages"}) == []
    rows = got["rows"].clone()
    rows[4, 583] ^= 1
    assert "(pad[0])" in wrong(vector, expected, {**got, "rows": rows})[0]


ONE_BYTE = (torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", ONE_BYTE, ids=str)
def test_bytes_in_another_type_are_refused_by_name(folder, out, dtype):
    for form in ("fp8_model1", "mxfp4_indexer"):
        vector, expected, got = one(folder, out, f"I9-bytes-{form}")
        for name in ("rows", "pages", "untouched"):
            if len(got[name]):
                found = wrong(vector, expected, {**got, name: got[name].view(dtype)})
                assert found, name
                assert found[0].startswith(f"{name}: "), found
                assert "uint8" in found[0]
                assert str(dtype) in found[0]
    vector, expected, got = one(folder, out, "I12-fail-closed-r2")
    assert (
        "refused: uint8 [6] expected, got" in wrong(vector, expected, {**got, "refused": got["refused"].view(dtype)})[0]
    )


def test_exact_rows_and_refusals_have_their_own_type_and_shape(folder, out):
    for form, other in (("bf16", torch.float32), ("fp32", torch.bfloat16)):
        vector, expected, got = one(folder, out, f"I9-bytes-{form}")
        assert wrong(vector, expected, got) == []
        found = wrong(vector, expected, {**got, "rows": got["rows"].to(other)})[0]
        assert found == f"rows: expected {got['rows'].dtype} for {form}, got {other}"
        assert "rows" in wrong(vector, expected, {**got, "rows": got["rows"].contiguous().view(torch.uint8)})[0]
    vector, expected, got = one(folder, out, "I12-fail-closed-r2")
    for changed in (got["refused"].float(), got["refused"].long(), got["refused"][:, None]):
        assert "refused: uint8 [6] expected, got" in wrong(vector, expected, {**got, "refused": changed})[0]
    assert "refused is missing" in wrong(vector, expected, {k: v for k, v in got.items() if k != "refused"})[0]
    vector, expected, got = one(folder, out, "I6-emission-csa-0")
    assert "refused" in wrong(vector, expected, {**got, "refused": torch.ones(1, dtype=torch.uint8)})[0], "no such op"
    assert wrong(vector, expected, {k: v for k, v in got.items() if k != "refused"}) == []


def flip(rows, row):
    changed = rows.clone()
    changed.view(torch.int16)[row, 0] ^= 1
    return changed


def test_files_that_were_changed_are_not_believed(folder, tmp_path):
    name = "I6-emission-csa-0"
    entry = schema.index(folder)[name]
    for suffix in ("json", "safetensors"):
        for path in (folder / f"{name}.json", folder / f"{name}.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        data = bytearray((tmp_path / f"{name}.{suffix}").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / f"{name}.{suffix}").write_bytes(data)
        with pytest.raises(KvCondenseError, match="checksum"):
            schema.read(tmp_path, name, entry)


@pytest.mark.parametrize("change", [
    {"schema": 2}, {"ops": 3}, {"ops": [{"op": "step", "x": 1}]}, {"read": ["a"]}, {"surplus": 1}, {"seed": 1.5},
    {"name": None}, {"ops": [{"op": "step", "pieces": [["2", 0, 1, 0]]}]},
], ids=str)  # fmt: skip
def test_vectors_of_another_form(folder, change):
    data = {**json.loads((folder / "I6-emission-csa-0.json").read_text()), **change}
    with pytest.raises(KvCondenseError):
        schema.Vector.from_json(json.dumps(data), "v")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 1, "vectors": {"../x": {}}}', "{"])
def test_an_index_of_another_form(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    assert "index.json" in invoke("check", tmp_path, "--against", tmp_path, status=2)


def test_names_cannot_leave_the_folder(tmp_path):
    entry = {"json": "", "safetensors": "", "invariant": "", "bug_class": ""}
    for name in ("../x", "/etc/passwd", ".hidden", "a b", ""):
        (tmp_path / "index.json").write_text(json.dumps({"schema": 1, "vectors": {name: entry}}))
        with pytest.raises(KvCondenseError, match="names of letters"):
            schema.index(tmp_path)


@pytest.mark.parametrize("words", [
    "walk DIR", "check DIR", "check DIR --against nowhere", "play DIR", "write DIR --out x", "mutants nowhere",
    "write DIR --without exact", "check DIR --against DIR --without sleep", "check nowhere --against DIR",
    "play DIR --out x --exec ''",
    "play DIR --out x --adapter none:x",
])  # fmt: skip
def test_the_command_refuses(folder, words):
    invoke(*(folder if word == "DIR" else word.strip("'") for word in words.split()), status=2)


def test_an_adapter_that_raises_leaves_no_output(folder, tmp_path):
    text = invoke("play", folder, "--out", tmp_path / "o", "--adapter", "reference:online", status=1)
    assert "failed" in text
    assert 0 < len(list((tmp_path / "o").iterdir())) < len(schema.index(folder))


def test_the_table_of_mutants(monkeypatch, folder, tmp_path):
    for path in folder.glob("I*-csa*"):  # a few vectors are enough
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["vectors"] = {n: e for n, e in index["vectors"].items() if (tmp_path / f"{n}.json").exists()}
    (tmp_path / "index.json").write_text(json.dumps(index))
    few = {n: MUTANTS[n] for n in ("ape-dropped", "drafts-at-committed")}
    monkeypatch.setattr("kvcondense.cli.work.vectors.MUTANTS", few)
    text = invoke("mutants", tmp_path)
    assert "2 of 2 caught" in text
    few["harmless"] = type(MUTANTS["no-yarn"])("harmless", "nothing", "B5 RoPE")
    assert "SURVIVED" in invoke("mutants", tmp_path, status=1)


def test_checksums_are_plain_sha256(folder):
    index = json.loads((folder / "index.json").read_text())
    for name, entry in list(index["vectors"].items())[:5]:
        for suffix in ("json", "safetensors"):
            assert hashlib.sha256(Path(folder / f"{name}.{suffix}").read_bytes()).hexdigest() == entry[suffix]
    assert {f.name for f in fields(schema.Entry)} == set(entry)


def test_classes_of_every_invariant():
    assert set(made.CLASSES) == {i.name for i in INVARIANTS} - {"I9 codes"}
