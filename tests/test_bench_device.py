"""The GPU's bench without a GPU: its cases, its clock's arithmetic; nobody times Triton on a CPU."""

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.bench import device, measure, run
from kvcondense.bench.cases import CASES, DEVICE_CASES, FORMAT, Case, make_inputs
from kvcondense.bench.runners import Kvcondense, gemm_names
from kvcondense.cli import app
from kvcondense.formats import FORMATS

RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)


@pytest.fixture
def host_clock(monkeypatch):
    """The GPU's clock with a graph that is a list of calls, and work that takes its units of time."""
    now = [0.0]

    class Graph:
        def __init__(self, body):
            self.replay = body

    def elapsed(run):
        before = now[0]
        run()
        return now[0] - before

    monkeypatch.setattr(device, "capture", Graph)
    monkeypatch.setattr(device, "elapsed", elapsed)
    monkeypatch.setattr(device, "home", lambda: "cpu")
    monkeypatch.setattr(device, "_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(device, "_FLUSH_BYTES", 1 << 12)
    return now


def test_cases_cover_what_a_gpu_is_asked():
    cases = DEVICE_CASES.values()
    assert {c.format for c in cases} == set(FORMATS)
    for kind in ("hca", "csa"):
        of = [c for c in cases if c.kind == kind and c.format == FORMAT]
        for batch in (1, 16, 64, 256):
            assert {c.windows for c in of if (c.batch, c.tokens, c.hidden) == (batch, 1, False)} == {0, 1}
        assert all(c.windows > 0 for c in of if c.tokens == 8)
        assert {(c.batch, c.tokens) for c in of if c.start == 0} == {(1, 8192), (1, 65536), (8, 8192)} | (
            {(8, 65536)} if kind == "hca" else set()
        )
        assert {c.hidden for c in of if c.start == 0} == {True, False}
    assert all("on a boundary" in n or "within" in n for n, c in DEVICE_CASES.items() if c.tokens == 1)
    assert "within" not in CASES["decode 16 on a boundary, ratio 4"].name


def test_floors_count_scales_that_lie_apart():
    int8, pow2 = (Case("", "indexer", 8, 1, 0, format=f) for f in ("int8_indexer", "fp8_indexer_pow2"))
    assert int8.bytes == pow2.bytes == 8 * 4 * int8.spec.projected + 2 * 132 + 4 * 4 * int8.spec.projected


def test_replays_are_divided_and_flushes_subtracted(host_clock):
    def spend(seconds):
        host_clock[0] += seconds

    works = [measure.Work(lambda: 3e-6, spend, capturable=True), measure.Work(lambda: 5e-6, spend)]
    warm = device.interleaved(works, cold=False)
    assert [len(t) for t in warm] == [device._ROUNDS] * 2
    assert warm[0] == pytest.approx([3e-6] * device._ROUNDS)
    assert warm[1] == pytest.approx([5e-6] * device._ROUNDS)
    original, calls = torch.Tensor.add_, []
    try:
        torch.Tensor.add_ = lambda self, other: (calls.append(self), spend(100e-6))[0]
        cold = device.interleaved(works, cold=True)
    finally:
        torch.Tensor.add_ = original
    assert cold[0] == pytest.approx([3e-6] * device._ROUNDS)
    assert cold[1] == pytest.approx([5e-6] * device._ROUNDS)
    # Twenty calls a graph, with and without work, and once before each eager call.
    assert len(calls) == device._ROUNDS * (2 * device._CALLS + 1)


def test_slow_work_is_repeated_less(host_clock):
    runs = []

    def spend(_):
        runs.append(1)
        host_clock[0] += 1.0

    device.interleaved([measure.Work(lambda: None, spend, capturable=True)], cold=False)
    assert len(runs) == 2 * 4 + device._ROUNDS * device._FEW_CALLS


def test_cached_bytes_decide_what_a_warm_floor_is():
    case = CASES["decode 16 on a boundary, ratio 128"]
    assert measure.Rates(1e9, 1e10, 1e11, cached=case.bytes).floor(case, cold=False) == case.bytes / 1e10
    assert measure.Rates(1e9, 1e10, 1e11, cached=case.bytes - 1).floor(case, cold=False) == case.bytes / 1e9


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_a_case(name):
    case = Case("tiny", "indexer" if "indexer" in name else "csa", 5, 1, 6, format=name)
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    bare = Kvcondense(inputs, "cpu", "bare")
    assert bare.capturable
    assert run.distance(bare, inputs, expected) < run.CLOSE


def test_a_bare_step_from_x_has_a_gemm_before_it():
    case = Case("tiny from x", "csa", 6, 1, 0, hidden=True)
    inputs = make_inputs(case)
    caches = []
    for way in ("", "bare"):
        runner = Kvcondense(inputs, "reference", way)
        state = runner.copy(runner.primed())
        runner.step(state)
        caches.append(state["cache"].decode_rows(torch.tensor([0])))
    assert caches[0].abs().max() > 0
    assert torch.allclose(*caches, rtol=0.1, atol=0.05)
    assert "GEMM alone, bf16 to fp32" in gemm_names("cuda")
    assert "GEMM alone, bf16 to fp32" not in gemm_names("cpu")


def test_cases_of_a_gpu_are_listed_without_one():
    result = CliRunner().invoke(app, ["bench", "--backend", "triton", "--list"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 1 + len(DEVICE_CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
@pytest.mark.parametrize(
    ("arguments", "word"), [(["--backend", "triton"], "GPU"), (["--peer-file", "vllm=."], "--backend triton")]
)
def test_without_a_gpu_triton_is_not_timed(arguments, word):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert word in result.output
