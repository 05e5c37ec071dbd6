"""Context parallel: sequences that lie on several ranks, cut at any token, condensed where their tokens are.

A rank needs what a state would hold at the first position of each of its segments, and nothing else: no row at a window
boundary without overlap, the previous window with overlap, else the tokens of the open window. Those rows travel, never
the whole kv_score; then every rank goes on from them as from a state, so that each window is emitted once, by the rank
that has its last token. A sequence that goes on from an earlier call begins with such rows, with the rank that holds
them. Where a window's tokens are scattered, running values (m, l, o) may travel instead. In training, the gradients of
those rows travel back.
"""

from kvcondense.parallel.deals import round_robin, zigzag
from kvcondense.parallel.inference import ShardedRows, condense_shard, traffic
from kvcondense.parallel.interleave import interleaved_slots
from kvcondense.parallel.shards import Segment, Shards
from kvcondense.parallel.training import train_shard

__all__ = [
    "Segment", "ShardedRows", "Shards", "condense_shard", "interleaved_slots", "round_robin", "traffic", "train_shard",
    "zigzag",
]  # fmt: skip
