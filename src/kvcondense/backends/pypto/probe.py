"""What stands between this process and a program in pypto.language: the package, the assembler, compilers, a chip."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from pathlib import Path

PLATFORMS = {"a2a3sim": "Ascend910B", "a5sim": "Ascend950", "a2a3": "Ascend910B", "a5": "Ascend950"}
"""Platform -> what programs are compiled for; those that end in "sim" run on this processor."""
_VARIABLE = "KVCONDENSE_PYPTO_PLATFORM"


def platform() -> str:
    """Where steps run: a simulator, unless the environment names another."""
    return os.environ.get(_VARIABLE, "a2a3sim")


def simulated() -> bool:
    """Whether that is this processor."""
    return platform().endswith("sim")


@functools.cache
def problem(name: str) -> str | None:
    """Why no program runs on the platform called ``name``, in a sentence; None if nothing is missing."""
    if name not in PLATFORMS:
        return f"{_VARIABLE} is {name}, which is none of {', '.join(PLATFORMS)}"
    missing = _package() or _assembler()
    if missing is not None:
        return missing
    if name.endswith("sim"):
        if shutil.which("g++-15") is None:
            return "the simulator compiles kernels with g++-15, which is not on PATH"
        return None
    return None if _chip() else f"{name} needs an NPU and its driver (no /dev/davinci*)"


def _package() -> str | None:
    """PyPI's ``pypto`` is another project of that name: one without ``language.program``."""
    if importlib.util.find_spec("pypto") is None:
        return "pypto (hw-native-sys/pypto, built from its sources) is not installed"
    try:
        language = importlib.util.find_spec("pypto.language")
    except (ImportError, OSError) as error:
        return f"pypto cannot be imported: {error}"
    if language is None:
        return "the installed pypto is another project of that name: it has no pypto.language"
    try:
        import pypto.language as pl  # pyright: ignore[reportMissingImports]
    except Exception as error:
        return f"pypto.language cannot be imported: {error}"
    return None if hasattr(pl, "program") else "the installed pypto.language has no program"


def _assembler() -> str | None:
    root = os.environ.get("PTOAS_ROOT")
    found = (Path(root) / "ptoas").is_file() if root else shutil.which("ptoas") is not None
    return None if found else "the assembler ptoas is neither in PTOAS_ROOT nor on PATH"


def _chip() -> bool:
    return any(Path("/dev").glob("davinci[0-9]*"))
