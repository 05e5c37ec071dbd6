"""Every check of a step, before anything is written: argument, expected, got."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvcondense.errors import DeviceError, DtypeError, KvCondenseError, RangeError, ShapeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.extremes import UNKNOWN, Slots
from kvcondense.layout.memory import check_apart, check_plain, overlap, span
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import WEIGHT_DTYPES, CompressorWeights


def tensor(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raise unless ``value`` is a plain tensor of ``shape`` (None: any size), one of ``dtypes``, on ``device``."""
    if isinstance(value, torch.Tensor) and value.dtype in dtypes and device in (None, value.device):
        sizes = value.shape
        if len(sizes) == len(shape):
            for wanted, size in zip(shape, sizes, strict=True):
                if wanted is not None and wanted != size:
                    break
            else:
                check_plain(name, value)
                return
    _explain(name, value, shape, dtypes, device)


def _explain(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> None:
    """Raise the error of a value that ``tensor`` did not take."""
    if not isinstance(value, torch.Tensor):
        raise DtypeError(name, "a tensor", type(value).__name__)
    pairs = zip(shape, value.shape, strict=False)
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in pairs):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ShapeError(name, f"shape [{wanted}]", f"shape {list(value.shape)}")
    if value.dtype not in dtypes:
        raise DtypeError(name, " or ".join(str(d).removeprefix("torch.") for d in dtypes), value.dtype)
    raise DeviceError(name, f"device {device}", value.device)


def projection(spec: CompressorSpec, x: torch.Tensor, weights: CompressorWeights) -> None:
    """Check the arguments of ``project``."""
    require("spec", spec, CompressorSpec)
    require("weights", weights, CompressorWeights)
    if weights.w is None:
        raise KvCondenseError("weights.w", f"a tensor [{spec.projected}, D]", "None")
    tensor("weights.w", weights.w, (spec.projected, None), WEIGHT_DTYPES)
    tensor("x", x, (None, weights.w.shape[1]), WEIGHT_DTYPES, weights.w.device)


def tokens(spec: CompressorSpec, name: str, t: torch.Tensor, device: torch.device) -> None:
    """Check kv_score [T, projected] of a step."""
    plain = isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_neg() and t.dtype in WEIGHT_DTYPES
    if not plain or t.dim() != 2 or t.shape[1] != spec.projected:
        tensor(name, t, (None, spec.projected), WEIGHT_DTYPES)  # says what is wrong
    if t.device != device or t.is_meta:
        raise DeviceError(name, f"device {device} as the weights", t.device)
    if t.requires_grad:
        no_gradients(name, t)


def enough(name: str, rows: int, batch: RaggedBatch) -> None:
    """Raise unless there are as many rows as a batch says; before anything is made in proportion to what it says."""
    tokens = int(batch.query_start_loc[-1])
    if rows < tokens:
        raise ShapeError(name, f"at least {tokens} rows", f"{rows} rows")


def one_of(kv_score: object, x: object) -> None:
    """Raise unless a step is given one of both."""
    if (kv_score is None) == (x is None):
        raise KvCondenseError("x", "exactly one of kv_score and x", "both or neither" if x is None else "both")


def no_gradients(name: str, t: torch.Tensor) -> None:
    """Raise if a gradient would be lost."""
    if t.requires_grad and torch.is_grad_enabled():
        wanted = "a tensor without gradients (kvcondense.training has them)"
        raise KvCondenseError(name, wanted, "one that requires them")


def admitted(plan: Plan, rows: int, rope: RopeTable | None, cache: PagedCache | None, name: str = "kv_score") -> None:
    """Compare what a plan reaches at most with the sizes of what it is given; asks for no value.

    rows: tokens of ``name``, kv_score or x. With the plan's geometry (``geometry``), that bounds every address.
    """
    most = plan.extremes
    if most is UNKNOWN:
        raise KvCondenseError("plan", "a plan that was filled to the end", "one whose filling was broken off")
    if rows < most.tokens:
        raise ShapeError(name, f"at least {most.tokens} rows", f"{rows} rows")
    if rope is not None:
        if most.positions is None:
            raise KvCondenseError("plan", "max_positions, as the step has a RoPE table", "a static plan without")
        if rope.cos.shape[0] < most.positions:
            raise RangeError("rope", f"at least {most.positions} positions", rope.cos.shape[0])
    if cache is not None:
        if most.slots is None:
            raise KvCondenseError("plan", "cache_rows, as the step has a cache", "a static plan without")
        slots(most.slots, cache.num_rows, "slot_mapping" if plan.batch.block_table is None else "block_table")


def layer(
    spec: CompressorSpec,
    weights: CompressorWeights,
    rope: RopeTable | None,
    state: StatePool | OnlineState | None,
    cache: PagedCache | None,
    device: torch.device,
    shared_blocks: bool = False,
) -> None:
    """Check that what a layer owns fits its spec, whatever the step; shared_blocks: as in ``bound.bind``."""
    _weights(spec, weights, device)
    _rope(spec, rope, device)
    for owner in (state, cache):
        if owner is not None:
            owner.check_memory()
    if cache is not None:
        if cache.head_dim != spec.head_dim:
            raise ShapeError("cache", f"rows of {spec.head_dim} channels", f"{cache.head_dim}")
        cache.format.check(spec.head_dim, spec.rope_dim)
        if cache.data.device != device:
            raise DeviceError("cache", f"device {device}", cache.data.device)
    if state is not None:
        if state.state_dim != spec.state_dim:
            raise ShapeError("state", f"rows of {spec.state_dim} channels", f"{state.state_dim}")
        if state.device != device:
            raise DeviceError("state", f"device {device}", state.device)
    for owners in ((state, None), (None, cache)) if shared_blocks else ((state, cache),):
        check_apart(written(*owners), _read(weights, rope))
    if shared_blocks:
        _one_stride({name: t for name, t in written(state, cache).items() if t.dim()})


