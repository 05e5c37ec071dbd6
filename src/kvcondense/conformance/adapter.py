"""What the kit asks of an implementation: what it declares, what it prepares for, and the methods of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from kvcondense.conformance import compressors
from kvcondense.conformance.stored import new_cache, stored
from kvcondense.errors import RangeError, UnsupportedError, require_int, require_known
from kvcondense.formats import FORMATS, CacheFormat
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.snapshot import load_live, save_live
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class Capabilities:
    """What an adapter declares. What it cannot do is not asked of it, and the report says so.

    specs: the compressors to ask for, each a line as ``compressors.compressor`` reads it: a name (csa, hca, indexer,
    fused, r2, with narrow heads), then sizes and the cache's format where they differ, such as ``csa head_dim=512
    rope_dim=64 format=fp8_model1 page_rows=64`` (``compressors.REAL``: DeepSeek's sizes, for kernels that have them
    built in); ragged: several requests in a step; chunks: steps of any length at any position (else a prefill from 0
    and single tokens); chunk_lengths: lengths at which the engine itself changes its mind, its buckets or tiles, asked
    for too; max_draft: most tokens of a step that may be rejected; mixed: they may end a chunk of any length, not only
    a verify step of drafts + 1 tokens; inert: requests with state slot -1 do nothing; spare: tokens behind the last
    request are ignored; unmapped: a window with cache slot -1 is not written; recycles: a slot can start over at
    position 0; exports: ``export`` and ``load``; offsets: a request may begin at any window boundary, with nothing
    before it; max_positions: positions end there; refuses: bad metadata raises before anything is written; exact: the
    same bits under any split; returns_state: ``state`` gives live rows; formats: every one of kvcondense's own cache
    formats, through kvcondense's own caches; rounding: the profile that rows follow, if not the compressor's own;
    close: how far rows of bf16 and fp32 may be from the reference, relative to 1 + |e| (None: the bounds of bf16 rows,
    and with a quantised cache those of its format on top).
    """

    specs: tuple[str, ...] = compressors.SMALL
    ragged: bool = True
    chunks: bool = True
    chunk_lengths: tuple[int, ...] = ()
    max_draft: int = 16
    mixed: bool = True
    inert: bool = True
    spare: bool = True
    unmapped: bool = True
    recycles: bool = True
    exports: bool = True
    offsets: bool = False
    max_positions: int = 1 << 20
    refuses: bool = True
    exact: bool = True
    returns_state: bool = True
    formats: bool = False
    rounding: str | None = None
    close: float | None = None

    def __post_init__(self) -> None:
        compressors.require(self.specs)
        for name, low, most in (("max_draft", 0, 1024), ("max_positions", 1, 1 << 20)):
            if require_int(name, getattr(self, name), low) > most:
                raise RangeError(name, f"at most {most}", getattr(self, name))
        for n in self.chunk_lengths:
            if not 1 <= require_int("chunk_lengths", n, 1) <= 1 << 14:
                raise RangeError("chunk_lengths", f"1 to {1 << 14} tokens", n)
        if self.rounding is not None:
            require_known("rounding", self.rounding, {r.value: r for r in Rounding})


@dataclass(frozen=True)
class Setup:
    """What an adapter prepares for: one compressor, its state slots and its cache pages (slot s: row s % page_rows)."""

    spec: CompressorSpec
    weights: CompressorWeights
    rope: RopeTable
    num_slots: int
    max_draft: int
    num_pages: int
    page_rows: int
    max_positions: int
    format: CacheFormat = FORMATS["bf16"]

    def new_cache(self) -> PagedCache:
        """Pages of this setup on the CPU, full of ``stored.CANARY`` (untouched if they would fill the memory)."""
        return new_cache(self.format, self.spec.head_dim, self.num_pages, self.page_rows)


@runtime_checkable
class Adapter(Protocol):
    """An implementation under test. ``batch`` names everything as engines do: see ``RaggedBatch``."""

    capabilities: Capabilities

    def init(self, setup: Setup) -> None:
        """Start over: empty state (poison it if you can), a cache full of ``stored.CANARY`` bytes."""
        ...

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Take kv_score [T, 2N] fp32 of this step's tokens: update the state, write finished rows to the cache."""
        ...

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Cache rows at slots [n] as they are stored: [n, head_dim] bf16 (fp32 if the cache is).

        Of another format, uint8 [n, bytes]: the row's fields, one after the other (``stored.stored``).
        """
        ...

    def state(self, batch: RaggedBatch) -> torch.Tensor | None:
        """Live state of the one request of ``batch`` (``RaggedBatch.at``), any layout; None if not to be had."""
        ...

    def reset(self, slots: list[int]) -> None:
        """Forget what these state slots hold."""
        ...

    def export(self, batch: RaggedBatch) -> bytes:
        """The state of the one request of ``batch``, to go on elsewhere. Needed with capabilities.exports.

        As ``snapshot.save_live`` packs it: rows of positions live_start .. start_positions - 1, oldest first, each kv,
        then score + ape; or the running values of an online state. What it holds is compared with the tokens.
        """
        ...

    def load(self, batch: RaggedBatch, payload: bytes) -> None:
        """Take over an export (``snapshot.save_live``) for the one request of ``batch``."""
        ...


Factory = Callable[[], Adapter]


class Engine:
    """An adapter to inherit from: ``step`` is what is left to write. It runs the kernels on ``setup`` and ``cache``.

    With ``state`` and ``put_state`` an engine can declare ``exports`` and ``returns_state``.
    """

    capabilities = Capabilities(exports=False, refuses=False, returns_state=False)
    setup: Setup
    cache: PagedCache

    def init(self, setup: Setup) -> None:
        """A cache in the declared format; an engine's own state comes in an ``init`` of its own."""
        self.setup, self.cache = setup, setup.new_cache()

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """The engine's: kv_score [T, 2N] fp32, kv channels first, then scores without ape."""
        raise NotImplementedError

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """What ``cache`` holds."""
        return stored(self.cache, slots)

    def reset(self, slots: list[int]) -> None:
        """Nothing; an engine that poisons its slots finds more."""

    def state(self, batch: RaggedBatch) -> Any:  # noqa: ARG002
        """Live rows [n, 2N] fp32, positions live_start .. start_positions - 1: kv, then score + ape. None: unknown."""
        return None

    def put_state(self, batch: RaggedBatch, rows: torch.Tensor) -> None:  # noqa: ARG002
        """The other way around, into the slot of ``batch``."""
        raise UnsupportedError("load", "an adapter with put_state", type(self).__name__)

    def export(self, batch: RaggedBatch) -> bytes:
        """``state``, as kvcondense saves it."""
        pool, at = self._alone(batch)
        import_live(self.setup.spec, pool, at, self.state(batch))
        return save_live(self.setup.spec, pool, at)

    def load(self, batch: RaggedBatch, payload: bytes) -> None:
        """``put_state``, of what kvcondense saved."""
        pool, at = self._alone(batch)
        load_live(self.setup.spec, pool, at, payload)
        self.put_state(batch, export_live(self.setup.spec, pool, at))

    def _alone(self, batch: RaggedBatch) -> tuple[StatePool, RaggedBatch]:
        return StatePool.ring(self.setup.spec, 1), RaggedBatch.at(int(batch.start_positions[0]), state_slot=0)
