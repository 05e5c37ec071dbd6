"""The tuner without a GPU: its candidates, what it picks, what it refuses, and the file it writes."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.backends.triton import TritonBackend, tuning
from kvcondense.backends.triton.tuning import Choice
from kvcondense.bench import device, records, tune
from kvcondense.bench.cases import Case
from kvcondense.bench.records import Log
from kvcondense.cli import app
from kvcondense.errors import CheckpointError, KvCondenseError

FACTS = {"device": "a GPU", "toolkit": "CUDA 0", "triton": "0", "commit": "abc"}
TINY = ((16, 2, 1, 127), (None, 1, 128, 0))


@pytest.fixture
def clocked(monkeypatch):
    """Work runs once, under the interpreter; its seconds follow from the tiling."""
    seen = []

    def interleaved(works, *, cold):
        assert cold
        for work in works:
            assert work.capturable
            work.run(work.prepare())
            seen.append(work.run.__self__.choice)
        seconds = lambda c: 1e-6 * (1 + abs(c.block - 64) + abs(c.num_warps - 8) + 500 * (c.windows != 2))  # noqa: E731
        return [[seconds(c)] for c in seen[-len(works) :]]

    monkeypatch.setattr(device, "interleaved", interleaved)
    monkeypatch.setattr(device, "machine", lambda: {k: v for k, v in FACTS.items() if k != "commit"})
    monkeypatch.setattr(device, "home", lambda: "cpu")
    monkeypatch.setattr(tune, "cast_is_exact", lambda *_: False)  # the interpreter's cast is nobody's
    monkeypatch.setattr(tune, "CLASSES", TINY)
    monkeypatch.setattr(tune, "_LEAST_BLOCK", 64)
    monkeypatch.setattr(tune, "_MOST_ELEMENTS", 1 << 14)
    return seen


def test_candidates_hold_the_tables_choice_and_no_idle_or_spilling_tile():
    now = Choice(32, 8)
    found = tune.candidates(Case("", "hca", 1, 16, 1023), now)
    assert found[0] == now
    assert len(set(found)) == len(found) > 5
    for c in found[1:]:
        assert 512 % c.block == 0
        assert 2 <= c.block * 128 / (32 * c.num_warps) <= 64


def test_candidates_for_short_windows_have_several_in_programs_with_all_channels():
    for tokens, expected in ((7, {1}), (8, {1, 2, 4}), (8192, {1, 2, 4})):
        found = tune.candidates(Case("", "csa", tokens, 1, 0), Choice(512, 4))
        assert {c.windows for c in found} == expected, "no window of fewer than 8 tokens is pooled with another"
        for c in found:
            assert c.windows == 1 or c.block == 512
            assert 2 <= c.windows * c.block * 8 / (32 * c.num_warps) <= 64
    assert {c.windows for c in tune.candidates(Case("", "hca", 8192, 1, 0), Choice(32, 8))} == {1}


def tuned(log, kinds=("hca",), **limits):
    said = []
    tune.tune(log, (), list(kinds), said.append, tune.Limits(**limits))
    return said


def fresh(path=None, kept=()):
    return Log(path, {"machine": FACTS}, kept)


def test_the_fastest_tiling_is_kept_and_other_entries_stay(clocked):
    log = fresh()
    said = tuned(log)
    arch, part = tune.part_of(log, (), FACTS)
    assert arch == "any"
    assert [e for e in part["entries"] if e[0] == 128] == [[128, 512, 16, 64, 8, 1], [128, 512, None, 64, 8, 1]]
    old = [e for e in tuning.table()["any"]["entries"] if e[0] != 128]
    assert [e for e in part["entries"] if e[0] != 128] == old
    assert part["source"] == "hca: measured on a GPU, CUDA 0, triton 0, commit abc"
    timings = [r for r in log.records if "us" in r]
    assert len(timings) == len(clocked)
    assert all(r["us"] for r in timings)
    assert len(said) == len(TINY)
    content = {**tuning.table(), arch: part}
    assert json.loads(tuning.dump(content)) == content


def test_a_class_that_is_in_the_file_is_not_timed_again(clocked, tmp_path):
    """As if the run had been killed in the second class."""
    path = tmp_path / "t.jsonl"
    whole = fresh(path)
    tuned(whole)
    lines = path.read_text().splitlines(keepends=True)
    count = len(clocked)
    path.write_text("".join(lines[:-4]) + lines[-4][:9])
    head, kept = records.resumed(path, FACTS, "kvcondense tune", tune.check_record)
    assert head == {"machine": FACTS}
    assert kept[-1] == {"complete": "hca, at most 16 rows"}
    again = fresh(path, kept)
    said = tuned(again)
    assert said[0] == "hca, at most 16 rows: in the file already"
    assert count < len(clocked) < 2 * count
    assert tune.part_of(again, (), FACTS) == tune.part_of(whole, (), FACTS)
    assert [r.get("block") for r in records.read(path, "", "", tune.check_record)] == [
        r.get("block") for r in whole.records
    ]


def test_a_budget_begins_no_class_that_would_end_later(clocked, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    real = tune.time_class

    def slow(*arguments):
        now[0] += 60
        return real(*arguments)

    monkeypatch.setattr(tune, "time_class", slow)
    log = fresh()
    assert "not timed, 40 s are left" in tuned(log, seconds=100)[1]
    assert log.complete == {"hca, at most 16 rows"}
    assert tune.part_of(log, (), FACTS) == ("any", None)
    assert clocked


def test_a_tiling_that_cannot_be_compiled_is_left_out(clocked, monkeypatch):
    real = TritonBackend.run

    def run(self, step):
        if self.choice is not None and self.choice.num_warps == 16:
            raise RuntimeError("out of resources")
        real(self, step)

    monkeypatch.setattr(TritonBackend, "run", run)
    timed = tune.time_class("hca", TINY[0], "cpu", ())
    assert {t.choice.num_warps for t in timed if t.error} == {16}
    assert {t.error for t in timed} == {None, "RuntimeError: out of resources"}
    assert [tune.Timed.from_dict(t.as_dict()).error for t in timed] == [t.error for t in timed]
    assert clocked


def test_a_tiling_with_other_bits_is_left_out(clocked, monkeypatch):
    real = TritonBackend.run

    def wrong(self, step):
        real(self, step)
        if self.choice is not None and (self.choice.block, self.choice.num_warps) == (64, 8):
            step.rows[0, 0] += 1

    monkeypatch.setattr(TritonBackend, "run", wrong)
    monkeypatch.setattr(tune, "CLASSES", TINY[:1])
    timed = tune.time_class("hca", TINY[0], "cpu", casts=())
    assert {(t.choice.block, t.choice.num_warps) for t in timed if t.seconds is None} == {(64, 8)}
    assert tune.best(timed).choice != Choice(64, 8)
    assert clocked


def test_several_windows_of_a_program_are_compared_and_kept(clocked, monkeypatch):
    monkeypatch.setattr(tune, "CLASSES", ((None, 1, 48, 0),))
    log = fresh()
    tuned(log, kinds=("indexer",))
    timings = [r for r in log.records if "block" in r]
    assert {r["windows"] for r in timings if r["us"]} == {1, 2, 4}
    assert not any(r["us"] is None for r in timings), "bits are those of one window"
    chosen = tune.part_of(log, (), FACTS)[1]["entries"]
    assert [e for e in chosen if e[:2] == [4, 128]] == [[4, 128, None, 128, 8, 2]]
    old = {"kind": "csa", "rows": 16, "block": 512, "num_warps": 4, "us": 3.0}
    assert tune.Timed.from_dict(old).choice.windows == 1, "as files from before have it"
    with pytest.raises(CheckpointError, match="windows"):
        tune.check_record({**old, "windows": 0}, "t.jsonl line 2")
    for key in ("block", "num_warps", "windows"):
        with pytest.raises(CheckpointError, match=f"t.jsonl line 2 {key}: expected a power of two, got 6"):
            tune.check_record({**old, key: 6}, "t.jsonl line 2")
    assert clocked


def test_small_gains_do_not_change_the_table():
    def of(block, seconds):
        return tune.Timed("hca", 16, Choice(block, 8), seconds)

    assert tune.best([of(32, 1.0), of(64, 0.99)]).choice.block == 32
    assert tune.best([of(32, 1.0), of(64, 0.9), of(16, None)]).choice.block == 64
    assert tune.best([of(32, None), of(64, 2.0)]).choice.block == 64
    with pytest.raises(KvCondenseError, match="tilings"):
        tune.best([of(32, None)])


def test_a_cast_is_compared_bit_by_bit(monkeypatch):
    """The interpreter's cast is not the chip's, but both agree on ordinary values, and a wrong code is seen."""
    ones = torch.tensor([1.0]).view(torch.int32).item()
    spans = lambda: iter([(ones, 2)])  # noqa: E731
    exact = [name for name in tuning.CASTS if tune.cast_is_exact(name, "cpu", spans)]
    assert exact == ["e4m3"], "what the interpreter cannot run is not proven"
    part = tune.SCALE_PART
    monkeypatch.setitem(tune._PARTS, "e4m3", type(part)(**{**vars(part), "bias": part.bias + 1}))
    assert not tune.cast_is_exact("e4m3", "cpu", spans)
    first = list(tune._all_floats())
    assert first[0][0] == 0
    assert all(a[0] + a[1] * tune._CAST_BLOCK == b[0] for a, b in itertools.pairwise(first))
    assert first[-1][0] + first[-1][1] * tune._CAST_BLOCK == 1 << 32


def test_casts_that_are_proven_get_into_the_table(clocked, monkeypatch):
    monkeypatch.setattr(tune, "cast_is_exact", lambda name, device: (name, device) == ("bf16", "cpu"))
    casts = tune.exact_casts("cpu")
    log = fresh()
    tuned(log)
    part = tune.part_of(log, casts, FACTS)[1]
    assert part["hardware_casts"] == ["bf16"]
    monkeypatch.setattr(tuning, "table", lambda: {"any": part})
    assert tuning.casts("sm_90") == casts == ("bf16",)
    assert clocked


def test_the_table_is_written_as_it_is_kept():
    assert tuning.dump(tuning.table()) == tuning.TABLE.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_without_a_gpu_nothing_is_tuned():
    result = CliRunner().invoke(app, ["tune", "--dry-run"])
    assert (result.exit_code, result.output) == (2, "error: tune: expected triton and a GPU, got none found\n")
