"""Launches that project: to kv_score, or, fused, to finished rows without kv_score in memory.

The kernels sum a product over the hidden channels in the same steps, by the same instruction, so a token has the same
bits in any batch, fused or not. The vendor's library, which stands in for the first of them, promises none.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.constants import Constants, constants, state_key
from kvcondense.backends.triton.fences import proxy_fence
from kvcondense.backends.triton.runtime import (
    cache_operands,
    fp32,
    interpreted,
    on_device,
    rope_operands,
    state_rows,
    state_table,
    why_no_device,
)
from kvcondense.backends.triton.tuning import Choice
from kvcondense.layout.online import OnlineState
from kvcondense.spec import CompressorSpec

TILE = 128
"""Tokens of a tile: whole windows, or kept rows."""
DEPTH = 64
"""Hidden channels of one step of the products."""
_BLOCK, _LEAST, _WARPS = 64, 16, 8
_ALIGNED = 16
"""Bytes, of which a descriptor wants a tensor's begin and its rows to be multiples."""
_LEAD = 8
"""Windows of a tile at least where they overlap: one of them is there for its tokens alone."""


def why_not_project(x: torch.Tensor, w: torch.Tensor) -> str | None:
    """None if the products of x [T, D] and w [projected, D] can be formed here, else the reason."""
    reason = why_no_device(x.device)
    if reason is not None:
        return reason
    if x.dtype is not torch.bfloat16 or w.dtype is not torch.bfloat16:
        return f"x and w are {x.dtype} and {w.dtype}; the products take bf16"
    if x.shape[1] % DEPTH:
        return f"{x.shape[1]} hidden channels are no multiple of {DEPTH}"
    if w.shape[0] % _LEAST:
        return f"{w.shape[0]} projected channels are no multiple of {_LEAST}"
    return None


