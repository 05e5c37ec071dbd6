"""The block of 64-bit integers of the kernel that plans: a head, the columns of a batch, then a block for each plan.

Host and kernel share these names, as those of ``params``.
"""

from __future__ import annotations

(
    STATUS,  # 1: irregular, in a way that only the builders in torch explain
    MOST,  # positions of a sequence
    DRAFTS,  # draft rows of every request; -1: the column has them
    COUNT,  # plans
    TOKENS,  # of the step, as the kernel says
    BASE,  # of the batch's own columns
    OUT,  # int64: what plans hold, one behind the other; 0: only take the batch and count
    SEEN,  # int64: a hash table
    SEEN_SIZE,  # entries, a power of two
) = range(9)
HEAD_SIZE = 9

# Columns, in the order of RaggedBatch's fields: integers of the caller, and where the batch has its own.
(
    FROM,
    ROWS,  # -1: the batch has no such column
    WIDTH,
    ROW_STRIDE,
    STRIDE,
    BYTES,  # of an integer; 0: they are the batch's own
    TO,  # where the batch has its own, in bytes from BASE
) = range(7)
COLUMN_SIZE = 7
QUERY_START, START, DRAFT, SLOTS, STATE_TABLE, MAPPING, TABLE = (HEAD_SIZE + COLUMN_SIZE * i for i in range(7))
JOBS = HEAD_SIZE + 7 * COLUMN_SIZE

# A plan: what it is made for, then what the kernel says of it.
(
    RATIO,
    HALVES,
    KIND,
    BLOCKS,  # slots or pages
    BLOCK_ROWS,
    PAGE_TOKENS,
    KEEP_ALL,
    PAGE_ROWS,  # of the cache; 0: not said
    WINDOWS,
    KEEPS,
    LAST_WINDOW,  # -1: none
    LOWEST,
    HIGHEST,
    SHARED,
    OVERWRITES,
) = range(15)
JOB_SIZE, JOB_GIVEN = 15, 8
STATELESS, RING, PAGED, ONLINE = range(4)
