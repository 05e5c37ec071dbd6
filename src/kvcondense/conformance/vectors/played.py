"""Play vectors on an adapter: what it returns is what an implementation in another language writes into a folder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvcondense.conformance import generator, stored
from kvcondense.conformance.adapter import Adapter, Factory, Setup
from kvcondense.conformance.cases import JUNK as VALUES
from kvcondense.conformance.compressors import CONFIG
from kvcondense.conformance.play import raw, seed
from kvcondense.conformance.vectors.schema import JUNK, Op, Vector
from kvcondense.formats import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

Tensors = dict[str, torch.Tensor]


def outputs(vector: Vector, given: Tensors, make: Factory) -> Tensors:
    """``rows``, ``untouched``, ``refused`` and, if the adapter has a ``cache`` of ours, ``pages``.

    given: the vector's tensors; only ``pattern`` and ``norm`` are looked at. Whatever the adapter raises passes.
    """
    adapter, setup = make(), _setup(vector, given)
    rows, refused = [], []
    read = torch.tensor(vector.read, dtype=torch.int64)
    for _ in range(vector.repeat):
        adapter.init(setup)
        refused = [_do(adapter, setup, vector, given, op) for op in vector.ops]
        rows.append(adapter.rows(read).clone())
    found = {"rows": torch.cat(rows), "refused": torch.tensor([r for r in refused if r is not None], dtype=torch.uint8)}
    found["untouched"] = raw(adapter.rows(torch.tensor(vector.untouched, dtype=torch.int64)))
    cache: Any = getattr(adapter, "cache", None)
    if vector.exact and cache is not None:
        found["pages"] = cache.data.clone()
    return found


def _setup(vector: Vector, given: Tensors) -> Setup:
    spec = CompressorSpec.from_dict(vector.compressor, f"{vector.name} compressor")
    ape = generator.values(vector.seed, generator.APE, 0, spec.ratio * spec.width) / 2 * vector.scale
    norm = 1 + generator.values(vector.seed, generator.NORM, 0, spec.head_dim) / 4
    weights = CompressorWeights(
        norm=given["norm"] if vector.pattern else norm,
        ape=ape.view(spec.ratio, spec.width) if spec.has_ape else None,
    )
    config = replace(CONFIG, head_dim=spec.head_dim, rope_dim=spec.rope_dim)
    sizes = (vector.num_slots, vector.max_draft, vector.num_pages, vector.page_rows, vector.max_positions)
    return Setup(spec, weights, RopeTable.build(config, vector.max_positions + 1), *sizes, get_format(vector.format))


def _do(adapter: Adapter, setup: Setup, vector: Vector, given: Tensors, op: Op) -> bool | None:
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
        adapter.step(_tokens(setup.spec, vector, given, op), _batch(op))
    else:
        try:
            adapter.step(_tokens(setup.spec, vector, given, op), _batch(op))
        except Exception:
            return True
        return False
    return None


def _tokens(spec: CompressorSpec, vector: Vector, given: Tensors, op: Op) -> torch.Tensor:
    width, found = spec.projected, [torch.zeros(0, spec.projected)]
    for stream, first, count, junk in op.pieces or ():
        if junk:
            found.append(torch.full((count, width), VALUES[JUNK[junk]] or 0.0))
        elif vector.pattern:
            kv = given["pattern"][stream - generator.TOKENS].float().repeat(spec.halves)
            found.append(torch.cat([kv, torch.zeros(spec.width)]).expand(count, width))
        else:
            values = generator.values(vector.seed, stream, first * width, count * width) * vector.scale
            found.append(values.view(count, width))
    return torch.cat(found)


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
