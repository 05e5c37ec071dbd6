"""The CPU backend: Numba kernels over torch tensors. One call does a step; see condense.py for what threads do."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from kvcondense.backends import Step
from kvcondense.backends.cpu import native, params, tables
from kvcondense.backends.cpu.blocks import LINE, address
from kvcondense.backends.cpu.threads import launch
from kvcondense.errors import UnsupportedError
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec

_KINDS = {torch.float32: params.FP32, torch.bfloat16: params.BF16, torch.float16: params.FP16}
_STAGE_CHANNELS = 128
_SERIAL = 1 << 16
"""Elements below which a step runs in the calling thread: waking others takes longer."""


@dataclass(frozen=True)
class CpuBackend:
    """Steps and projections on the CPU, in fp32, for channels in multiples of 16."""

    name: str = "cpu"

    def why_not(self, step: Step) -> str | None:
        """None if this step can run here, else the reason."""
        kv_score, state = step.kv_score, step.state
        if kv_score.device.type != "cpu":
            return f"kv_score is on {kv_score.device}, not on the CPU"
        if kv_score.dtype not in _KINDS:
            return f"kv_score is {kv_score.dtype}; the kernels compute in fp32 (the reference takes fp64)"
        if state is not None and state.dtype not in (torch.float32, torch.bfloat16):
            return f"the state is {state.dtype}; the kernels take fp32 and bf16"
        if step.spec.head_dim % params.LANES:
            return f"head_dim {step.spec.head_dim} is not a multiple of {params.LANES}"
        if step.cache is not None:
            try:
                _format_block(step.cache)
            except UnsupportedError as error:
                return str(error)
        return native.problem()

    def run(self, step: Step) -> None:
        """Do the step. A cache in validation mode is encoded by its format, so that nothing is written if it raises."""
        if step.cache is not None and step.cache.strict:
            _run(step, windows=True, cache=None, keeps=False)
            live = step.plan.window_slot >= 0
            stored = step.cache.encode(step.rows[live])
            step.cache.put(step.plan.window_slot[live], stored)
            _run(step, windows=False, cache=None, keeps=True)
        else:
            _run(step, windows=True, cache=step.cache, keeps=True)

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:
        """None if x @ w.T can run here, else the reason."""
        if x.device.type != "cpu":
            return f"x is on {x.device}, not on the CPU"
        if x.dtype is not torch.bfloat16 or w.dtype is not torch.bfloat16:
            return f"x is {x.dtype} and w {w.dtype}; the kernel multiplies bf16"
        if x.shape[1] % 32 or x.shape[1] == 0 or w.shape[0] % 8:
            return f"w is {list(w.shape)}; channels must come in multiples of 8 and the hidden size in multiples of 32"
        return native.problem()

    def project(self, x: torch.Tensor, w: torch.Tensor, tile: int | None) -> torch.Tensor:  # noqa: ARG002 - not needed
        """x @ w.T with fp32 sums, in an order that depends on the hidden size alone."""
        x, w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
        tokens, channels = x.shape[0], w.shape[0]
        out = torch.empty(tokens, channels, dtype=torch.float32)
        # A panel of w stays in the second-level cache while tokens pass by; a few tokens share the panels out instead.
        tall, wide = (120, 128) if tokens >= 48 else (48, 32)
        product = params.Product()
        product.x, product.x_stride = x.data_ptr(), 2 * x.stride(0)
        product.w, product.w_stride = w.data_ptr(), 2 * w.stride(0)
        product.out, product.tokens, product.channels = out.data_ptr(), tokens, channels
        product.hidden_bytes = 2 * x.shape[1]
        product.tile_tokens, product.tile_channels = tall, wide
        block = product.pack()
        threads = 1 if tokens * w.numel() < _SERIAL else torch.get_num_threads()
        launch(native.address("project"), address(block), threads)
        return out


def _run(step: Step, *, windows: bool, cache: PagedCache | None, keeps: bool) -> None:
    """One launch for the windows, for what is kept, or for both."""
    spec, plan, state, batch = step.spec, step.plan, step.state, step.plan.batch
    kv_score = step.kv_score if step.kv_score.stride(1) == 1 else step.kv_score.contiguous()
    plain = kv_score.dtype is torch.float32 and (state is None or state.dtype is torch.float32)
    staged = 0 if plain else min(_STAGE_CHANNELS, spec.head_dim)
    online = isinstance(state, OnlineState)
    count = plan.num_windows if windows else 0
    kept = plan.keep_token.shape[0] if keeps and state is not None else 0
    requests = batch.start_positions.shape[0] if online and keeps else 0
    threads, blocks, chunk = _split(spec, count, requests, kept)
    scratch_bytes = 20 * spec.head_dim + (48 + 8 * staged) * spec.window + LINE
    scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
    ape, gamma = None if step.ape is None else _fp32(step.ape), _fp32(step.gamma)
    cos, sin = (gamma, gamma) if step.rope is None else (_fp32(step.rope.cos), _fp32(step.rope.sin))
    rule = tables.spec_block(spec, staged)
    form = None if cache is None else _format_block(cache)
    scales = None if cache is None or cache.format.tensor_scale else cache.scales
    table, page_rows, page_tokens, data = _addressing(step)
    pool = state if isinstance(state, StatePool) else None
    size = 0 if data is None else data.element_size()
    call = params.Call()
    call.spec = address(rule)
    call.format = 0 if form is None else address(form)
    call.scratch, call.scratch_bytes = scratch.data_ptr(), scratch_bytes
    call.kv_score, call.kv_stride = kv_score.data_ptr(), kv_score.stride(0) * kv_score.element_size()
    call.kv_kind = _KINDS[kv_score.dtype]
    call.ape, call.gamma = 0 if ape is None else ape.data_ptr(), gamma.data_ptr()
    call.cos, call.sin = cos.data_ptr(), sin.data_ptr()
    call.rows, call.latent = step.rows.data_ptr(), 0 if step.latent is None else step.latent.data_ptr()
    call.query_start, call.start = batch.query_start_loc.data_ptr(), batch.start_positions.data_ptr()
    call.drafts, call.requests = batch.draft_rows.data_ptr(), requests
    call.state_table = 0 if table is None else table.data_ptr()
    call.state_table_stride = 0 if table is None else table.stride(0)
    call.state_page_rows, call.state_page_tokens, call.paged = page_rows, max(page_tokens, 1), page_tokens > 0
    call.state = 0 if data is None else data.data_ptr()
    call.state_stride = 0 if data is None else data.stride(-2) * size
    call.state_page_stride = 0 if data is None else (data.stride(0) * (1 if data.dim() == 3 else page_rows)) * size
    call.state_kind = params.FP32 if data is None else _KINDS[data.dtype]
    call.state_raw = pool is not None and pool.layout.raw_scores
    call.acc = state.acc.data_ptr() if isinstance(state, OnlineState) else 0
    call.folded = state.folded.data_ptr() if isinstance(state, OnlineState) else 0
    call.windows, call.window_request = count, plan.window_request.data_ptr()
    call.window_index, call.window_slot = plan.window_index.data_ptr(), plan.window_slot.data_ptr()
    call.keeps, call.keep_token = kept, plan.keep_token.data_ptr()
    call.keep_position, call.keep_row = plan.keep_position.data_ptr(), plan.keep_row.data_ptr()
    call.cache = 0 if cache is None else cache.data.data_ptr()
    call.page_stride = 0 if cache is None else cache.data.stride(0)
    call.scales = 0 if scales is None else scales.data_ptr()
    call.scales_stride = 0 if scales is None else 4 * scales.stride(0)
    call.blocks, call.chunk = blocks, chunk
    block = call.pack()
    if blocks > 1:
        block.frombytes(bytes(8 * count))
    launch(native.address("condense"), address(block), threads)


def _split(spec: CompressorSpec, windows: int, requests: int, kept: int) -> tuple[int, int, int]:
    """(threads, channel blocks per window, windows taken at once) for this much work."""
    work = (windows + requests) * spec.window * spec.head_dim + kept * spec.state_dim
    threads = 1 if work < _SERIAL else torch.get_num_threads()
    if threads == 1:
        return 1, 1, 1
    if windows < threads:
        return threads, min(-(-threads // max(windows, 1)), spec.head_dim // params.LANES), 1
    return threads, 1, max(1, min(8, windows // (8 * threads)))


def _addressing(step: Step) -> tuple[torch.Tensor | None, int, int, torch.Tensor | None]:
    """(slots or block table, rows of a slot or page, positions of a page or 0, rows of the state or log)."""
    state, batch = step.state, step.plan.batch
    if state is None:
        return None, 1, 0, None
    if isinstance(state, OnlineState):
        return batch.state_slots, max(state.layout.log_rows, 1), 0, state.log
    if isinstance(state.layout, PagedLayout):
        return batch.state_block_table, state.layout.page_rows, state.layout.page_tokens, state.data
    return batch.state_slots, state.layout.ring_rows, 0, state.data


def _format_block(cache: PagedCache) -> array[int]:
    scale = None if cache.tensor_scale is None else float(cache.tensor_scale)
    return tables.format_block(cache.format, cache.head_dim, cache.page_rows, scale)


def _fp32(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()


BACKEND = CpuBackend()