def geometry(spec: CompressorSpec, plan: Plan, state: StatePool | OnlineState | None, cache: PagedCache | None) -> None:
    """Check that a plan was made for this ratio, this state's layout and this cache's pages; asks for no value."""
    if plan.ratio != spec.ratio or plan.overlap != spec.overlap:
        raise KvCondenseError(
            "plan",
            f"a plan for ratio {spec.ratio}, overlap {spec.overlap}",
            f"one for ratio {plan.ratio}, overlap {plan.overlap}",
        )
    layout = None if state is None else state.layout
    if plan.state_layout is not layout and plan.state_layout != layout:
        raise KvCondenseError("plan", "a plan for the layout of this state", f"{plan.state_layout}")
    if cache is None:
        return
    if plan.batch.slot_mapping is None and plan.batch.block_table is None:
        raise KvCondenseError("batch.slot_mapping", "slot_mapping or block_table (a cache is given)", "neither")
    if plan.page_rows is not None and plan.batch.block_table is not None and plan.page_rows != cache.page_rows:
        raise KvCondenseError("plan", f"a plan for pages of {cache.page_rows} rows", f"{plan.page_rows} rows")


def slots(slot: Slots, rows: int, name: str = "slot_mapping") -> None:
    """Raise RangeError unless every slot is -1 or one of this many cache rows, and no row is named twice."""
    if slot.lowest < -1 or slot.highest >= rows:
        worst = slot.highest if slot.highest >= rows else slot.lowest
        raise RangeError(name, f"-1 or a cache row below {rows}", worst)
    if slot.shared:
        raise RangeError(name, "a cache row of its own for each row", "rows that share one")


def written(state: StatePool | OnlineState | None, cache: PagedCache | None) -> dict[str, torch.Tensor]:
    """What every step of a layer writes, by name."""
    return {name: t for owner in (state, cache) if owner is not None for name, t in owner.tensors.items()}


def apart(mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], shared_blocks: bool) -> bool:
    """Raise if what two layers write is the same memory; shared_blocks: unless it is blocks that an engine deals out.

    True if it is such blocks. One tensor for both is refused in any case.
    """
    found = False
    for name, t in mine.items():
        for beside, u in other.items():
            if overlap(t, u):
                if t is u or not shared_blocks:
                    raise KvCondenseError(name, "memory of its own", f"memory of {beside}")
                _one_stride({beside: u, name: t})
                found = True
    return found


def _one_stride(tensors: dict[str, torch.Tensor]) -> None:
    """Raise unless block i of each tensor lies in the same stretch of memory: only then has one number one place.

    That is, blocks are as many bytes apart in all of them, and all lie within the first one's stride of its start.
    """
    spans = {name: span(t) for name, t in tensors.items()}
    start = min((first for first, _ in spans.values()), default=0)
    strides = {name: t.stride(0) * t.element_size() for name, t in tensors.items()}
    stride = next(iter(strides.values()), 0)
    for name, t in tensors.items():
        if strides[name] != stride:
            raise ShapeError(name, f"blocks {stride} bytes apart, as the first of {', '.join(strides)}", strides[name])
        first, end = span(t[0])
        if end - start > stride:
            raise ShapeError(
                name, f"blocks within {stride} bytes of the memory's first", f"{first - start} to {end - start}"
            )


def _read(weights: CompressorWeights, rope: RopeTable | None) -> dict[str, torch.Tensor]:
    """What every step of a layer reads."""
    found = {"weights.norm": weights.norm, "weights.ape": weights.ape, "weights.w": weights.w}
    if rope is not None:
        found |= {"rope.cos": rope.cos, "rope.sin": rope.sin}
    return {name: t for name, t in found.items() if t is not None}


def _weights(spec: CompressorSpec, weights: CompressorWeights, device: torch.device) -> None:
    require("weights", weights, CompressorWeights)
    for name, t in _read(weights, None).items():
        if t.is_meta:
            raise DeviceError(name, "a device that holds values", t.device)
    exact = (torch.float32, torch.float64)
    tensor("weights.norm", weights.norm, (spec.head_dim,), exact, device)
    if spec.has_ape:
        if weights.ape is None:
            raise KvCondenseError("weights.ape", f"a tensor [{spec.ratio}, {spec.width}]", "None")
        tensor("weights.ape", weights.ape, (spec.ratio, spec.width), exact, device)
    elif weights.ape is not None:
        raise KvCondenseError("weights.ape", "None (the spec has no ape)", "a tensor")


def _rope(spec: CompressorSpec, rope: RopeTable | None, device: torch.device) -> None:
    if spec.rope_dim == 0:
        if rope is not None:
            raise KvCondenseError("rope", "None (rope_dim is 0)", "a RopeTable")
        return
    if rope is None:
        raise KvCondenseError("rope", f"a RopeTable (rope_dim is {spec.rope_dim})", "None")
    require("rope", rope, RopeTable)
    for name, table in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        tensor(name, table, (None, spec.rope_dim // 2), (torch.float32, torch.float64), device)
