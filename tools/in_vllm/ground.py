"""What vLLM for CPUs needs to run at all here: Triton's interpreter, plain torch for operators, keys that it forgot."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from in_vllm import tiny

COMPRESSOR = "save_partial_states_cpu", "compress_norm_rope_store_cpu", "compress_norm_rope_store_indexer_cpu"


def before_vllm() -> None:
    """Triton's interpreter in the place of triton-cpu, which makes vLLM's metadata; one process, a gigabyte."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    triton = import_module("triton")
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    import_module("triton.backends").backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    assert triton.backends.backends


def after_vllm() -> dict[str, Any]:
    """Stand-ins for operators that this build lacks, and a mended builder: what was done, for the result."""
    from engines import interpreter

    from in_vllm import stand_ins

    import_module("vllm.platforms").current_platform.import_kernels()
    import_module("vllm._custom_ops")  # first: it registers what it knows of operators that are there
    interpreter.correct()
    lacking = [name for name in COMPRESSOR if not hasattr(torch.ops._C, name)]
    return {
        "compressor": "Triton, interpreted" if lacking else "C++",
        "lacking": lacking,
        "stood_in": stand_ins.install(),
        "mended": _mend(),
    }


def compressors() -> tuple[type, type]:
    """vLLM's compressor for CPUs and the one that it comes from."""
    cpu = import_module("vllm.models.deepseek_v4.cpu.cpu_compressor").DeepseekV4CPUCompressor
    return cpu, import_module("vllm.models.deepseek_v4.compressor").DeepseekCompressor


def set_up(who: str) -> dict[str, Any]:
    """``after_vllm`` in a process of an engine, whose model has random weights; who "own": vLLM's own compressor."""
    found = after_vllm()
    if who == "own":
        compressors()[0].forward = own_forward(found)  # type: ignore[attr-defined]
    import_module("vllm.model_executor.model_loader.dummy_loader").DummyModelLoader.load_weights = tiny.randomise
    return found


def own_forward(found: dict[str, Any]) -> Callable[..., None]:
    """vLLM's own forward, as it is without the plugin: its C++ operators, or its Triton kernels where it lacks them."""
    cpu, base = compressors()
    forward: Any = vars(cpu if found["compressor"] == "C++" else base)["forward"]
    return getattr(forward, "__wrapped__", forward)


def _mend() -> list[str]:
    """vLLM 0.32: a builder of metadata returns three keys of five that its caller reads."""
    builder = import_module("vllm.models.deepseek_v4.cpu.cpu_mla").DeepseekV4CPUSparseSWAMetadataBuilder
    theirs = builder.build_tile_scheduler
    given = theirs(None, 0)
    names = vars(import_module("vllm.v1.attention.backends.mla.sparse_swa"))
    wanted = {names[name] for name in ("_LAYER_TYPE_C1A", "_LAYER_TYPE_C2A") if name in names}
    if wanted <= set(given):
        return []
    builder.build_tile_scheduler = lambda self, count: dict.fromkeys(wanted) | theirs(self, count)
    return [f"{builder.__name__}.build_tile_scheduler lacks {', '.join(sorted(wanted - set(given)))}"]
