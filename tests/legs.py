"""Tools that run engines, without any engine: modules of their packages, and what they say of themselves."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

TOOLS = Path(__file__).parent.parent / "tools"


def modules(package, *names):
    """Of a package in tools/: those that need neither an engine nor Triton's interpreter."""
    sys.path.insert(0, str(TOOLS))
    try:
        return tuple(import_module(f"{package}.{name}") for name in names)
    finally:
        sys.path.remove(str(TOOLS))


def check_help(tool, example):
    """``--help`` has an example, and says what exit status 1 means."""
    command = [sys.executable, TOOLS / tool, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert example in done.stdout
    assert "Exit status 1" in done.stdout
