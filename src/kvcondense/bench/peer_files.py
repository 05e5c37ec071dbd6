"""Engines' Triton kernels from files that the user has: RTP-LLM's and vLLM's compressors. No engine is installed.

Both keep the state in fp32 pages by absolute position, [kv | score + ape], save every token there in one launch and
finish windows in a second (RTP-LLM at ratio 128: a third). A file is a program: name only files that you would run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from kvcondense.bench.cases import CONFIG, FORMAT, PAGE_ROWS, Inputs
from kvcondense.bench.peers import Make
from kvcondense.errors import UnsupportedError
from kvcondense.layout.cache import PagedCache
from kvcondense.rope_table import RopeTable

_VLLM = ("save_partial_states.py", "fused_compress_quant_cache.py")


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


class RtpLlm(Paged):
    """rtp_llm/models_py/modules/dsv4/_compressor_vllm_triton.py of alibaba/rtp-llm."""

    name = "rtp-llm"
    note = "two or three launches; every token to an fp32 paged state; bf16 rows"

    def __init__(self, inputs: Inputs, module: Any) -> None:
        super().__init__(inputs)
        self.module = module

    def cache(self) -> torch.Tensor:
        rows = self.inputs.case.batch * self.pages * PAGE_ROWS
        return torch.zeros(rows, self.spec.head_dim, dtype=torch.bfloat16, device=self.device)

    def rows(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return cache[slots].float()

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        spec, inputs = self.spec, self.inputs
        kv, score = tokens[:, : spec.width], tokens[:, spec.width :]
        self.module.run_save_partial_states(
            kv, score, inputs.ape, prepared["positions"], state["memory"], prepared["slot_mapping"], spec.ratio
        )
        self.module.run_fused_compress_kv_write_bf16(
            state["memory"], prepared["requests"], prepared["positions"], prepared["slot_mapping"], self.block_table,
            inputs.norm, spec.eps, self.cos_sin, state["cache"], prepared["kv_slot_mapping"], kv, score, inputs.ape,
            seq_start=prepared["start"],
            disable_raw_path=inputs.case.batch > 1,  # it takes tokens of one request only
            boundary_token_indices=prepared["boundaries"],
            head_dim=spec.head_dim, rope_head_dim=spec.rope_dim, compress_ratio=spec.ratio, overlap=spec.overlap,
        )  # fmt: skip


class Vllm(Paged):
    """save_partial_states.py and fused_compress_quant_cache.py of vllm/models/deepseek_v4/common/ops."""

    name = "vllm"
    note = "two launches; every token to an fp32 paged state, windows read from there; fp8_model1 rows"
    rounded = 2.0**-4
    """Half a step of e4m3, relative: rows are compared as they are stored."""

    def __init__(self, inputs: Inputs, save: Any, fused: Any) -> None:
        super().__init__(inputs)
        # A class in newer versions, a function in older ones.
        newer = getattr(save, "SavePartialStatesKernel", None)
        self.save = save._save_partial_states_kernel if newer is None else newer.kernel
        self.fused = fused.compress_norm_rope_store_triton

    def cache(self) -> PagedCache:
        pages = self.inputs.case.batch * self.pages
        return PagedCache.allocate(self.spec.head_dim, pages, PAGE_ROWS, format=FORMAT, device=self.device)

    def rows(self, cache: PagedCache, slots: torch.Tensor) -> torch.Tensor:
        return cache.decode_rows(slots).float()

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
        module = _module(path)
        peer: Any = lambda inputs: RtpLlm(inputs, module)  # noqa: E731
    elif name == "vllm" and all((path / part).is_file() for part in _VLLM):
        with _stubs():
            save, fused = (_module(path / part) for part in _VLLM)
        peer = lambda inputs: Vllm(inputs, save, fused)  # noqa: E731
    else:
        raise UnsupportedError("--peer-file", f"rtp-llm=FILE, or vllm=FOLDER with {' and '.join(_VLLM)}", text)
    peer.hidden = False
    return peer


def _module(path: Path) -> ModuleType:
    """The file as a module of a package that only stubs are in."""
    specification = importlib.util.spec_from_file_location(f"kvcondense_peer.{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    """What vLLM's two files import of vLLM, for as long as they are loaded; an installed vLLM is set aside."""
    import triton
    from triton import language

    class Generic:
        def __class_getitem__(cls, _: object) -> type:
            return cls

    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_rocm=lambda: False)},
        "vllm.triton_utils": {"tl": language, "triton": triton},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.model_executor": {},
        "vllm.model_executor.warmup": {},
        "vllm.model_executor.warmup.jit_warmup_triton_helper": {
            "LaunchSpec": object, "TritonWarmupTensor": object, "VllmTritonJitKernel": Generic,
            "kernel_launcher": lambda f: f,
        },
        "kvcondense_peer": {"__path__": []},
        "kvcondense_peer.fused_indexer_q": {"_fp32x2_to_fp4x2": None},
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in names}
    for name, values in names.items():
        sys.modules[name] = module = ModuleType(name)
        vars(module).update(values)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
