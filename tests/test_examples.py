"""The examples run as a reader would run them, say what they should, and stay short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = EXAMPLES / "compress_text.py"
TWO_RANKS = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
RUNS = {  # name: how to run it, what it says, what it must not say
    "compress_text": ((TEXT,), f"CSA: {TEXT.stat().st_size} tokens -> {TEXT.stat().st_size // 4} rows", "nan"),
    "serve": (("serve.py",), "request 1: 15 rows equal, byte for byte", "DIFFER"),
    "engine": (("engine.py",), "[1, 3] tokens", "Error"),
    "train": (("train.py",), "\nlearned", "NOT"),
    "train_ranks": ((*TWO_RANKS, "train_ranks.py"), "FSDP, one sequence: gradients of one process", "DIFFER"),
    "generate": (("generate.py", "--contexts", "64", "192"), "greedy tokens: the same", "DIFFERENT"),
    "context_parallel": ((*TWO_RANKS, "context_parallel.py", "--tokens", "700"), "512 channels: 4 rows", "DIFFERS"),
    "adapter": (("-m", "kvcondense", "conformance", "--adapter", "adapter:make"), "PASS  I2 rollback", "FAIL"),
}


def test_every_example_is_run_and_short():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(RUNS)
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name):
    words, wanted, unwanted = RUNS[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [sys.executable, *words], cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert wanted in done.stdout
    assert unwanted not in done.stdout
