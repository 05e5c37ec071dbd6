"""ROCm ATOM's Triton compressor (ROCm/ATOM ffdf3bb5) under the conformance kit, within its limit and beyond it.

Files: ``atom/model_ops/v4_kernels/`` of the repository, of it compress_plan.py, fused_compress.py and state_writes.py.
KVCONDENSE_PEERS=... PYTHONPATH=examples/foreign kvcondense conformance --adapter atom_adapter:make
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peers import INDEXER, MAIN, folder, package, tool

from kvcondense import RaggedBatch
from kvcondense.conformance import Capabilities, Engine, Setup

_HOME = "atom.model_ops.v4_kernels"


class _Plan:
    """In the place of ATOM's CpuGpuBuffer: rows of a plan that are filled on the CPU."""

    def __init__(self, rows: int) -> None:
        self.np = np.zeros((rows, 4), dtype=np.int32)

    def copy_to_gpu(self, count: int | None = None) -> torch.Tensor:
        return torch.from_numpy(self.np[:count].copy())


class Atom(Engine):
    """Rings of a window + drafts, in two tensors; pages of 256 tokens, bf16 ones and the indexer's FP8 tiles."""

    # A plan holds requests that are somebody's, and rows are addressed by block tables alone. 7 drafts: see make16.
    capabilities = Capabilities(
        specs=(
            f"csa {MAIN} page_rows=64",
            f"hca {MAIN} page_rows=2",
            f"indexer {INDEXER} format=fp8_indexer_pow2_16x16 page_rows=64",
        ),
        max_draft=7,
        mixed=False,
        inert=False,
        unmapped=False,
        refuses=False,
        rounding="fused",
    )

    def __init__(self) -> None:
        root = folder("ATOM", _HOME.replace(".", "/"))
        stand_in = tool("vllm_files").stand_in
        stand_in("atom.utils", envs=SimpleNamespace(ATOM_FUSED_COMPRESS_USE_FLYDSL="never"))
        stand_in("atom.utils.decorators", mark_trace=lambda function: function)
        stand_in("atom.model_ops.attentions.v4_pool_geometry", WindowParams=object, UnifiedPoolGeometry=object)
        package(_HOME, root)
        self.plan = importlib.import_module(f"{_HOME}.compress_plan").make_compress_plans
        self.pool = importlib.import_module(f"{_HOME}.fused_compress").fused_compress_attn
        self.save = importlib.import_module(f"{_HOME}.state_writes").update_compressor_states

    def init(self, setup: Setup) -> None:
        super().init(setup)
        ring = setup.spec.window + setup.max_draft
        self.kv = torch.full((setup.num_slots, ring, setup.spec.width), float("nan"))
        self.score = self.kv.clone()

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Pool what ends, then save what the plan says: the last window of each request's tokens."""
        assert batch.state_slots is not None
        assert batch.block_table is not None
        spec, weights, count = self.setup.spec, self.setup.weights, int(batch.query_start_loc[-1])
        if not count:
            return
        plan = self._plan(batch, count, spec.ratio, spec.overlap)
        saved = self._plan(batch, count, *self.saved()).write_plan_gpu
        kv, score = kv_score.split([spec.width, spec.width], dim=1)
        shape = {"ratio": spec.ratio, "overlap": spec.overlap, "state_slot_mapping": batch.state_slots.int()}
        self.pool(
            kv_in=kv, score_in=score, kv_state=self.kv, score_state=self.score, plan=plan, ape=weights.ape,
            rms_weight=weights.norm, rms_eps=spec.eps, cos_cache=self.setup.rope.cos, sin_cache=self.setup.rope.sin,
            block_tables=batch.block_table.int(), k_per_block=self.setup.page_rows, head_dim=spec.head_dim,
            rope_head_dim=spec.rope_dim, **self._cache(), **shape,
        )  # fmt: skip
        self.save(kv, score, weights.ape, self.kv, self.score, write_plan=saved, **shape)

    def saved(self) -> tuple[int, bool]:
        """(ratio, overlap) of the plan that says what is saved: the last window of a step."""
        return self.setup.spec.ratio, self.setup.spec.overlap

    def _plan(self, batch: RaggedBatch, count: int, ratio: int, overlap: bool) -> Any:
        return self.plan(
            batch.lengths.int().numpy(),
            (batch.start_positions + batch.lengths).int().numpy(),
            [(ratio, overlap)],
            plan_buffers={ratio: {"compress": _Plan(count), "write": _Plan(count)}},
        )[ratio]

    def _cache(self) -> dict[str, Any]:
        """bf16 rows, or tiles of codes and the scales behind them in each page."""
        if self.setup.format.name == "bf16":
            return {"kv_cache": self.cache.rows}
        data, rows, width = self.cache.data, self.setup.page_rows, self.setup.spec.head_dim
        codes = data.view(torch.float8_e4m3fn).as_strided((data.shape[0], rows, width), (data.stride(0), width, 1))
        scales = data.view(torch.float32)[:, rows * width // 4 :]
        return {"kv_cache": codes, "cache_scale": scales, "quant": True, "fp8_max": 448.0}

    def _live(self, batch: RaggedBatch) -> tuple[int, torch.Tensor]:
        assert batch.state_slots is not None
        position = int(batch.start_positions[0])
        live = torch.arange(self.setup.spec.live_start(position), position)
        return int(batch.state_slots[0]), live % self.kv.shape[1]

    def state(self, batch: RaggedBatch) -> torch.Tensor:
        slot, at = self._live(batch)
        return torch.cat([self.kv[slot, at], self.score[slot, at]], dim=1)

    def put_state(self, batch: RaggedBatch, rows: torch.Tensor) -> None:
        slot, at = self._live(batch)
        self.kv[slot, at], self.score[slot, at] = rows.chunk(2, dim=1)

    def reset(self, slots: list[int]) -> None:
        self.kv[slots], self.score[slots] = float("nan"), float("nan")


class Atom16(Atom):
    """Beyond the limit: 16 drafts, while a step's plan saves 8 rows of ratio 4. Only rows count, not the state."""

    capabilities = replace(Atom.capabilities, max_draft=16, returns_state=False)


class AtomWider(Atom16):
    """What would repair it: a plan as of a window that is longer by the drafts says what is saved."""

    def saved(self) -> tuple[int, bool]:
        return self.setup.spec.window + self.setup.max_draft, False


make, make16, make_wider = Atom, Atom16, AtomWider
