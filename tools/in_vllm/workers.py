"""What vLLM's worker processes need: the ground before vLLM is imported, the rest by an entry point."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from in_vllm import ground

RANKS = 2
_WHO, _COUNTS = "IN_VLLM_WHO", "IN_VLLM_COUNTS"


def prepare(folder: Path, who: str) -> None:
    """For workers that this process will start: a module that Python imports first, and a package with an entry point.

    Each worker has a core; nothing is compiled, since the ground has no compiler for kernels.
    """
    about = folder / "in_vllm-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: in_vllm\nVersion: 0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nin_vllm = in_vllm.workers:register\n", encoding="utf-8"
    )
    first = "from in_vllm import ground\n\nground.before_vllm()\n"
    (folder / "sitecustomize.py").write_text(first, encoding="utf-8")
    sys.path.insert(0, str(folder))
    os.environ.update(
        {
            "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))),
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(RANKS))),
            _WHO: who,
            _COUNTS: str(folder),
        }
    )


def register() -> None:
    """The entry point: in a worker, what ``engine.run`` does in its own process."""
    if current_process().name == "MainProcess":
        return
    ground.set_up(os.environ[_WHO])
    bound = import_module("kvcondense.bound").Bound
    condense, file = bound.condense, Path(os.environ[_COUNTS]) / f"steps-{os.getpid()}"
    file.touch()

    def counted(*given: Any, **named: Any) -> Any:
        with file.open("a", encoding="utf-8") as lines:  # a worker is killed in the end
            lines.write("\n")
        return condense(*given, **named)

    bound.condense = counted


def steps(folder: Path) -> list[int]:
    """The plugin's steps in each worker."""
    return [file.stat().st_size for file in sorted(folder.glob("steps-*"))]
