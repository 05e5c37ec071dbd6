"""Decode context parallel: every rank has all tokens of a step, and keeps the compressed rows that are its own."""

from __future__ import annotations

import torch

from kvcondense.errors import RangeError, ShapeError, require_int
from kvcondense.layout.batch import IntTensor, RaggedBatch, spread
from kvcondense.spec import CompressorSpec


def interleaved_slots(
    spec: CompressorSpec,
    query_start_loc: IntTensor,
    start_positions: IntTensor,
    block_table: torch.Tensor,
    page_rows: int,
    *,
    rank: int,
    ranks: int,
    interleave: int,
) -> torch.Tensor:
    """slot_mapping int64 [T] of a step for ``RaggedBatch.build``: this rank's rows, -1 for those of other ranks.

    ``interleave`` positions go to a rank, then as many to the next one: position p lies on rank (p // interleave) mod
    ranks, there at p // (interleave ranks) interleave + p mod interleave. A window's row lies with its last token, at
    that place // ratio of the request's own rows; block_table [R, pages] names this rank's pages of them. As vLLM's
    ``get_compressed_slot_mapping`` has it. interleave is a multiple of the ratio, so that no window is cut.

    States are not dealt out: every rank keeps them, since all read the tokens. Raises RangeError, or ShapeError for a
    table that is too narrow.
    """
    for name, value, low in (("ranks", ranks, 1), ("rank", rank, 0), ("page_rows", page_rows, 1)):
        require_int(name, value, low)
    if rank >= ranks:
        raise RangeError("rank", f"0..{ranks - 1}", rank)
    if require_int("interleave", interleave, 1) % spec.ratio:
        raise RangeError("interleave", f"a multiple of the ratio, {spec.ratio}", interleave)
    batch = RaggedBatch.build(query_start_loc, start_positions=start_positions, block_table=block_table)
    request, offset = spread(batch.lengths)  # [T] each
    position = batch.start_positions[request] + offset
    ends = (batch.start_positions[request] >= 0) & ((position + 1) % spec.ratio == 0)
    mine = ends & (position // interleave % ranks == rank)
    row = (position // (interleave * ranks) * interleave + position % interleave) // spec.ratio
    page = torch.where(mine, row // page_rows, 0)
    assert batch.block_table is not None
    wide = batch.block_table.shape[1]
    if bool((page[mine] >= wide).any()):
        raise ShapeError("block_table", f"at least {int(page[mine].max()) + 1} pages", f"{wide}")
    entry = batch.block_table[request, page]
    bad = mine & ((entry < 0) | (entry > torch.iinfo(torch.int64).max // page_rows - 1))
    if bool(bad.any()):
        t = int(bad.nonzero()[0, 0])
        raise RangeError(f"block_table[{int(request[t])}, {int(page[t])}]", "a page of this rank's", int(entry[t]))
    return torch.where(mine, entry * page_rows + row % page_rows, -1)
