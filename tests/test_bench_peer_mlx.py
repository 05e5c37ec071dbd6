"""mlx-lm in the bench: the reference's rows where it is installed, and from a stand-in in numpy where it is not."""

import copy
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from kvcondense.bench import measure, peer_mlx, peers, run
from kvcondense.bench.cases import CASES, V41, V41_FORMAT, Case, make_inputs
from kvcondense.bench.runners import Kvcondense
from kvcondense.cli import app
from kvcondense.formats import FORMATS

RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)
TINY = [
    Case("prefill", "r2", 12, 2, 0, format=V41_FORMAT),
    Case("open prefill", "r2", 13, 1, 0, format=V41_FORMAT),
    Case("decode on a boundary", "r2", 1, 3, 37, format=V41_FORMAT),
    Case("decode within a window", "r2", 1, 3, 36, format=V41_FORMAT),
]


class StandIn:
    """What is asked of mlx.core and of mlx-lm's model, with its modules' interface. ``evaluated``: arrays, in turn."""

    def __init__(self):
        self.evaluated = []
        self.mx = SimpleNamespace(array=np.array, eval=self.evaluated.append)
        self.model = SimpleNamespace(
            Compressor=Compressor, YarnRoPE=YarnRoPE, LayerCache=LayerCache, _apply_rope=apply_rope, _append=append
        )


class LayerCache:
    def __init__(self, window_size):
        assert window_size > 0
        self.compress_kv = self.pending_kv = self.pending_gate = None


class Compressor:
    def __init__(self, args, layer_id):
        self.ratio, self.eps = args.compress_ratios[layer_id], args.rms_norm_eps
        self.kv_proj = self.gate_proj = None
        self.kv_norm = SimpleNamespace(weight=np.ones(args.head_dim))

    def __call__(self, x, start_pos, cache):
        pending = 0 if cache.pending_kv is None else cache.pending_kv.shape[1]
        kv, gate = append(cache.pending_kv, self.kv_proj(x)), append(cache.pending_gate, self.gate_proj(x))
        full = kv.shape[1] // self.ratio * self.ratio
        cache.pending_kv, cache.pending_gate = kv[:, full:], gate[:, full:]
        first = (start_pos - pending) // self.ratio
        if not full:
            return None, first
        kv, gate = (a[:, :full].reshape(a.shape[0], -1, self.ratio, a.shape[2]) for a in (kv, gate))
        weight = np.exp(gate - gate.max(2, keepdims=True))
        row = (kv * weight).sum(2) / weight.sum(2)
        return row / np.sqrt(np.square(row).mean(-1, keepdims=True) + self.eps) * self.kv_norm.weight, first


class YarnRoPE:
    def __init__(self, dims, traditional, base, mscale, mscale_all_dim):
        assert traditional
        assert mscale == mscale_all_dim
        self.frequencies = base ** (-np.arange(0, dims, 2) / dims)


