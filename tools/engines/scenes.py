"""A scene: tokens, tables and first bytes of a serving history, from which an engine and kvcondense both start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcondense import (
    CompressorSpec,
    CompressorWeights,
    ModelConfig,
    PagedCache,
    RopeTable,
    condense,
)
from kvcondense.formats import FORMATS
from kvcondense.integrations import vllm
from kvcondense.spec import Rounding

PAGE_ROWS, FILL, PADDING = 64, 0x5A, 2
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8_tensor": torch.float8_e4m3fn}
_STRIDE = 576
"""vLLM pads pages of 584-byte rows to a multiple of this."""


@dataclass(frozen=True)
class Kind:
    """A compressor as an engine has it, and what its requests do.

    steps: for each step and request, (tokens, rejected): how many of its last tokens are drafts that are rejected
    afterwards. ring: the state is one block per request. named: the format's name where the tensor does not say it.
    variant: of an engine's kernels, where it has several for one thing. close: how far values may be apart, relative to
    the row's amax, if rows are not compared by their bytes. mutants: deliberate errors that must be seen.
    """

    name: str
    spec: CompressorSpec
    format: str
    steps: tuple[tuple[tuple[int, int], ...], ...]
    block_rows: int
    ring: bool = False
    mutants: tuple[str, ...] = ()
    named: bool = False
    variant: str = ""
    close: float = 0.0


@dataclass(frozen=True)
class Step:
    """What an engine is told of a step, [T + padding]; state_slots and cache_slots are -1 for padding."""

    tokens: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    requests: torch.Tensor
    state_slots: torch.Tensor
    cache_slots: torch.Tensor
    drafts: torch.Tensor

    @property
    def real(self) -> int:
        """Tokens that are no padding."""
        return int(self.query_start_loc[-1])


@dataclass
class Memory:
    """What was written: every byte of a paged state, or a ring's rows that can be read again, step by step."""

    state: torch.Tensor | None
    cache: torch.Tensor
    pages: PagedCache
    live: list[torch.Tensor] = field(default_factory=list)
    peer: Any = None
    """What an engine keeps of its own between steps."""

    @property
    def state_bytes(self) -> torch.Tensor:
        """Bytes of the state that are compared."""
        if self.live:
            return torch.cat([rows.flatten() for rows in self.live]).view(torch.uint8)
        return torch.zeros(0, dtype=torch.uint8) if self.state is None else self.state.flatten().view(torch.uint8)


