"""Whether the plugin fits the vLLM that is installed: its version, and what the classes that it changes look like."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

OLDEST, BELOW = (0, 32), (0, 34)
"""Versions of vLLM whose sources were read: the first, and the first that was not."""
BASE = "vllm.models.deepseek_v4.compressor", "DeepseekCompressor"
"""Module and class of the compressor; subclasses whose own forward is replaced, too, follow."""
OTHERS = (("vllm.models.deepseek_v4.cpu.cpu_compressor", "DeepseekV4CPUCompressor"),)
OURS = "kvcondense"
"""An attribute of forwards that are exchanged."""
_TAKES = ["self", "kv_score", "positions", "rotary_emb"]
_METADATA = {"block_table", "slot_mapping", "block_size", "token_to_req_indices"}


@dataclass(frozen=True)
class Support:
    """version: vLLM's, None without one. device: its platform's. replaced: classes whose forward is exchanged. why:
    the reason why none is; empty if some are.
    """

    version: str | None
    device: str | None
    replaced: tuple[type, ...]
    why: str

    def as_dict(self) -> dict[str, Any]:
        """As ``kvcondense info --vllm --json`` has it."""
        names = [f"{c.__module__}.{c.__qualname__}" for c in self.replaced]
        return {"version": self.version, "device": self.device, "replaced": names, "why": self.why}


def support() -> Support:
    """What ``install`` would replace here, or why nothing. Imports vLLM, if there is one, and changes nothing."""
    if find_spec("vllm") is None:
        return Support(None, None, (), "vllm is not installed")
    try:
        version = import_module("vllm").__version__
        device = import_module("vllm.platforms").current_platform.device_type
    except Exception as error:  # an installation can be broken in many ways
        return Support(None, None, (), f"vllm cannot be imported ({error})")
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdecimal())
    if not OLDEST <= numbers < BELOW:
        asked = f"{_text(OLDEST)} or later, before {_text(BELOW)}"
        return Support(version, device, (), f"expected vLLM {asked}, got {version}")
    try:
        base = getattr(import_module(BASE[0]), BASE[1])
        metadata = import_module(BASE[0]).CompressorMetadata
    except Exception as error:
        return Support(version, device, (), f"{'.'.join(BASE)} cannot be imported ({error})")
    lacking = _METADATA - {field.name for field in dataclasses.fields(metadata)}
    if lacking:
        return Support(version, device, (), f"expected CompressorMetadata with {', '.join(sorted(lacking))}")
    found = [base]
    for module, name in OTHERS:
        try:
            found.append(getattr(import_module(module), name))
        except Exception:  # another platform's, or none of this version's
            continue
    for one in found:
        takes = list(inspect.signature(_original(one)).parameters)
        if takes != _TAKES:
            return Support(version, device, (), f"expected {one.__name__}.forward({', '.join(_TAKES)}), got {takes}")
    return Support(version, device, tuple(found), "")


def _original(one: type) -> Any:
    """A class's forward as vLLM has it, whether it is replaced by now or not."""
    forward: Any = inspect.getattr_static(one, "forward")
    return forward.__wrapped__ if hasattr(forward, OURS) else forward


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
