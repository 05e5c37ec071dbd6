"""Steps of a few tokens from hidden states: one launch for one compressor, or for two that read the same ones.

Sums are split over the hidden channels, in spans that depend on their number alone: a token has the same bits in every
such step, but not those of ``fused``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.constants import ALIGNED, Constants, constants, state_key
from kvcondense.backends.triton.fences import proxy_fence
from kvcondense.backends.triton.fused import DEPTH, why_not_project
from kvcondense.backends.triton.runtime import (
    cache_operands,
    clean_counters,
    fp32,
    interpreted,
    next_launch,
    on_device,
    rope_operands,
    state_rows,
    state_table,
)
from kvcondense.backends.triton.tuning import Choice
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import COLUMNS

TOKENS = 64
"""Most tokens of a step."""
_BLOCKS = (32, 16)
WARPS = 4
_SPLITS = 8
_TILE = 1024
"""Elements of a pooled tile, [window, channels]; of long windows it has more."""
_LINE = 32
"""Channels that are pooled at once at least: 128 bytes of a row, a line of the cache."""
_Job = tuple[Step, tuple[Any, ...], Constants]
"""A step, what the kernel takes for it, and its constants."""
_NONE = (None,) * 4, (None,) * 6, (None,) * 4, (None,) * 3, (None,) * 8, 0, 0, 0
"""A compressor's arguments where there is none."""


def why_not(step: Step, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """None if ``run`` can do this step from x [T, D] and w [projected, D], else the reason."""
    if x.shape[0] > TOKENS:
        return f"{x.shape[0]} tokens; a launch takes {TOKENS}"
    if tuning.decode_programs(step.rows.device, step.spec.window) is None:
        return "the table has no such launch for this device"
    reason = why_not_project(x, w)
    if reason is not None:
        return reason
    if _blocks([w.shape[0]]) > COLUMNS:
        return f"{w.shape[0]} projected channels; a launch counts {COLUMNS} blocks of {block_of([w.shape[0]])}"
    if isinstance(step.state, OnlineState):
        return "an online state is folded token by token"
    if step.cache is not None and step.cache.strict:
        return "caches in validation mode take the unfused step"
    return None


def splits(hidden: int) -> int:
    """Spans of the hidden channels."""
    return min(_SPLITS, -(-hidden // DEPTH))


def block_of(projected: Sequence[int]) -> int:
    """Projected channels of a program's product, for these numbers of them in all."""
    return next(b for b in _BLOCKS if all(p % b == 0 for p in projected))


def _blocks(projected: Sequence[int]) -> int:
    """Products' blocks of these numbers of projected channels."""
    return sum(projected) // block_of(projected)


def choice(device: torch.device, window: int, head_dim: int) -> Choice:
    """How the windows of such a step are cut; programs have WARPS warps whatever they do."""
    arch = tuning.architecture(device)
    block = max(_TILE // (1 << (window - 1).bit_length()), _LINE)
    return Choice(min(head_dim, block), WARPS, tuning.casts(arch), holds=tuning.holds_loads(arch))


def run(steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
    """Steps of the same x [T, D], two to a launch."""
    x = x if x.stride(1) == 1 else x.contiguous()
    left = [(step, *_arguments(step, x, w)) for step, w in zip(steps, ws, strict=True)]
    while left:
        # Two that cut windows into blocks count them, each with counters of its own.
        two = (
            len(left) > 1
            and not (_cut(left[0]) and _cut(left[1]) and left[0][0].plan.counters is left[1][0].plan.counters)
            and _blocks([c.projected for _, _, c in left[:2]]) <= COLUMNS
        )
        _launch(left[: 1 + two], x)
        left = left[1 + two :]


def _cut(job: _Job) -> bool:
    """Whether windows are pooled in blocks of channels."""
    return job[2].blocks > 1


def _launch(jobs: Sequence[_Job], x: torch.Tensor) -> None:
    """One launch; where programs cannot wait for one another, one for each part."""
    from kvcondense.backends.triton.kernels import decode as kernels

    two = len(jobs) > 1
    block = block_of([c.projected for _, _, c in jobs])
    shape = {"M": TOKENS, "B": block, "K": DEPTH, "WIDE": interpreted(), "TWO": two}
    ordered = any(step.plan.overwrites for step, _, _ in jobs)
    products = sum(c.projected // block * c.splits for _, _, c in jobs)
    others = sum(step.plan.num_windows * c.blocks + step.plan.keep_token.shape[0] for step, _, c in jobs)
    each = tuning.decode_programs(x.device, max(step.spec.window for step, _, _ in jobs), len(jobs), products)
    assert each is not None
    whole, programs = _programs(x.device, each)
    options = {**tuning.decode_options(tuning.architecture(x.device), each), **tuning.launch_options(x.device)}
    if whole:
        options["launch_cooperative_grid"] = True
    second, number = jobs[1][1] if two else _NONE, next_launch()
    plans = [step.plan for step, _, _ in jobs]
    with on_device(x.device), proxy_fence(), clean_counters(plans):
        for phase in (kernels.ALL,) if whole else (kernels.STREAM, kernels.WINDOWS, kernels.KEEPS):
            launch: dict[str, Any] = {
                "c": jobs[0][2], "c_2": jobs[1][2] if two else None, "PHASE": phase.value, "num_warps": WARPS,
                **shape, **options,
            }  # fmt: skip
            kernels.decode_kernel[(min(max(products, others), programs),)](
                x, x.shape[0], x.shape[1], x.stride(0), number, int(ordered), *jobs[0][1], *second, **launch
            )


def _programs(device: torch.device, each: int) -> tuple[bool, int]:
    """Whether programs may wait for one another, and how many are on the device at once, ``each`` on a processor."""
    return not interpreted(), each * _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _arguments(step: Step, x: torch.Tensor, w: torch.Tensor) -> tuple[tuple[Any, ...], Constants]:
    """What the kernel takes for one compressor, in the order of its parameters."""
    spec, plan, state, cache, batch = step.spec, step.plan, step.state, step.cache, step.plan.batch
    assert not isinstance(state, OnlineState)
    form, page_rows = (None, 0) if cache is None else (cache.format, cache.page_rows)
    count = splits(x.shape[1])
    chosen = choice(step.rows.device, spec.window, spec.head_dim)
    c = constants(
        spec, state_key(state), form, page_rows, step.latent is not None, chosen, splits=count, tokens=ALIGNED
    )
    w = w if w.stride(1) == 1 else w.contiguous()
    partials = torch.empty(count, x.shape[0], spec.projected, dtype=torch.float32, device=x.device)
    table, stride = state_table(batch, state)
    data = state_rows(state)
    stored, scales, page_stride, scales_stride = cache_operands(cache)
    return (
        (w, partials, w.stride(0), partials.stride(0)),
        (None if step.ape is None else fp32(step.ape), fp32(step.gamma), *rope_operands(step),
         batch.query_start_loc, batch.start_positions),
        (plan.window_request, plan.window_index, plan.window_slot, plan.counters),
        (plan.keep_token, plan.keep_position, plan.keep_row),
        (step.rows, step.latent, table, data, stored, scales, page_stride, scales_stride),
        plan.num_windows, plan.keep_token.shape[0] if data is not None else 0, stride,
    ), c  # fmt: skip
