"""vLLM's Triton files, loaded from its package one by one: stand-ins for what they import of the rest of vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import triton
from triton import language

from engines import interpreter

_V4, _V41 = "vllm.models.deepseek_v4.common.ops", "vllm.models.deepseek_v41.common.ops"


class JitKernel:
    """In the place of ``VllmTritonJitKernel``, whose subscript and warm-up do nothing here."""

    kernel: Any

    def __class_getitem__(cls, _: object) -> type:
        return cls


def launcher(describe: Callable[..., Any]) -> Callable[..., None]:
    """In the place of ``kernel_launcher``: launches what the method describes, arguments found by their names."""

    def launch(self: JitKernel, **given: Any) -> None:
        grid, described = describe(self, **given)
        kernel = described.pop("kernel", self.kernel)
        known = {**given, **described}
        known.pop("pdl_kwargs", None)
        names = kernel.arg_names
        kernel[grid](**{name: known[name] if name in known else known[name.removesuffix("_ptr")] for name in names})

    return launch


@dataclass
class Files:
    """The functions that write states and caches. ``mx_scales``: SM100's scales in the indexer's FP8 rows."""

    save: Any
    store: Any
    latent: Any
    insert: Any
    module: ModuleType

    @property
    def store_split(self) -> Any:
        """ROCm's two launches for ratio 128: channels in parts, then the norm."""
        self.module._n_cu = lambda: 8  # pyright: ignore[reportAttributeAccessIssue]
        return self.module.compress_norm_rope_store_two_stage_triton

    def set_mx_scales(self, on: bool) -> None:
        """As ``mqa_logits_use_mx_scales`` would answer."""
        self.module.mqa_logits_use_mx_scales = lambda: on  # pyright: ignore[reportAttributeAccessIssue]


def load(package: Path) -> Files:
    """The files in ``package``, vLLM's own folder; its ``__init__`` files do not run."""
    interpreter.correct()
    platform = SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False)
    stand_in("vllm.platforms", current_platform=platform)
    stand_in("vllm.triton_utils", tl=language, triton=triton)
    stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2, round_up=lambda x, y: -(-x // y) * y)
    stand_in("vllm.utils.import_utils", has_cutedsl=lambda: False)
    stand_in("vllm.utils.deep_gemm", mqa_logits_use_mx_scales=lambda: False)
    stand_in("vllm.model_executor.warmup.jit_warmup", kernel_launcher=launcher)
    helper = "vllm.model_executor.warmup.jit_warmup_triton_helper"
    stand_in(helper, LaunchSpec=tuple, TritonWarmupTensor=object, VllmTritonJitKernel=JitKernel)
    for name in ("vllm.v1.attention.ops", _V4, _V41):
        sys.modules.pop(name, None)
        stand_in(name).__path__ = [str(package.joinpath(*name.split(".")[1:]))]
    save = importlib.import_module(f"{_V4}.save_partial_states")
    fused = importlib.import_module(f"{_V4}.fused_compress_quant_cache")
    latent = importlib.import_module(f"{_V41}.fused_compress_quant_cache")
    for module in (fused, latent):
        module._fp32x2_to_fp4x2 = interpreter.e2m1_pair  # pyright: ignore[reportAttributeAccessIssue]
    return Files(
        save._SAVE_PARTIAL_STATES_KERNEL,
        fused.compress_norm_rope_store_triton,
        latent.fused_save_compress_norm,
        latent.rope_quant_insert,
        fused,
    )


def stand_in(name: str, **values: Any) -> ModuleType:
    """A module of that name, and the packages above it."""
    above = name.rpartition(".")[0]
    if above and above not in sys.modules:
        stand_in(above)
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = []
    vars(sys.modules[name]).update(values)
    return sys.modules[name]