class Scene:
    """The history of one ``Kind``, and fresh memory for whoever plays it."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        self.kind, self.spec, spec = kind, kind.spec, kind.spec
        self.gen = torch.Generator().manual_seed(seed)
        self.count = len(kind.steps[0])
        ends, most = [0] * self.count, 0
        for step in kind.steps:
            most = max([most, *(end + tokens for end, (tokens, _) in zip(ends, step, strict=True))])
            ends = [end + tokens - rejected for end, (tokens, rejected) in zip(ends, step, strict=True)]
        config = ModelConfig.FLASH if spec.ratio > 2 else ModelConfig.V41_FLASH
        self.rope = RopeTable.build(config, most + spec.ratio)
        self.cos_sin = torch.cat([self.rope.cos, self.rope.sin], dim=1)
        norm = (1 + 0.2 * self._random(spec.head_dim)).bfloat16().float()
        self.weights = CompressorWeights(norm=norm, ape=self._random(spec.ratio, spec.width) if spec.has_ape else None)
        blocks = 1 if kind.ring else -(-most // kind.block_rows)
        self.table = self._table(blocks)
        self.cache_table = self._table(-(-(most // spec.ratio + 1) // PAGE_ROWS))
        self.scale = torch.tensor(0.0137) if kind.format == "fp8_tensor" else None
        self.steps = list(self._steps())
        self.written = torch.cat([step.cache_slots for step in self.steps]).unique()
        self.written = self.written[self.written >= 0]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.gen)

    def _table(self, blocks: int) -> torch.Tensor:
        """Blocks of every request in no order; block 0 is nobody's."""
        ids = 1 + torch.randperm(self.count * blocks, generator=self.gen)
        return ids.view(self.count, blocks).to(torch.int32)

    def _steps(self) -> Iterator[Step]:
        spec, rows = self.spec, self.kind.block_rows
        starts = torch.zeros(self.count, dtype=torch.int64)
        for index, plan in enumerate(self.kind.steps):
            lengths, drafts = (torch.tensor(list(column)) for column in zip(*plan, strict=True))
            request = torch.arange(self.count).repeat_interleave(lengths)
            start_loc = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            position = starts[request] + torch.arange(request.shape[0]) - start_loc[request]
            block = self.table[request, 0 if self.kind.ring else position // rows].long()
            window = position // spec.ratio
            slot = self.cache_table[request, window // PAGE_ROWS].long() * PAGE_ROWS + window % PAGE_ROWS
            slot = torch.where((position + 1) % spec.ratio == 0, slot, -1)
            if index == 0 and bool((slot >= 0).any()):
                slot[torch.nonzero(slot >= 0)[-1]] = -1  # a row that nobody wants
            yield Step(
                tokens=self._random(request.shape[0] + PADDING, spec.projected),
                query_start_loc=start_loc.to(torch.int32),
                seq_lens=(starts + lengths).to(torch.int32),
                positions=_padded(position, 0),
                requests=_padded(request, 0).to(torch.int32),
                state_slots=_padded(block * rows + position % rows, -1),
                cache_slots=_padded(slot, -1),
                drafts=drafts,
            )
            starts = starts + lengths - drafts

    def memory(self) -> Memory:
        """First bytes: equal ones for everybody."""
        spec, form = self.spec, FORMATS[self.kind.format]
        state = None
        if spec.window > 1:
            blocks = 1 + int(self.table.max())
            state = torch.full((blocks, self.kind.block_rows, spec.state_dim), 7.0)
        size = form.row_bytes(spec.head_dim)
        stride = -(-PAGE_ROWS * size // _STRIDE) * _STRIDE if form.align == _STRIDE else PAGE_ROWS * size
        storage = torch.full((1 + int(self.cache_table.max()), stride), FILL, dtype=torch.uint8)
        pages = storage.as_strided((storage.shape[0], PAGE_ROWS, size), (stride, size, 1))
        if form.name in _TYPES:
            pages = pages.view(_TYPES[form.name])
        return Memory(state, storage, PagedCache.wrap(pages, format=form.name, scales=self.scale))

    def rows(self, memory: Memory) -> torch.Tensor:
        """The cache's memory as an engine sees it: [pages, rows, n]."""
        form = FORMATS[self.kind.format]
        size, storage = form.row_bytes(self.spec.head_dim), memory.cache
        pages = storage.as_strided((storage.shape[0], PAGE_ROWS, size), (storage.stride(0), size, 1))
        return pages.view(_TYPES[form.name]) if form.name in _TYPES else pages

    def note(self, memory: Memory, step: Step) -> None:
        """Copy the ring's rows that a later step can read: of what is accepted."""
        if not self.kind.ring or memory.state is None:
            return
        lengths = (step.seq_lens - step.drafts).tolist()
        for request, length in enumerate(lengths):
            at = torch.arange(self.spec.live_start(length), length) % self.kind.block_rows
            memory.live.append(memory.state[int(self.table[request, 0]), at].clone())


def _padded(values: torch.Tensor, fill: int) -> torch.Tensor:
    return torch.cat([values, torch.full((PADDING,), fill, dtype=values.dtype)])


def play(scene: Scene, step: Callable[[Scene, Memory, Step], None]) -> Memory:
    """Every step of the scene on fresh memory."""
    memory = scene.memory()
    for each in scene.steps:
        step(scene, memory, each)
        scene.note(memory, each)
    return memory


def ours(scene: Scene, impl: str, mutant: str = "") -> Memory:
    """The scene on kvcondense, or with one deliberate error."""
    spec, weights = scene.spec, scene.weights
    if mutant == "rotated":
        spec = replace(spec, rotate=not spec.rotate)
    elif mutant == "without ape":
        weights = replace(weights, ape=torch.zeros_like(weights.ape))  # pyright: ignore[reportArgumentType]
    elif mutant == "rounded as V4":
        spec = replace(spec, rounding=Rounding.FUSED)
    elif mutant == "rounded as DeepSeek's code":
        spec = replace(spec, rounding=Rounding.REFERENCE)
    rope = scene.rope
    if mutant == "turned a window late":
        rope = RopeTable(rope.cos.roll(-spec.ratio, 0), rope.sin.roll(-spec.ratio, 0))

    def one(scene: Scene, memory: Memory, step: Step) -> None:
        slots = step.cache_slots[: step.real]
        if mutant == "a slot further":
            slots = torch.where(slots >= 0, slots + 1, slots)
        if scene.kind.ring:
            batch = vllm.ring_batch(
                step.query_start_loc, step.seq_lens, block_table=None if memory.state is None else scene.table,
                slot_mapping=slots, draft_rows=step.drafts,
            )  # fmt: skip
            state = None if memory.state is None else vllm.ring_state(memory.state)
        else:
            assert memory.state is not None
            batch = vllm.batch(
                step.query_start_loc, step.seq_lens, state_block_table=scene.table, slot_mapping=slots,
                draft_rows=step.drafts,
            )  # fmt: skip
            state = vllm.state(memory.state)
        # The tensor says the format where it can; else it is named.
        cache = vllm.cache(
            scene.rows(memory), scale=scene.scale, format=scene.kind.format if scene.kind.named else None
        )
        condense(spec, step.tokens, weights, rope, batch, state=state, cache=cache, impl=impl)

    return play(scene, one)
