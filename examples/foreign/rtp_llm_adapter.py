"""RTP-LLM's Triton compressor (alibaba/rtp-llm 4b8d39cd) under the conformance kit.

Files: ``rtp_llm/models_py/modules/dsv4/fp8/`` of the repository, of it _compressor_vllm_triton.py,
_fused_compressor_meta_triton.py and _trap_utils.py.
KVCONDENSE_PEERS=... PYTHONPATH=examples/foreign kvcondense conformance --adapter rtp_llm_adapter:make
"""

from __future__ import annotations

import importlib
import os

import torch
from peers import INDEXER, MAIN, Blocks, folder, package, pages, tokens

from kvcondense import RaggedBatch
from kvcondense.conformance import Capabilities

_HOME = "rtp_llm.models_py.modules.dsv4.fp8"
_SPAN = 256
"""Tokens of a block, of states and of rows: DSV4_KERNEL_TOKENS_PER_BLOCK."""


class RtpLlm(Blocks):
    """As it is deployed: of each 256 positions the state keeps the last window + drafts, up to an even number.

    Chunks of a prompt begin at multiples of 256 there and read themselves (the raw path); verify steps have up to
    drafts + 1 tokens and read the state alone. A step of the kit that is neither is played as verify steps.
    """

    # Rows are addressed by block tables alone, and every request of a batch is somebody's.
    capabilities = Capabilities(
        specs=(
            f"csa {MAIN} format=fp8_model1 page_rows=64",
            f"hca {MAIN} format=fp8_model1 page_rows=2",
            f"indexer {INDEXER} format=fp8_indexer_pow2 page_rows=64",
        ),
        inert=False,
        unmapped=False,
        refuses=False,
        rounding="fused",
    )

    def __init__(self) -> None:
        package(_HOME, folder("rtp-llm", _HOME.replace(".", "/")))
        os.environ["DSV4_TRAP_INVALID_KV_ACCESS"] = "0"  # a trap is PTX
        self.kernels = importlib.import_module(f"{_HOME}._compressor_vllm_triton")
        self.meta = importlib.import_module(f"{_HOME}._fused_compressor_meta_triton")

    def layout(self) -> tuple[int, int]:
        """As OpaqueKVCacheSpec.h counts a ring's entries."""
        return _SPAN, (self.setup.spec.window + self.setup.max_draft + 1) // 2 * 2

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Prompts at once; everything else in pieces that a verify step can have."""
        self.admit(batch)
        starts, counts, most = batch.start_positions.tolist(), batch.lengths.tolist(), self.setup.max_draft + 1
        prompts = [q for q, count in enumerate(counts) if count > most and starts[q] % _SPAN == 0]
        self._launch(kv_score, batch, [(q, 0, counts[q]) for q in prompts], raw=True)
        others = [q for q in range(len(counts)) if q not in prompts]
        for at in range(0, max((counts[q] for q in others), default=0), most):
            pieces = [(q, at, min(most, counts[q] - at)) for q in others if at < counts[q]]
            self._launch(kv_score, batch, pieces, raw=False)
        self.release(batch)

    def _launch(
        self, kv_score: torch.Tensor, batch: RaggedBatch, pieces: list[tuple[int, int, int]], raw: bool
    ) -> None:
        """The two kernels on ``pieces``: (request, first token, tokens)."""
        if not pieces:
            return
        assert batch.state_slots is not None
        assert batch.block_table is not None
        spec, weights, width = self.setup.spec, self.setup.weights, self.setup.spec.width
        request, first, counts = (torch.tensor(column) for column in zip(*pieces, strict=True))
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        begin = batch.query_start_loc[request] + first
        part = RaggedBatch.build(
            ends, start_positions=batch.start_positions[request] + first, state_slots=batch.state_slots[request],
            block_table=batch.block_table[request],
        )  # fmt: skip
        at = torch.cat([torch.arange(b, b + n) for b, n in zip(begin.tolist(), counts.tolist(), strict=True)])
        kv, score = kv_score[at].split([width, width], dim=1)
        found, table = tokens(self.setup, part, at.shape[0]), self.table(part)
        rows = pages(self.setup, self.cache.data)
        slots, cache_slots, requests = self.meta.fused_compressor_slot_mapping(
            found.positions, found.requests.long(), table, self.block_rows, batch.block_table[request].int(),
            self.setup.page_rows, spec.ratio, part.start_positions + counts, self.span,
            pool_rows=rows.shape[0] * rows.shape[1],
        )  # fmt: skip
        self.kernels.run_save_partial_states(
            kv, score, weights.ape, found.positions, self.states, slots, compress_ratio=spec.ratio
        )
        self.kernels.run_fused_compress_kv_write(
            self.states, requests, found.positions, slots, table, weights.norm, spec.eps, self.cos_sin, rows,
            cache_slots, kv, score, weights.ape, 0, disable_raw_path=not raw, head_dim=spec.head_dim,
            rope_head_dim=spec.rope_dim, compress_ratio=spec.ratio, overlap=spec.overlap,
            seq_start_per_req=part.start_positions if raw else None, cu_seq_per_req=ends if raw else None,
            state_tokens_per_block=self.span,
        )  # fmt: skip


make = RtpLlm
