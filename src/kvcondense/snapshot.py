"""Snapshots: the state of one request as a small safetensors payload, to go on elsewhere.

Elsewhere: another process, slot, ring size, page size or kind of state. The payload is a header (schema, spec, dtype,
position) and the live rows, or, from an online state, the running values of its open window. Its size depends on spec
and position alone: nothing at a window boundary without overlap, the previous window with overlap.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from kvcondense.backends import Backend, Step, select
from kvcondense.errors import (
    CheckpointError,
    DtypeError,
    KvCondenseError,
    RangeError,
    ShapeError,
    StateMismatchError,
    require,
    require_int,
)
from kvcondense.files import sealed
from kvcondense.files.reading import short
from kvcondense.files.schema import typed
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import UNKNOWN, StatePool
from kvcondense.spec import CompressorSpec

SCHEMA = 2
"""1 had no digests; it is still read."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def save_live(
    spec: CompressorSpec,
    state: StatePool | OnlineState,
    batch: RaggedBatch,
    *,
    ape: torch.Tensor | None = None,
    impl: str | Backend = "auto",
) -> bytes:
    """The state of the one request of ``batch`` (``RaggedBatch.at``) as bytes.

    rows [position - live_start(position), state_dim] in the pool's dtype, or, of an online state, acc [3, head_dim]
    with accepted drafts folded by ``impl`` (``ape`` is needed for that without a gate). Raises StateMismatchError if
    the state does not hold the request at its position.
    """
    position = _one_request(batch)
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(state, OnlineState):
        acc = settle(spec, state, batch, ape=ape, impl=impl)
        if position % spec.ratio:
            tensors["acc"] = acc.cpu()
    else:
        tensors["rows"] = export_live(spec, state, batch).cpu()
    return sealed.pack(_header(spec, position, state), tensors)


def load_live(
    spec: CompressorSpec,
    state: StatePool | OnlineState,
    batch: RaggedBatch,
    payload: bytes,
    *,
    ape: torch.Tensor | None = None,
    convert: bool = False,
    impl: str | Backend = "auto",
) -> None:
    """Put a payload of ``save_live`` into ``state``, where the one request of ``batch`` has its slot or pages.

    Rows fit rings, pages and online states, where ``impl`` folds them; running values fit online states alone. Rows of
    another dtype are refused unless ``convert``, and raw scores where the pool has biased ones, or the reverse. Mutates
    ``state``. Raises CheckpointError for a payload that is none, or has changed since, KvCondenseError for one of
    another spec or position, before anything is written. Schema 1 has no digests: an IntegrityWarning.
    """
    position = _one_request(batch)
    file = sealed.unpacked(payload, "payload", unsealed=(1,))
    header = {"raw_scores": False, **file.header}
    _dtype(file)
    wanted = _header(spec, position, state)
    if header.get("schema") == 1:
        wanted["schema"] = 1
    for key, value in wanted.items():
        if key != "dtype" and header.get(key) != value:
            raise KvCondenseError(f"payload {key}", json.dumps(value), json.dumps(header.get(key)))
    dtype = header["dtype"]
    if dtype != wanted["dtype"] and not convert:
        raise DtypeError("payload dtype", f"{wanted['dtype']} as the state (or convert=True)", dtype)
    if "acc" in file.names or (isinstance(state, OnlineState) and "rows" not in file.names):
        if not isinstance(state, OnlineState):
            raise StateMismatchError("payload", "rows (a ring or pages cannot go on from running values)", "acc")
        shapes = {"acc": ([3, spec.head_dim], torch.float32)} if position % spec.ratio else {}
    else:
        shapes = {"rows": ([spec.seed_rows(position), spec.state_dim], _DTYPES[dtype])}
    if file.names != set(shapes):
        raise CheckpointError("payload", f"tensors {sorted(shapes)}", sorted(file.names))
    tensors = {name: file.tensor(name, *wanted) for name, wanted in shapes.items()}
    if isinstance(state, OnlineState):
        _load_online(spec, state, batch, tensors, ape, impl)
    else:
        import_live(spec, state, batch, tensors["rows"].to(state.device, state.dtype))


def earlier(payload: bytes, position: int) -> bytes:
    """The payload of the same request as it stood at ``position``, as far as one of a later time can tell.

    It can where the request needs no row at all (at a window boundary without overlap), and, from rows, back to the
    boundary of the window that was open. Raises RangeError elsewhere, CheckpointError for a payload that is none.
    """
    file = sealed.unpacked(payload, "payload", unsealed=(1,))
    spec, now, low = _stands(file)
    if position == now:
        return payload
    first = spec.live_start(position)
    if position > now or (first < position and (first < low or "acc" in file.names)):
        raise RangeError("position", f"{now}, or one that the state of a request at {now} reaches back to", position)
    rows = torch.zeros(0, spec.state_dim, dtype=_dtype(file), device="cpu")
    if first < position:
        rows = file.tensor("rows", [now - low, spec.state_dim], rows.dtype)[first - low : position - low].clone()
    return sealed.pack({**file.header, "schema": SCHEMA, "position": position}, {"rows": rows})


