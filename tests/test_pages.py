"""Large pages: state that is large gets them where the system has them, and nothing is touched or moved by asking."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcondense.layout.pages import LARGE, advise

TESTS = str(Path(__file__).parent)
CHILD = """
import re, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from kvcondense import StatePool
from kvcondense.layout.pages import LARGE
from machine import SPECS

def large_kib():
    return sum(map(int, re.findall(r"AnonHugePages:\\s+(\\d+)", Path("/proc/self/smaps").read_text())))

spec = SPECS["hca"]
before = large_kib()
pool = StatePool.ring(spec, 24 * LARGE // (4 * spec.state_dim * 128) + 1, 128)
assert large_kib() == before, "nothing is touched yet"
pool.data.zero_()
assert large_kib() > before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has these pages")
def test_a_large_state_gets_them():
    """In a process of its own: an allocator that has freed as much gives memory that was touched before."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("this system has none")
    run = subprocess.run([sys.executable, "-c", CHILD, TESTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("size", [0, 5, LARGE // 4, 3 * LARGE])
def test_values_stay(size):
    t = torch.arange(size, dtype=torch.int32)
    assert advise(t) is t
    assert torch.equal(t, torch.arange(size, dtype=torch.int32))
    assert advise(torch.empty(4, device="meta")).is_meta
