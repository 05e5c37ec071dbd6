"""vLLM's Triton kernels under the interpreter: V4's states and rows, V4.1's latents and records."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from engines.scenes import Kind, Memory, Scene, Step
from kvcondense import CompressorSpec, ModelConfig
from kvcondense.spec import Rounding

if TYPE_CHECKING:
    from engines.vllm_files import Files

NAME, PACKAGE = "vLLM, Triton", "vllm"
_FLASH, _V41 = ModelConfig.FLASH, ModelConfig.V41_FLASH
CSA = CompressorSpec.csa(_FLASH, rounding=Rounding.FUSED)
HCA = CompressorSpec.hca(_FLASH, rounding=Rounding.FUSED)
INDEXER = CompressorSpec.indexer(_FLASH, rounding=Rounding.FUSED, rotate=False)
PAIRS = CompressorSpec.for_layer(_V41, 2, rounding=Rounding.LATENT)
SINGLE = CompressorSpec.for_layer(_V41, 20, rounding=Rounding.LATENT)
# (tokens, rejected drafts) of three requests: prefill, a chunk, decode over boundaries, drafts.
FOUR = (
    ((190, 0), (63, 0), (0, 0)), ((7, 0), (1, 0), (13, 0)), ((1, 0), (4, 2), (1, 0)), ((1, 0), (1, 0), (1, 0)),
    ((1, 0), (5, 3), (1, 0)), ((1, 0), (1, 0), (1, 0)),
)  # fmt: skip
MANY = (
    ((898, 0), (378, 0), (0, 0)), ((100, 0), (3, 0), (5, 0)), ((24, 0), (4, 2), (121, 0)), ((1, 0), (1, 0), (1, 0)),
    ((1, 0), (1, 0), (1, 0)), ((1, 0), (1, 0), (1, 0)),
)  # fmt: skip
TWO = (
    ((91, 0), (34, 0), (0, 0)), ((6, 0), (1, 0), (21, 0)), ((1, 0), (4, 2), (1, 0)), ((1, 0), (6, 5), (1, 0)),
    ((1, 0), (1, 0), (3, 1)), ((1, 0), (1, 0), (1, 0)),
)  # fmt: skip
_LAYOUT = {"fp8_model1": (64, 576, 8), "mxfp4_indexer": (32, 64, 4)}
_FORMATS = ("mxfp8_v41_window_interleaved", "fp4_v41_times_interleaved", "fp8_model1", "bf16", "fp8_tensor")


def kinds() -> list[Kind]:
    """Every Triton kernel that pools, every record; without ROCm's tiles and cleaned NaNs and prefill over ranks."""
    main = ("without ape", "a slot further", "turned a window late")
    found = [
        Kind("V4 ratio 4, 584-byte rows", CSA, "fp8_model1", FOUR, 4, mutants=main),
        Kind("V4 ratio 128, 584-byte rows", HCA, "fp8_model1", MANY, 8),
        Kind("V4 ratio 128, ROCm's two launches", HCA, "fp8_model1", MANY, 8, variant="split"),
        _indexer("FP8", "fp8_indexer_pow2", ("rotated",)),
        _indexer("FP8 of SM100", "fp8_indexer_ue8m0"),
        _indexer("MXFP4", "mxfp4_indexer", ("rotated",)),
    ]
    for spec in (PAIRS, SINGLE):
        for form in _FORMATS:
            mutants = ("rounded as V4", "rounded as DeepSeek's code", "a slot further")
            found.append(_latent(spec, form, mutants if "fp4" in form else ()))
    return found


def _indexer(what: str, form: str, mutants: tuple[str, ...] = ()) -> Kind:
    return Kind(f"V4 indexer, {what}", INDEXER, form, FOUR, 4, mutants=mutants, named=form != "mxfp4_indexer")


def _latent(spec: CompressorSpec, form: str, mutants: tuple[str, ...]) -> Kind:
    # vLLM makes the ring of drafts + 2 rows, at least 8, up to a power of two.
    rows = max(8, 1 << math.ceil(math.log2(5 + 2)))
    return Kind(
        f"V4.1 ratio {spec.ratio}, {form}", spec, form, TWO, rows, ring=True, mutants=mutants,
        named="interleaved" in form,
    )  # fmt: skip


def opened(packages: Path) -> Callable[[Scene, Memory, Step], None] | str:
    """A step on vLLM's kernels, or why there is none."""
    package = packages / PACKAGE / "vllm"
    if not package.is_dir():
        return f"not installed: {PACKAGE}"
    try:
        from engines import vllm_files  # Triton and ml_dtypes

        files = vllm_files.load(package)
    except (ImportError, AttributeError) as error:
        return f"its files do not load: {error}"

    def step(scene: Scene, memory: Memory, given: Step) -> None:
        (_v41 if scene.kind.ring else _v4)(files, scene, memory, given)

    return step


def _v4(files: Files, scene: Scene, memory: Memory, step: Step) -> None:
    spec, kind, state = scene.spec, scene.kind, memory.state
    assert state is not None
    assert scene.weights.ape is not None
    kv, score = step.tokens.split([spec.width, spec.width], dim=1)
    rows = {"block_size": state.shape[1], "state_width": spec.width, "compress_ratio": spec.ratio, "pdl_kwargs": {}}
    files.save(
        kv=kv, score=score, ape=scene.weights.ape, positions=step.positions, state_cache=state,
        slot_mapping=step.state_slots, **rows,
    )  # fmt: skip
    files.set_mx_scales(kind.format == "fp8_indexer_ue8m0")
    block, stride, scales = _LAYOUT.get(kind.format, (128, 128, 4))
    split = {}
    if kind.variant == "split":
        split = {"num_decode_tokens": 0, "compress_scratch": torch.zeros(step.tokens.shape[0], spec.head_dim)}
    store = files.store_split if split else files.store
    store(
        state_cache=state,
        num_actual=step.state_slots.shape[0],
        token_to_req_indices=step.requests,
        positions=step.positions,
        slot_mapping=step.state_slots,
        block_table=scene.table,
        cos_sin_cache=scene.cos_sin,
        kv_cache=scene.rows(memory),
        k_cache_metadata=SimpleNamespace(slot_mapping=step.cache_slots),
        head_dim=spec.head_dim,
        rope_head_dim=spec.rope_dim,
        overlap=spec.overlap,
        use_fp4_cache=kind.format == "mxfp4_indexer",
        rms_norm_weight=scene.weights.norm,
        rms_norm_eps=spec.eps,
        quant_block=block,
        token_stride=stride,
        scale_dim=scales,
        **rows,
        **split,
    )


def _v41(files: Files, scene: Scene, memory: Memory, step: Step) -> None:
    spec, tokens = scene.spec, step.tokens
    latent = torch.full((tokens.shape[0], spec.head_dim), 3.0, dtype=torch.bfloat16)
    files.latent(
        tokens, step.positions, memory.state, step.state_slots if spec.ratio > 1 else step.cache_slots,
        step.query_start_loc, step.requests, scene.weights.norm.bfloat16(), spec.eps, spec.ratio, latent,
    )  # fmt: skip
    cache = scene.rows(memory)
    files.insert(latent, step.positions, scene.cos_sin, cache, step.cache_slots, spec.ratio, fp8_scale=scene.scale)
