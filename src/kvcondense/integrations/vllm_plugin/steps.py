"""vLLM's metadata of a step as a plan of ours, made once for all layers of a kind; on a GPU no value is asked for."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from kvcondense.backends.jobs import Job
from kvcondense.bound import Bound
from kvcondense.layout.batch import RaggedBatch, copy_fields
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner, StaticPlans

_KEPT = 64
"""Static plans of shapes that came last; those that a graph has captured are kept for good."""
_statics: OrderedDict[Any, StaticPlans] = OrderedDict()
_captured: list[StaticPlans] = []


class Requests(NamedTuple):
    """query_start_loc [R + 1] and start_positions [R] (-1: no tokens), int64, out of what each token says."""

    query_start_loc: torch.Tensor
    start_positions: torch.Tensor


def plan(bound: Bound, context: Any, metadata: Any, cache_slots: torch.Tensor, positions: torch.Tensor) -> Plan | None:
    """The plan of a forward pass for a bound compressor; None for tokens that are none of a request's next ones.

    context: vLLM's ForwardContext, one for each forward pass, which remembers its plans. metadata: CompressorMetadata
    of the module's states. cache_slots [T]: rows of the compressed cache, at windows' last tokens. positions [T]. A
    plan is made once for all layers of one ratio, page size and pair of tables.
    """
    state, cache = bound.state, bound.cache
    assert state is not None
    assert cache is not None
    job: Job = (bound.spec, state.layout, cache.page_rows)
    known = vars(context).setdefault("kvcondense", {})
    key = (job, id(metadata), cache_slots.data_ptr())
    if key not in known:
        host = on_host(cache_slots.device)
        # vLLM runs a layer's two compressors on two streams, which wait for nobody: each finds out for itself there.
        shared = id(metadata) if host else (*key, "requests")
        if shared not in known:
            known[shared] = (requests if host else spans)(metadata, positions)
        known[key] = None if known[shared] is None else _plan(bound, job, known[shared], metadata, cache_slots)
    return known[key]


def on_host(device: torch.device) -> bool:
    """Whether values may be asked for."""
    return device.type == "cpu"


def _told(metadata: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Owner and position of each token [n]. Padding, of slot -1, has one request more than there are as its owner.

    vLLM pads slots for its graphs, and not always what else there is of each token: what is behind it is padding.
    """
    count = metadata.block_table.shape[0]
    many = min(metadata.slot_mapping.shape[0], metadata.token_to_req_indices.shape[0], positions.shape[0])
    owner = metadata.token_to_req_indices[:many].to(torch.int64)
    there = (metadata.slot_mapping[:many] >= 0) & (owner >= 0) & (owner < count)
    return torch.where(there, owner, count), positions[:many]


def requests(metadata: Any, positions: torch.Tensor) -> Requests | None:
    """Who has which tokens, on the CPU. None if one is none of its request's next ones, or padding is before one."""
    count = metadata.block_table.shape[0]
    owner, positions = _told(metadata, positions)
    many = owner.shape[0]
    if not many:
        return None
    bounds = torch.searchsorted(owner, torch.arange(count + 1, device="cpu"))  # never falling
    first = positions[bounds[:-1].clamp(max=many - 1)]
    starts = torch.where(bounds.diff() > 0, first, -1)
    total = int(bounds[-1])
    mine = owner[:total]
    wanted = starts[mine.clamp(max=count - 1)] + torch.arange(total, device="cpu") - bounds[mine.clamp(max=count - 1)]
    if bool((owner.diff() < 0).any()) or not torch.equal(wanted, positions[:total]):
        return None
    return Requests(bounds, starts)