def reaches_back(spec: CompressorSpec, position: int, to: int) -> bool:
    """Whether ``earlier`` can take rows of a request at ``position`` back to ``to``."""
    first = spec.live_start(to)
    return to <= position and (first == to or first >= spec.live_start(position))


def settle(
    spec: CompressorSpec,
    state: OnlineState,
    batch: RaggedBatch,
    *,
    ape: torch.Tensor | None = None,
    impl: str | Backend = "auto",
) -> torch.Tensor:
    """(m, l, o) [3, head_dim] of the open window of the one request of ``batch``: drafts before its position accepted.

    At a window boundary the window is empty: (-inf, 0, 0). ``impl`` should be the backend that runs the steps, so that
    its arithmetic folds the drafts, too. Reads the state, writes nothing; raises as ``save_live``.
    """
    _check_online(spec, state, batch)
    assert batch.state_slots is not None
    slot, position = int(batch.state_slots[0]), _one_request(batch)
    folded, begin = int(state.folded[slot]), position // spec.ratio * spec.ratio
    started = begin < min(folded, position)
    cursor = folded if started else begin
    logged = torch.arange(cursor, max(cursor, position), device=state.device)
    rows = state.log[state.layout.address(batch, torch.zeros_like(logged), logged)]
    return _fold(spec, state.acc[slot] if started else None, cursor, rows, ape, impl)


def _fold(
    spec: CompressorSpec,
    acc: torch.Tensor | None,
    cursor: int,
    rows: torch.Tensor,
    ape: torch.Tensor | None,
    impl: str | Backend,
) -> torch.Tensor:
    """Fold rows [n, state_dim] of positions cursor .. into acc [3, d] (None: nothing yet): a step of one request."""
    scratch = OnlineState.allocate(spec, 1, device=rows.device)
    scratch.acc[0] = torch.tensor([float("-inf"), 0.0, 0.0], device=rows.device)[:, None] if acc is None else acc
    if rows.shape[0] == 0:
        return scratch.acc[0]
    scratch.folded[0] = cursor
    if spec.has_gate:  # a stored score has its ape
        spec, ape = replace(spec, has_ape=False), None
    start = torch.tensor([cursor], device=rows.device)
    batch = RaggedBatch.build(
        torch.tensor([0, rows.shape[0]], device=rows.device), start_positions=start, state_slots=torch.zeros_like(start)
    )
    step = Step(
        spec=replace(spec, rope_dim=0),
        plan=Plan.build(spec, batch, state_layout=scratch.layout),
        kv_score=rows.to(torch.float32),
        ape=ape,
        gamma=torch.ones(spec.head_dim, device=rows.device),
        rope=None,
        state=scratch,
        cache=None,
        rows=rows.new_empty(0, spec.head_dim, dtype=torch.float32),
        latent=None,
    )
    select(impl, step).run(step)
    return scratch.acc[0]


def _load_online(
    spec: CompressorSpec,
    state: OnlineState,
    batch: RaggedBatch,
    tensors: dict[str, torch.Tensor],
    ape: torch.Tensor | None,
    impl: str | Backend,
) -> None:
    _check_online(spec, state, None)
    state.check_slots(batch)
    position = int(batch.start_positions[0])
    rows = tensors.get("rows", torch.empty(0, spec.state_dim, device="cpu")).to(state.device)
    acc = tensors["acc"].to(state.device) if "acc" in tensors else None
    acc = _fold(spec, acc, position - rows.shape[0], rows, ape, impl)
    assert batch.state_slots is not None
    if state.tags is not None:  # broken off below, values are not taken for what was there
        state.tags[batch.state_slots] = UNKNOWN
    state.acc[batch.state_slots] = acc
    state.folded[batch.state_slots] = position
    if state.tags is not None:
        state.tags[batch.state_slots] = position


def _check_online(spec: CompressorSpec, state: OnlineState, batch: RaggedBatch | None) -> None:
    if state.state_dim != spec.state_dim or state.acc.shape[2] != spec.head_dim:
        raise ShapeError("state", f"rows of {spec.state_dim} channels", f"{state.state_dim}")
    if batch is not None:
        state.check_at(spec, batch)


def _one_request(batch: RaggedBatch) -> int:
    require("batch", batch, RaggedBatch)
    if batch.start_positions.shape[0] != 1:
        raise ShapeError("batch", "one request", f"{batch.start_positions.shape[0]}")
    return int(batch.start_positions[0])


def _header(spec: CompressorSpec, position: int, state: StatePool | OnlineState) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "spec": spec.as_dict(),
        "position": position,
        "dtype": str(state.dtype).removeprefix("torch."),
        "raw_scores": isinstance(state, StatePool) and state.layout.raw_scores,
    }


def _dtype(file: sealed.Sealed) -> torch.dtype:
    name = file.header.get("dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise CheckpointError("payload header", f"a dtype of {', '.join(_DTYPES)}", short(name))
    return _DTYPES[name]


def _stands(file: sealed.Sealed) -> tuple[CompressorSpec, int, int]:
    """Spec and position of a payload, and the first position that it holds."""
    spec = CompressorSpec.from_dict(typed(file.header.get("spec"), dict[str, Any], "payload spec"), "payload spec")
    position = require_int("payload position", file.header.get("position"), 0)
    return spec, position, spec.live_start(position)
