"""What the adapters here share: where the engines' files are, Triton's interpreter, pages, states in blocks.

``KVCONDENSE_PEERS`` is a folder with one folder for each engine, named as below and made of files that the engines
publish: ``pip install --no-deps --target vllm vllm==0.33.0`` and the like, or a checkout. Nothing of them is copied.
Triton kernels run in its interpreter, whose casts are exchanged for those of a GPU (tools/engines/interpreter.py).
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports Triton

import torch

from kvcondense import RaggedBatch
from kvcondense.conformance import Engine, Setup
from kvcondense.errors import UnsupportedError

MAIN = "head_dim=512 rope_dim=64"
INDEXER = "head_dim=128 rope_dim=64 rotate=false"
"""None of these engines rotates the indexer's keys in its compressor."""


def folder(name: str, file: str) -> Path:
    """The engine's folder, which must hold ``file``."""
    root = os.environ.get("KVCONDENSE_PEERS", "")
    found = Path(root) / name
    if not root or not (found / file).exists():
        raise UnsupportedError("KVCONDENSE_PEERS", f"a folder with {name}/{file}", repr(root))
    return found


def tool(name: str) -> Any:
    """A module of tools/engines, of which this is the other user."""
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    return importlib.import_module(f"engines.{name}")


def package(name: str, root: Path) -> None:
    """A package of that name whose ``__init__`` files do not run, and whose modules are those in ``root``."""
    tool("interpreter").correct()
    tool("vllm_files").stand_in(name).__path__ = [str(root.joinpath(*name.split(".")))]


def pages(setup: Setup, data: torch.Tensor) -> torch.Tensor:
    """The cache's bytes as engines see them: [pages, rows, bytes of a row], at the stride that its pages have."""
    size = setup.format.row_bytes(setup.spec.head_dim)
    return data.as_strided((data.shape[0], setup.page_rows, size), (data.stride(0), size, 1))


@dataclass
class Tokens:
    """A step token by token: its position, request and cache slot (-1: no row), and whether it is anybody's."""

    positions: torch.Tensor
    requests: torch.Tensor
    cache_slots: torch.Tensor
    mine: torch.Tensor


def tokens(setup: Setup, batch: RaggedBatch, count: int) -> Tokens:
    """Of ``count`` tokens, spare ones behind the last request among them."""
    assert batch.state_slots is not None
    starts, real = batch.query_start_loc[:-1], int(batch.query_start_loc[-1])
    requests = torch.arange(starts.shape[0]).repeat_interleave(batch.lengths)
    positions = batch.start_positions[requests] + torch.arange(real) - starts[requests]
    if batch.slot_mapping is not None:
        slots = batch.slot_mapping[:real]
    else:
        assert batch.block_table is not None
        window = positions // setup.spec.ratio
        page = batch.block_table[requests, (window // setup.page_rows).clamp(max=batch.block_table.shape[1] - 1)]
        slots = page * setup.page_rows + window % setup.page_rows
    mine = batch.state_slots[requests] >= 0
    slots = torch.where(mine & ((positions + 1) % setup.spec.ratio == 0), slots, -1)
    spare = count - real
    return Tokens(
        torch.cat([positions, positions.new_zeros(spare)]),
        torch.cat([requests, requests.new_zeros(spare)]).to(torch.int32),
        torch.cat([slots, slots.new_full((spare,), -1)]),
        torch.cat([mine, mine.new_zeros(spare)]),
    )


class Blocks(Engine):
    """An engine whose states lie in blocks [blocks, rows, 2N] fp32, given out as positions arrive; block 0 is nobody's.

    ``span`` positions share a block, position p in its row p % rows. Blocks that nothing can read any more go back and
    keep what they hold: whoever gets them finds it.
    """

    def layout(self) -> tuple[int, int]:
        """(span, rows)."""
        raise NotImplementedError

    def init(self, setup: Setup) -> None:
        super().init(setup)
        self.span, self.block_rows = self.layout()
        self.states = self._more(64)
        self.free, self.tables = list(range(1, 64)), {}
        self.cos_sin = torch.cat([setup.rope.cos, setup.rope.sin], dim=1)

    def _more(self, count: int) -> torch.Tensor:
        return torch.full((count, self.block_rows, self.setup.spec.state_dim), float("nan"))

    def block(self, slot: int, index: int) -> int:
        """The block of a request's positions from index * span on."""
        table = self.tables.setdefault(slot, {})
        if index not in table:
            if not self.free:
                count = self.states.shape[0]
                self.states = torch.cat([self.states, self._more(count)])
                self.free = list(range(count, 2 * count))
            table[index] = self.free.pop()
        return table[index]

    def where(self, slot: int, positions: range) -> torch.Tensor:
        """Rows of the states, counted over all blocks."""
        rows = self.block_rows
        return torch.tensor([self.block(slot, p // self.span) * rows + p % rows for p in positions], dtype=torch.int64)

    def admit(self, batch: RaggedBatch) -> None:
        """Blocks for a step's positions; a request at position 0 is a new one."""
        assert batch.state_slots is not None
        for slot, start, count in zip(*self._columns(batch), strict=True):
            if slot >= 0 and start == 0 and count:
                self.reset([slot])
            if slot >= 0:
                for index in range(start // self.span, -(-(start + count) // self.span)):
                    self.block(slot, index)

    def table(self, batch: RaggedBatch) -> torch.Tensor:
        """Block tables of a step's requests, int32; 0 where there is no block."""
        assert batch.state_slots is not None
        held = [self.tables.get(slot, {}) for slot in batch.state_slots.tolist()]
        found = torch.zeros(len(held), 1 + max((max(t, default=0) for t in held), default=0), dtype=torch.int32)
        for row, table in zip(found, held, strict=True):
            row[list(table)] = torch.tensor(list(table.values()), dtype=torch.int32)
        return found

    def release(self, batch: RaggedBatch) -> None:
        """Blocks whose positions lie before every window that is open, even if all drafts are rejected, go back."""
        keep = self.setup.max_draft + self.setup.spec.window
        for slot, start, count in zip(*self._columns(batch), strict=True):
            table = self.tables.get(slot, {})
            for index in [i for i in table if (i + 1) * self.span <= start + count - keep]:
                self.free.append(table.pop(index))

    @staticmethod
    def _columns(batch: RaggedBatch) -> tuple[list[int], ...]:
        assert batch.state_slots is not None
        return batch.state_slots.tolist(), batch.start_positions.tolist(), batch.lengths.tolist()

    def _live(self, batch: RaggedBatch) -> torch.Tensor:
        assert batch.state_slots is not None
        position = int(batch.start_positions[0])
        return self.where(int(batch.state_slots[0]), range(self.setup.spec.live_start(position), position))

    def state(self, batch: RaggedBatch) -> torch.Tensor:
        return self.states.flatten(0, 1)[self._live(batch)]

    def put_state(self, batch: RaggedBatch, rows: torch.Tensor) -> None:
        assert batch.state_slots is not None
        self.reset([int(batch.state_slots[0])])
        at = self._live(batch)
        self.states.flatten(0, 1)[at] = rows

    def reset(self, slots: list[int]) -> None:
        for slot in slots:
            self.free += self.tables.pop(slot, {}).values()
