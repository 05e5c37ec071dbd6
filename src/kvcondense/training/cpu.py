"""Both operations in Numba on the CPU: the pool, one pass over the tokens each way, and what makes rows of P."""

from __future__ import annotations

from itertools import pairwise

import torch

from kvcondense.backends.cpu import native, params, tables
from kvcondense.backends.cpu.blocks import LINE, address
from kvcondense.backends.cpu.threads import SERIAL, launch
from kvcondense.layout.plan import Plan
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec

_STRIP_TOKENS = 1024
"""Tokens of a task: ape's gradients are added up in it, then task by task."""
_STRIP_ROWS = 128
"""Rows of a task, for gamma's."""
_CHANNELS = 512
"""Of a task: whole rows of 512, since first touches of a new gradient's pages cost most, and less in order."""


def can_run(spec: CompressorSpec, kv_score: torch.Tensor) -> bool:
    """True for contiguous fp32 on the CPU, channels in multiples of 16."""
    plain = kv_score.device.type == "cpu" and kv_score.dtype is torch.float32 and kv_score.is_contiguous()
    return plain and spec.head_dim % params.CHANNELS == 0 and native.problem(native.TRAINING) is None


def forward(
    spec: CompressorSpec, kv_score: torch.Tensor, ape: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and lse = log sum_j e^(z_j), [E, d] each."""
    pooled, lse, total = (kv_score.new_empty(plan.num_windows, spec.head_dim) for _ in range(3))
    _run(spec, kv_score, ape, plan, pooled=pooled, lse=lse, total=total)
    return pooled, lse.add_(total.log_())


def backward(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    ape: torch.Tensor | None,
    plan: Plan,
    of_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of kv_score and ape; of_rows: P, lse, g [E, d] each."""
    pooled, lse, given = of_rows
    d_tokens = torch.empty_like(kv_score)
    zero_unread(spec, d_tokens, plan)
    strips = -(-plan.num_windows // _strip(spec))
    d_ape = kv_score.new_zeros(strips, spec.window, spec.head_dim)
    _run(spec, kv_score, ape, plan, pooled=pooled, lse=lse, given=given, d_tokens=d_tokens, d_ape=d_ape)
    return d_tokens, by_phase(spec, d_ape.sum(dim=0))


def can_finish(spec: CompressorSpec, pooled: torch.Tensor) -> bool:
    """True for fp32 on the CPU, channels in multiples of 16."""
    plain = pooled.device.type == "cpu" and pooled.dtype is torch.float32 and pooled.is_contiguous()
    return plain and spec.head_dim % params.CHANNELS == 0 and native.problem(native.TRAINING) is None


def finish(
    spec: CompressorSpec, pooled: torch.Tensor, gamma: torch.Tensor, rope: RopeTable | None, position: torch.Tensor
) -> torch.Tensor:
    """Rows [E, d] of P [E, d]: norm, RoPE at ``position`` [E], Hadamard, as the ``cpu`` backend's."""
    out = torch.empty_like(pooled)
    _run_rows(spec, pooled, gamma, rope, position, out=out)
    return out


def unfinish(
    spec: CompressorSpec,
    pooled: torch.Tensor,
    gamma: torch.Tensor,
    rope: RopeTable | None,
    position: torch.Tensor,
    given: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of P [E, d] and gamma [d] from those of the rows [E, d]."""
    out = torch.empty_like(pooled)
    d_gamma = pooled.new_zeros(-(-pooled.shape[0] // _STRIP_ROWS), spec.head_dim)
    _run_rows(spec, pooled, gamma, rope, position, out=out, given=given, d_gamma=d_gamma)
    return out, d_gamma.sum(dim=0)


def _run_rows(
    spec: CompressorSpec,
    pooled: torch.Tensor,
    gamma: torch.Tensor,
    rope: RopeTable | None,
    position: torch.Tensor,
    **tensors: torch.Tensor,
) -> None:
    threads = 1 if pooled.numel() < SERIAL else torch.get_num_threads()
    scratch = torch.empty(threads, 12 * spec.head_dim + params.ROOM, dtype=torch.uint8, device="cpu")
    rule = tables.spec_block(spec)
    gamma = gamma.to(torch.float32).contiguous()
    cos, sin = (gamma, gamma) if rope is None else (t.to(torch.float32).contiguous() for t in (rope.cos, rope.sin))
    at = {name: t.data_ptr() for name, t in tensors.items()}
    call = params.TrainingRows()
    call.what, call.spec = params.FINISH, address(rule)
    call.pooled, call.gamma = pooled.data_ptr(), gamma.data_ptr()
    call.cos, call.sin, call.position = cos.data_ptr(), sin.data_ptr(), position.data_ptr()
    call.given, call.out, call.gamma_gradient = at.get("given", 0), at["out"], at.get("d_gamma", 0)
    call.count, call.strip, call.scratch = pooled.shape[0], _STRIP_ROWS, scratch.data_ptr()
    block = call.pack()
    launch(native.address("training"), address(block), threads)


def by_phase(spec: CompressorSpec, d_ape: torch.Tensor) -> torch.Tensor:
    """ape's gradient by candidate [W, d] -> [r, N]: those of the window before have the first channels."""
    return torch.cat(d_ape.split(spec.ratio), dim=1) if spec.overlap else d_ape


def zero_unread(spec: CompressorSpec, d_tokens: torch.Tensor, plan: Plan) -> None:
    """Zero the gradients of what no window reads: tokens behind a document's last window, and, with overlap, the first
    channels of the last window's tokens.
    """
    for begin, end in pairwise(plan.batch.query_start_loc.tolist()):
        last = begin + (end - begin) // spec.ratio * spec.ratio
        d_tokens[last:end] = 0
        if spec.overlap:
            by_half = d_tokens[max(last - spec.ratio, begin) : last].unflatten(1, (-1, spec.halves, spec.head_dim))
            by_half[:, :, 0] = 0


def _strip(spec: CompressorSpec) -> int:
    return max(16, _STRIP_TOKENS // spec.ratio)


def _run(
    spec: CompressorSpec, kv_score: torch.Tensor, ape: torch.Tensor | None, plan: Plan, **tensors: torch.Tensor
) -> None:
    """One launch: forward with ``total``, else backward."""
    first = plan.batch.query_start_loc[plan.window_request] + plan.window_index * spec.ratio
    bias = None if ape is None else ape.to(torch.float32).contiguous()
    zeros, nothing = torch.zeros(spec.width, device="cpu"), torch.full((spec.width,), float("-inf"), device="cpu")
    size = params.ENTRY * (spec.window + params.GROUP) + 12 * _CHANNELS + LINE
    serial = plan.num_windows * spec.window * spec.head_dim < SERIAL
    threads = 1 if serial else torch.get_num_threads()
    scratch = torch.empty(threads * size, dtype=torch.uint8, device="cpu")
    at = {name: t.data_ptr() for name, t in tensors.items()}
    call = params.TrainingPool()
    call.what, call.tokens, call.stride = params.POOL, kv_score.data_ptr(), 4 * kv_score.shape[1]
    call.ape, call.zeros, call.nothing = 0 if bias is None else bias.data_ptr(), zeros.data_ptr(), nothing.data_ptr()
    call.first, call.index = first.data_ptr(), plan.window_index.data_ptr()
    call.windows, call.strip, call.channels = plan.num_windows, _strip(spec), _CHANNELS
    call.pooled, call.lse, call.total = at["pooled"], at["lse"], at.get("total", 0)
    call.given, call.gradient, call.bias_gradient = at.get("given", 0), at.get("d_tokens", 0), at.get("d_ape", 0)
    call.scratch, call.scratch_bytes = scratch.data_ptr(), size
    call.ratio, call.window, call.head_dim, call.width = spec.ratio, spec.window, spec.head_dim, spec.width
    call.gate = spec.has_gate
    block = call.pack()
    launch(native.address("training"), address(block), threads)