def spans(metadata: Any, positions: torch.Tensor) -> Requests | None:
    """The same on a device, which is asked for no value: vLLM's request q is request 2 q of 2 R - 1.

    Those between are inert and own padding amid tokens, as vLLM has it behind drafts of one request and before the next
    one. Inert is also, so that nothing is written for it, a request whose tokens are not side by side, position after
    position, in the order of requests, and the first one behind padding. None without tokens or requests.
    """
    count = metadata.block_table.shape[0]
    owner, positions = _told(metadata, positions)
    many = owner.shape[0]
    if not many or not count:
        return None
    token = torch.arange(many, device=owner.device)
    first = token.new_full((count + 1,), many).scatter_reduce_(0, owner, token, "amin")
    last = token.new_full((count + 1,), -1).scatter_reduce_(0, owner, token, "amax")
    start = positions[first.clamp(max=many - 1)] - first
    following = torch.zeros_like(first).scatter_add_(0, owner, (positions - token == start[owner]).to(torch.int64))
    whole = (following == last - first + 1)[:-1]  # [R]; False without tokens, since there is one at least
    edges = torch.stack([first[:-1], last[:-1] + 1], 1) * whole[:, None]  # [R, 2]
    edges[0, 0] = 0
    offsets = edges.flatten().cummax(0).values  # [2 R]
    good = whole & (offsets[::2] == first[:-1])
    starts = torch.where(good, start[:-1] + first[:-1], -1)
    return Requests(offsets, torch.stack([starts, torch.full_like(starts, -1)], 1).flatten()[:-1])


def _plan(bound: Bound, job: Job, told: Requests, metadata: Any, cache_slots: torch.Tensor) -> Plan:
    table = metadata.block_table
    if not on_host(table.device):
        return _static(bound, job, told, table, cache_slots)
    # Pages behind the last token are not needed, and a table is as wide as the longest sequence that there may be.
    last = int((told.start_positions + told.query_start_loc.diff()).max())
    step = planner(job).step(
        told.query_start_loc,
        start_positions=told.start_positions,
        state_block_table=table[:, : max(0, last - 1) // metadata.block_size + 1],
        slot_mapping=cache_slots,
    )
    return step[1][0]


@functools.lru_cache(maxsize=64)
def planner(job: Job) -> Planner:
    """The planner of one job."""
    return Planner([job])


def _static(bound: Bound, job: Job, told: Requests, table: torch.Tensor, cache_slots: torch.Tensor) -> Plan:
    """A static plan of what lies on the device: a captured graph plans it again, from vLLM's own table."""
    rope, cache = bound.rope, bound.cache
    assert rope is not None
    assert cache is not None
    batch = RaggedBatch(*told, torch.zeros_like(told.start_positions), slot_mapping=cache_slots)
    # Layers of one kind may have tables of their own in one pass: each keeps its plan until the pass is over.
    places = table.dtype, table.data_ptr(), tuple(table.shape), table.stride(), cache_slots.data_ptr()
    sizes = {"max_positions": rope.cos.shape[0], "cache_rows": cache.num_rows}
    return filled(job, batch, places, table, max_tokens=cache_slots.shape[0], **sizes)


def filled(job: Job, batch: RaggedBatch, places: tuple[Any, ...], table: Any = None, **bounds: int) -> Plan:
    """A static plan of a batch within ``bounds``, in tensors that stay where they are, for what comes from ``places``.

    table: the block table of the states, vLLM's own, which the batch does not have.
    """
    key = (job, batch.query_start_loc.device, batch.query_start_loc.shape[0], *places, *bounds.values())
    found = _statics.pop(key, None)
    if found is None:
        with torch.inference_mode(False):  # a later pass may not be in that mode, and fills them anew
            mine = batch.owned()
            mine = mine if table is None else replace(mine, state_block_table=_spread(table))
            found = planner(job).static(mine, **bounds)
    else:
        copy_fields(found.batch, batch, [f.name for f in fields(batch) if getattr(batch, f.name) is not None])
        if table is not None and table.stride(0) % 2:
            assert found.batch.state_block_table is not None
            found.batch.state_block_table[::2].copy_(table)
        found.refill()
    _statics[key] = found
    if captured(batch.query_start_loc.device):
        _captured.append(found)
    elif len(_statics) > _KEPT:
        _statics.popitem(last=False)
    return found.plans[0]


def _spread(table: torch.Tensor) -> torch.Tensor:
    """vLLM's table [R, blocks] as one of the requests of ``spans``: row 2 q is row q, and nobody reads those between.

    It is vLLM's memory, since tables are as wide as the longest sequence that there may be, or a copy, where the middle
    between two rows is no entry.
    """
    rows, columns = table.shape
    if table.stride(0) % 2:
        table = table.new_empty(rows, columns + columns % 2)[:, :columns].copy_(table)
    return table.as_strided((2 * rows - 1, columns), (table.stride(0) // 2, 1))


def captured(device: torch.device) -> bool:
    """Whether a graph is being captured, which will run again without this code."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
