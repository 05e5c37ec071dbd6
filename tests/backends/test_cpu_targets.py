"""Kernels for other processors: the same bytes from vectors of any length, sums that stay in registers."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kvcondense.backends.cpu import native
from kvcondense.backends.cpu.target import target
from kvcondense.errors import RangeError

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the kernels cannot run here")
AVX2 = "+64bit,+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+cx8,+f16c,+fma,+fxsr,+lzcnt,+movbe,+popcnt,+sahf,+sse,+sse2,+sse3,"\
    "+sse4.1,+sse4.2,+ssse3,+xsave"  # fmt: skip

DIGESTS = """
import hashlib, json, sys
from dataclasses import replace
import torch
sys.path.insert(0, "tests")
from kvcondense import OnlineState, PagedCache, RaggedBatch, StatePool, condense, project, training
from kvcondense.backends.cpu.target import target
from kvcondense.formats import FORMATS
from machine import SPECS, rope, weights

found = {}

def keep(name, *tensors):
    parts = [t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
    found[name] = hashlib.sha256(b"".join(parts)).hexdigest()

gen = torch.Generator().manual_seed(7)
for name, spec in SPECS.items():
    tokens = 3 * spec.window + 5
    kv = 3 * torch.randn(2 * tokens, spec.projected, generator=gen)
    batch = RaggedBatch.build([0, tokens, 2 * tokens], start_positions=[0, 0], state_slots=[0, 1], draft_rows=2)
    after = RaggedBatch.build([0, 2, 2 + spec.ratio], start_positions=[tokens, tokens - 1], state_slots=[0, 1])
    table = rope(spec, tokens + 2 * spec.ratio)
    steep = kv.clone()  # some channels' scores are further apart than a pool begins with, beside others that are not
    steep[:, spec.width :: 3] *= 30
    tiny = kv.clone()  # scores that some processors round to 0, beside others and among themselves; and no numbers
    tiny[:, spec.width :: 5] *= 1e-38
    tiny[::7, spec.width + 1 :: 5] *= 1e-39
    for i, odd in enumerate((float("nan"), float("inf"), float("-inf"))):
        tiny[i :: 11, spec.width + 2 + i :: 17] = odd
    few = replace(weights(spec), ape=None if weights(spec).ape is None else 1e-39 * weights(spec).ape)
    for token, state in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        pool = StatePool.ring(spec, 2, spec.required_ring_rows(2) + spec.ratio, dtype=state)
        rows = condense(spec, tiny.to(token), few, table, batch, state=pool, impl="cpu").values
        keep(f"{name} {token} tiny", rows.masked_fill(rows.isnan(), float("nan")))  # whose other bits are not promised
    for token in (torch.float32, torch.bfloat16):
        pool = StatePool.ring(spec, 2, spec.required_ring_rows(2) + spec.ratio, dtype=token)
        rows = condense(spec, steep.to(token), weights(spec), table, batch, state=pool, impl="cpu")
        keep(f"{name} {token} steep", rows.values)
    for token, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                         (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        pool = StatePool.ring(spec, 2, spec.required_ring_rows(2) + spec.ratio, dtype=state)
        pool.data.zero_()
        rows = [condense(spec, kv.to(token), weights(spec), table, batch, state=pool, impl="cpu"),
                condense(spec, kv[: 2 + spec.ratio].to(token), weights(spec), table, after, state=pool, impl="cpu")]
        keep(f"{name} {token} {state}", *(r.values for r in rows), pool.data)
    if not spec.overlap:
        online = OnlineState.allocate(spec, 2, 2)
        online.acc.zero_()
        values = condense(spec, kv, weights(spec), table, batch, state=online, impl="cpu").values
        keep(f"{name} online", values, online.acc)
wide = replace(SPECS["csa"], head_dim=512, rope_dim=64)
kv = 3 * torch.randn(64, wide.projected, generator=gen)
for form in FORMATS:
    spec = replace(wide, head_dim=128) if "indexer" in form else wide
    try:
        cache = PagedCache.allocate(spec.head_dim, 1, 64, format=form, tensor_scale=0.02 if "tensor" in form else None)
        batch = RaggedBatch.build([0, 64], start_positions=[0], block_table=[[0]])
        condense(spec, kv[:, : spec.projected], weights(spec), rope(spec, 64), batch, cache=cache, impl="cpu")
    except Exception as error:
        found[form] = type(error).__name__
    else:
        keep(form, *cache.tensors.values())
for hidden in (96, 1536, 2560):
    w = weights(wide, hidden=hidden)
    x = torch.randn(101, hidden, generator=gen).bfloat16()
    for count in (1, 2, 5, 11, 70, 101):
        keep(f"project {hidden} {count}", project(wide, x[:count], replace(w, w=w.w.bfloat16()), impl="cpu"))
spec = SPECS["csa"]
kv = torch.randn(40, spec.projected, generator=gen, requires_grad=True)
w = weights(spec)
out = training.condense(spec, kv, w, rope(spec, 40), RaggedBatch.build([0, 25, 40], start_positions=[0, 0]))
out.values.square().sum().backward()
keep("training", out.values.detach(), kv.grad)
print(json.dumps([target().lanes, target().bf16_products, found]))
"""


def digests(**environment):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "KVCONDENSE_LANES")
    }
    run = subprocess.run([sys.executable, "-c", DIGESTS], env={**clean, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def here():
    return digests()


def other_targets():
    has = target().features
    yield "4 lanes", {"KVCONDENSE_LANES": "4"}
    yield ("8 lanes" if target().lanes != 8 else "16 lanes"), {"KVCONDENSE_LANES": "16" if target().lanes == 8 else "8"}
    if {"avx2", "fma", "f16c", "bmi2", "movbe"} <= has and target().lanes != 8:
        yield "AVX2", {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}
    if target().bf16_products:  # multiplied where that is fast, elsewhere widened, and in panels if there are many
        name, cpu = ("widened", "cooperlake") if target().fast_bf16_products else ("pairs of bf16", "znver4")
        yield name, {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": target().flags}


@pytest.mark.parametrize(("name", "environment"), [pytest.param(*t, id=t[0]) for t in other_targets()])
def test_other_targets_give_the_same_bytes(name, environment, here):
    lanes, _, found = digests(**environment)
    assert lanes == (int(name.split()[0]) if "lanes" in name else 8 if name == "AVX2" else 16)
    assert len(found) > 60
    assert found == here[2]


def test_other_lengths_are_refused(monkeypatch):
    monkeypatch.setenv("KVCONDENSE_LANES", "12")
    with pytest.raises(RangeError, match="KVCONDENSE_LANES: expected 4, 8 or 16, got 12"):
        target.__wrapped__()


# A loop of a pool takes eight tokens: seven exponentials or eight, of seven multiplies each, and eight rows.
LIMITS = {"avx512": 15, "avx2": 15, "neon": 20}
"""Instructions for a token and vector of fp32."""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="LLVM is built for those")
@pytest.mark.parametrize("name", LIMITS)
def test_sums_stay_in_registers(name, tmp_path):
    report = tmp_path / "loops.json"
    tool = Path(__file__).parents[2] / "tools" / "machine_code.py"
    subprocess.run([sys.executable, tool, "--target", name, "--json", report], check=True, capture_output=True)
    loops = json.loads(report.read_text())
    pools = [loop for loop in loops if loop["kernel"] == "condense" and loop["multiplies"] >= 7 * 7]
    products = [loop for loop in loops if loop["kernel"] == "project" and loop["multiplies"] >= 8]
    assert len(pools) >= 6
    assert len(products) >= 3
    assert min(loop["arithmetic"] for loop in pools) <= 8 * LIMITS[name], "of fp32 rows"
    assert not [loop for loop in pools + products if loop["spilled"]]
