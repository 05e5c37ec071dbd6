"""What tests/interpreter.py keeps of Triton's interpreter changes no bit: the same steps with it and without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

STEPS = """
import hashlib, sys
import torch
if sys.argv[1] == "kept":
    import interpreter
    interpreter.patch_once()
from projected import bf16_weights
from kvcondense import OnlineState, PagedCache, RaggedBatch, StatePool, compress, condense
from machine import SPECS, rope

def digest(*tensors):
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()

def odd(x):
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e-39, -0.0)):
        x.view(-1)[97 * i :: 485] = value
    return x

for name in ("csa", "hca", "indexer", "r8"):
    spec = SPECS[name]
    weights = bf16_weights(spec)
    for kind in ("ring", "online") if not spec.overlap else ("ring",):
        for dtype in (torch.float32, torch.bfloat16):
            for special in (False, True):
                state = OnlineState.allocate(spec, 2, 4) if kind == "online" else StatePool.ring(spec, 2)
                cache = PagedCache.allocate(spec.head_dim, 40, 4, format="bf16")
                for memory in (state.acc, state.log, cache.data) if kind == "online" else (state.data, cache.data):
                    memory.zero_()  # which nobody promises
                batch = RaggedBatch.build([0, spec.ratio + 3, spec.ratio + 8], start_positions=[0, 0],
                                          state_slots=[1, 0], slot_mapping=range(spec.ratio + 8))
                kv = torch.randn(spec.ratio + 8, spec.projected, generator=torch.Generator().manual_seed(3))
                rows = condense(spec, (odd(kv) if special else kv).to(dtype), weights, rope(spec, 1024), batch,
                                state=state, cache=cache, impl="triton")
                held = (state.acc, state.log) if kind == "online" else (state.data,)
                print(name, kind, dtype, special, digest(rows.values, cache.rows, *held))
    x = torch.randn(6, 192, generator=torch.Generator().manual_seed(4)).bfloat16()
    batch = RaggedBatch.build([0, 6], start_positions=[0])
    print(name, "from x", digest(compress(spec, x, weights, rope(spec, 1024), batch, impl="triton").values))
"""


def said(how):
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here / "backends", here.parent / "src")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", STEPS, how], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_steps_have_the_same_bytes_with_what_is_kept_and_without():
    plain = said("plain")
    assert len(set(plain)) == len(plain) >= 24
    assert said("kept") == plain
