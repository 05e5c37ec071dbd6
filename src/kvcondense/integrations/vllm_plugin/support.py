"""Whether the plugin fits the vLLM that is installed: its version, and what the classes that it changes look like."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

OLDEST, BELOW = (0, 32), (0, 34)
"""Versions of vLLM whose sources were read: the first, and the first that was not."""
OURS = "kvcondense"
"""An attribute of forwards that are exchanged."""


@dataclass(frozen=True)
class Family:
    """A generation's compressor in vLLM: the module of ``DeepseekCompressor`` and ``CompressorMetadata``, subclasses
    whose own forward is replaced, too, what forwards take, and fields of the metadata that are read.
    """

    name: str
    module: str
    takes: tuple[str, ...]
    metadata: frozenset[str]
    others: tuple[tuple[str, str], ...] = ()


V4 = Family(
    "V4",
    "vllm.models.deepseek_v4.compressor",
    ("self", "kv_score", "positions", "rotary_emb"),
    frozenset({"block_table", "slot_mapping", "block_size", "token_to_req_indices"}),
    (("vllm.models.deepseek_v4.cpu.cpu_compressor", "DeepseekV4CPUCompressor"),),
)
V41 = Family(
    "V4.1",
    "vllm.models.deepseek_v41.compressor",
    ("self", "kv_score", "positions"),
    frozenset({"query_start_loc", "slot_mapping"}),
)


@dataclass(frozen=True)
class Support:
    """version: vLLM's, None without one. device: its platform's. why: the reason why no forward is exchanged; empty if
    some are. classes: those whose forward is, by the name of their family. left: families that are not, with reasons.
    """

    version: str | None
    device: str | None
    why: str
    classes: dict[str, tuple[type, ...]] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[type, ...]:
        """All classes whose forward is exchanged."""
        return tuple(one for classes in self.classes.values() for one in classes)

    def as_dict(self) -> dict[str, Any]:
        """As ``kvcondense info --vllm --json`` has it."""
        names = [named(one) for one in self.replaced]
        return {
            "version": self.version,
            "device": self.device,
            "replaced": names,
            "left": list(self.left),
            "why": self.why,
        }


def support() -> Support:
    """What ``install`` would replace here, or why nothing. Imports vLLM, if there is one, and changes nothing."""
    if find_spec("vllm") is None:
        return Support(None, None, "vllm is not installed")
    try:
        version = import_module("vllm").__version__
        device = import_module("vllm.platforms").current_platform.device_type
    except Exception as error:  # an installation can be broken in many ways
        return Support(None, None, f"vllm cannot be imported ({error})")
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdecimal())
    if not OLDEST <= numbers < BELOW:
        asked = f"{_text(OLDEST)} or later, before {_text(BELOW)}"
        return Support(version, device, f"expected vLLM {asked}, got {version}")
    classes, left = {}, []
    for family in (V4, V41):
        found = _classes(family)
        if isinstance(found, str):
            left.append(f"{family.name}: {found}")
        else:
            classes[family.name] = found
    return Support(version, device, "" if classes else "; ".join(left), classes, tuple(left))


def named(one: type) -> str:
    """A class with its module: both families have one called ``DeepseekCompressor``."""
    return f"{one.__module__}.{one.__qualname__}"


def _classes(family: Family) -> tuple[type, ...] | str:
    """The classes whose forward is replaced, or why none is."""
    try:
        module = import_module(family.module)
        found, metadata = [module.DeepseekCompressor], module.CompressorMetadata
    except Exception as error:
        return f"{family.module} cannot be imported ({error})"
    lacking = family.metadata - {one.name for one in dataclasses.fields(metadata)}
    if lacking:
        return f"expected CompressorMetadata with {', '.join(sorted(lacking))}"
    for name, other in family.others:
        try:
            found.append(getattr(import_module(name), other))
        except Exception:  # another platform's, or none of this version's
            continue
    for one in found:
        takes = tuple(inspect.signature(_original(one)).parameters)
        if takes != family.takes:
            return f"expected {one.__name__}.forward({', '.join(family.takes)}), got {list(takes)}"
    return tuple(found)


def _original(one: type) -> Any:
    """A class's forward as vLLM has it, whether it is replaced by now or not."""
    forward: Any = inspect.getattr_static(one, "forward")
    return forward.__wrapped__ if hasattr(forward, OURS) else forward


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
