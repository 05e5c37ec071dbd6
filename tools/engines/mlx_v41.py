"""mlx-lm's V4.1 compressor on MLX's CPU backend: rows in fp32, and the rows of a window that is open."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from engines.scenes import Kind, Memory, Scene, Step
from engines.vllm_triton import PAIRS, SINGLE, TWO
from kvcondense import ModelConfig
from kvcondense.spec import Rounding

NAME, PACKAGE = "mlx-lm", "mlx-lm"
_CONFIG = ModelConfig.V41_FLASH
CLOSE = 2.0**-18
"""Rows are fp32: sums, sines and cosines of another library. An angle up to 2^7, rounded once, is off by 2^-18."""


def kinds() -> list[Kind]:
    """Both ratios. It has no drafts, so those of the scene are left out."""
    steps = tuple(tuple((tokens - rejected, 0) for tokens, rejected in step) for step in TWO)
    found = []
    for spec in (PAIRS, SINGLE):
        mutants = ("turned a window late", "rounded as DeepSeek's code")
        fused = replace(spec, rounding=Rounding.FUSED)
        found.append(
            Kind(
                f"V4.1 ratio {spec.ratio}, fp32", fused, "fp32", steps, 8, ring=True, mutants=mutants, close=CLOSE,
            )
        )  # fmt: skip
    return found


def opened(packages: Path) -> Callable[[Scene, Memory, Step], None] | str:
    """A step on mlx-lm's module, or why there is none."""
    del packages  # it is installed as any package
    try:
        mx, np, model = (importlib.import_module(n) for n in ("mlx.core", "numpy", "mlx_lm.models.deepseek_v41"))
    except ImportError as error:
        return f"not installed: {PACKAGE} ({error})"
    mx.set_default_device(mx.cpu)

    def step(scene: Scene, memory: Memory, given: Step) -> None:
        spec = scene.spec
        memory.peer = memory.peer or _net(scene, mx, model)
        net, rope, live = memory.peer
        bounds, starts = given.query_start_loc.tolist(), (given.seq_lens - given.query_start_loc.diff()).tolist()
        for request in range(scene.count):
            low, high = bounds[request : request + 2]
            if low == high:
                continue
            tokens = mx.array(given.tokens[low:high].numpy())[None]
            cache = live.setdefault(request, model.LayerCache(128))
            latent, first = net(tokens, starts[request], cache)
            if latent is not None:
                rows = model._apply_rope(latent, rope, rope_dim=spec.rope_dim, offset=first, scale=spec.ratio)
                rows = torch.from_numpy(np.array(rows[0]))
                slots = given.cache_slots[low:high]
                ends = (given.positions[low:high] + 1) % spec.ratio == 0
                for slot, row in zip(slots[ends].tolist(), rows, strict=True):
                    if slot >= 0:
                        scene.rows(memory)[slot // 64, slot % 64] = row
            if memory.state is not None and cache.pending_kv is not None:
                pending = [torch.from_numpy(np.array(part[0])) for part in (cache.pending_kv, cache.pending_gate)]
                at = torch.arange(int(given.seq_lens[request]) - pending[0].shape[0], int(given.seq_lens[request]))
                memory.state[int(scene.table[request, 0]), at % 8] = torch.cat(pending, dim=1)

    return step


def _net(scene: Scene, mx: Any, model: Any) -> tuple[Any, Any, dict[int, Any]]:
    """Its compressor with projections that pick kv and score out of a token of both."""
    spec, d = scene.spec, scene.spec.head_dim
    sizes = {"hidden_size": spec.projected, "head_dim": d, "rms_norm_eps": spec.eps}
    net = model.Compressor(SimpleNamespace(compress_ratios=(spec.ratio,), **sizes), 0)
    eye = torch.eye(spec.projected)
    net.kv_proj.weight = mx.array(eye[:d].numpy())
    if spec.has_gate:
        net.gate_proj.weight = mx.array(eye[d:].numpy())
    net.kv_norm.weight = mx.array(scene.weights.norm.numpy())
    yarn = _CONFIG.yarn
    assert yarn is not None
    rope = model.YarnRoPE(
        dims=spec.rope_dim, traditional=True, base=_CONFIG.compress_rope_theta, scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_positions, beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow, mscale=0.0, mscale_all_dim=0.0,
    )  # fmt: skip
    return net, rope, {}
