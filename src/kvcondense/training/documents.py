"""Who takes part: tokens of inert documents and padding are left out before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense import validate
from kvcondense.layout.batch import RaggedBatch


def live(name: str, tokens: torch.Tensor, batch: RaggedBatch) -> tuple[torch.Tensor, RaggedBatch]:
    """The tokens that documents of the batch own, without those of inert ones, which become empty documents.

    Documents keep their numbers. What is left out has a gradient of exactly zero and meets no sum: neither its values,
    NaN included, nor how many there are can change a bit. ``name``: of the tokens, in errors.
    """
    validate.tensor(name, tokens, (None, None), validate.WEIGHT_DTYPES, batch.query_start_loc.device)
    validate.enough(name, tokens.shape[0], batch)
    batch = batch.checked()
    total = int(batch.query_start_loc[-1])
    if tokens.shape[0] > total:
        tokens = tokens[:total]
    lengths = torch.where(batch.active, batch.lengths, 0)
    if int(lengths.sum()) == total:
        return tokens, batch
    taken = batch.active.repeat_interleave(batch.lengths).nonzero()[:, 0]
    slots = None if batch.slot_mapping is None else batch.slot_mapping[taken]
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    drafts = torch.minimum(batch.draft_rows, lengths)
    batch = replace(batch, query_start_loc=starts, draft_rows=drafts, slot_mapping=slots)
    return tokens.index_select(0, taken), batch
