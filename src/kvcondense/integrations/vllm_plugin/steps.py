"""vLLM's metadata of a step as a plan of ours, made once for all layers of a kind; on a GPU no value is asked for."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from kvcondense.backends.jobs import Job
from kvcondense.bound import Bound
from kvcondense.layout.batch import RaggedBatch
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
        # vLLM runs a layer's two compressors on two streams, which wait for nobody: each finds out for itself there.
        shared = id(metadata) if cache_slots.device.type == "cpu" else (*key, "requests")
        if shared not in known:
            known[shared] = requests(metadata, positions)
        known[key] = None if known[shared] is None else _plan(bound, job, known[shared], metadata, cache_slots)
    return known[key]


def requests(metadata: Any, positions: torch.Tensor) -> Requests | None:
    """Who has which tokens. slot_mapping [n] of -1 marks padding behind the last token; elsewhere: None.

    vLLM pads slots for its graphs, and not always what else there is of each token: what is behind it is padding.
    Values are looked at on the CPU alone. On GPUs, where that would wait for the device, padding is where it may be.
    """
    count = metadata.block_table.shape[0]
    many = min(metadata.slot_mapping.shape[0], metadata.token_to_req_indices.shape[0], positions.shape[0])
    slots = metadata.slot_mapping[:many]
    if not many:
        return None
    # Padding belongs to request 0 there, and to nobody here: [n], never falling.
    owner = torch.where(slots >= 0, metadata.token_to_req_indices[:many].to(torch.int64), count)
    bounds = torch.searchsorted(owner, torch.arange(count + 1, device=slots.device))
    first = positions[bounds[:-1].clamp(max=many - 1)]
    starts = torch.where(bounds.diff() > 0, first, -1)
    if slots.device.type == "cpu":
        total = int(bounds[-1])
        mine = owner[:total]
        wanted = starts[mine.clamp(max=count - 1)] + torch.arange(total) - bounds[mine.clamp(max=count - 1)]
        if bool((owner.diff() < 0).any()) or not torch.equal(wanted, positions[:total]):
            return None
    return Requests(bounds, starts)


def _plan(bound: Bound, job: Job, told: Requests, metadata: Any, cache_slots: torch.Tensor) -> Plan:
    table = metadata.block_table
    if table.device.type != "cpu":
        return _static(bound, job, told, table, cache_slots)
    # Pages behind the last token are not needed, and a table is as wide as the longest sequence that there may be.
    last = int((told.start_positions + told.query_start_loc.diff()).max())
    step = _planner(job).step(
        told.query_start_loc,
        start_positions=told.start_positions,
        state_block_table=table[:, : max(0, last - 1) // metadata.block_size + 1],
        slot_mapping=cache_slots,
    )
    return step[1][0]


@functools.lru_cache(maxsize=64)
def _planner(job: Job) -> Planner:
    return Planner([job])


def _static(bound: Bound, job: Job, told: Requests, table: torch.Tensor, cache_slots: torch.Tensor) -> Plan:
    """A static plan of what lies on the device: a captured graph copies and plans it again."""
    rope, cache = bound.rope, bound.cache
    assert rope is not None
    assert cache is not None
    batch = RaggedBatch(
        query_start_loc=told.query_start_loc,
        start_positions=told.start_positions,
        draft_rows=torch.zeros_like(told.start_positions),
        state_block_table=table.to(torch.int64),
        slot_mapping=cache_slots,
    )
    tokens, sizes = cache_slots.shape[0], (rope.cos.shape[0], cache.num_rows)
    # Layers of one kind may have tables of their own in one pass: each keeps its plan until the pass is over.
    places = table.device, table.data_ptr(), tuple(table.shape), cache_slots.data_ptr(), tokens
    key = (job, *places, *sizes)
    found = _statics.pop(key, None)
    if found is None:
        with torch.inference_mode(False):  # a later pass may not be in that mode, and fills them anew
            found = _planner(job).static(batch.owned(), max_tokens=tokens, max_positions=sizes[0], cache_rows=sizes[1])
    else:
        found.refill(batch)
    _statics[key] = found
    if captured(table.device):
        _captured.append(found)
    elif len(_statics) > _KEPT:
        _statics.popitem(last=False)
    return found.plans[0]


def captured(device: torch.device) -> bool:
    """Whether a graph is being captured, which will run again without this code."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
