"""What a kernel is compiled for: spec, kind of state, cache format and tiling in one frozen record of plain values."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvcondense.backends.triton.tuning import Choice
from kvcondense.formats.descriptor import CacheFormat
from kvcondense.formats.elements import E4M3, SmallFloat
from kvcondense.formats.integers import SMALL_FLOAT, Part, RowMap, row_map
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.online import OnlineState
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec

_MULTIPLE = 16
_ALIGNED = 4  # fp32 of a load of 16 bytes
ALIGNED = "fp32, aligned"
UNROLL = 4
"""Tokens that an online fold reads ahead."""


def small_float_part(element: SmallFloat) -> Part:
    """What encodes such elements by themselves."""
    nan = -1 if element.nan_code is None else element.nan_code
    ties = int(element.ties_to_even)
    return Part(0, 0, SMALL_FLOAT, 0, element.bits, element.mantissa, element.bias, element.max_code, nan, ties)


SCALE_PART = small_float_part(E4M3)
"""Scales that are e4m3 bytes."""


@dataclass(frozen=True, eq=False)
class Constants:
    """Compile-time arguments; equal ones are one object (``constants``), so that looking a kernel up is quick.

    block: channels of a program, blocks: programs per window, windows: of a program that has all their channels,
    counters: whether the last of a window's programs finishes it. whole: windows may be read as they lie, since
    kv_score is given, and their tokens are a power of two.
    holds: loads ahead are volatile.
    state_rows: rows of a ring, a page or a draft log; page_tokens: positions that share a page; state_apart: kv and
    scores are two tensors; strides in elements, state_multiple: a power of two that divides them, so that rows begin
    where 16 bytes do, if the tensors do. alike: both are fp32, so that one load may take a row from either
    place; aligned: and where they and their halves begin, so do 16 bytes. window_padded,
    window_levels: the window as a power of two, and its logarithm; ratio_levels: the ratio's. splits: partial sums of
    which this launch makes kv_score; 0: it is given. stored: all tokens are read from the state. rounds_rows: rows are
    rounded before the cache takes them. casts_...: the chip's own cast gives what integers would.
    """

    ratio: int
    window: int
    window_padded: int
    window_levels: int
    ratio_levels: int
    width: int
    projected: int
    head_dim: int
    channel_levels: int
    rope_dim: int
    eps: float
    rotate: bool
    hadamard_scale: float
    has_gate: bool
    has_ape: bool
    round_pooled: bool
    round_latent: bool
    round_rotated: bool
    block: int
    blocks: int
    windows: int
    whole: bool
    counters: bool
    holds: bool
    has_state: bool
    paged: bool
    online: bool
    state_rows: int
    state_bf16: bool
    page_tokens: int
    state_apart: bool
    state_stride: int
    state_page_stride: int
    state_multiple: int
    alike: bool
    aligned: bool
    raw_scores: bool
    latent: bool
    has_cache: bool
    rows_map: RowMap | None
    rounds_rows: bool
    scale_part: Part
    casts_bf16: bool
    casts_e4m3: bool
    casts_e2m1: bool
    unroll: int
    splits: int
    stored: bool = False

    @property
    def early(self) -> bool:
        """Whether each program asks for what ends a row before it knows if it is the last of its window."""
        return self.holds and self.counters and self.blocks > 1 and not self.online

    @property
    def value(self) -> Constants:
        """Itself, as Triton's wrapper has it."""
        return self


class StateKey(NamedTuple):
    """Kind ("ring", "paged", "online", "": none), rows of a slot, page or log, strides in elements, and the rest."""

    kind: str = ""
    rows: int = 0
    bf16: bool = False
    stride: int = 0
    page_stride: int = 0
    page_tokens: int = 0
    raw_scores: bool = False
    apart: bool = False
    aligned: bool = False


