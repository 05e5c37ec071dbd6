"""Live rows of a request: read them out of one state pool, put them into another (other ring, page size, slot)."""

from __future__ import annotations

import torch

from kvcondense.errors import DtypeError, RangeError, ShapeError
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.state import UNKNOWN, StatePool, live_rows
from kvcondense.spec import CompressorSpec


def export_live(spec: CompressorSpec, state: StatePool, batch: RaggedBatch) -> torch.Tensor:
    """Rows that the requests of ``batch`` need to go on at their start positions: [n, state_dim], a copy.

    Request after request, oldest position first: live_start(p) .. p - 1 for a request at p. Lengths are ignored.
    Of a pool with raw scores, rows have none of the ape.
    Raises RangeError if the batch names rows that the pool lacks, StateMismatchError if it holds others there.
    """
    request, position, address = _rows(spec, state, batch)
    state.check_rows(batch, request, position)
    return state.take(address)


def import_live(spec: CompressorSpec, state: StatePool, batch: RaggedBatch, rows: torch.Tensor) -> None:
    """Write rows of ``export_live`` for the requests of ``batch``; mutates ``state``.

    Raises ShapeError, DtypeError or RangeError before anything is written: the number of rows follows from the spec
    and the positions alone, and the dtype must be the pool's.
    """
    _, position, address = _rows(spec, state, batch)
    if tuple(rows.shape) != (position.shape[0], spec.state_dim):
        raise ShapeError("rows", f"shape [{position.shape[0]}, {spec.state_dim}]", f"shape {list(rows.shape)}")
    if rows.dtype != state.data.dtype:
        raise DtypeError("rows", f"{state.data.dtype} as the state", rows.dtype)
    if state.tags is not None:  # broken off below, rows are not taken for what was there
        state.tags[address] = UNKNOWN
    state.put(address, rows)
    if state.tags is not None:
        state.tags[address] = position


def _rows(
    spec: CompressorSpec, state: StatePool, batch: RaggedBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(request, position, state row) of everything the requests go on from; raises unless the rows exist, once each."""
    request, position = live_rows(spec, batch.start_positions.clamp(min=0))
    address = state.layout.address(batch, request, position)
    if bool(((address < 0) | (address >= state.layout.num_rows)).any()) or address.unique().shape != address.shape:
        raise RangeError(
            "batch", f"state rows of its own in 0..{state.layout.num_rows - 1} for each position", "others"
        )
    return request, position, address
