"""vLLM 0.33.0's Triton compressors under the conformance kit: V4's, and V4.1's of ratio 2.

Files: ``vllm/`` of the package vllm 0.33.0, of it models/deepseek_v4/common/ops and models/deepseek_v41/common/ops.
KVCONDENSE_PEERS=... PYTHONPATH=examples/foreign kvcondense conformance --adapter vllm_adapter:make
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peers import INDEXER, MAIN, Blocks, folder, pages, tokens, tool

from kvcondense import RaggedBatch
from kvcondense.conformance import Capabilities, Setup

_QUANTISED = {"fp8_model1": (64, 576, 8), "mxfp4_indexer": (32, 64, 4), "fp8_indexer_pow2": (128, 128, 4)}


class Vllm(Blocks):
    """V4: states in blocks of 4 or 8 positions, pages of 256 tokens; a token with slot -1 is nobody's."""

    # The scheduler checks metadata, the kernels do not.
    capabilities = Capabilities(
        specs=(
            f"csa {MAIN} format=fp8_model1 page_rows=64",
            f"hca {MAIN} format=fp8_model1 page_rows=2",
            f"indexer {INDEXER} format=fp8_indexer_pow2 page_rows=64",
            f"indexer {INDEXER} format=mxfp4_indexer page_rows=64",
        ),
        refuses=False,
        rounding="fused",
    )

    def __init__(self) -> None:
        self.files = tool("vllm_files").load(folder("vllm", "vllm/models/deepseek_v4") / "vllm")

    def layout(self) -> tuple[int, int]:
        rows = 4 if self.setup.spec.ratio == 4 else 8
        return rows, rows

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Save every token's row, then pool the windows that end."""
        spec, weights = self.setup.spec, self.setup.weights
        assert weights.ape is not None
        found = tokens(self.setup, batch, kv_score.shape[0])
        if not found.mine.any():
            return
        self.admit(batch)
        table = self.table(batch)
        block = table[found.requests, (found.positions // self.span).clamp(max=table.shape[1] - 1)].long()
        slots = torch.where(found.mine, block * self.block_rows + found.positions % self.block_rows, -1)
        kv, score = kv_score.split([spec.width, spec.width], dim=1)
        common = {
            "positions": found.positions, "state_cache": self.states, "slot_mapping": slots,
            "block_size": self.block_rows, "state_width": spec.width, "compress_ratio": spec.ratio, "pdl_kwargs": {},
        }  # fmt: skip
        self.files.save(kv=kv, score=score, ape=weights.ape, **common)
        block_size, stride, scales = _QUANTISED[self.setup.format.name]
        self.files.store(
            num_actual=slots.shape[0],
            token_to_req_indices=found.requests,
            block_table=table,
            cos_sin_cache=self.cos_sin,
            kv_cache=pages(self.setup, self.cache.data),
            k_cache_metadata=SimpleNamespace(slot_mapping=found.cache_slots),
            head_dim=spec.head_dim,
            rope_head_dim=spec.rope_dim,
            overlap=spec.overlap,
            use_fp4_cache=self.setup.format.name == "mxfp4_indexer",
            rms_norm_weight=weights.norm,
            rms_norm_eps=spec.eps,
            quant_block=block_size,
            token_stride=stride,
            scale_dim=scales,
            **common,
        )
        self.release(batch)


class VllmV41(Blocks):
    """V4.1's ratio 2: a ring for each request, a kernel that saves and pools, another that turns and quantises."""

    capabilities = Capabilities(
        specs=(
            f"r2 {MAIN} rounding=latent format=bf16 page_rows=64",
            f"r2 {MAIN} rounding=latent format=fp4_v41_times_interleaved page_rows=64",
        ),
        refuses=False,
    )

    def __init__(self) -> None:
        self.files = tool("vllm_files").load(folder("vllm", "vllm/models/deepseek_v41") / "vllm")

    def layout(self) -> tuple[int, int]:
        """vLLM's ring: drafts + 2 rows, at least 8, up to a power of two."""
        return 1 << 40, max(8, 1 << (self.setup.max_draft + 1).bit_length())

    def init(self, setup: Setup) -> None:
        super().init(setup)
        self.latents = torch.zeros(0, setup.spec.head_dim, dtype=torch.bfloat16)

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Latents of windows that end, then records."""
        spec = self.setup.spec
        found = tokens(self.setup, batch, kv_score.shape[0])
        if not found.mine.any():
            return
        self.admit(batch)
        block = self.table(batch)[found.requests, 0].long()
        slots = torch.where(found.mine, block * self.block_rows + found.positions % self.block_rows, -1)
        latent = torch.zeros(kv_score.shape[0], spec.head_dim, dtype=torch.bfloat16)
        self.files.latent(
            kv_score, found.positions, self.states, slots, batch.query_start_loc.to(torch.int32), found.requests,
            self.setup.weights.norm, spec.eps, spec.ratio, latent,
        )  # fmt: skip
        plain = self.setup.format.name == "bf16"
        cache = self.cache.rows if plain else pages(self.setup, self.cache.data)
        self.files.insert(
            latent, found.positions, self.cos_sin, cache, found.cache_slots, spec.ratio, fp8_scale=None
        )  # fmt: skip


make, make_v41 = Vllm, VllmV41
