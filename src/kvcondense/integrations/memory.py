"""What a compressor remembers of a batch of sequences: its state, and the rows so far in memory that grows by doubling.

Sequences may differ in length; each has a row of its own for every window that it has completed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.api import condense
from kvcondense.backends import Backend
from kvcondense.errors import KvCondenseError
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.planning import Planner
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

_FIRST_ROWS = 64


@dataclass(frozen=True)
class Tokens:
    """What a call brings: for sequence b, ``lengths[b]`` tokens from position ``starts[b]``, after ``skips[b]`` others.

    The others are padding before a sequence's first token.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    skips: tuple[int, ...]

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, channels] -> [T, channels]: the tokens of all sequences, one after the other."""
        if not any(self.skips):
            return x.flatten(0, 1)
        return torch.cat([row[skip:] for row, skip in zip(x, self.skips, strict=True)])

    def plans(self, planner: Planner, device: torch.device) -> tuple[Plan, ...]:
        """The same as plans; sequence b has state slot b."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        slots = list(range(len(self.starts)))
        start_loc = torch.tensor(ends, device=device)
        return planner.step(start_loc, start_positions=self.starts, state_slots=slots)[1]


@dataclass(frozen=True)
class Tail:
    """Of sequences of one length: kv and gate [B, n, N] of tokens after the last row; what overlaps into the next.

    ``overlap``: kv and gate + ape [B, r, d] of the first half of the last row's own tokens, if there are such.
    """

    kv: torch.Tensor
    gate: torch.Tensor
    overlap: tuple[torch.Tensor, torch.Tensor] | None


class Memory:
    """State and rows of one compressor. ``seen[b]``: tokens of sequence b."""

    def __init__(self, spec: CompressorSpec, like: torch.Tensor, sequences: int) -> None:
        self.spec = spec
        with torch.inference_mode(False):  # such a mode may end before the sequences do
            self.pool = StatePool.ring(spec, sequences, device=like.device)
            self.rows = like.new_zeros(sequences, _FIRST_ROWS, spec.head_dim)
        self.pool.tags = None  # ``seen`` says what every sequence holds
        self.seen = (0,) * sequences
        self.torn = False
        self.ape: torch.Tensor | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each sequence."""
        return tuple(seen // self.spec.ratio for seen in self.seen)

    @property
    def visible(self) -> torch.Tensor:
        """[B, most rows, d]; rows beyond a sequence's own are zero."""
        return self.rows[:, : max(self.counts, default=0)]

    def check(self, tokens: Tokens) -> None:
        """Raise KvCondenseError unless these tokens continue what there is."""
        if tokens.starts != self.seen:
            raise KvCondenseError("position_ids", f"to go on at {list(self.seen)}", list(tokens.starts))
        if self.torn:
            raise KvCondenseError(
                "past_key_values (cache)", "a cache whose last call was finished", "one that was broken off"
            )

    def push(
        self,
        kv_score: torch.Tensor,
        tokens: Tokens,
        plan: Plan,
        weights: CompressorWeights,
        rope: RopeTable,
        impl: str | Backend,
    ) -> None:
        """Take the tokens' kv_score [T, projected] and keep the rows that they complete; raises as ``check`` does."""
        self.check(tokens)
        self.torn, self.ape = True, weights.ape
        done = condense(self.spec, kv_score, weights, rope, plan.batch, plan=plan, state=self.pool, impl=impl)
        self.seen = tuple(s + n for s, n in zip(tokens.starts, tokens.lengths, strict=True))
        self._grow(max(self.counts, default=0))
        self.rows[done.request, done.window] = done.values.to(self.rows.dtype)
        self.torn = False

    def _grow(self, count: int) -> None:
        have = self.rows.shape[1]
        if count > have:
            with torch.inference_mode(False):
                more = self.rows.new_zeros(self.rows.shape[0], max(count, 2 * have) - have, self.spec.head_dim)
                self.rows = torch.cat([self.rows, more], dim=1)

    def select(self, indices: torch.Tensor) -> None:
        """Sequence i becomes a copy of what sequence indices[i] is. The caller sees to ``torn`` meanwhile."""
        order: Sequence[int] = indices.tolist()
        with torch.inference_mode(False):
            pool = StatePool.ring(self.spec, len(order), device=self.rows.device)
            pool.blocks.copy_(self.pool.blocks.index_select(0, indices.to(self.pool.device)))
            rows = self.rows.index_select(0, indices.to(self.rows.device))
        pool.tags = None
        self.pool, self.rows = pool, rows
        self.seen = tuple(self.seen[i] for i in order)

    def tail(self) -> Tail:
        """What has not become a row yet, of sequences that have one length, not 0; in the type of the rows."""
        assert self.ape is not None
        end, ratio, d = self.seen[0], self.spec.ratio, self.spec.head_dim
        begin = end - end % ratio
        kv, z = self._tokens(begin, end)
        overlap = None
        if self.spec.overlap and begin:
            before_kv, before_z = self._tokens(begin - ratio, begin)
            overlap = before_kv[..., :d].to(self.rows.dtype), before_z[..., :d]
        return Tail(kv.to(self.rows.dtype), (z - self.ape[: end - begin]).to(self.rows.dtype), overlap)

    def _tokens(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """kv and gate + ape [B, n, N] of the state at these positions."""
        blocks = self.pool.blocks
        at = torch.arange(begin, end, device=blocks.device) % blocks.shape[1]
        kv, z = blocks.index_select(1, at).chunk(2, dim=-1)
        return kv, z
