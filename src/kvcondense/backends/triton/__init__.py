"""The Triton backend: one launch per step on NVIDIA, AMD and Ascend devices, or on the CPU under Triton's interpreter.

Kernels are in ``kernels``, in the order of the data; ``constants`` is what they are compiled for, ``tuning`` how they
are tiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import decode, fused, tuning
from kvcondense.backends.triton.constants import UNROLL, Constants, constants, state_key, tokens_key
from kvcondense.backends.triton.runtime import (
    cache_operands,
    clean_counters,
    fp32,
    installed,
    interpreted,
    next_launch,
    on_device,
    rope_operands,
    state_rows,
    state_table,
    why_no_device,
)
from kvcondense.errors import UnsupportedError
from kvcondense.formats.integers import row_map
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState

_TOKENS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_CANDIDATES = 1024


@dataclass(frozen=True)
class TritonBackend:
    """Steps on a GPU, in fp32, for head_dim a power of two. ``choice`` stands in for the tuning table's.

    From hidden states, steps of a few tokens (64, or 16 where the vendor's library is faster) sum the projection in
    spans, so that all processors can take part; longer ones are projected by that library, whose bits depend on the
    batch, or in tiles. ``impl=TritonBackend(batch_invariant=True)`` gives a token the same bits in every step, and
    small steps a projection by few programs.
    """

    name: str = "triton"
    choice: tuning.Choice | None = None
    batch_invariant: bool = False

    @property
    def stand_in(self) -> bool:
        """True where Triton's interpreter stands in for a device."""
        return installed() and interpreted()

    def why_not(self, step: Step) -> str | None:
        """None if this step can run here, else the reason."""
        spec, kv_score, state = step.spec, step.kv_score, step.state
        reason = why_no_device(kv_score.device)
        if reason is not None:
            return reason
        if kv_score.dtype not in _TOKENS:
            return f"kv_score is {kv_score.dtype}; the kernels compute in fp32 (the reference takes fp64)"
        if state is not None and state.dtype not in (torch.float32, torch.bfloat16):
            return f"the state is {state.dtype}; the kernels take fp32 and bf16"
        if spec.head_dim & (spec.head_dim - 1) or spec.head_dim < 2:
            return f"head_dim {spec.head_dim} is not a power of two"
        if spec.window > _MOST_CANDIDATES:
            return f"the window has {spec.window} tokens; a tile holds {_MOST_CANDIDATES}"
        return None if step.cache is None else _why_no_format(step.cache)

    def run(self, step: Step) -> None:
        """Do the step. A cache in validation mode is encoded by its format, so that nothing is written if it raises."""
        if step.cache is not None and step.cache.strict:
            _run_strict(step, step.cache, self.choice)
        elif step.plan.overwrites and not step.stored and not isinstance(step.state, OnlineState):
            # A kept row takes the place of one that a window of this step still reads.
            _run(step, self.choice, cache=step.cache, keeps=False)
            _run(step, self.choice, cache=step.cache, windows=False)
        else:
            _run(step, self.choice, cache=step.cache)

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:
        """None if ``project`` can do this, else the reason."""
        return fused.why_not_project(x, w)

    def project(self, x: torch.Tensor, w: torch.Tensor, tile: int | None) -> torch.Tensor:
        """x @ w.T; tiles are the kernel's own."""
        del tile
        return fused.project(x, w, not self.batch_invariant)

    def fused_forms(self, step: Step, x: torch.Tensor, w: torch.Tensor) -> dict[str, str | None]:
        """For each way to do this step from x: None if the table says that it wins, else the reason."""
        one = "it sums in another order than longer steps do" if self.batch_invariant else decode.why_not(step, x, w)
        one = one or fused.why_not_one_launch(step.rows.device, x.shape[0])
        worth = fused.why_not_worth(step, x.shape[0], not self.batch_invariant)
        return {
            "one launch": self.why_not(step) or one,
            "tiles": self.why_not(step) or fused.why_not(step, x, w) or worth,
        }

    def run_fused(self, form: str, steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        """Steps from the same x in the form named; ``kv_score`` is not looked at."""
        if form == "one launch":
            decode.run(steps, x, ws)
            return
        for step, w in zip(steps, ws, strict=True):
            fused.run(step, x, w)


def _run_strict(step: Step, cache: PagedCache, choice: tuning.Choice | None) -> None:
    """Rows first, then their bytes, which may raise; what is kept comes last."""
    live, state = step.plan.window_slot >= 0, step.state
    if isinstance(state, OnlineState):  # folds and windows are one launch: it works on a copy
        copy = replace(state, acc=state.acc.clone(), folded=state.folded.clone(), log=state.log.clone())
        _run(replace(step, state=copy), choice, cache=None)
    else:
        copy = None
        _run(step, choice, cache=None, keeps=False)
    stored = cache.encode(step.rows[live], exact=not step.spec.rounding.row)
    cache.put(step.plan.window_slot[live], stored)
    if copy is None:
        _run(step, choice, windows=False, cache=None)
    else:
        assert isinstance(state, OnlineState)
        for name in ("acc", "folded", "log"):
            getattr(state, name).copy_(getattr(copy, name))


def _why_no_format(cache: PagedCache) -> str | None:
    try:
        rows = row_map(cache.format, cache.head_dim, cache.page_rows)
    except UnsupportedError as error:
        return str(error)
    for part in (*rows.inner, *rows.parts):
        if part.scale and (cache.head_dim % part.block or part.first % part.block or part.last % part.block):
            return f"{cache.format.name}: blocks of {part.block} channels do not divide {cache.head_dim}"
    return None


def _run(
    step: Step,
    choice: tuning.Choice | None,
    *,
    windows: bool = True,
    cache: PagedCache | None,
    keeps: bool = True,
) -> None:
    """One launch for the windows, for what is kept, or for both, on the current stream of the step's device."""
    plan, state, spec = step.plan, step.state, step.spec
    count = plan.num_windows if windows else 0
    online = isinstance(state, OnlineState)
    kept = 0
    if keeps and state is not None and not step.stored:
        kept = plan.batch.start_positions.shape[0] if online else plan.keep_token.shape[0]
    if count == 0 and kept == 0:
        return
    if choice is None:
        choice = tuning.choose(step.kv_score.device, spec, plan.num_windows)
    form = None if cache is None else cache.format
    if step.kv_score.stride(1) != 1:
        step = replace(step, kv_score=step.kv_score.contiguous())
    c = constants(
        spec,
        state_key(state),
        form,
        0 if cache is None else cache.page_rows,
        step.latent is not None,
        choice,
        unroll=1 if interpreted() else UNROLL,
        stored=step.stored,
        tokens=tokens_key(step.kv_score),
    )
    # m, l and o of an online state lie in registers beside what is pooled.
    launch(step, cache, c, count, kept, min(8, 2 * choice.num_warps) if online else choice.num_warps)


def launch(step: Step, cache: PagedCache | None, c: Constants, count: int, kept: int, num_warps: int) -> None:
    """Start the kernel for ``count`` windows and ``kept`` kept rows (online: requests)."""
    from kvcondense.backends.triton.kernels.condense import condense_kernel, finish_kernel
    from kvcondense.backends.triton.kernels.online import online_kernel

    plan, state, batch = step.plan, step.state, step.plan.batch
    number = next_launch()
    kv_score = step.kv_score
    ape, gamma = None if step.ape is None else fp32(step.ape), fp32(step.gamma)
    cos, sin = rope_operands(step)
    counters = plan.counters if c.blocks > 1 and c.counters else None
    cache_data, scales, page_stride, scales_stride = cache_operands(cache)
    head = (kv_score, ape, gamma, cos, sin, step.rows, step.latent, batch.query_start_loc, batch.start_positions)
    windows = (plan.window_request, plan.window_index, plan.window_slot)
    stored = (cache_data, scales, counters)
    programs = -(-count // c.windows) * c.blocks
    options: dict[str, Any] = {"c": c, "num_warps": num_warps, "enable_fp_fusion": False}
    options |= tuning.launch_options(kv_score.device)
    with on_device(kv_score.device), clean_counters([plan]):
        if isinstance(state, OnlineState):
            options |= tuning.online_options(tuning.architecture(kv_score.device), num_warps)
            online_kernel[(programs + kept,)](
                *head, batch.draft_rows, batch.state_slots, state.acc, state.folded, state.log, *windows, *stored,
                programs, kv_score.stride(0), page_stride, scales_stride, number, **options,
            )  # fmt: skip
            return
        table, stride = state_table(batch, state)
        data = state_rows(state)
        condense_kernel[(programs + kept,)](
            *head, table, data, *windows, plan.keep_token, plan.keep_position, plan.keep_row, *stored,
            count, programs, kv_score.stride(0), stride, page_stride, scales_stride, number, **options,
        )  # fmt: skip
        if count and c.blocks > 1 and not c.counters:
            finish_kernel[(count,)](*head[2:7], *windows, cache_data, scales, page_stride, scales_stride, **options)


BACKEND = TritonBackend()
