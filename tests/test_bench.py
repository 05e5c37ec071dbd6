"""The bench: floors are arithmetic, wrong rows are never timed, and what it prints can be drawn and read again."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.bench import decode_step, measure, peer_cpp, peer_mlx, peers, report, run
from kvcondense.bench.cases import CASES, Case, make_inputs
from kvcondense.bench.runners import Kvcondense
from kvcondense.cli import app

BASELINE = Path(__file__).parent.parent / "benchmarks" / "baselines" / "cpu.jsonl"
RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)
PREFILL = Case("tiny prefill", "csa", 12, 2, 0)
DECODE = Case("tiny decode", "hca", 1, 2, 130)
HIDDEN = Case("tiny from x", "csa", 3, 1, 6, hidden=True)
ROW = 584
OURS = {"cpu", "cpu, checked", "cpu, bare", "reference", "arithmetic alone"}
"""Of a prefill."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "_COLD_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)


def test_floors_count_every_byte_once():
    names = ("prefill 8192, ratio 128", "prefill 8192, ratio 4", "decode 16 on a boundary, ratio 128",
             "decode 16 on a boundary, ratio 4", "decode 16 within a window, ratio 128")  # fmt: skip
    cases = [CASES[name] for name in names]
    # 8192 tokens of 2 * 512 fp32 and 64 rows; with overlap 4 * 512 fp32, 2048 rows, and 4 tokens kept.
    assert cases[0].bytes == 8192 * 4096 + 64 * ROW
    assert cases[1].bytes == 8192 * 8192 + 2048 * ROW + 4 * 8192
    assert cases[2].bytes == 16 * (4096 + 127 * 4096 + ROW)
    # 7 earlier rows, half of each, and 4 rows that the next window needs, the new one among them.
    assert cases[3].bytes == 16 * (8192 + 7 * 8192 // 2 + 1 * 8192 + ROW)
    assert cases[4].bytes == 16 * 2 * 4096
    assert CASES["prefill 8192 in bf16, ratio 128"].bytes == 8192 * 2048 + 64 * ROW
    projection = CASES["prefill 2048 from x, ratio 128"]
    assert projection.flops == 2 * 2048 * 4096 * 1024
    assert RATES.floor(projection, cold=True) == projection.flops / 1e11
    assert RATES.floor(cases[2], cold=True) == cases[2].bytes / 1e9
    assert RATES.floor(cases[2], cold=False) == cases[2].bytes / 1e10
    assert RATES.floor(cases[0], cold=False) == cases[0].bytes / 1e9, "it never was in a cache"
    assert RATES.floor(cases[0], cold=True, read=0.25) == 0.25
    assert RATES.floor(projection, cold=True, read=0.125) == projection.flops / 1e11


def test_many_bytes_are_read_in_turns_with_what_is_compared_with_them(monkeypatch):
    monkeypatch.setattr(measure.Rates, "now", lambda self: self)
    works, notes = [measure.Work(lambda: None, lambda _: None)], [{"runner": "nothing"}]
    for name in ("prefill 8192 in bf16, ratio 128", "decode 16 within a window, ratio 128"):
        case = CASES[name]
        found = list(run.timings(case, works, notes, RATES, "cpu"))
        assert [(r["runner"], r["cache"]) for r in found] == [("nothing", "warm"), ("nothing", "cold")]
        floors = [1e-6 * r["floor_us"] for r in found]
        if case.bytes < 1 << 22:
            assert measure.reading(case.bytes) is None
            assert floors == pytest.approx([case.bytes / 1e10, case.bytes / 1e9], rel=0.01)
        else:
            work = measure.reading(case.bytes)
            assert work.prepare().numel() * 4 in range(case.bytes - 3, case.bytes + 1)
            assert work.run(work.prepare()) == work.prepare().numel(), "every byte"
            assert all(case.bytes / 1e12 < floor < case.bytes / 1e9 / 3 for floor in floors), "not those of RATES"


@pytest.mark.parametrize("case", [PREFILL, DECODE, HIDDEN], ids=lambda c: c.name)
def test_everybody_makes_the_same_rows(case):
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    assert expected.shape[1] > 0
    assert run.distance(Kvcondense(inputs, "cpu"), inputs, expected) < 0.07
    for way in ("checked", "prepared"):
        assert run.distance(Kvcondense(inputs, "cpu", way), inputs, expected) < 0.07
    for peer in peers.installed():
        assert run.distance(peer(inputs), inputs, expected) < run.CLOSE


def test_peers_of_the_bench_extra_are_found():
    pytest.importorskip("nano_deepseek_v4")
    assert peers.PEERS["nano"][1] in peers.installed()


def test_wrong_rows_are_not_timed(monkeypatch):
    class Dropped(Kvcondense):
        def __init__(self, inputs):
            super().__init__(inputs, "cpu")
            self.name = "dropped ape"
            self.weights = type(self.weights)(norm=inputs.norm, ape=inputs.ape * 0 + 3 * torch.randn(inputs.ape.shape))

    monkeypatch.setattr(peers, "installed", lambda: [Dropped])
    monkeypatch.setattr(peer_cpp, "there", lambda: False)
    said = []
    records = list(run.run_case(PREFILL, "cpu", RATES, said.append))
    wrong = [r for r in records if "wrong" in r]
    assert [r["runner"] for r in wrong] == ["dropped ape"]
    assert wrong[0]["wrong"] > run.CLOSE
    assert "not timed" in said[0]
    timed = {(r["runner"], r["cache"]) for r in records if "us" in r}
    assert timed == {(n, c) for n in OURS for c in ("warm", "cold")}
    assert all(r["us"] > 0 and r["floor_us"] > 0 and r["rounds"] >= 5 for r in records if "us" in r)


def test_a_peer_that_raises_is_recorded_and_nobody_else_suffers(monkeypatch):
    class Broken:
        name = "broken"

        def __init__(self, _):
            raise TypeError("no such argument")

    monkeypatch.setattr(peers, "installed", lambda: [Broken])
    monkeypatch.setattr(peers, "takes", lambda *_: True)
    monkeypatch.setattr(peer_cpp, "there", lambda: False)
    monkeypatch.setattr(peer_mlx, "there", lambda: False)
    found = list(run.run_case(PREFILL, "cpu", RATES, print))
    assert [r for r in found if "raised" in r] == [
        {"case": PREFILL.name, "runner": "broken", "raised": "TypeError: no such argument"}
    ]
    assert {r["runner"] for r in found if "us" in r} == OURS


def test_ways_to_project_are_timed_side_by_side(monkeypatch):
    monkeypatch.setattr(peers, "installed", list)
    before = torch.get_float32_matmul_precision()
    names = {r["runner"] for r in run.run_case(HIDDEN, "cpu", RATES, print) if "us" in r}
    assert {"bf16 GEMM alone", "our GEMM alone", "fp32 GEMM alone", "fp32 GEMM in bf16 math mode"} <= names
    assert torch.get_float32_matmul_precision() == before


def test_rounds_are_interleaved_and_preparations_are_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "_QUICK_S", 0.0)
    order = []
    works = [measure.Work(lambda n=n: order.append(f"prepare {n}"), lambda _, n=n: order.append(n)) for n in ("a", "b")]
    times = measure.interleaved(works, cold=True)
    assert [len(t) for t in times] == [measure._FEWEST] * 2
    assert order[-4:] == ["prepare a", "a", "prepare b", "b"]


