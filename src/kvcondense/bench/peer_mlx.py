"""mlx-lm's compressor of DeepSeek-V4.1 on MLX's CPU backend, where ``mlx`` and ``mlx_lm`` can be imported.

Module, RoPE and rows that are appended follow one another as in its attention layer, but for rounding rows to FP4 and
back in between: what it costs would be an emulation's. Steps from x are not timed either, since MLX's wheel for Linux
brings the reference BLAS.
"""

from __future__ import annotations

import copy
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvcondense.bench.cases import V41_FORMAT, Inputs


@functools.cache
def modules() -> tuple[Any, Any] | None:
    """MLX, on the CPU from now on, and mlx-lm's model of V4.1; None where they are not, or are without one."""
    try:
        mx, model = (importlib.import_module(name) for name in ("mlx.core", "mlx_lm.models.deepseek_v41"))
    except (ImportError, OSError):  # its library may be another processor's
        return None
    mx.set_default_device(mx.cpu)
    return mx, model


def there() -> bool:
    """True if the module could be imported."""
    return modules() is not None


class MlxLm:
    """``Compressor`` and ``YarnRoPE`` of ``mlx_lm.models.deepseek_v41``; ``kv_score`` in the place of projections."""

    name = "mlx-lm"
    note = "its graph made and evaluated, on one thread; rows kept in fp32, buffers copied, nothing paged or quantised"
    capturable, hidden = False, False
    kinds, format = ("r2",), V41_FORMAT

    def __init__(self, inputs: Inputs) -> None:
        found = modules()
        assert found is not None
        self.mx, self.model = found
        self.inputs, self.spec = inputs, inputs.case.spec
        spec, d = self.spec, self.spec.head_dim
        sizes = {"hidden_size": spec.projected, "head_dim": d, "rms_norm_eps": spec.eps}
        self.net = self.model.Compressor(SimpleNamespace(compress_ratios=(spec.ratio,), **sizes), 0)
        self.net.kv_proj, self.net.gate_proj = (lambda t: t[..., :d]), (lambda t: t[..., d:])
        self.net.kv_norm.weight = self._array(inputs.norm)
        self.rope = self.model.YarnRoPE(
            dims=spec.rope_dim, traditional=True, base=inputs.case.config.compress_rope_theta, mscale=0.0,
            mscale_all_dim=0.0,
        )  # fmt: skip

    def _array(self, tensor: torch.Tensor) -> Any:
        made = self.mx.array(tensor.numpy())
        self.mx.eval(made)
        return made

    def primed(self) -> dict[str, Any]:
        state = {"cache": self.model.LayerCache(128), "position": 0, "new": self._array(self.inputs.new)}
        if self.inputs.case.start:
            self.feed(state, self.inputs.history)
        return state

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "cache": copy.copy(state["cache"])}  # a step puts new arrays there, and changes none

    def step(self, state: dict[str, Any]) -> None:
        self._take(state, state["new"])

    def feed(self, state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        before = state["position"] // self.spec.ratio
        self._take(state, self._array(tokens))
        rows = state["cache"].compress_kv
        if rows is None:
            return tokens.new_zeros(tokens.shape[0], 0, self.spec.head_dim)
        return torch.from_numpy(np.array(rows))[:, before:]

    def _take(self, state: dict[str, Any], tokens: Any) -> None:
        """MLX is lazy: what the cache holds is computed when this returns."""
        spec, cache = self.spec, state["cache"]
        latent, first = self.net(tokens, state["position"], cache)
        state["position"] += tokens.shape[1]
        if latent is not None:
            rows = self.model._apply_rope(latent, self.rope, rope_dim=spec.rope_dim, offset=first, scale=spec.ratio)
            cache.compress_kv = self.model._append(cache.compress_kv, rows)
        kept = (cache.compress_kv, cache.pending_kv, cache.pending_gate)
        self.mx.eval([array for array in kept if array is not None])
