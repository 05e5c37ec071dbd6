"""Runs a script in as many processes as there are ranks, which meet over gloo, and returns what each said."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def play(script, ranks, tmp_path, *words):
    """(output, exit status) by rank of: python SCRIPT WORDS RANK RANKS FILE."""
    tmp_path.mkdir(exist_ok=True)
    started = [
        subprocess.Popen(
            [sys.executable, TESTS / script, *words, str(rank), str(ranks), tmp_path / "store"], env=ENVIRONMENT,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return [(process.communicate(timeout=150)[0], process.returncode) for process in started]