def why_not(step: Step, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """None if ``run`` can do this step from x [T, D] and w [projected, D], else the reason."""
    spec = step.spec
    reason = why_not_project(x, w)
    if reason is not None:
        return reason
    if spec.ratio & (spec.ratio - 1) or spec.ratio > TILE:
        return f"ratio {spec.ratio} does not divide a tile of {TILE} tokens"
    arch = tuning.architecture(x.device)
    block, least = choice(spec, arch).block, tuning.product_rows(arch)
    if block < least:
        return f"{block} channels of a tile; {arch} multiplies fewer than {least} otherwise than ``project`` does"
    if spec.overlap and TILE // spec.ratio < _LEAD:
        return f"windows of ratio {spec.ratio} that overlap are too few in a tile of {TILE} tokens"
    if isinstance(step.state, OnlineState):
        return "an online state is folded token by token"
    if step.latent is not None or (step.cache is not None and step.cache.strict):
        return "latent rows and caches in validation mode take the unfused step"
    return None


def by_library(device: torch.device) -> bool:
    """True if the table has the vendor's library form products here, bf16 into fp32. Its bits depend on the batch."""
    there = device.type == "cuda" and torch.version.hip is None and not interpreted()
    return there and tuning.library_product(device)


def why_not_one_launch(device: torch.device, tokens: int) -> str | None:
    """None if the table says that one launch wins where it is possible, else what speaks against it."""
    most = tuning.one_launch_tokens(tuning.architecture(device))
    if most is None or tokens <= most or not by_library(device):
        return None
    return f"{tokens} tokens; of more than {most} the table has the library's product, then the step"


def why_not_worth(step: Step, tokens: int, library: bool) -> str | None:
    """None if the table says that fusing wins, else what speaks against it; library: products may be ``by_library``."""
    if library and by_library(step.rows.device):
        return "the table has the library's product, then the step"
    least = tuning.fused_tokens(step.rows.device)
    if least is None or tokens < least:
        return f"{tokens} tokens; the table fuses steps of at least {least}"
    if step.plan.num_windows * step.spec.ratio > 2 * tokens:
        return "most tokens of the windows are in the state: a tile would project few of its rows"
    return None


def project(x: torch.Tensor, w: torch.Tensor, library: bool) -> torch.Tensor:
    """kv_score [T, projected] fp32; library: it may be formed ``by_library``."""
    from kvcondense.backends.triton.kernels import fused

    if library and by_library(x.device):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0] == 0:
        return out
    # The kernel's constants are a step's: all channels as those of one product.
    spec = CompressorSpec(ratio=1, head_dim=w.shape[0], eps=1.0, rope_dim=0, has_ape=False, has_gate=False)
    block = next(b for b in (_BLOCK, 32, _LEAST) if w.shape[0] % b == 0)
    c = constants(spec, state_key(None), None, 0, False, Choice(block, _WARPS, counters=False))
    x, x_box, w, w_stride, options = _operands(x, w, c)
    options["M"] = TILE
    with on_device(x.device), proxy_fence():
        fused.project_kernel[(-(-x.shape[0] // TILE) * c.blocks,)](
            x, x_box, w, out, x.shape[0], x.shape[1], x.stride(0), w_stride, out.stride(0), **options,
        )  # fmt: skip
    return out


def _operands(x: torch.Tensor, w: torch.Tensor, c: Constants) -> tuple[Any, Any, Any, int, dict[str, Any]]:
    """x, its descriptor or None, w or its descriptor, w's stride, and options of a launch that multiplies."""
    arch = tuning.architecture(x.device)
    options = {**tuning.product_options(arch), **tuning.launch_options(x.device)}
    options |= {"c": c, "K": DEPTH, "WIDE": interpreted(), "num_warps": _WARPS}
    by_box = tuning.boxes(arch) and x.shape[0] > 0
    x, w = (t if t.stride(1) == 1 and (not by_box or _aligned(t)) else t.clone(memory_format=torch.contiguous_format)
            for t in (x, w))  # fmt: skip
    if by_box:
        return x, boxes_of(x, TILE), boxes_of(w, c.block), w.stride(0), options
    return x, None, w, w.stride(0), options


def _aligned(t: torch.Tensor) -> bool:
    """Whether t [n, hidden] bf16 begins, and its rows do, where a descriptor wants them to, each apart from others."""
    return t.data_ptr() % _ALIGNED == 0 and t.stride(0) % (_ALIGNED // 2) == 0 and t.stride(0) >= t.shape[1]


def boxes_of(t: torch.Tensor, rows: int) -> Any:
    """A descriptor of t [n, hidden], for boxes of ``rows`` rows and ``DEPTH`` hidden channels; beyond t they are 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, DEPTH])


def choice(spec: CompressorSpec, arch: str) -> Choice:
    """Channels and warps of a program: kv and score of each are accumulated, with overlap of both halves."""
    block = min(spec.head_dim, tuning.tile_columns(arch) // (4 if spec.overlap else 2))
    return Choice(block, _WARPS, tuning.casts(arch), counters=False)


def windows_per_tile(spec: CompressorSpec) -> int:
    """That it finishes."""
    return TILE // spec.ratio - spec.overlap


def run(step: Step, x: torch.Tensor, w: torch.Tensor) -> None:
    """Windows and what is kept, then norm to store of every row.

    Two launches for the first two where a kept row takes the place of one that a window of this step still reads.
    """
    from kvcondense.backends.triton.kernels import fused
    from kvcondense.backends.triton.kernels.condense import finish_kernel

    spec, plan, state, cache, batch = step.spec, step.plan, step.state, step.cache, step.plan.batch
    assert not isinstance(state, OnlineState)
    form, page_rows = (None, 0) if cache is None else (cache.format, cache.page_rows)
    arch = tuning.architecture(x.device)
    c = constants(spec, state_key(state), form, page_rows, False, choice(spec, arch))
    x, x_box, w, w_stride, options = _operands(x, w, c)
    options |= {"G": TILE // spec.ratio, **tuning.epilogue_options(arch, c.block, spec.has_gate)}
    ape, data = None if step.ape is None else fp32(step.ape), state_rows(state)
    windows, keeps = plan.num_windows, 0 if data is None else plan.keep_token.shape[0]
    pooling, keeping = (-(-n // each) * c.blocks for n, each in ((windows, windows_per_tile(spec)), (keeps, TILE)))
    table, stride = state_table(batch, state)
    with on_device(x.device), proxy_fence():
        for pool, keep in ((pooling, 0), (0, keeping)) if plan.overwrites else ((pooling, keeping),):
            if pool + keep:
                fused.tiles_kernel[(pool + keep,)](
                    x, x_box, w, ape, batch.query_start_loc, batch.start_positions, table, data,
                    plan.window_request, plan.window_index, step.rows,
                    plan.keep_token, plan.keep_position, plan.keep_row, windows, keeps, pool, x.shape[1],
                    x.stride(0), w_stride, stride, **options,
                )  # fmt: skip
        if windows:
            bytes_, scales, page_stride, scales_stride = cache_operands(cache)
            ending = {"c": c, "num_warps": _WARPS, "enable_fp_fusion": False, **tuning.launch_options(x.device)}
            finish_kernel[(windows,)](
                fp32(step.gamma), *rope_operands(step), step.rows, None,
                plan.window_request, plan.window_index, plan.window_slot,
                bytes_, scales, page_stride, scales_stride, **ending,
            )  # fmt: skip