def test_a_long_prefill_comes_in_chunks(monkeypatch):
    monkeypatch.setattr(run, "_STREAMS", (8192, 16384))
    records = list(run.stream_series("cpu", print))
    assert [(r["streamed"], r["ratio"]) for r in records] == [(8192, 128), (16384, 128), (8192, 4), (16384, 4)]
    assert all(r["us"] > 0 and r["grown_bytes"] < 1 << 28 for r in records)
    assert "| ratio 4 | 16384 |" in report.streams(records)


def test_a_request_goes_on_from_step_to_step(monkeypatch):
    monkeypatch.setattr(run, "_CONTEXTS", (16,))
    monkeypatch.setattr(peers, "installed", list)
    records = list(run.context_series("cpu", print))
    assert [(r["context"], r["runner"]) for r in records] == [(16, "cpu"), (16, "plan of a step")]


def test_a_decode_step_is_taken_part_by_part_and_added_up(monkeypatch):
    """One layer of each kind, two requests; peers where installed, their rows compared first."""
    monkeypatch.setattr(decode_step, "parts", lambda: [decode_step.Part(kind, 1) for kind in ("hca", "csa", "indexer")])
    monkeypatch.setattr(decode_step, "_REQUESTS", 2)
    monkeypatch.setattr(measure, "_BUDGET_S", 0.01)
    said = []
    records = list(decode_step.decode_step("cpu", said.append))
    assert not any("is not timed" in line for line in said), said
    for name in ("cpu", "cpu, checked", "cpu, prepared"):
        ours = {r["part"]: r["us"] for r in records if r["runner"] == name}
        assert list(ours) == ["1 HCA", "1 CSA", "1 indexers", decode_step.PLANS, "all"]
        assert ours["all"] == pytest.approx(sum(us for part, us in ours.items() if part != "all"), rel=0.01)
    runners = {r["runner"] for r in records}
    assert ("transformers" in runners) == (peers.Transformers in peers.installed())
    table = report.decode_step(records)
    assert f"| {report._number(ours['all'])} |" in table.splitlines()[-1]


