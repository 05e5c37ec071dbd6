"""The CPU backend: threads, its projection, what it refuses, and how machine code is kept."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import (
    CompressorSpec,
    CompressorWeights,
    PagedCache,
    RaggedBatch,
    StatePool,
    compress,
    condense,
    project,
)
from kvcondense.backends.cpu import native
from kvcondense.backends.cpu import threads as cpu_threads
from kvcondense.cli import app
from kvcondense.errors import RangeError, UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.golden import calibrated
from machine import SPECS, rope, tokens, weights

WIDE = CompressorSpec(ratio=128, head_dim=512, eps=1e-6, rope_dim=64)
OVERLAPPED = CompressorSpec(ratio=4, head_dim=512, eps=1e-6, rope_dim=64, overlap=True)


@pytest.fixture
def threads():
    """Set torch's threads, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "Python"])
def pool(request, monkeypatch):
    """Threads of torch's OpenMP runtime, and those that stand in where there is none."""
    if request.param == "OpenMP":
        assert cpu_threads._openmp() is not None
    else:
        monkeypatch.setattr(cpu_threads, "_openmp", lambda: None)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("spec", [WIDE, OVERLAPPED], ids=["r128", "r4"])
@pytest.mark.parametrize("requests", [1, 3, 40])
def test_threads_do_not_change_a_byte(spec, requests, threads, monkeypatch):
    """With fewer windows than threads their channels are split; with many, whole windows are taken in chunks."""
    length = 256
    x = torch.randn(requests * length, spec.projected, generator=torch.Generator().manual_seed(0))
    batch = RaggedBatch.build(
        torch.arange(requests + 1) * length,
        start_positions=[0] * requests,
        state_slots=list(range(requests)),
        block_table=[[q] for q in range(requests)],
        draft_rows=5,
    )
    launches = []
    monkeypatch.setattr(
        "kvcondense.backends.cpu.calls.launch", lambda a, b, n: (launches.append(n), cpu_threads.launch(a, b, n))
    )
    results = []
    for count in (1, 2, 5):
        threads(count)
        state = StatePool.ring(spec, requests, spec.required_ring_rows(5))
        state.data.fill_(0)
        cache = PagedCache.allocate(512, requests, 64, format="fp8_model1")
        rows = condense(spec, x, weights(spec), rope(spec, 4096), batch, state=state, cache=cache, impl="cpu")
        results.append((rows.values, state.data, cache.data))
    assert sorted(set(launches)) == [1, 2, 5]
    assert results[0][0].abs().sum() > 0
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_several_python_threads_may_run_steps_at_once(threads):
    from concurrent.futures import ThreadPoolExecutor

    threads(2)
    x = torch.randn(1024, WIDE.projected)
    batch = RaggedBatch.build([0, 1024], start_positions=[0])

    def step(_):
        return condense(WIDE, x, weights(WIDE), rope(WIDE, 4096), batch, impl="cpu").values

    alone = step(0)
    with ThreadPoolExecutor(4) as executor:
        assert all(torch.equal(alone, other) for other in executor.map(step, range(40)))


def case(tokens, hidden=256, dtype=torch.bfloat16, spec=SPECS["csa"]):
    gen = torch.Generator().manual_seed(tokens)
    w = torch.randn(spec.projected, hidden, generator=gen).to(dtype)
    return spec, torch.randn(tokens, hidden, generator=gen).to(dtype), CompressorWeights(norm=torch.ones(16), w=w)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 7, 11, 47, 48, 121, 250])
def test_projection_sums_exact_products_in_fp32(count, threads):
    threads(2)
    spec, x, w = case(count, hidden=1024)
    got = project(spec, x, w, impl="cpu")
    exact = x.double() @ w.w.double().t()
    size = x.double().abs() @ w.w.double().abs().t()
    assert got.dtype == torch.float32
    assert ((got - exact).abs() <= 2e-6 * size).all()
    # bf16 results would be off by up to 2^-9 of themselves.
    assert count == 0 or (got - exact).abs().max() < 0.05 * (exact.bfloat16() - exact).abs().max()


@pytest.mark.parametrize("hidden", [32, 96, 4096])
def test_a_projected_token_is_the_same_in_any_batch(hidden, threads):
    threads(2)
    spec, x, w = case(130, hidden=hidden)
    whole = project(spec, x, w, impl="cpu")
    assert whole.abs().sum() > 0
    for start, stop in ((0, 1), (1, 3), (3, 10), (10, 57), (57, 130), (129, 130)):
        assert torch.equal(project(spec, x[start:stop], w, impl="cpu"), whole[start:stop])
    padded = torch.full((130, 2 * hidden), float("nan"), dtype=torch.bfloat16)
    padded[:, :hidden] = x
    assert torch.equal(project(spec, padded[:, :hidden], w, impl="cpu"), whole)
    padded[:, ::2] = x
    assert torch.equal(project(spec, padded[:, ::2], w, impl="cpu"), whole)


