"""Engines' Triton kernels from files that the user has: RTP-LLM's and vLLM's compressors. No engine is installed.

Both keep the state in fp32 pages by absolute position, [kv | score + ape], save every token there in one launch and
finish windows in a second (an older RTP-LLM at ratio 128: a third). A file is a program: name only files that you would
run. What their entry points are called with is checked when a file is loaded.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kvcondense.bench import foreign
from kvcondense.bench.cases import CONFIG, FORMAT, PAGE_ROWS, Inputs
from kvcondense.bench.peers import Make
from kvcondense.errors import UnsupportedError
from kvcondense.layout.cache import PagedCache
from kvcondense.rope_table import RopeTable

_VLLM = ("save_partial_states.py", "fused_compress_quant_cache.py")
_VLLM_SAVE = (
    "kv_ptr", "kv_stride", "score_ptr", "score_stride", "ape_ptr", "ape_stride", "positions_ptr", "state_cache_ptr",
    "state_cache_stride0", "state_cache_stride1", "slot_mapping_ptr", "block_size", "HEAD_SIZE", "TRITON_BLOCK_SIZE",
    "STATE_WIDTH", "COMPRESS_RATIO",
)  # fmt: skip
_VLLM_FUSED = (
    "state_cache", "num_actual", "token_to_req_indices", "positions", "slot_mapping", "block_table", "block_size",
    "state_width", "cos_sin_cache", "kv_cache", "k_cache_metadata", "pdl_kwargs", "head_dim", "rope_head_dim",
    "compress_ratio", "overlap", "use_fp4_cache", "rms_norm_weight", "rms_norm_eps", "quant_block", "token_stride",
    "scale_dim",
)  # fmt: skip
_RTP_SAVE = ("kv", "score", "ape", "positions", "state_cache", "slot_mapping", "compress_ratio")
_RTP_FUSED = (
    "state_cache", "token_to_req_indices", "positions", "slot_mapping", "block_table", "rms_norm_weight",
    "rms_norm_eps", "cos_sin_cache", "kv_cache", "kv_slot_mapping", "kv_raw", "score_raw", "ape", "seq_start",
    "disable_raw_path", "head_dim", "rope_head_dim", "compress_ratio", "overlap",
)  # fmt: skip


class Paged:
    """What both have in common: the state's pages, and what an engine prepares for a step."""

    name, note, capturable, hidden = "", "", True, False

    def __init__(self, inputs: Inputs) -> None:
        case, spec = inputs.case, inputs.case.spec
        self.inputs, self.spec, self.device = inputs, spec, inputs.new.device
        self.block = 4 if spec.ratio == 4 else 8  # as vLLM has them
        end = case.start + case.tokens + inputs.rest.shape[1]
        self.state_pages = -(-end // self.block)
        self.pages = -(-(end // spec.ratio + 1) // PAGE_ROWS)
        rope = RopeTable.build(CONFIG, end + spec.ratio, device=self.device)
        self.cos_sin = torch.cat([rope.cos, rope.sin], dim=-1)
        # Page 0 means "none" to RTP-LLM.
        ids = 1 + torch.arange(case.batch * self.state_pages, dtype=torch.int32, device=self.device)
        self.block_table = ids.view(case.batch, -1)

    def cache(self) -> Any:
        raise NotImplementedError

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        raise NotImplementedError

    def rows(self, cache: Any, slots: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def primed(self) -> dict[str, Any]:
        case = self.inputs.case
        pages = 1 + case.batch * self.state_pages
        memory = torch.zeros(pages, self.block, 2 * self.spec.width, device=self.device)
        state = {"memory": memory, "cache": self.cache(), "position": 0}
        if case.start:
            self.feed(state, self.inputs.history)
        state["new"] = self.inputs.new.flatten(0, 1)
        state["prepared"] = self.prepare(case.start, case.tokens)
        return state

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return dict(state)  # a step at a fixed position writes the same rows again

    def step(self, state: dict[str, Any]) -> None:
        state["position"] = self.inputs.case.start + self.inputs.case.tokens
        self.call(state["new"], state, state["prepared"])

    def feed(self, state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        prepared = self.prepare(state["position"], tokens.shape[1])
        state["position"] += tokens.shape[1]
        self.call(tokens.flatten(0, 1).contiguous(), state, prepared)
        slots = prepared["kv_slot_mapping"][prepared["boundaries"]]
        return self.rows(state["cache"], slots).view(tokens.shape[0], -1, self.spec.head_dim)

    def prepare(self, start: int, count: int) -> dict[str, Any]:
        """Metadata of a step, int64 [T] but for the requests: not timed, as layers share it."""
        batch, ratio = self.inputs.case.batch, self.spec.ratio
        position = start + torch.arange(count, device=self.device).repeat(batch)
        request = torch.arange(batch, device=self.device).repeat_interleave(count)
        page = self.block_table[request, position // self.block].long()
        row = request * self.pages * PAGE_ROWS + position // ratio
        kv_slot = torch.where((position + 1) % ratio == 0, row, -1)
        return {
            "start": start,
            "positions": position,
            "requests": request.int(),
            "slot_mapping": page * self.block + position % self.block,
            "kv_slot_mapping": kv_slot,
            "boundaries": torch.nonzero(kv_slot >= 0)[:, 0],
        }


class _Model1(Paged):
    """Rows as FlashMLA has them, in pages of bytes."""

    rounded = 2.0**-4
    """Half a step of e4m3, relative: rows are compared as they are stored."""

    def cache(self) -> PagedCache:
        pages = self.inputs.case.batch * self.pages
        return PagedCache.allocate(self.spec.head_dim, pages, PAGE_ROWS, format=FORMAT, device=self.device)

    def rows(self, cache: PagedCache, slots: torch.Tensor) -> torch.Tensor:
        return cache.decode_rows(slots).float()


def _rtp_llm_save(save: Any, peer: Paged, tokens: torch.Tensor, memory: torch.Tensor, prepared: dict[str, Any]) -> None:
    n = peer.spec.width
    save(
        kv=tokens[:, :n],
        score=tokens[:, n:],
        ape=peer.inputs.ape,
        positions=prepared["positions"],
        state_cache=memory,
        slot_mapping=prepared["slot_mapping"],
        compress_ratio=peer.spec.ratio,
    )


def _rtp_llm_arguments(
    peer: Paged, tokens: torch.Tensor, memory: torch.Tensor, prepared: dict[str, Any]
) -> dict[str, Any]:
    """What older and newer files ask alike, but for the cache and where raw tokens are read."""
    spec, inputs, n = peer.spec, peer.inputs, peer.spec.width
    return {
        "state_cache": memory,
        "token_to_req_indices": prepared["requests"],
        "positions": prepared["positions"],
        "slot_mapping": prepared["slot_mapping"],
        "block_table": peer.block_table,
        "rms_norm_weight": inputs.norm,
        "rms_norm_eps": spec.eps,
        "cos_sin_cache": peer.cos_sin,
        "kv_slot_mapping": prepared["kv_slot_mapping"],
        "kv_raw": tokens[:, :n],
        "score_raw": tokens[:, n:],
        "ape": inputs.ape,
        "head_dim": spec.head_dim,
        "rope_head_dim": spec.rope_dim,
        "compress_ratio": spec.ratio,
        "overlap": spec.overlap,
    }


class RtpLlmBf16(Paged):
    """rtp_llm/models_py/modules/dsv4/_compressor_vllm_triton.py of alibaba/rtp-llm, before rows were FP8 alone."""

    name = "rtp-llm"
    note = "two or three launches; every token to an fp32 paged state; bf16 rows"

    def __init__(self, inputs: Inputs, save: Any, fused: Any) -> None:
        super().__init__(inputs)
        self.save, self.fused = save, fused

    def cache(self) -> torch.Tensor:
        rows = self.inputs.case.batch * self.pages * PAGE_ROWS
        return torch.zeros(rows, self.spec.head_dim, dtype=torch.bfloat16, device=self.device)

    def rows(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return cache[slots].float()

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        _rtp_llm_save(self.save, self, tokens, state["memory"], prepared)
        self.fused(
            **_rtp_llm_arguments(self, tokens, state["memory"], prepared),
            kv_cache=state["cache"],
            seq_start=prepared["start"],
            disable_raw_path=self.inputs.case.batch > 1,  # it takes tokens of one request only
            boundary_token_indices=prepared["boundaries"],
        )


class RtpLlm(_Model1):
    """rtp_llm/models_py/modules/dsv4/fp8/_compressor_vllm_triton.py of alibaba/rtp-llm.

    As it is called there: a prefill reads the tokens it was given, a decode the state alone.
    """

    name = "rtp-llm"
    note = "two launches; every token to an fp32 paged state, a decode's windows read from there; fp8_model1 rows"

    def __init__(self, inputs: Inputs, save: Any, fused: Any) -> None:
        super().__init__(inputs)
        self.save, self.fused = save, fused

    def prepare(self, start: int, count: int) -> dict[str, Any]:
        """And where each request's tokens begin: in the sequence [B], among all [B + 1]; int64."""
        batch = self.inputs.case.batch
        starts = torch.full((batch,), start, dtype=torch.int64, device=self.device)
        ends = count * torch.arange(batch + 1, dtype=torch.int64, device=self.device)
        several = batch > 1 and count > 1
        return {
            **super().prepare(start, count),
            "raw": {
                "seq_start": start if batch == 1 and count > 1 else 0,
                "disable_raw_path": count == 1,
                "seq_start_per_req": starts if several else None,
                "cu_seq_per_req": ends if several else None,
            },
        }

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        _rtp_llm_save(self.save, self, tokens, state["memory"], prepared)
        data, entry = state["cache"].data, state["cache"].format.row_bytes(self.spec.head_dim)
        self.fused(
            **_rtp_llm_arguments(self, tokens, state["memory"], prepared),
            kv_cache=data.as_strided((data.shape[0], PAGE_ROWS, entry), (data.stride(0), entry, 1)),
            state_tokens_per_block=self.block,
            **prepared["raw"],
        )


class Vllm(_Model1):
    """save_partial_states.py and fused_compress_quant_cache.py of vllm/models/deepseek_v4/common/ops."""

    name = "vllm"
    note = "two launches; every token to an fp32 paged state, windows read from there; fp8_model1 rows"

    def __init__(self, inputs: Inputs, save: Any, fused: Any) -> None:
        super().__init__(inputs)
        self.save, self.fused = save, fused

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        spec, inputs, memory, n = self.spec, self.inputs, state["memory"], self.spec.width
        self.save[(tokens.shape[0],)](
            tokens, tokens.stride(0), tokens[:, n:], tokens.stride(0), inputs.ape, inputs.ape.stride(0),
            prepared["positions"], memory, memory.stride(0), memory.stride(1), prepared["slot_mapping"], self.block,
            HEAD_SIZE=n, TRITON_BLOCK_SIZE=1 << (n - 1).bit_length(), STATE_WIDTH=n, COMPRESS_RATIO=spec.ratio,
        )  # fmt: skip
        data = state["cache"].data
        self.fused(
            state_cache=memory,
            num_actual=tokens.shape[0],
            token_to_req_indices=prepared["requests"],
            positions=prepared["positions"],
            slot_mapping=prepared["slot_mapping"],
            block_table=self.block_table,
            block_size=self.block,
            state_width=n,
            cos_sin_cache=self.cos_sin,
            kv_cache=data.as_strided((data.shape[0], PAGE_ROWS, 1), (data.stride(0), 1, 1)),
            k_cache_metadata=SimpleNamespace(slot_mapping=prepared["kv_slot_mapping"]),
            pdl_kwargs={},
            head_dim=spec.head_dim,
            rope_head_dim=spec.rope_dim,
            compress_ratio=spec.ratio,
            overlap=spec.overlap,
            use_fp4_cache=False,
            rms_norm_weight=inputs.norm,
            rms_norm_eps=spec.eps,
            quant_block=64,
            token_stride=576,
            scale_dim=8,
        )


def load(text: str) -> Make:
    """A peer from ``rtp-llm=FILE`` or ``vllm=FOLDER`` (with both files). Raises UnsupportedError for anything else."""
    name, _, place = text.partition("=")
    path = Path(place)
    if name == "rtp-llm" and path.is_file():
        peer: Any = _rtp_llm(path)
    elif name == "vllm" and all((path / part).is_file() for part in _VLLM):
        peer = _vllm(*(path / part for part in _VLLM))
    else:
        raise UnsupportedError("--peer-file", f"rtp-llm=FILE, or vllm=FOLDER with {' and '.join(_VLLM)}", text)
    peer.hidden = False
    return peer


def _rtp_llm(path: Path) -> Make:
    module = foreign.load(path)
    save = foreign.entry(path, module, "run_save_partial_states", named=_RTP_SAVE)
    older = "run_fused_compress_kv_write_bf16"  # a file of then may have the other one, too
    if hasattr(module, older):
        fused = foreign.entry(path, module, older, named=(*_RTP_FUSED, "boundary_token_indices"))
        return lambda inputs: RtpLlmBf16(inputs, save, fused)
    more = ("seq_start_per_req", "cu_seq_per_req", "state_tokens_per_block")
    fused = foreign.entry(path, module, "run_fused_compress_kv_write", named=(*_RTP_FUSED, *more))
    return lambda inputs: RtpLlm(inputs, save, fused)


def _vllm(save_path: Path, fused_path: Path) -> Make:
    save, fused = foreign.load(save_path), foreign.load(fused_path)
    # A class in newer versions, a function in older ones.
    newer = getattr(save, "SavePartialStatesKernel", None)
    owner, name = (save, "_save_partial_states_kernel") if newer is None else (newer, "kernel")
    kernel = foreign.entry(save_path, owner, name, exactly=_VLLM_SAVE)
    function = foreign.entry(fused_path, fused, "compress_norm_rope_store_triton", named=_VLLM_FUSED)
    return lambda inputs: Vllm(inputs, kernel, function)
