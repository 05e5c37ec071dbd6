"""A process that compiles kernels: those of tests interpret them."""

import os
import subprocess
import sys


def compiling(*words):
    """What Python prints, called with these words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
