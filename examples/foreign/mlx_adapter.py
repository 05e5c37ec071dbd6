"""mlx-lm 0.32.2's compressor of V4.1 under the conformance kit, ratio 2, with its own RoPE, on MLX's CPU backend.

Files: the packages mlx-lm 0.32.2 and mlx[cpu] 0.32.2, installed, or in the folder ``mlx-lm`` as pip --target has them.
KVCONDENSE_PEERS=... PYTHONPATH=examples/foreign kvcondense conformance --adapter mlx_adapter:make
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import torch
from peers import MAIN, folder

from kvcondense import RaggedBatch
from kvcondense.conformance import Capabilities, Engine, Setup
from kvcondense.conformance.compressors import CONFIG
from kvcondense.errors import UnsupportedError


class Mlx(Engine):
    """Its module takes one sequence with a cache of its own, and is called for each request in turn. No drafts."""

    # Rows are fp32, sines and cosines MLX's: an ulp of an inverse frequency is 2e-4 of a value at position 2^20.
    capabilities = Capabilities(
        specs=(f"r2 {MAIN} format=fp32 rounding=fused page_rows=64",),
        max_draft=0,
        inert=False,
        unmapped=False,
        refuses=False,
        close=1e-3,
    )

    def __init__(self) -> None:
        with contextlib.suppress(UnsupportedError):  # installed, or not there at all
            sys.path.append(str(folder("mlx-lm", "mlx_lm")))
        try:
            self.mx = importlib.import_module("mlx.core")
            self.model = importlib.import_module("mlx_lm.models.deepseek_v41")
        except ImportError as error:
            raise UnsupportedError("mlx_adapter", "mlx[cpu] and mlx-lm 0.32.2", error) from error
        self.mx.set_default_device(self.mx.cpu)

    def init(self, setup: Setup) -> None:
        super().init(setup)
        spec, mx, yarn = setup.spec, self.mx, CONFIG.yarn
        assert yarn is not None
        sizes = {"hidden_size": spec.projected, "head_dim": spec.head_dim, "rms_norm_eps": spec.eps}
        self.net = self.model.Compressor(SimpleNamespace(compress_ratios=(spec.ratio,), **sizes), 0)
        eye = torch.eye(spec.projected)
        self.net.kv_proj.weight = mx.array(eye[: spec.width].numpy())
        self.net.gate_proj.weight = mx.array(eye[spec.width :].numpy())
        self.net.kv_norm.weight = mx.array(setup.weights.norm.numpy())
        self.rope = self.model.YarnRoPE(
            dims=spec.rope_dim, traditional=True, base=CONFIG.compress_rope_theta, scaling_factor=yarn.factor,
            original_max_position_embeddings=yarn.original_max_positions, beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow, mscale=0.0, mscale_all_dim=0.0,
        )  # fmt: skip
        self.caches = {}

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Latents of the windows that end, then RoPE."""
        assert batch.state_slots is not None
        assert batch.block_table is not None
        spec, rows = self.setup.spec, self.setup.page_rows
        bounds, starts = batch.query_start_loc.tolist(), batch.start_positions.tolist()
        for q, slot in enumerate(batch.state_slots.tolist()):
            if bounds[q] == bounds[q + 1]:
                continue
            if starts[q] == 0:
                self.caches[slot] = self.model.LayerCache(128)
            given = self.mx.array(kv_score[bounds[q] : bounds[q + 1]].numpy())[None]
            latent, first = self.net(given, starts[q], self.caches[slot])
            if latent is not None:
                turned = self.model._apply_rope(
                    latent, self.rope, rope_dim=spec.rope_dim, offset=first, scale=spec.ratio
                )
                found = torch.from_numpy(np.array(turned[0]))
                windows = first + torch.arange(found.shape[0])
                self.cache.rows[batch.block_table[q, windows // rows], windows % rows] = found

    def state(self, batch: RaggedBatch) -> torch.Tensor:
        assert batch.state_slots is not None
        cache = self.caches.get(int(batch.state_slots[0]))
        if cache is None or cache.pending_kv is None:
            return torch.zeros(0, self.setup.spec.state_dim)
        parts = (cache.pending_kv, cache.pending_gate)
        return torch.cat([torch.from_numpy(np.array(part[0])) for part in parts], dim=1)

    def put_state(self, batch: RaggedBatch, rows: torch.Tensor) -> None:
        assert batch.state_slots is not None
        cache = self.caches[int(batch.state_slots[0])] = self.model.LayerCache(128)
        kv, gate = (self.mx.array(part.contiguous().numpy())[None] for part in rows.chunk(2, dim=1))
        cache.pending_kv, cache.pending_gate = kv, gate

    def reset(self, slots: list[int]) -> None:
        for slot in slots:
            self.caches.pop(slot, None)


make = Mlx
