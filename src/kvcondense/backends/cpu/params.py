"""What the host hands to compiled kernels, one list of fields for each block: addresses, strides, counts.

Host and kernels use these names, and Numba reads the module's constants as literals, so that they cannot drift apart.
"""

from __future__ import annotations

from typing import Annotated

from kvcondense.backends.cpu.blocks import LINE, Behind, Block, Counter, Real, Table, whole_lines

CHANNELS = 16
"""Rows come in multiples of as many channels, 64 bytes of fp32: one vector of AVX-512, two of AVX2, four of NEON."""
GROUP = 8
"""Tokens that a pool takes at once."""
STAGED = 128
"""Channels of a group that are widened at once, where rows are not read as they lie."""
FP32, BF16, FP16 = range(3)
BF16_ROUNDED, WIDENED = 3, 4
"""More ways to read rows: scores are rounded to bf16 with their ape; rows go through a copy in fp32."""


class Spec(Block):
    """What a compressor computes."""

    ratio: int
    window: int
    head_dim: int
    width: int
    has_gate: int
    round_pooled: int
    round_latent: int
    round_rotated: int
    round_row: int  # before a cache quantises it
    rounded: int  # 1: rows are of bf16 before that
    rotate: int
    rope_dim: int
    eps: Real
    hadamard_scale: Real


SMALL_FLOAT, WHOLE, PLAIN16, PLAIN32 = range(4)
POW2, PLAIN_FP32, E4M3_BYTE, E4M3_TIMES, E4M3_INVERSE, INVERSE_FP32, TENSOR = range(7)


class Part(Block):
    """Channels first .. last - 1 of a cache row."""

    first: int
    last: int
    element: int  # SMALL_FLOAT, WHOLE, PLAIN16 or PLAIN32
    bits: int
    mantissa: int
    bias: int
    max_code: int
    nan_code: int  # -1: none
    ties_to_even: int
    largest: int  # bits of an fp32
    scale: int  # POW2 .. TENSOR; -1: none
    scale_bytes: int
    scale_copies: int  # 0: stored as fp32
    divides: int
    scale_nan: int
    clean: int
    block: int
    floor: int
    floor_exponent: int  # least exponent, for floors on the scale
    tensor_scale: Real
    code_base: int  # bytes: row i of a page has its codes at code_base + code_stride * i
    code_stride: int
    second: int  # 1: in the buffer beside the pages
    tile: int  # rows of a tile of as many channels; 1: rows lie as they are
    scale_base: int
    scale_stride: int


class Format(Block):
    """How a row lies in a page of the cache."""

    page_rows: int
    round_row: int  # 1: unless the profile forbids it, 2: always
    inner_count: int  # parts that the row goes through first; they come before the others
    pad_base: int
    pad_stride: int
    pad_bytes: int
    part_count: int  # of both
    parts: Annotated[int, Behind(Part)]


class Layer(Block):
    """What a compressor works on, step after step. Addresses are 0 for what there is none of."""

    spec: Annotated[int, Spec]
    format: Annotated[int, Format]
    ape: int  # fp32 [r, N]
    gamma: int
    cos: int
    sin: int
    state: int  # rows of the state, or of the draft log of an online state
    state_stride: int  # bytes from row to row
    state_page_stride: int  # bytes from slot to slot or page to page
    state_score: int  # bytes from the kv of a row to its score; they may lie in two tensors
    state_kind: int  # FP32 or BF16
    state_raw: int  # 1: stored scores lack the ape
    acc: int  # online state: fp32 [slots, 3, d]; 0: rows
    folded: Table
    cache: int
    page_stride: int  # bytes
    scales: int  # fp32 scales beside the pages
    scales_stride: int  # bytes from page to page
    second: int  # channels beside the pages
    second_stride: int
    encode: int  # compiled functions that not every layer has: of a cache
    online: int  # of an online state


class Work(Block):
    """A plan, for all layers that share it."""

    query_start: Table
    start: Table
    drafts: Table
    state_table: Table  # state slots [R], or block table [R, pages]
    state_table_stride: int  # entries from request to request
    state_page_rows: int  # of a slot or page
    state_page_tokens: int  # positions that share a page
    paged: int  # 1: block table, 0: slots
    window_request: Table
    window_index: Table
    window_slot: Table
    keep_token: Table
    keep_position: Table
    keep_row: Table


WINDOWS, OPEN, KEEP = 1, 2, 4
"""Pool and finish windows; fold what is left into online states; keep rows."""


