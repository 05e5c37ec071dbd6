"""HostedStates: states of idle requests in host memory, all layers of a request moved there and back, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch

from kvcondense.errors import (
    DeviceError,
    DtypeError,
    RangeError,
    ShapeError,
    StateMismatchError,
    UnsupportedError,
    require,
    require_int,
    require_known,
)
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.memory import check_apart
from kvcondense.layout.online import OnlineState
from kvcondense.layout.pages import advise
from kvcondense.layout.state import StatePool, live_rows
from kvcondense.spec import CompressorSpec

KEPT = 1 << 14
"""Records of moves that wait for a reader at most."""
_State = TypeVar("_State", bound=StatePool | OnlineState)
_Tags = list[tuple[torch.Tensor, torch.Tensor]]
_WHOLE = [slice(None)]


@dataclass(frozen=True)
class Move:
    """What one layer's part of a move has copied: ``bytes``, "out" to ``host_slot`` of its host memory or "in" from it.

    position: up to which rows were moved (``HostedStates.swap_out``), None: the whole slot. number: counts all moves; a
    gap says that records were dropped, because nobody read them or because an interrupt came between.
    """

    number: int
    request: Hashable
    layer: str
    direction: Literal["out", "in"]
    host_slot: int
    position: int | None
    bytes: int


@dataclass(frozen=True)
class _Layer:
    """A pool on the device, the one like it on the host, and of both the tensors and the tags by slot."""

    name: str
    spec: CompressorSpec
    pool: StatePool | OnlineState
    host: StatePool | OnlineState
    met: tuple[torch.Tensor | None, ...]
    """The device's tensors as they were given, of which there are views below."""
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    tags: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, name: str, spec: CompressorSpec, pool: StatePool | OnlineState, host_slots: int) -> _Layer:
        """With memory of its own on the host."""
        host = _twin(pool, host_slots)
        pairs = tuple((_by_slot(pool, a), _by_slot(host, b)) for a, b in zip(pool.memory, host.memory, strict=True))
        tags = None
        if pool.tags is not None and host.tags is not None:
            tags = _by_slot(pool, pool.tags), _by_slot(host, host.tags)
        return cls(name, spec, pool, host, (*pool.memory, pool.tags), pairs, tags)

    def check(self, slot: int) -> None:
        """Raise unless the pool has the slot, in the tensors that it had."""
        if any(a is not b for a, b in zip(self.met, (*self.pool.memory, self.pool.tags), strict=True)):
            raise StateMismatchError(
                f"pools[{self.name!r}]", "the tensors that it had when it was given", "others", "make HostedStates anew"
            )
        if slot >= _slots(self.pool):
            raise RangeError("slot", f"values in 0..{_slots(self.pool) - 1} (pools[{self.name!r}])", slot)

    def check_holds(self, request: Hashable, batch: RaggedBatch, live: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Raise StateMismatchError if tags say that the slot of ``batch`` does not hold the rows ``live``."""
        try:
            if isinstance(self.pool, OnlineState):
                self.pool.check_at(self.spec, batch)
            else:
                self.pool.check_rows(batch, *live)
        except StateMismatchError as error:
            raise StateMismatchError(self._of(request), error.expected, error.got, "slot and position?") from None

    def check_free(self, request: Hashable, slot: int) -> None:
        """Raise StateMismatchError if tags say that somebody can go on from what the slot holds."""
        if self.tags is not None and int(self.tags[0][slot].max()) >= 0:
            got = f"slot {slot} that holds positions of a request"
            raise StateMismatchError(self._of(request), "a slot that holds nothing", got, "pool.reset([slot])")

    def _of(self, request: Hashable) -> str:
        return f"state of request {request!r} in {self.name}"

    def live(self, position: int | None) -> tuple[list[slice], ...]:
        """Of each of ``pairs``, the rows of a slot that a request at ``position`` goes on from; None: all."""
        if position is None:
            return (_WHOLE,) * len(self.pairs)
        low = self.spec.live_start(position)
        if isinstance(self.pool, StatePool):
            return (_ring(low, position, self.pool.layout.block_rows),) * len(self.pairs)
        if low == position:  # a window begins: nothing is folded, nothing is logged that counts
            return [], [], []
        logged = self.pool.layout.log_rows
        return _WHOLE, _WHOLE, _ring(max(low, position - logged), position, logged)

    def rows(self, slot: int, host_slot: int, position: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views (on the device, on the host) of what moves between two slots."""
        pairs = zip(self.pairs, self.live(position), strict=True)
        return [(a[slot, rows], b[host_slot, rows]) for (a, b), runs in pairs for rows in runs]

    def leaves(self, slot: int, host_slot: int, position: int | None) -> _Tags:
        """Tags and what they become when a slot has moved out: with a position, only rows that moved have a name."""
        if self.tags is None:
            return []
        here, there = self.tags[0][slot], self.tags[1][host_slot]
        names = here.clone()
        if position is not None and isinstance(self.pool, OnlineState):
            names.fill_(position if position % self.spec.ratio else -1)
        elif position is not None:
            names[(here < self.spec.live_start(position)) | (here >= position)] = -1
        return [(there, names), (here, torch.full_like(here, -1))]

    def enters(self, slot: int | None, host_slot: int) -> _Tags:
        """Tags and what they become when a slot has moved in; None: when it is forgotten."""
        if self.tags is None:
            return []
        there = self.tags[1][host_slot]
        named = [] if slot is None else [(self.tags[0][slot], there.clone())]
        return [*named, (there, torch.full_like(there, -1))]


@dataclass(frozen=True)
class _Away:
    """Where a request's state is, up to which position (None: whole slots), and its bytes."""

    host_slot: int
    position: int | None
    bytes: int


class HostedStates:
    """Room on the host for the states of ``host_slots`` requests that are idle, of all ``pools`` of a model together.

    pools: by layer (or compressor), in the order in which a step runs them, each with its spec: rings and online states
    of any kinds, on one device. A request is moved out of the slot that it has in every pool, and later back, into any
    slot; all its later bits are those of one that never moved. While it is away no slot holds it: where pools have
    tags, a step that goes on from its old slot raises.

    Memory of the host is a pool of the same kind for each layer (``pool``): what takes a state takes it there, too.
    For pools on an accelerator it is pinned, and copies run on a stream of their own, after what the current stream has
    begun. **After any move, call** ``wait(layer)`` **before the layer's step or whatever else touches its pool.** So
    layer k waits for no later layer's copy. On the CPU copies are done when the call returns, and ``wait`` is empty.

    Every method raises before anything is written. One that is broken off, wherever, leaves the state in one place:
    where it was or where it was to go; ``requests`` says who is away. Not for several threads at once.
    """

    def __init__(
        self, pools: Mapping[str, tuple[CompressorSpec, StatePool | OnlineState]], host_slots: int, *, kept: int = KEPT
    ) -> None:
        """Allocate the host's memory: ``host_slots * slot_bytes``. kept: records that ``moves`` has at most.

        Raises UnsupportedError for pages, ShapeError or RangeError for a pool that is none of its spec, DeviceError for
        pools on several devices, KvCondenseError for two that share memory.
        """
        self.host_slots = require_int("host_slots", host_slots, 1)
        require("pools", pools, Mapping)
        if not pools:
            raise RangeError("pools", "at least one", "none")
        for name, pair in pools.items():
            _check(name, pair)
        devices = {pool.device for _, pool in pools.values()}
        if len(devices) > 1:
            raise DeviceError("pools", "pools on one device", ", ".join(sorted(map(str, devices))))
        check_apart({f"pools[{name!r}], {k}": t for name, (_, p) in pools.items() for k, t in p.tensors.items()}, {})
        self._device = devices.pop()
        self._layers = {name: _Layer.of(name, spec, pool, host_slots) for name, (spec, pool) in pools.items()}
        # torch.cuda or what corresponds to it; None: copies are done at once.
        self._streams: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._stream = None if self._streams is None else self._streams.Stream(device=self._device)
        self._copied: dict[str, Any] = {}
        self._away: dict[Hashable, _Away] = {}
        self._taken = torch.zeros(
            host_slots, dtype=torch.int64, device="cpu"
        )  # 0: not away, whatever ``_away`` says of the slot
        self._moves: deque[tuple[Move, Any]] = deque(maxlen=require_int("kept", kept, 0))
        self._numbers = itertools.count()

    def swap_out(self, request: Hashable, slot: int, position: int | None = None) -> None:
        """Move the state of ``request`` from ``slot`` of every pool to the host; the slot is free then.

        position: where the request goes on; rows that it reads from there move, and no others, so drafts that it has
        not accepted are left behind. None: the whole slot moves, and which drafts are accepted may be said later.
        Mutates the host's memory, and tags of the slot, which then name nothing. Raises RangeError for a request that
        is away, a slot that a pool lacks, or no room; StateMismatchError if tags say that the slot does not hold a
        request at ``position``, or if a pool has other tensors than when it was given.
        """
        self._check(slot)
        self._away = self._still_away()
        if _known(request, self._away):
            raise RangeError("request", "one that is not away", repr(request))
        taken = self._taken.tolist()
        if all(taken):
            raise RangeError("host_slots", f"more than {self.host_slots}, which are all taken", self.host_slots)
        host_slot = taken.index(0)
        if position is not None:
            require_int("position", position, 0)
            self._check_holds(request, slot, position)
        moves = self._copy(request, "out", slot, host_slot, position)
        self._away[request] = _Away(host_slot, position, sum(move.bytes for move, _ in moves))
        self._commit(host_slot, 1, [layer.leaves(slot, host_slot, position) for layer in self._layers.values()], moves)

    def swap_in(self, request: Hashable, slot: int) -> None:
        """Move the state of ``request`` back, into ``slot`` of every pool; its room on the host is free then.

        Mutates the pools' rows and tags of that slot. Raises RangeError for a request that is not away or a slot that a
        pool lacks; StateMismatchError if tags say that the slot holds another request (``reset`` it if that is gone),
        or if a pool has other tensors than when it was given.
        """
        self._check(slot)
        away = self._of(request)
        for layer in self._layers.values():
            layer.check_free(request, slot)
        moves = self._copy(request, "in", slot, away.host_slot, away.position)
        self._commit(away.host_slot, 0, [layer.enters(slot, away.host_slot) for layer in self._layers.values()], moves)

    def drop(self, request: Hashable) -> None:
        """Forget a request that is away. Raises RangeError for one that is not."""
        host_slot = self._of(request).host_slot
        self._commit(host_slot, 0, [layer.enters(None, host_slot) for layer in self._layers.values()])

    def wait(self, layer: str) -> None:
        """Have the device's current stream wait for the last copy of ``layer``, and the host for none.

        Where a captured graph holds the steps of several layers: before its replay, for each. Raises RangeError for an
        unknown layer.
        """
        self._layer(layer)
        if (copied := self._copied.get(layer)) is not None:
            current = self._streams.current_stream(self._device)
            current.wait_stream(copied) if copied is self._stream else current.wait_event(copied)

    def moves(self) -> Iterator[Move]:
        """Records of all copies since they were last read, in order; each is handed out once, when its copy is done.

        What reads ``views`` for another store may do so once it has the record, until the request is back or dropped.
        """
        while self._moves:
            move, copied = self._moves.popleft()
            if copied is not None:
                copied.synchronize()
            yield move

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """Who is away, in the order in which they went."""
        return tuple(self._still_away())

    def host_slot(self, request: Hashable) -> int:
        """Slot of a request that is away in the host's memory. Raises RangeError for one that is not."""
        return self._of(request).host_slot

    def state_bytes(self, request: Hashable) -> int:
        """Bytes of the state of a request that is away, in all layers: those that were moved. Raises RangeError."""
        return self._of(request).bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of the host's memory that one slot takes in all layers: the most that a request can have."""
        return sum(t.nbytes for layer in self._layers.values() for t in layer.host.memory) // self.host_slots

    def pool(self, layer: str) -> StatePool | OnlineState:
        """The host's pool of a layer; a request has ``host_slot`` there. Raises RangeError for an unknown layer."""
        return self._layer(layer).host

    def views(self, layer: str) -> dict[str, torch.Tensor]:
        """The host's memory of a layer, by tensor: [host_slots, rows, channels], a ring's rows at p mod rows; no copy.

        "state" (and "state score" where kv and scores are two tensors), or of an online state "state" (m, l, o),
        "state folded" [host_slots, 1] and "state log". Raises RangeError for an unknown layer.
        """
        host = self._layer(layer).host
        return {name: _by_slot(host, t) for name, t in host.tensors.items()}

    def _check(self, slot: int) -> None:
        require_int("slot", slot, 0)
        for layer in self._layers.values():
            layer.check(slot)

    def _check_holds(self, request: Hashable, slot: int, position: int) -> None:
        tagged = [layer for layer in self._layers.values() if layer.tags is not None]
        if tagged:  # else a batch on a GPU would be waited for, and nothing compared
            batch = RaggedBatch.at(position, state_slot=slot, device=self._device)
            live = {spec: live_rows(spec, batch.start_positions) for spec in {layer.spec for layer in tagged}}
            for layer in tagged:
                layer.check_holds(request, batch, live[layer.spec])

    def _layer(self, name: str) -> _Layer:
        require_known("layer", name, self._layers, error=RangeError)
        return self._layers[name]

    def _of(self, request: Hashable) -> _Away:
        if not _known(request, self._away) or not self._taken[self._away[request].host_slot]:
            raise RangeError("request", "one that is away", repr(request))
        return self._away[request]

    def _still_away(self) -> dict[Hashable, _Away]:
        taken = self._taken.tolist()
        return {request: away for request, away in self._away.items() if taken[away.host_slot]}

    def _copy(
        self, request: Hashable, direction: Literal["out", "in"], slot: int, host_slot: int, position: int | None
    ) -> list[tuple[Move, Any]]:
        """Copy, or begin to copy, layer after layer: a record of each, and an event that follows it (None: done)."""
        moves = []
        if self._stream is not None:  # the step before may still write what is read here, or read what is written
            self._stream.wait_stream(self._streams.current_stream(self._device))
        with nullcontext() if self._stream is None else self._streams.stream(self._stream):
            for name, layer in self._layers.items():
                size, self._copied[name] = 0, self._stream  # broken off among its copies, ``wait`` waits for all
                for device, host in layer.rows(slot, host_slot, position):
                    target, source = (host, device) if direction == "out" else (device, host)
                    target.copy_(source, non_blocking=True)
                    size += source.nbytes
                if self._stream is not None:
                    self._copied[name] = self._stream.record_event()
                move = Move(next(self._numbers), request, name, direction, host_slot, position, size)
                moves.append((move, self._copied[name]))
        return moves

    def _commit(self, host_slot: int, taken: int, tags: list[_Tags], moves: Sequence[tuple[Move, Any]] = ()) -> None:
        """Make a move count: whether the host's slot is taken, and all tags, by one call that no interrupt parts."""
        there, new = zip(
            *itertools.chain(*tags), (self._taken[host_slot], torch.tensor(taken, device="cpu")), strict=True
        )
        torch._foreach_copy_(there, new)  # type: ignore[attr-defined]
        self._moves.extend(moves)


def _check(name: str, pair: tuple[CompressorSpec, StatePool | OnlineState]) -> None:
    """Raise unless the pool has slots and is one of its spec."""
    require("layer", name, str)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise DtypeError(f"pools[{name!r}]", "a spec and a pool", type(pair).__name__)
    spec, pool = pair
    require(f"pools[{name!r}]", spec, CompressorSpec)
    require(f"pools[{name!r}]", pool, (StatePool, OnlineState))
    if isinstance(pool.layout, PagedLayout):
        hint = "an engine moves pages as its other blocks: StatePool.blocks is a view [pages, rows, channels]"
        raise UnsupportedError(f"pools[{name!r}]", "a ring or an online state, which have slots", "pages", hint)
    pool.check_memory()
    pool.layout.check_drafts(spec, 0)
    if pool.state_dim != spec.state_dim or (isinstance(pool, OnlineState) and pool.acc.shape[2] != spec.head_dim):
        raise ShapeError(f"pools[{name!r}]", f"rows of {spec.state_dim} channels", pool.state_dim)


def _twin(pool: _State, slots: int) -> _State:
    """A pool of the same kind on the host, pinned if this one is on an accelerator; its tags name nothing."""
    many, pinned = _slots(pool), pool.device.type != "cpu"
    made = {}
    for name in (f.name for f in fields(pool)):
        if isinstance(t := getattr(pool, name), torch.Tensor):
            shape = (t.shape[0] // many * slots, *t.shape[1:])
            made[name] = advise(torch.empty(shape, dtype=t.dtype, device="cpu", pin_memory=pinned))
    if pool.tags is not None:
        made["tags"].fill_(-1)
    return replace(pool, layout=replace(pool.layout, num_slots=slots), **made)


def _slots(pool: StatePool | OnlineState) -> int:
    assert not isinstance(pool.layout, PagedLayout)
    return pool.layout.num_slots


def _by_slot(pool: StatePool | OnlineState, t: torch.Tensor) -> torch.Tensor:
    """View [slots, rows or values, ...] of one of its tensors."""
    many = _slots(pool)
    return t if t.dim() == 3 else t.unflatten(0, (many, t.shape[0] // many))


def _known(request: Hashable, away: Mapping[Hashable, _Away]) -> bool:
    try:
        return request in away
    except TypeError:
        raise DtypeError("request", "a key that can be hashed", type(request).__name__) from None


def _ring(low: int, high: int, rows: int) -> list[slice]:
    """Where positions low .. high - 1 lie in a ring that is long enough for them: in up to two pieces."""
    if low >= high:
        return []
    first, last = low % rows, (high - 1) % rows + 1
    return [slice(first, last)] if first < last else [slice(first, rows), slice(0, last)]
