"""Play vectors on an adapter: what it returns is what an implementation in another language writes into a folder."""

from __future__ import annotations

from typing import Any

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.adapter import Adapter, Factory, Setup
from kvcondense.conformance.compressors import rope_of
from kvcondense.conformance.inputs import Inputs, Piece
from kvcondense.conformance.play import raw, seed
from kvcondense.conformance.vectors.schema import JUNK, Op, Vector
from kvcondense.formats import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec

Tensors = dict[str, torch.Tensor]


def outputs(vector: Vector, given: Tensors, make: Factory) -> Tensors:
    """``rows``, ``untouched``, ``refused`` and, if the adapter has a ``cache`` of ours, ``pages``.

    given: the vector's tensors; only ``pattern`` and ``norm`` are looked at. Whatever the adapter raises passes.
    """
    adapter, inputs = make(), _inputs(vector, given)
    setup = _setup(vector, inputs)
    rows, refused = [], []
    read = torch.tensor(vector.read, dtype=torch.int64)
    for _ in range(vector.repeat):
        adapter.init(setup)
        refused = [_do(adapter, setup, inputs, op) for op in vector.ops]
        rows.append(adapter.rows(read).clone())
    found = {"rows": torch.cat(rows), "refused": torch.tensor([r for r in refused if r is not None], dtype=torch.uint8)}
    found["untouched"] = raw(adapter.rows(torch.tensor(vector.untouched, dtype=torch.int64)))
    cache: Any = getattr(adapter, "cache", None)
    if vector.exact and cache is not None:
        found["pages"] = cache.data.clone()
    return found


def _inputs(vector: Vector, given: Tensors) -> Inputs:
    spec = CompressorSpec.from_dict(vector.compressor, f"{vector.name} compressor")
    own = (given["pattern"], given["norm"]) if vector.pattern else ()
    return Inputs(spec, vector.seed, vector.scale, *own)


def _setup(vector: Vector, inputs: Inputs) -> Setup:
    spec = inputs.spec
    rope = rope_of(spec, vector.max_positions + 1)
    sizes = (vector.num_slots, vector.max_draft, vector.num_pages, vector.page_rows, vector.max_positions)
    return Setup(spec, inputs.weights(), rope, *sizes, get_format(vector.format))


def _do(adapter: Adapter, setup: Setup, inputs: Inputs, op: Op) -> bool | None:
    """Do an op; whether it was refused, of those that must be."""
    if op.op == "begin":
        assert op.slot is not None
        assert op.position is not None
        if adapter.capabilities.exports:
            seed(adapter, setup, op.slot, op.position)
    elif op.op == "copy":
        assert op.position is not None
        payload = adapter.export(RaggedBatch.at(op.position, state_slot=op.slot))
        adapter.load(RaggedBatch.at(op.position, state_slot=op.to), payload)
    elif op.op == "reset":
        assert op.slot is not None
        adapter.reset([op.slot])
    elif op.op == "step":
        adapter.step(inputs.tokens(_pieces(op)), _batch(op))
    else:
        try:
            adapter.step(inputs.tokens(_pieces(op)), _batch(op))
        except Exception:
            return True
        return False
    return None


def _pieces(op: Op) -> list[Piece]:
    return [Piece(stream, first, count, JUNK[junk]) for stream, first, count, junk in op.pieces or ()]


def _batch(op: Op) -> RaggedBatch:
    table = None
    if op.block_table is not None:
        pages = torch.tensor(op.block_table, dtype=torch.int64)
        table = torch.cat([torch.zeros(pages.shape[0], op.first_page or 0, dtype=torch.int64), pages], dim=1)
    return RaggedBatch.build(
        op.query_start_loc or [0],
        start_positions=op.start_positions,
        draft_rows=op.draft_rows or [],
        state_slots=op.state_slots,
        block_table=table,
        slot_mapping=op.slot_mapping if table is None else None,
    )


def values(vector: Vector, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as a reader sees them: fp32 [n, head_dim]. Raises if they are none of the vector's format."""
    form, d = get_format(vector.format), int(vector.compressor["head_dim"])
    stored.check(form, d, rows, rows.shape[0])
    return stored.values(form, d, rows)