class Call(Block):
    """One step of a layer by a plan."""

    layer: Annotated[int, Layer]
    plan: Annotated[int, Work]
    scratch: int
    scratch_bytes: int  # of each thread: a Room and what it lists
    kv_score: int
    kv_stride: int  # bytes from token to token
    kv_kind: int  # FP32, BF16 or FP16
    rows: int  # fp32 [E, d]
    latent: int  # fp32 [E, d]; 0: not asked for
    stored: int  # 1: all tokens are read from the state
    store: int  # 1: rows go to the cache, if there is one
    windows: int
    requests: int  # whose online state is left open
    keeps: int
    blocks: int  # channel blocks that a window's pool is split into
    chunk: int  # windows that a thread takes at once
    phases: int  # of this launch: WINDOWS, OPEN, KEEP
    threads: Counter
    next_window: Counter
    next_open: Counter
    next_keep: Counter
    blocks_done: Counter  # the first of one for each window, if blocks > 1


class Candidate(Block):
    """Where a candidate's channels lie."""

    kv: int
    score: int
    bias: int


ENTRY = Candidate.size
"""Bytes of a table's entry."""


class Room(Block):
    """Where a thread of a step works."""

    zeros: int  # fp32 [d]
    nothing: int  # fp32 [d] of minus infinity
    row: int  # fp32 [d]
    factors: int  # fp32 [d]: of a row's vectors, what they are multiplied with or divided by
    scales: int  # [3, d]: the same of its blocks, their scales as fp32, their bytes of scales
    scales_away: int  # from one of the three to the next
    work: int  # fp32 [3, d]: m, l and o
    table: int  # of the window that is pooled; room for whole groups
    following: int  # of the next one
    lines: int  # what memory is asked for meanwhile, if in another order: room for a group
    later: int  # a table whose scores are asked for while a row is finished
    later_rows: int  # of its entries; 0 for none
    later_halved: int  # 1 if they are of 16 bits
    copied: int  # of a group that goes through ``copies``: fp32 [GROUP, 2, STAGED]
    copies: int

    @classmethod
    def bytes(cls, head_dim: int, window: int) -> int:
        """Of a thread's scratch, for windows of as many tokens: whole lines."""
        entries = -(-window // GROUP) * GROUP
        return whole_lines(ROOM + 40 * head_dim + 8 * GROUP * STAGED + ENTRY * (2 * entries + 2 * GROUP))


ROOM = whole_lines(Room.size)
"""Bytes of a room before what it lists."""

PANEL = 2048
"""Bytes of a panel's row of bf16. Rows lie a line further apart, lest all of them share the sets of a cache."""
X_ROW, W_ROW = PANEL + LINE, 2 * PANEL + LINE
"""Of tokens, which stay bf16, and of channels, which are widened."""
TALL, WIDE, BLOCK = 128, 32, 12
"""Most tokens and channels of a task whose rows go through panels, and tokens whose panel stays in the first cache."""


class Product(Block):
    """A projection, x [T, D] w [N, D]^T in tiles."""

    x: int
    x_stride: int  # bytes
    w: int
    w_stride: int
    out: int
    tokens: int
    channels: int
    hidden_bytes: int
    tile_tokens: int
    tile_channels: int
    scratch: int
    scratch_bytes: int  # of each thread
    threads: Counter
    next_tile: Counter

    @classmethod
    def bytes(cls) -> int:
        """Of a thread's scratch: two panels and the sums of their products."""
        return X_ROW * BLOCK + W_ROW * WIDE + 4 * CHANNELS * TALL * WIDE


POOL, FINISH = range(2)


class TrainingPool(Block):
    """Training's pool, forward or back."""

    what: int  # POOL
    tokens: int  # fp32 [T, projected]
    stride: int  # bytes from token to token, in tokens and gradient
    ape: int  # fp32 [r, N]; 0: none
    zeros: int  # fp32 [N]
    nothing: int  # fp32 [N] of minus infinity
    first: Table  # first token of each window's own
    index: Table  # window of the document, 0: nothing comes before it
    windows: int
    strip: int  # windows of a task
    channels: int  # of a task
    pooled: int  # fp32 [E, d]
    lse: int  # fp32 [E, d]; forward leaves the maximum there
    total: int  # fp32 [E, d], sum e^(z - m); 0: backward
    given: int  # fp32 [E, d]
    gradient: int  # fp32 [T, projected]
    bias_gradient: int  # fp32 [strips, W, d], zeros
    scratch: int
    scratch_bytes: int  # of each thread
    ratio: int
    window: int
    head_dim: int
    width: int
    gate: int
    threads: Counter
    next: Counter


class TrainingRows(Block):
    """Training's norm, RoPE and Hadamard, forward or back."""

    what: int  # FINISH
    spec: Annotated[int, Spec]
    pooled: int  # fp32 [E, d]
    gamma: int
    cos: int
    sin: int
    position: Table  # [E]
    given: int  # fp32 [E, d]; 0: forward
    out: int  # fp32 [E, d]: rows, or the gradient of P
    gamma_gradient: int  # fp32 [strips, d], zeros
    count: int
    strip: int
    scratch: int  # of each thread, 3 d floats and a Room
    threads: Counter
    next: Counter