def apply_rope(x, rope, *, rope_dim, offset, scale):
    angle = (offset + np.arange(x.shape[1]))[:, None] * scale * rope.frequencies
    a, b, out = x[..., -rope_dim::2], x[..., -rope_dim + 1 :: 2], x.copy()
    out[..., -rope_dim::2] = a * np.cos(angle) - b * np.sin(angle)
    out[..., -rope_dim + 1 :: 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def append(cached, new):
    return new if cached is None else np.concatenate([cached, new], axis=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "_COLD_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(peer_mlx, "modules", lambda: (made.mx, made.model))
    return made


@pytest.fixture
def installed():
    for name in ("mlx.core", "mlx_lm.models.deepseek_v41"):
        pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    peer_mlx.modules.cache_clear()
    yield
    peer_mlx.modules.cache_clear()


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
@pytest.mark.parametrize("whose", ["stand_in", "installed"])
def test_it_makes_the_references_rows(case, whose, request):
    request.getfixturevalue(whose)
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    assert expected.shape[1] > 0
    assert run.distance(peer_mlx.MlxLm(inputs), inputs, expected) < 0.03  # bf16 roundings that fp32 rows are without


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_a_step_evaluates_all_that_it_keeps_and_leaves_the_state_that_it_was_copied_from(case, stand_in):
    runner = peer_mlx.MlxLm(make_inputs(case))
    state = runner.primed()
    before = copy.deepcopy(vars(state["cache"]))
    again = []
    for _ in range(2):
        mine = runner.copy(state)
        stand_in.evaluated.clear()
        runner.step(mine)
        kept = [array for array in vars(mine["cache"]).values() if array is not None]
        ((*arrays,),) = stand_in.evaluated
        assert {id(array) for array in arrays} == {id(array) for array in kept}
        again.append(kept)
    assert all(np.array_equal(a, b) for a, b in zip(*again, strict=True))
    assert all(np.array_equal(before[name], now) for name, now in vars(state["cache"]).items())


@pytest.mark.usefixtures("installed")
def test_arrays_lie_on_the_cpu():
    mx, model = peer_mlx.modules()
    assert mx.default_device() == mx.cpu
    assert model is importlib.import_module("mlx_lm.models.deepseek_v41")


@pytest.mark.parametrize("whose", ["stand_in", "installed"])
def test_it_is_timed_after_its_rows_were_compared(whose, request):
    request.getfixturevalue(whose)
    found = list(run.run_case(TINY[0], "cpu", RATES, print))
    of = [r for r in found if r["runner"] == "mlx-lm"]
    assert [r["cache"] for r in of] == ["warm", "cold"]
    assert all(r["us"] > 0 and r["off_by_rms"] < 0.03 for r in of)
    assert "fp32" in of[0]["note"]


def test_rows_that_are_wrong_are_not_timed(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in.model, "_apply_rope", lambda x, rope, **_: x)
    found = list(run.run_case(TINY[0], "cpu", RATES, print))
    (record,) = [r for r in found if r["runner"] == "mlx-lm"]
    assert record["wrong"] > run.CLOSE


def test_a_version_with_another_interface_is_recorded(stand_in, monkeypatch):
    monkeypatch.delattr(stand_in.model, "YarnRoPE")
    found = list(run.run_case(TINY[0], "cpu", RATES, print))
    (record,) = [r for r in found if r["runner"] == "mlx-lm"]
    assert "YarnRoPE" in record["raised"]


@pytest.mark.usefixtures("absent")
def test_where_it_is_absent_the_others_are_timed():
    assert not peer_mlx.there()
    found = list(run.run_case(TINY[0], "cpu", RATES, print))
    assert {r["runner"] for r in found if "us" in r} == {
        "cpu", "cpu, checked", "cpu, bare", "reference", "arithmetic alone",
    }  # fmt: skip


def test_it_takes_v41_from_kv_score_alone_and_nobody_else_takes_that():
    theirs = [case for case in CASES.values() if peers.takes(peer_mlx.MlxLm, case)]
    assert [case.name for case in theirs] == [name for name in CASES if "V4.1" in name]
    assert not any(peers.takes(peer, case) for _, peer in peers.PEERS.values() for case in theirs)
    assert not peers.takes(peer_mlx.MlxLm, Case("", "r2", 4, 1, 0, hidden=True, format=V41_FORMAT))
    assert not peers.takes(peer_mlx.MlxLm, Case("", "r2", 4, 1, 0, format=V41_FORMAT, narrow=True))


def test_bytes_of_v41():
    prefill, decode = (CASES[f"{step}, V4.1 ratio 2"] for step in ("prefill 8192", "decode 16 on a boundary"))
    row = FORMATS[V41_FORMAT].row_bytes(512)
    assert prefill.bytes == 8192 * 4096 + 4096 * row
    assert decode.bytes == 16 * (4096 + 4096 + row)
    hidden = Case("", "r2", 1, 1, 0, hidden=True, format=V41_FORMAT)
    assert make_inputs(hidden).new.shape[2] == V41.hidden_size


def test_backends_without_v41_are_not_asked_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr("kvcondense.cli.work.bench.run_case", lambda case, **_: asked.append(case) or iter(()))
    monkeypatch.setattr("kvcondense.cli.work.bench.report.tables", lambda _: {})
    monkeypatch.setattr(measure.Rates, "measure", lambda: RATES)
    result = CliRunner().invoke(app, ["bench", "--backend", "pypto", "--case", "decode 16 within a window"])
    assert result.exit_code == 0, result.output
    assert {case.kind for case in asked} == {"hca", "csa"}