@functools.lru_cache(maxsize=1024)
def constants(
    spec: CompressorSpec,
    state: StateKey,
    form: CacheFormat | None,
    page_rows: int,
    latent: bool,
    choice: Choice,
    unroll: int = UNROLL,
    splits: int = 0,
    stored: bool = False,
    tokens: str = "",
) -> Constants:
    """The record for these; ``state`` as ``state_key`` has it, ``page_rows`` of the cache, ``tokens_key`` of tokens."""
    # Without counters a launch of its own finishes windows; who writes back an online state then has to be one program.
    block = spec.head_dim if state.kind == "online" and not choice.counters else choice.block
    padded = 1 << (spec.window - 1).bit_length()
    whole = splits == 0 and spec.window == padded and not stored
    rows = None if form is None else row_map(form, spec.head_dim, page_rows, exact=not spec.rounding.row)
    return Constants(
        ratio=spec.ratio,
        window=spec.window,
        window_padded=padded,
        window_levels=padded.bit_length() - 1,
        ratio_levels=spec.ratio.bit_length() - 1,
        width=spec.width,
        projected=spec.projected,
        head_dim=spec.head_dim,
        channel_levels=spec.head_dim.bit_length() - 1,
        rope_dim=spec.rope_dim,
        eps=spec.eps,
        rotate=spec.rotate,
        hadamard_scale=spec.head_dim**-0.5,
        has_gate=spec.has_gate,
        has_ape=spec.has_ape,
        round_pooled=spec.rounding.pooled,
        round_latent=spec.rounding.latent,
        round_rotated=spec.rounding.rotated,
        block=block,
        blocks=spec.head_dim // block,
        windows=choice.windows if whole and block == spec.head_dim and state.kind != "online" else 1,
        whole=whole,
        counters=choice.counters,
        holds=choice.holds,
        has_state=state.kind != "",
        paged=state.kind == "paged",
        online=state.kind == "online",
        state_rows=state.rows,
        state_bf16=state.bf16,
        page_tokens=state.page_tokens,
        state_apart=state.apart,
        state_stride=state.stride,
        state_page_stride=state.page_stride,
        state_multiple=math.gcd(state.stride, state.page_stride, _MULTIPLE),
        # Ascend's compiler, where a program is one thread, ends on pointers that are chosen.
        alike=choice.counters and tokens != "" and state.kind in ("ring", "paged") and not state.bf16,
        aligned=tokens == ALIGNED
        and state.aligned
        and math.gcd(state.stride, state.page_stride, spec.head_dim) % _ALIGNED == 0,
        raw_scores=state.raw_scores,
        latent=latent,
        has_cache=form is not None,
        rows_map=rows,
        rounds_rows=rows is not None and rows.round_row and not spec.rounded,
        scale_part=SCALE_PART,
        casts_bf16="bf16" in choice.casts,
        casts_e4m3="e4m3" in choice.casts,
        casts_e2m1="e2m1" in choice.casts,
        unroll=unroll,
        splits=splits,
        stored=stored,
    )


def tokens_key(kv_score: torch.Tensor) -> str:
    """What kernels are compiled for of tokens: "fp32", ``ALIGNED`` if their rows begin where 16 bytes do; else ""."""
    if kv_score.dtype is not torch.float32:
        return ""
    whole = kv_score.data_ptr() % (4 * _ALIGNED) == 0 and kv_score.stride(0) % _ALIGNED == 0
    return ALIGNED if whole else "fp32"


def state_key(state: StatePool | OnlineState | None) -> StateKey:
    """What kernels are compiled for of this state."""
    if state is None:
        return StateKey()
    rows = state.log if isinstance(state, OnlineState) else state.data
    block = state.layout.log_rows if isinstance(state, OnlineState) else state.layout.block_rows
    stride = rows.stride(-2)
    key = StateKey("online", block, False, stride, stride * block)
    if isinstance(state, OnlineState):
        return key
    return key._replace(
        kind="paged" if isinstance(state.layout, PagedLayout) else "ring",
        bf16=state.dtype is torch.bfloat16,
        page_stride=state.blocks.stride(0),
        page_tokens=state.layout.page_tokens if isinstance(state.layout, PagedLayout) else 0,
        raw_scores=state.layout.raw_scores,
        apart=state.score is not None,
        aligned=all(t.data_ptr() % (4 * _ALIGNED) == 0 for t in state.memory),
    )
