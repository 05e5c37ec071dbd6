"""What the fuzz of readers has found, one by one: values of files that nobody's writer makes, refused by name."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import alterations
from bundles import Small
from foreign_requests import cache_file
from kvcondense import CompressorSpec, RaggedBatch, StatePool
from kvcondense.bench import chart, records, report, tune
from kvcondense.bundle import Bundle
from kvcondense.bundle.held import fields_of
from kvcondense.cachefile import CacheFile
from kvcondense.conformance.cases import Case
from kvcondense.errors import CheckpointError, RangeError, UnsupportedError
from kvcondense.files.reading import parsed
from kvcondense.formats import FORMATS
from kvcondense.layout.cache import PagedCache
from kvcondense.snapshot import earlier, load_live, save_live
from kvcondense.weightfiles import gguf
from machine import SPECS, Machine, tokens

HALF = '"\\ud800"'


@pytest.mark.parametrize("text", [f'{{"a": {HALF}}}', f"{{{HALF}: 1}}", f'{{"a": [[{{"b": {HALF}}}]]}}'])
def test_half_a_surrogate_pair_is_no_text(text):
    with pytest.raises(CheckpointError, match="name: expected a JSON object in Unicode"):
        parsed(text, "name")
    assert parsed('{"a": "\\ud83d\\ude00"}', "name") == {"a": "\N{GRINNING FACE}"}


def test_half_a_surrogate_pair_in_a_cache_file(tmp_path):
    cache_file("r8", 9, "bf16", 2).save(tmp_path / "cache")
    header, tensors = alterations.unsealed_parts((tmp_path / "cache").read_bytes())
    data = alterations.sealed({**header, "last_hidden_sha256": alterations.Raw(HALF)}, tensors)
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(CheckpointError, match="header"):
        CacheFile.load(tmp_path / "bad")


@pytest.mark.parametrize("dtype", [[], {}, None, 3, "float128"])
def test_a_snapshots_type_may_be_anything(dtype):
    machine = Machine(SPECS["csa"], [tokens(SPECS["csa"], 8)])
    machine.feed([5])
    header, tensors = alterations.unsealed_parts(save_live(machine.spec, machine.state, machine.at(0)))
    payload = alterations.sealed({**header, "dtype": dtype}, tensors)
    with pytest.raises(CheckpointError, match="payload header: expected a dtype"):
        load_live(machine.spec, StatePool.ring(machine.spec, 1), RaggedBatch.at(5, state_slot=0), payload)
    with pytest.raises(CheckpointError, match="payload header: expected a dtype"):
        earlier(payload, 4)


@pytest.mark.parametrize(("field", "value"), [("ratio", 1 << 62), ("head_dim", 1 << 62), ("head_dim", 10**400)])
def test_sizes_of_a_compressor_have_bounds(field, value):
    with pytest.raises(RangeError, match=f"{field}: expected at least 1 and at most"):
        replace(SPECS["r8"], **{field: value})


def test_a_bundle_takes_no_memory_for_the_sizes_that_it_claims(tmp_path, monkeypatch):
    data = Small(tmp_path, SPECS["csa"]).path.read_bytes()
    commits = alterations.pieces(data)
    commits[0].content["members"][0]["spec"].update(head_dim=1 << 30, rope_dim=8)
    (tmp_path / "bad").write_bytes(alterations.bundle(commits))
    monkeypatch.setattr(PagedCache, "allocate", None)
    with pytest.raises(CheckpointError, match="commit 0 layer 0 main: expected 2147483648 bytes for 1 rows"):
        Bundle(tmp_path / "bad")


@pytest.mark.parametrize("name", FORMATS)
def test_a_rows_fields_are_those_of_a_page(name):
    fmt = FORMATS[name]
    head_dim = fmt.head_dim or 16
    page = PagedCache.allocate(head_dim, 1, fmt.tile, format=fmt, tensor_scale=1.0 if fmt.tensor_scale else None)
    got = page.get(torch.zeros(1, dtype=torch.int64))
    assert fields_of(fmt, head_dim) == {k: (t.dtype, t.shape[1]) for k, t in got.items()}


def test_commits_of_a_bundle_do_not_share_bytes(tmp_path):
    """Or a file of megabytes could have gigabytes of them to read."""
    commits = alterations.pieces(Small(tmp_path, SPECS["csa"]).path.read_bytes())

    def longer(content):
        if content["previous"] is not None:
            content["previous"]["bytes"] += 1 << 16
        return content

    (tmp_path / "bad").write_bytes(alterations.bundle(commits, longer))
    with pytest.raises(CheckpointError, match="the commit before it to end before it"):
        Bundle(tmp_path / "bad")


def test_pages_have_whole_bytes_however_large():
    fmt = FORMATS["fp8_model1"]
    rows = (1 << 60) + 1
    assert fmt.page_bytes(512, rows) == -(-rows * 584 // 576) * 576
    assert fmt.page_bytes(512, 10**400) % 576 == 0


HEAD = {"machine": {"commit": "a"}}
TIMED = {"case": "a", "runner": "r", "cache": "warm", "us": 1.0, "floor_us": 1.0}


def read(path, *found, check=records.check_timing):
    path.write_text("".join(json.dumps(r) + "\n" for r in (HEAD, *found)))
    return records.read(path, "--from", "kvcondense bench", check)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": 4, "runner": "r"}, "us"),
        ({"complete": []}, "complete"),
        ({"complete": None}, "complete"),
        ({"case": ["a"]}, "case"),
        ({"runner": {}}, "runner"),
        ({"wrong": 1.0}, "runner"),
        ({"wrong": 1.0, "runner": "r", "cache": "warm"}, "us"),
    ],
)
def test_records_that_no_table_can_be_made_of(tmp_path, record, message):
    with pytest.raises(UnsupportedError, match=rf"record 2 {message}:"):
        read(tmp_path / "r", record)


def test_the_first_record_is_looked_at_as_the_others_are(tmp_path):
    (tmp_path / "r").write_text(json.dumps({**HEAD, "moved_bytes": 3, "us": 1.0, "runner": "r"}) + "\n")
    with pytest.raises(UnsupportedError, match="record 1 case"):
        records.read(tmp_path / "r", "--from", "kvcondense bench")


def test_a_part_of_a_step_that_was_wrong_is_no_timing(tmp_path):
    """The bench writes such a record, and could not read its file again."""
    found = read(tmp_path / "r", {"step": "flash", "part": "csa", "runner": "cpu", "wrong": math.inf})
    assert report.tables(found) == {}
    with pytest.raises(UnsupportedError, match="timings: expected warm ones"):
        chart.chart(found)


def test_records_and_bars_are_not_without_number(tmp_path):
    with pytest.raises(UnsupportedError, match="at most 4096, got .*, of 4098"):
        read(tmp_path / "r", *[TIMED] * 4097)
    with pytest.raises(UnsupportedError, match="at most 1000, got 1001 and 0"):
        chart.chart(read(tmp_path / "r", *[TIMED] * 1001))


@pytest.mark.parametrize("change", [{"us": math.inf}, {"us": math.nan}, {"us": -1.0}, {"block": 0}, {"rows": -2}])
def test_a_tiling_has_sizes_and_a_time(tmp_path, change):
    timed = {"kind": "hca", "rows": 16, "block": 64, "num_warps": 4, "us": 3.0}
    assert read(tmp_path / "r", {**timed, "us": None, "rows": None}, timed, check=tune.check_record)
    with pytest.raises(UnsupportedError, match=f"record 2 {next(iter(change))}: expected a number above 0"):
        read(tmp_path / "r", {**timed, **change}, check=tune.check_record)
    with pytest.raises(UnsupportedError, match="record 2 kind"):
        read(tmp_path / "r", {"block": 64}, check=tune.check_record)


@pytest.mark.parametrize("scale", [np.inf, np.nan, 6e4])
def test_scales_of_gguf_that_are_not_finite_are_no_warning(tmp_path, scale, monkeypatch):
    blocks = np.zeros((4, 34), np.uint8)
    blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
    (tmp_path / "m.gguf").write_bytes(blocks.tobytes())
    entry = gguf.Entry((4, 32), "Q8_0", 0, blocks.size)
    monkeypatch.setattr(gguf, "header", lambda _: {"t": entry})
    assert gguf.read(tmp_path / "m.gguf", "t").isfinite().all() == np.isfinite(scale)


@pytest.mark.parametrize(
    "ops",
    [
        {"requests": 2, "ops": [{"kind": "move", "counts": [1 << 21, 1 << 21]}]},
        {"requests": 1, "ops": [{"kind": "fork", "drafts": 3}]},
        {"requests": 1024, "first": 1 << 21, "ops": [{"kind": "step", "counts": [1] + [0] * 1023}]},
    ],
)
def test_cases_are_bounded_by_all_that_they_make_somebody_allocate(ops):
    with pytest.raises(CheckpointError, match="case: expected"):
        Case.from_json(json.dumps({"spec": "r2", **ops}))


def test_specs_of_models_are_within_the_bounds():
    assert CompressorSpec(1 << 20, 1 << 20, 1e-6, 0).visible_rows(1 << 31) == 1 << 11


@pytest.mark.parametrize("scale", [1e308, 1e-310, 0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_of_a_whole_cache_is_an_fp32(scale):
    with pytest.raises(RangeError, match="tensor_scale"):
        PagedCache.allocate(16, 1, 1, format="fp8_tensor", tensor_scale=scale)
