"""The scratch of a launch: no thread leaves its part, whatever windows are made of and however rows are read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcondense.backends.cpu import native

pytestmark = pytest.mark.skipif(native.problem() is not None, reason="the kernels cannot run here")
TESTS = Path(__file__).parent.parent

CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
from guarded import guarded
from kvcondense import CompressorSpec, RaggedBatch, StatePool, condense
from kvcondense.backends.cpu import scratch
from machine import rope, weights

scratch.of = lambda size: guarded(torch.zeros(size, dtype=torch.uint8)).data_ptr()  # ends at an unmapped page
torch.set_num_threads(1)
for ratio in (1, 3, 5, 12, 20, 128):
    for overlap in (False, True):
        spec = CompressorSpec(ratio=ratio, head_dim=256, eps=1e-6, rope_dim=8, overlap=overlap)
        w, tokens = weights(spec), 3 * ratio + 1
        kv = torch.randn(tokens, spec.projected, generator=torch.Generator().manual_seed(ratio))
        for token, state in ((torch.float32, torch.float32), (torch.float16, torch.float32),
                             (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
            values = []
            for impl in ("cpu", "reference"):
                pool = StatePool.ring(spec, 1, dtype=state)
                for start, stop in ((0, ratio + 1), (ratio + 1, tokens)):
                    batch = RaggedBatch.build([0, stop - start], start_positions=[start], state_slots=[0])
                    rows = condense(spec, kv[start:stop].to(token), w, rope(spec, tokens), batch, state=pool, impl=impl)
                values.append(rows.values)
            assert (values[0] - values[1]).abs().max() < 0.1, (ratio, overlap, token, state)
print("done")
"""


def test_no_launch_leaves_its_scratch():
    run = subprocess.run(
        [sys.executable, "-c", CHILD.format(tests=str(TESTS))], capture_output=True, text=True
    )  # a process of its own: who leaves the scratch ends it
    assert run.stdout == "done\n", (run.returncode, run.stderr[-2000:])


FORK = """
import ctypes, os
from kvcondense.backends.cpu import scratch
for size in (1 << 12, 1 << 20):
    ctypes.memset(scratch.of(size), 1, size)
    child = os.fork()
    if child == 0:
        ctypes.memset(scratch.of(size), 7, size)
        os._exit(ctypes.string_at(scratch.of(size), size) != bytes([7]) * size)
    assert os.waitpid(child, 0)[1] == 0
    assert ctypes.string_at(scratch.of(size), size) == bytes([1]) * size, size
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks of POSIX")
def test_a_fork_works_in_memory_of_its_own():
    """Large scratch is mapped by itself: were it shared, a child would write over what its parent works on."""
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr[-2000:]