def test_no_global_switch_leaks():
    def switches():
        return (
            torch.get_float32_matmul_precision(),
            torch.get_num_threads(),
            torch.backends.mkldnn.enabled,
            torch.is_grad_enabled(),
        )

    before = switches()
    spec, x, w = case(9)
    w = CompressorWeights(norm=w.norm, w=w.w, ape=weights(spec).ape)
    batch = RaggedBatch.build([0, 9], start_positions=[0])
    rows = compress(spec, x, w, rope(spec, 64), batch, impl="cpu")
    assert rows.values.shape == (2, 16)
    assert switches() == before


def test_it_refuses_with_a_reason():
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 4], start_positions=[0])

    def run(change=None, x=None, **kwargs):
        s = spec if change is None else change
        return condense(s, tokens(s, 4) if x is None else x, weights(s), rope(s, 64), batch, impl="cpu", **kwargs)

    with pytest.raises(UnsupportedError, match="computes? in fp32"):
        run(x=tokens(spec, 4).double())
    with pytest.raises(UnsupportedError, match="not a multiple of 16"):
        run(CompressorSpec(4, 24, 1e-6, 8))
    batch = RaggedBatch.build([0, 4], start_positions=[0], state_slots=[0])
    with pytest.raises(UnsupportedError, match=r"the state is torch\.float64"):
        run(state=StatePool.ring(spec, 1, dtype=torch.float64))
    for kwargs, reason in (
        ({"dtype": torch.float32}, "multiplies bf16"),
        ({"hidden": 40}, "multiples of 32"),
    ):
        s, x, w = case(4, **kwargs)
        with pytest.raises(UnsupportedError, match=reason):
            project(s, x, w, impl="cpu")
        assert project(s, x, w).shape == (4, s.projected), "auto finds another"


def test_a_backend_without_a_projection_says_so():
    class Bare:
        name = "bare"

        why_not = run = staticmethod(lambda step: None)

    spec, x, w = case(4)
    with pytest.raises(UnsupportedError, match="bare: it has no projection"):
        project(spec, x, w, impl=Bare())


def test_validation_mode_raises_before_anything_is_written():
    spec = SPECS["csa"]
    batch = RaggedBatch.build([0, 8], start_positions=[0], state_slots=[0], block_table=[[0]])
    cache = PagedCache.allocate(16, 1, 4, format="fp8_tensor", tensor_scale=1e-5, strict=True)
    state = StatePool.ring(spec, 1)
    state.data.fill_(5.0)
    with pytest.raises(RangeError, match="values that fp8_tensor can hold"):
        condense(spec, tokens(spec, 8), weights(spec), rope(spec, 64), batch, state=state, cache=cache, impl="cpu")
    assert (cache.data == 0).all()
    assert (state.data == 5.0).all()


CHILD = """
import sys, torch
from kvcondense.backends.cpu import native
before = native.status()
x = torch.ones(2, 32, dtype=torch.bfloat16)
from kvcondense.backends.cpu import BACKEND
assert BACKEND.why_not_project(x, x.repeat(4, 1)) is None
cached = [k.name for k in before if k.cached]
print(BACKEND.project(x, x.repeat(4, 1), None).sum().item(), *cached, "numba" in sys.modules)
"""


def child(directory, **environment):
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "NUMBA_CACHE_DIR": str(directory), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.strip(), result.stderr


def test_machine_code_is_kept_checked_and_told_about(tmp_path):
    native.address("condense")
    for kernel in native.status():
        if kernel.name == "condense":  # so that only the small kernel is compiled here
            (tmp_path / "kvcondense").mkdir()
            (tmp_path / "kvcondense" / kernel.path.name).write_bytes(kernel.path.read_bytes())
    out, err = child(tmp_path)
    assert out == "512.0 condense True"
    assert "compiling the CPU kernel 'project'" in err
    assert str(tmp_path) in err
    (kept,) = (tmp_path / "kvcondense").glob("project-*.o")
    # The second process finds it, says nothing and does not import numba.
    out, err = child(tmp_path)
    assert (out, err) == ("512.0 condense project False", "")
    code = kept.read_bytes()
    assert b"numba_" not in code, "machine code that needs nothing of Numba's"
    kept.write_bytes(code[:-1] + bytes([code[-1] ^ 1]))
    out, err = child(tmp_path)
    assert out.startswith("512.0")
    assert "compiling" in err, "a damaged file is compiled again"
    assert kept.read_bytes() == code


def test_a_directory_that_cannot_be_written_costs_no_more_than_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    out, err = child(blocked)
    assert out.startswith("512.0")
    assert "compiled kernels are neither loaded nor kept" in err


@pytest.mark.parametrize(("kind", "name"), [(k, f.name) for f in FORMATS.values() for k in calibrated.kinds_of(f)])
def test_the_golden_run_passes_in_every_format(kind, name):
    rotate = "--rotate" if kind == "indexer" else "--no-rotate"
    words = ["verify", "--backend", "cpu", "--kind", kind, "--format", name, "--history", "300", rotate]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "kv_bytes     PASS" in result.output