def test_a_decode_step_whose_rows_are_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(decode_step, "parts", lambda: [decode_step.Part(kind, 1) for kind in ("hca", "csa")])
    monkeypatch.setattr(decode_step, "_REQUESTS", 1)
    monkeypatch.setattr(decode_step, "distance", lambda runner, inputs, expected: 1.0)
    records = list(decode_step.decode_step("cpu", print))
    assert [r["part"] for r in records if "wrong" in r] == ["1 HCA", "1 CSA"]
    assert {r["runner"] for r in records} == {"cpu"}


def test_the_command_measures_prints_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcondense.cli.work.bench.CASES", {PREFILL.name: PREFILL})
    monkeypatch.setattr(measure.Rates, "measure", lambda: RATES)
    lines, picture = tmp_path / "t.jsonl", tmp_path / "t.png"
    arguments = ["bench", "--case", "tiny prefill", "--json", str(lines), "--plot", str(picture)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["rates"]["memory"] == 1e9
    assert records[0]["machine"]["threads"] == torch.get_num_threads()
    assert {r["case"] for r in records[1:-1]} == {"tiny prefill"}
    assert records[-1] == {"complete": "tiny prefill"}
    assert picture.stat().st_size > 10_000
    assert "| tiny prefill |" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["--case", "nothing"], ["--backend", "nobody"], ["--plot", "x.txt"], ["--from", "README.md"]],
)
def test_bad_arguments_are_errors(arguments, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_the_baseline_says_where_it_comes_from_and_nobody_was_wrong(tmp_path):
    records = [json.loads(line) for line in BASELINE.read_text().splitlines()]
    assert set(records[0]["machine"]) == {"processor", "threads", "torch", "python", "commit"}
    timed = {r["case"] for r in records if "case" in r}
    # It may be older than the cases of V4.1.
    assert {name for name, case in CASES.items() if case.kind != "r2"} <= timed <= set(CASES)
    assert not [r for r in records if "wrong" in r]
    result = CliRunner().invoke(app, ["bench", "--from", str(BASELINE), "--plot", str(tmp_path / "b.png")])
    assert result.exit_code == 0
