"""The GPU's bench without a GPU: its cases, its clock's arithmetic, peers from files; nobody times Triton on a CPU."""

import importlib

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.bench import device, measure, peer_files, peers, run
from kvcondense.bench.cases import CASES, DEVICE_CASES, FORMAT, Case, make_inputs
from kvcondense.bench.runners import Kvcondense, gemm_names
from kvcondense.cli import app
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS

RATES = measure.Rates(memory=1e9, cache=1e10, gemm=1e11)
SMALL = [Case("prefill", "csa", 12, 2, 0), Case("decode", "hca", 1, 2, 130), Case("keys", "indexer", 9, 1, 6)]
# The interface of the files, with the work done plainly in torch: sources of engines are not part of this project.
COMMON = """
import torch
def save(kv, score, ape, positions, memory, slots, ratio):
    n, block = kv.shape[1], memory.shape[1]
    row = torch.cat([kv, score + ape[positions % ratio]], dim=1)
    memory[slots // block, slots % block] = row
def window(memory, table, request, position, ratio, overlap, d):
    block, out = memory.shape[1], []
    n = memory.shape[2] // 2
    first = position - (1 + overlap) * ratio + 1
    for p in range(max(first, 0), position + 1):
        half = d * int(overlap and p > position - ratio)
        row = memory[table[request, p // block], p % block]
        out.append(torch.stack([row[half : half + d], row[n + half : n + half + d]]))
    kv, z = torch.stack(out, dim=1)
    return (torch.softmax(z, dim=0) * kv).sum(0)
def finish(pooled, gamma, eps, cos_sin, position, ratio, rope):
    row = pooled * torch.rsqrt(pooled.square().mean() + eps) * gamma
    cos, sin = cos_sin[position // ratio * ratio].chunk(2)
    a, b = row[-rope::2].clone(), row[-rope + 1 :: 2].clone()
    row[-rope::2], row[-rope + 1 :: 2] = a * cos - b * sin, b * cos + a * sin
    return row
"""
RTP = (
    COMMON
    + """
run_save_partial_states = save
def run_fused_compress_kv_write_bf16(memory, requests, positions, slots, table, gamma, eps, cos_sin, cache, kv_slots,
        kv, score, ape, seq_start, disable_raw_path=False, boundary_token_indices=None, *, head_dim, rope_head_dim,
        compress_ratio, overlap):
    assert disable_raw_path == (table.shape[0] > 1) and int((table == 0).sum()) == 0
    for t in boundary_token_indices.tolist():
        pooled = window(memory, table, requests[t], int(positions[t]), compress_ratio, overlap, head_dim)
        row = finish(pooled, gamma, eps, cos_sin, int(positions[t]), compress_ratio, rope_head_dim)
        cache[kv_slots[t]] = row.bfloat16()
"""
)
SAVE = (
    """
from vllm.model_executor.warmup.jit_warmup_triton_helper import VllmTritonJitKernel, kernel_launcher
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2
"""
    + COMMON
    + """
class Kernel:
    def __getitem__(self, grid):
        def run(kv, kv_stride, score, score_stride, ape, ape_stride, positions, memory, s0, s1, slots, block, *,
                HEAD_SIZE, TRITON_BLOCK_SIZE, STATE_WIDTH, COMPRESS_RATIO):
            assert grid == (len(slots),) and block == memory.shape[1] and TRITON_BLOCK_SIZE == HEAD_SIZE == STATE_WIDTH
            save(kv[:, :HEAD_SIZE], score[:, :HEAD_SIZE], ape, positions, memory, slots, COMPRESS_RATIO)
        return run
class SavePartialStatesKernel(VllmTritonJitKernel["K"]):
    kernel = Kernel()
"""
)
FUSED = (
    """
from vllm.platforms import current_platform
from .fused_indexer_q import _fp32x2_to_fp4x2
assert not current_platform.is_rocm()
from kvcondense.layout.cache import PagedCache
"""
    + COMMON
    + """
def compress_norm_rope_store_triton(*, state_cache, positions, token_to_req_indices, block_table, cos_sin_cache,
        kv_cache, k_cache_metadata, head_dim, rope_head_dim, compress_ratio, overlap, rms_norm_weight, rms_norm_eps,
        token_stride, scale_dim, **_):
    pages, page_rows = kv_cache.shape[:2]
    data = kv_cache.as_strided((pages, page_rows, token_stride + scale_dim), (kv_cache.stride(0), 584, 1))
    cache = PagedCache.wrap(data, format="fp8_model1")
    for t, slot in enumerate(k_cache_metadata.slot_mapping.tolist()):
        if slot >= 0:
            p = int(positions[t])
            pooled = window(state_cache, block_table, token_to_req_indices[t], p, compress_ratio, overlap, head_dim)
            row = finish(pooled, rms_norm_weight, rms_norm_eps, cos_sin_cache, p, compress_ratio, rope_head_dim)
            cache.put(torch.tensor([slot]), cache.encode(row[None]))
"""
)


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


@pytest.fixture
def files(tmp_path):
    (tmp_path / "rtp.py").write_text(RTP)
    (tmp_path / "save_partial_states.py").write_text(SAVE)
    (tmp_path / "fused_compress_quant_cache.py").write_text(FUSED)
    return [f"rtp-llm={tmp_path / 'rtp.py'}", f"vllm={tmp_path}"]


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


@pytest.mark.parametrize("case", SMALL[:2], ids=lambda c: c.name)
def test_peers_from_files_make_the_same_rows(case, files):
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    for text in files:
        peer = peer_files.load(text)
        assert peers.takes(peer, case)
        runner = peer(inputs)
        assert runner.capturable
        assert run.distance(runner, inputs, expected) < run.CLOSE
        state = runner.copy(runner.primed())
        runner.step(state)
        assert state["position"] == case.start + case.tokens


def test_stubs_do_not_stay(files):
    peer_files.load(files[1])
    with pytest.raises(ImportError):
        importlib.import_module("vllm.triton_utils")


@pytest.mark.parametrize("text", ["sglang=x", "rtp-llm", "rtp-llm=missing.py", "vllm=."])
def test_peer_files_are_checked(text):
    with pytest.raises(UnsupportedError, match="--peer-file"):
        peer_files.load(text)


def test_peers_are_not_asked_for_what_they_lack(files):
    peer = peer_files.load(files[0])
    assert not peers.takes(peer, SMALL[2])
    assert not peers.takes(peer, Case("", "csa", 4, 1, 0, hidden=True))
    assert peers.takes(peers.Nano, Case("", "csa", 4, 1, 0, hidden=True))
    assert not peers.takes(peers.Nano, Case("", "csa", 4, 1, 0, format="bf16"))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_a_case(name):
    case = Case("tiny", "indexer" if "indexer" in name else "csa", 5, 1, 6, format=name)
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    bare = Kvcondense(inputs, "cpu", bare=True)
    assert bare.capturable
    assert run.distance(bare, inputs, expected) < run.CLOSE


def test_a_bare_step_from_x_has_a_gemm_before_it():
    case = Case("tiny from x", "csa", 6, 1, 0, hidden=True)
    inputs = make_inputs(case)
    caches = []
    for bare in (False, True):
        runner = Kvcondense(inputs, "reference", bare=bare)
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
