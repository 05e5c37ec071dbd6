"""What vLLM's compressor modules are bound to: weights, angles, states and caches where vLLM has them by now."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvcondense.bound import Bound
from kvcondense.errors import KvCondenseError
from kvcondense.integrations import vllm
from kvcondense.integrations.vllm_plugin.support import Support
from kvcondense.layout.memory import version
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

log = logging.getLogger("vllm.kvcondense")  # vLLM's own handler shows what is below "vllm"
Make = Callable[[CompressorWeights, RopeTable | None], Bound]
_layers: weakref.WeakKeyDictionary[Any, Layer] = weakref.WeakKeyDictionary()
_angles = WeakTensorKeyDictionary()


@dataclass
class Layer:
    """A module's compressor, bound to the memory that lay at ``places``; without one, vLLM's own forward runs.

    table: vLLM's own angles, if rows are rotated; angles: what was copied of them. copies: of weights that are narrower
    there, (ours, vLLM's).
    """

    bound: Bound | None
    places: tuple[Any, ...]
    table: torch.Tensor | None
    angles: Angles | None = None
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()


@dataclass
class Angles:
    """A copy of vLLM's table, for all modules that share that, and the ``version`` that was copied."""

    table: RopeTable
    version: int | None

    def follow(self, cos_sin_cache: torch.Tensor) -> None:
        """Take over what vLLM's table has become in place, in place: captured graphs read this one."""
        now = version(cos_sin_cache)
        if self.version != now:
            new, self.version = vllm.rope(cos_sin_cache), now
            self.table.cos.copy_(new.cos)
            self.table.sin.copy_(new.sin)


def layer_of(
    module: Any,
    found: Support,
    memory: tuple[torch.Tensor | None, ...],
    make: Make,
    table: torch.Tensor | None = None,
) -> Layer:
    """What a module is bound to, with what was copied as vLLM has it by now.

    ``make`` binds it anew if vLLM has moved its weights, ``memory`` or ``table`` of angles.
    """
    weights = tuple(None if t is None else t.detach() for t in (module.norm.weight, getattr(module, "ape", None)))
    tensors = (*weights, *memory, table)
    places = tuple(None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
    layer = _layers.get(module)
    if layer is None or layer.places != places or layer.table is not table:
        layer = _layers[module] = _bound(module, found, Layer(None, places, table), weights, make)
    for mine, theirs in layer.copies:  # weights can be loaded anew in place: a captured graph copies them, too
        mine.copy_(theirs)
    if layer.angles is not None and table is not None:
        layer.angles.follow(table)
    return layer


def _bound(module: Any, found: Support, layer: Layer, weights: tuple[Any, ...], make: Make) -> Layer:
    why = _why_not(module, found)
    if why is None:
        try:
            with torch.inference_mode(False):  # a later pass may not be in that mode, and copies anew
                layer.angles = None if layer.table is None else _angles_of(layer.table)
                layer.bound = bound = make(CompressorWeights(*weights), layer.angles and layer.angles.table)
            pairs = zip((bound.weights.norm, bound.weights.ape), weights, strict=True)
            layer.copies = tuple((mine, its) for mine, its in pairs if mine is not None and mine is not its)
            return layer
        except KvCondenseError as error:
            layer.angles, why = None, str(error)
    log.warning("kvcondense: %s stays vLLM's: %s", module.prefix, why)
    return layer


def _why_not(module: Any, found: Support) -> str | None:
    """Why a module is none that a step of ours does the same as; None if it is one."""
    if type(module) not in found.replaced:
        return f"{type(module).__name__} may write a cache of its own"
    if found.device not in ("cpu", "cuda") or torch.version.hip:
        return f"it was not tried on {'ROCm' if torch.version.hip else found.device}"
    ranks = getattr(module, "pcp_size", 1)
    if ranks > 1:
        return f"its prompts are dealt out over {ranks} ranks (prefill context parallel)"
    try:
        ranks = import_module("vllm.distributed").get_dcp_group().world_size
    except (AssertionError, AttributeError):  # not initialised, or a version without it
        ranks = 1
    return None if ranks == 1 else f"its tokens are dealt out over {ranks} ranks (decode context parallel)"


def _angles_of(cos_sin_cache: torch.Tensor) -> Angles:
    """The copy that all modules share which share vLLM's table."""
    found: Angles | None = _angles.get(cos_sin_cache)
    if found is None:
        found = _angles[cos_sin_cache] = Angles(vllm.rope(cos_sin_cache), version(cos_sin_cache))
    return found
