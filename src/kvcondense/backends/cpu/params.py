"""The blocks of 64-bit integers that the host hands to compiled kernels: addresses, strides, counts. One list each.

Numba reads the module's constants as literals, so host and kernels share these names and cannot drift apart. Floats
travel as their fp32 bits.
"""

from __future__ import annotations

# One call of a kernel.
(
    SPEC,  # address of a spec block
    FORMAT,  # address of a format block; 0: no cache
    SCRATCH,  # address of scratch memory
    SCRATCH_BYTES,  # of each thread
    KV_SCORE,
    KV_STRIDE,  # bytes from token to token
    KV_KIND,  # FP32, BF16 or FP16
    APE,  # fp32 [r, N]; 0: none
    GAMMA,
    COS,
    SIN,
    ROWS,  # fp32 [E, d]
    LATENT,  # fp32 [E, d]; 0: not asked for
    QUERY_START,
    START,
    DRAFTS,
    REQUESTS,
    STATE_TABLE,  # state slots [R], or block table [R, pages]
    STATE_TABLE_STRIDE,  # entries from request to request
    STATE_PAGE,  # rows of a slot or page
    STATE_TOKENS,  # positions that share a page
    PAGED,  # 1: block table, 0: slots
    STATE,  # rows of the state, or of the draft log of an online state; 0: none
    STATE_STRIDE,  # bytes from row to row
    STATE_PAGE_STRIDE,  # bytes from slot to slot or page to page
    STATE_KIND,  # FP32 or BF16
    STATE_RAW,  # 1: stored scores lack the ape
    ACC,  # online state: fp32 [slots, 3, d]; 0: rows
    FOLDED,
    WINDOWS,
    WINDOW_REQUEST,
    WINDOW_INDEX,
    WINDOW_SLOT,
    KEEPS,
    KEEP_TOKEN,
    KEEP_POSITION,
    KEEP_ROW,
    CACHE,
    PAGE_STRIDE,  # bytes
    SCALES,  # fp32 scales beside the pages; 0: none
    SCALES_STRIDE,  # bytes from page to page
    BLOCKS,  # channel blocks that a window's pool is split into
    CHUNK,  # windows that a thread takes at once
) = range(43)
CALL_SIZE = 43

LANES = 16
"""Channels of a vector; the kernels take rows in multiples of it."""
FP32, BF16, FP16 = range(3)

# Counters follow the call block, zeroed: byte offsets, a cache line apart so that threads do not share one; then one
# counter per window if BLOCKS > 1.
LINE = 64
THREADS, NEXT_WINDOW, DONE_WINDOWS, NEXT_OPEN, NEXT_KEEP, WINDOW_BLOCKS = (8 * CALL_SIZE + LINE * i for i in range(6))

# What a compressor computes.
(
    RATIO,
    WINDOW,
    HEAD_DIM,
    WIDTH,
    HAS_GATE,
    ROUND,  # 1: REFERENCE profile
    ROTATE,
    ROPE_DIM,
    EPS,
    HADAMARD_SCALE,
    STAGED,  # channels staged at once when rows are not read as they lie; 0: never
) = range(11)
SPEC_SIZE = 11

# How a row lies in a page of the cache: PARTS entries of PART_SIZE follow the head.
FORMAT_PAGE_ROWS, ROUND_ROW, THROUGH, PAD_BASE, PAD_STRIDE, PAD_BYTES, PARTS = range(7)
FORMAT_HEAD = 7
(
    FIRST,  # channels FIRST .. LAST - 1
    LAST,
    ELEMENT,  # SMALL_FLOAT, WHOLE, PLAIN16 or PLAIN32
    BITS,
    MANTISSA,
    BIAS,
    MAX_CODE,
    NAN_CODE,  # -1: none
    TIES_TO_EVEN,
    LARGEST,
    SCALE,  # index in SCALE_KINDS; -1: none
    BLOCK,
    FLOOR,
    FLOOR_EXPONENT,  # least exponent, for floors on the scale
    TENSOR_SCALE,
    CODE_BASE,  # bytes: row i of a page has its codes at CODE_BASE + CODE_STRIDE * i
    CODE_STRIDE,
    SCALE_BASE,
    SCALE_STRIDE,
) = range(19)
PART_SIZE = 19

SMALL_FLOAT, WHOLE, PLAIN16, PLAIN32 = range(4)
POW2_BYTE, POW2_FP32, PLAIN_FP32, E4M3_BYTE, INVERSE_FP32, TENSOR = range(6)

# A projection; NEXT_TILE is a counter in the block itself, zero at first.
X, X_STRIDE, W, W_STRIDE, OUT, TOKENS, CHANNELS, HIDDEN_BYTES, TILE_TOKENS, TILE_CHANNELS, NEXT_TILE = range(11)
PROJECT_SIZE = 11

# Training; what counts is in the block itself, zero at first. The pool's block, then that of norm, RoPE and Hadamard.
POOL, FINISH = range(2)
(
    T_WHAT,  # POOL or FINISH
    T_TOKENS,  # fp32 [T, projected]
    T_STRIDE,  # bytes from token to token, in T_TOKENS and T_GRADIENT
    T_APE,  # fp32 [r, N]; 0: none
    T_ZEROS,  # fp32 [N]
    T_FIRST,  # first token of each window's own
    T_INDEX,  # window of the document, 0: nothing comes before it
    T_WINDOWS,
    T_STRIP,  # windows of a task
    T_CHANNELS,  # of a task
    T_POOLED,  # fp32 [E, d]
    T_LSE,  # fp32 [E, d]; forward leaves the maximum there
    T_TOTAL,  # fp32 [E, d], sum e^(z - m); 0: backward
    T_GIVEN,  # fp32 [E, d]
    T_GRADIENT,  # fp32 [T, projected]
    T_BIAS_GRADIENT,  # fp32 [strips, W, d], zeros
    T_SCRATCH,
    T_SCRATCH_BYTES,  # of each thread
    T_RATIO,
    T_WINDOW,
    T_HEAD_DIM,
    T_WIDTH,
    T_GATE,
    T_THREADS,  # counters
    T_NEXT,
) = range(25)
(
    F_WHAT,
    F_SPEC,
    F_POOLED,  # fp32 [E, d]
    F_GAMMA,
    F_COS,
    F_SIN,
    F_POSITION,  # [E]
    F_GIVEN,  # fp32 [E, d]; 0: forward
    F_OUT,  # fp32 [E, d]: rows, or the gradient of P
    F_GAMMA_GRADIENT,  # fp32 [strips, d], zeros
    F_COUNT,
    F_STRIP,
    F_SCRATCH,  # 3 d floats of each thread
    F_THREADS,  # counters
    F_NEXT,
) = range(15)
