"""Files of timings: each record is there as soon as it is made, a run that was killed can be gone on with."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kvcondense.bench import measure, peers, records
from kvcondense.bench.cases import Case
from kvcondense.cli import app
from kvcondense.errors import UnsupportedError

RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)
CASES = {c.name: c for c in (Case("tiny one", "csa", 12, 2, 0), Case("tiny two", "csa", 8, 1, 4))}
MACHINE = {"processor": "a", "torch": "1", "commit": "abc"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "_COLD_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)
    monkeypatch.setattr(measure.Rates, "measure", lambda: RATES)
    monkeypatch.setattr(peers, "installed", list)
    monkeypatch.setattr("kvcondense.cli.work.bench.CASES", CASES)


def bench(*words, status=0):
    result = CliRunner().invoke(app, ["bench", "--case", "tiny", *map(str, words)])
    if status is not None:
        assert result.exit_code == status, result.output
    return result


def test_a_record_is_on_disk_when_it_was_added(tmp_path):
    path = tmp_path / "t.jsonl"
    log = records.Log(path, {"machine": MACHINE})
    assert records.read(path, "", "") == [{"machine": MACHINE}]
    log.add({"case": "a", "us": 1.0, "runner": "r"})
    assert records.read(path, "", "")[-1] == {"case": "a", "us": 1.0, "runner": "r"}
    log.finish("a")
    assert records.resumed(path, MACHINE, "") == ({"machine": MACHINE}, log.records[1:])


@pytest.mark.parametrize("rest", ['{"case": "b", "u', '{"case": "b", "us": 2.0, "runner": "r"}', ""])
def test_parts_that_were_not_completed_are_made_again(tmp_path, rest):
    path = tmp_path / "t.jsonl"
    done = [{"case": "a", "us": 1.0, "runner": "r"}, {"complete": "a"}]
    failed = [{"case": "x", "us": 1.0, "runner": "r"}, {"case": "x", "failed": "OutOfMemoryError"}]
    path.write_text("".join(map(records.text, [{"machine": MACHINE}, *failed, *done])) + rest)
    head, kept = records.resumed(path, MACHINE, "kvcondense bench")
    assert kept == done
    log = records.Log(path, head, kept)
    assert log.complete == {"a"}
    assert records.read(path, "", "") == [head, *done]


def test_other_machines_and_sources_are_refused_by_name(tmp_path):
    path = tmp_path / "t.jsonl"
    records.Log(path, {"machine": MACHINE})
    before = path.read_bytes()
    with pytest.raises(UnsupportedError, match="--resume: .* commit def, device H100, got .* commit abc, device none"):
        records.resumed(path, {**MACHINE, "commit": "def", "device": "H100"}, "")
    assert path.read_bytes() == before
    path.write_text("{}\n")
    with pytest.raises(UnsupportedError, match="JSON lines of kvcondense tune"):
        records.resumed(path, MACHINE, "kvcondense tune")


def test_sources_that_differ_have_other_names(tmp_path):
    (tmp_path / "a.py").write_text("1")
    one = measure._digest(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert one != measure._digest(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "a.py").write_text("1")
    assert one == measure._digest(tmp_path)


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "--json", "-"], ["--resume", "--from", "README.md"]])
def test_resume_needs_a_file_to_go_on_with(words):
    assert "--resume" in bench(*words, status=2).output


def test_the_bench_goes_on_where_its_file_ends(tmp_path):
    path = tmp_path / "t.jsonl"
    bench("--json", path, "--resume")  # there is none yet
    whole = path.read_text().splitlines(keepends=True)
    first = whole.index(json.dumps({"complete": "tiny one"}) + "\n")
    path.write_text("".join(whole[: first + 3]) + whole[first + 3][:20])
    output = bench("--json", path, "--resume").output
    assert "[1/2] tiny one: in the file already" in output
    assert "[2/2] tiny two: comparing rows" in output
    assert "rates ..." not in output
    lines = path.read_text().splitlines(keepends=True)
    assert lines[: first + 1] == whole[: first + 1]
    names = [(r.get("case"), r.get("runner"), r.get("cache")) for r in map(json.loads, lines)]
    assert names == [(r.get("case"), r.get("runner"), r.get("cache")) for r in map(json.loads, whole)]
    assert "| tiny one |" in output
    assert "| tiny two |" in output


def test_a_case_that_raises_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    bad = replace(CASES["tiny one"], name="tiny bad", format="no format")
    monkeypatch.setattr("kvcondense.cli.work.bench.CASES", {"tiny bad": bad, "tiny two": CASES["tiny two"]})
    path = tmp_path / "t.jsonl"
    bench("--json", path, status=1)
    found = records.read(path, "", "")
    assert [r["case"] for r in found if "failed" in r] == ["tiny bad"]
    assert found[-1] == {"complete": "tiny two"}
    assert "| tiny two |" in bench("--from", path).output


KILLED = """
import torch
from kvcondense.bench import measure, peers
from kvcondense.bench.cases import Case
from kvcondense.cli import app
from kvcondense.cli.work import bench

measure._COLD_BYTES, measure._BUDGET_S = 1 << 12, 0.0
measure.Rates.measure = lambda: measure.Rates(memory=1e9, cache=1e10, gemm=1e11)
peers.installed = list
bench.CASES = {f"tiny {i}": Case(f"tiny {i}", "csa", 12, 2, 0) for i in range(1000)}
app()
"""


def test_a_killed_bench_leaves_what_it_had_measured(tmp_path):
    path, program = tmp_path / "t.jsonl", tmp_path / "program.py"
    program.write_text(textwrap.dedent(KILLED))
    words = [sys.executable, program, "bench", "--case", "tiny", "--json", path]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (path.exists() and path.read_text().count("complete") >= 3):
            assert child.poll() is None
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    found = records.read(path, "--from", "kvcondense bench")
    assert {r["complete"] for r in found if "complete" in r} >= {"tiny 0", "tiny 1", "tiny 2"}
    shown = CliRunner().invoke(app, ["bench", "--from", str(path)])
    assert shown.exit_code == 0
    assert "| tiny 2 |" in shown.output
