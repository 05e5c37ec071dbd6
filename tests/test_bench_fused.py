"""``bench --fused`` without a GPU: its layers, rows that are compared before anything is timed, its table."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.backends import get_backend
from kvcondense.backends.triton import decode, tuning
from kvcondense.bench import cases, fused, measure, report
from kvcondense.bench.cases import CONFIG, Case
from kvcondense.bench.fused import LAYERS, Layer
from kvcondense.cli import app

pytest.importorskip("triton")
RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)


@pytest.fixture
def small(monkeypatch):
    """Two spans of hidden channels, and a clock that runs everybody once."""
    config = replace(CONFIG, hidden_size=128)
    for module in (cases, fused):
        monkeypatch.setattr(module, "CONFIG", config)
    cases.make_inputs.cache_clear()

    def interleaved(works, *, cold):
        for work in works:
            work.run(work.prepare())
        return [[1e-6 * (i + 1 + 10 * cold)] for i in range(len(works))]

    monkeypatch.setattr(measure, "interleaved", interleaved)
    yield
    cases.make_inputs.cache_clear()


def pair(tokens, start):
    case = Case("tiny", "csa", tokens, 2, start, hidden=True)
    return Layer("tiny", (case, replace(case, kind="indexer", format="mxfp4_indexer")))


def test_layers_are_those_that_are_asked_for():
    assert {(len(la.cases), la.cases[0].kind) for la in LAYERS.values()} == {(1, "hca"), (1, "csa"), (2, "csa")}
    assert {la.cases[0].tokens for la in LAYERS.values() if la.cases[0].start == 0} == {8192, 65536, 524288}
    for kind in ("HCA", "CSA", "CSA + indexer"):
        decodes = {(la.cases[0].batch, la.cases[0].windows) for n, la in LAYERS.items() if n.startswith(f"{kind}, dec")}
        assert decodes == {(b, w) for b in (1, 4, 16, 64) for w in (0, 1)}
        assert LAYERS[f"{kind}, verify 8 x 8 across a boundary"].cases[0].windows > 0
    for layer in LAYERS.values():
        assert all(c.hidden for c in layer.cases)
        assert layer.cases[-1].format == ("mxfp4_indexer" if len(layer.cases) == 2 else "fp8_model1")


def test_two_compressors_read_x_once():
    main, keys = (LAYERS["CSA + indexer, decode 16 on a boundary"].cases[i] for i in range(2))
    both = LAYERS["CSA + indexer, decode 16 on a boundary"]
    assert both.bytes == main.bytes + keys.bytes - 2 * 16 * CONFIG.hidden_size
    assert both.flops == main.flops + keys.flops
    assert RATES.floor(both, cold=True) == both.bytes / RATES.memory


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("tokens", "start"), [(1, 7), (3, 6)])
def test_every_way_makes_the_rows_and_is_timed(tokens, start):
    records = list(fused.run_layer(pair(tokens, start), RATES, print, device="cpu"))
    names = ["fused, one launch", "GEMM + step", "GEMM each + step", "batch-invariant", "GEMM alone"]
    assert [(r["runner"], r["cache"]) for r in records] == [(n, c) for c in ("warm", "cold") for n in names]
    assert all(r["off_by_rms"] < fused.CLOSE for r in records if r["runner"] != "GEMM alone")
    assert all(r["floor_us"] > 0 for r in records)
    table = report.fused(records)
    assert "| tiny | " in table
    assert "| 5.0 | 2.0 | 3.0 | 4.0 | 1.0 |" in table
    assert table.splitlines()[2].endswith("| 0.20 | 2.00 |")


@pytest.mark.usefixtures("small")
def test_where_kernels_start_early_the_same_in_full_order_is_timed(monkeypatch):
    asked = []

    def options(_):
        asked.append(tuning._in_full_order.get())
        return {"PDL": False}

    monkeypatch.setattr(tuning, "launch_options", options)
    records = list(fused.run_layer(pair(1, 7), RATES, print, device="cpu"))
    names = list(dict.fromkeys(r["runner"] for r in records))
    assert names[:4] == ["fused, one launch", "in full order, one launch", "GEMM + step", "GEMM each + step"]
    assert {False, True} == set(asked)
    table = report.fused(records)
    assert "| batch-invariant | in full order | fused |" in table
    assert "| 6.0 | 3.0 | 4.0 | 5.0 | 2.0 | 1.0 |" in table


@pytest.mark.usefixtures("small")
def test_tiles_are_a_way():
    case = Case("long", "csa", 128, 1, 0, hidden=True)
    ways = fused.ways([fused.make_inputs(case)])
    assert [w.name for w in ways] == ["fused, tiles", "GEMM + step"]


@pytest.mark.usefixtures("small")
def test_a_wrong_way_is_not_timed(monkeypatch):
    real = decode.run

    def wrong(steps, x, ws):
        real(steps, x, ws)
        steps[-1].rows.mul_(1.5)

    monkeypatch.setattr(decode, "run", wrong)
    said = []
    layer = pair(1, 3)
    found = list(fused.run_layer(layer, RATES, said.append, device="cpu"))
    assert found[0]["runner"] == "fused, one launch"
    assert found[0]["wrong"] > fused.CLOSE
    assert "not timed" in said[0]
    assert {r["runner"] for r in found[1:]} == {"GEMM + step", "GEMM each + step", "batch-invariant", "GEMM alone"}
    assert get_backend("triton").name == "triton"


def test_the_command_says_what_it_needs():
    result = CliRunner().invoke(app, ["bench", "--backend", "triton", "--fused", "--list"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 1 + len(LAYERS)
    result = CliRunner().invoke(app, ["bench", "--fused"])
    assert result.exit_code == 2
    assert "--backend triton" in result.output
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["bench", "--backend", "triton", "--fused"])
        assert "GPU" in result.output
