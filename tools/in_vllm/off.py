"""The plugin where it must touch nothing: without its variable, and in a vLLM whose sources nobody read."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from in_vllm import ground

MODES = ("without the variable", "another version", "switched on")
"""The last one must be seen to change something."""


def run(mode: str, say: Callable[[str], None]) -> dict[str, Any]:
    """What vLLM's own loading of plugins does to the compressors in this process."""
    ground.before_vllm()
    os.environ["KVCONDENSE_VLLM"] = "0" if mode == MODES[0] else "1"
    vllm: Any = import_module("vllm")
    if mode == MODES[1]:
        vllm.__version__ = "0.31.0"
    before, notices = _forwards(), _Notices()
    logging.getLogger("vllm.kvcondense").addHandler(notices)
    say("load_general_plugins")
    import_module("vllm.plugins").load_general_plugins()
    touched = any(one is not other for one, other in zip(before, _forwards(), strict=True))
    imported = "kvcondense" in sys.modules
    right = {
        MODES[0]: not touched and not imported and not notices.texts,
        MODES[1]: not touched and len(notices.texts) == 1,
        MODES[2]: touched,
    }
    return {
        "check": mode,
        "status": "PASS" if right[mode] else "FAIL",
        "touched": touched,
        "imported": imported,
        "notices": notices.texts,
    }


def _forwards() -> list[Any]:
    return [vars(one)["forward"] for one in ground.compressors()]


class _Notices(logging.Handler):
    """Texts of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
