"""A trace: the steps of one request as the library plans them, in integers, for a page or another program to show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcondense.errors import RangeError, UnsupportedError, require, require_int
from kvcondense.formats import CacheFormat, get_format
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.plan import Plan
from kvcondense.spec import CompressorSpec

SCHEMA = 1
_STATE_PAGES = 7
"""Step between the pages of a paged state, so that they do not lie in order."""


@dataclass(frozen=True)
class Scenario:
    """One request: ``prompt`` tokens in chunks of ``chunk``, then ``steps`` steps of 1 + ``drafts`` tokens.

    Of the drafts of step i, i mod (drafts + 1) are accepted. The state is a ring of ``ring_rows`` rows (None: the
    least), or has pages of ``state_page`` rows.
    """

    spec: CompressorSpec
    prompt: int
    chunk: int
    drafts: int = 0
    steps: int = 12
    ring_rows: int | None = None
    state_page: int | None = None
    page_rows: int = 4
    format: str = "fp8_model1"

    def __post_init__(self) -> None:
        require("spec", self.spec, CompressorSpec)
        for name, low in (("prompt", 0), ("chunk", 1), ("drafts", 0), ("steps", 0), ("page_rows", 1)):
            require_int(name, getattr(self, name), low)
        if self.ring_rows is not None and self.state_page is not None:
            raise RangeError("ring_rows", "ring_rows or state_page, not both", "both")

    @property
    def layout(self) -> RingLayout | PagedLayout:
        """Where the state's rows lie."""
        if self.state_page is None:
            rows = self.spec.required_ring_rows(self.drafts) if self.ring_rows is None else self.ring_rows
            return RingLayout(1, rows)
        return PagedLayout(_STATE_PAGES * self.pages + 1, self.state_page)

    @property
    def longest(self) -> int:
        """Positions that the request may reach, rejected ones included."""
        return self.prompt + self.steps * (1 + self.drafts)

    @property
    def pages(self) -> int:
        """Pages of a paged state."""
        return -(-self.longest // (self.state_page or 1))

    def advance(self) -> Iterator[tuple[int, int, int, int]]:
        """(first position, tokens, drafts, accepted drafts) of every step."""
        position = 0
        while position < self.prompt:
            count = min(self.chunk, self.prompt - position)
            yield position, count, 0, 0
            position += count
        for i in range(self.steps):
            accepted = i % (self.drafts + 1)
            yield position, 1 + self.drafts, self.drafts, accepted
            position += 1 + accepted


def trace(scenario: Scenario) -> dict[str, Any]:
    """The scenario's steps in plain integers, as JSON takes them; every number is a Plan's or the spec's.

    ``steps``: start, tokens, drafts, accepted; ``reads`` and ``keeps`` [[position, state row], ..]; ``windows``
    [[index, cache row, RoPE position], ..]. ``cache.row_bytes``: for each row of a page, its fields' bytes in it,
    [[name, first, behind the last], ..]. Raises as ``Plan.build`` does, for a ring that is too short.
    """
    spec, layout = scenario.spec, scenario.layout
    form = get_format(scenario.format)
    form.check(spec.head_dim, spec.rope_dim)
    if form.tile > 1 or form.second(spec.head_dim) is not None:
        wanted = "one whose rows lie in one piece (neither in tiles nor in two buffers), as they are drawn"
        raise UnsupportedError("format", wanted, form.name)
    rows = spec.visible_rows(scenario.longest) + 1
    table = [[(3 * i + 1) % _prime(rows) for i in range(-(-rows // scenario.page_rows))]]
    steps = []
    for start, tokens, drafts, accepted in scenario.advance():
        where: dict[str, Any] = {"state_slots": [0]}
        if isinstance(layout, PagedLayout):
            where = {"state_block_table": [[_STATE_PAGES * i + 1 for i in range(scenario.pages)]]}
        batch = RaggedBatch.build([0, tokens], start_positions=[start], draft_rows=drafts, block_table=table, **where)
        plan = Plan.build(spec, batch, state_layout=layout, page_rows=scenario.page_rows)
        reads = plan.facts(spec).reads
        assert reads.row is not None
        window = plan.window_index
        steps.append({
            "start": start, "tokens": tokens, "drafts": drafts, "accepted": accepted,
            "reads": _pairs(reads.position, reads.row),
            "windows": _pairs(window, plan.window_slot, window * spec.ratio),
            "keeps": _pairs(plan.keep_position, plan.keep_row),
        })  # fmt: skip
    return {
        "schema": SCHEMA,
        "spec": {"ratio": spec.ratio, "window": spec.window, "overlap": spec.overlap, "head_dim": spec.head_dim},
        "state": {
            "kind": "ring" if isinstance(layout, RingLayout) else "paged",
            "block_rows": layout.block_rows,
            "row_bytes": 4 * spec.state_dim,
        },
        "cache": {
            "format": form.name,
            "page_rows": scenario.page_rows,
            "page_bytes": form.page_bytes(spec.head_dim, scenario.page_rows),
            "row_bytes": [_row_bytes(form, spec.head_dim, scenario.page_rows, i) for i in range(scenario.page_rows)],
        },
        "scenario": {"prompt": scenario.prompt, "chunk": scenario.chunk, "drafts": scenario.drafts},
        "steps": steps,
    }


def _pairs(*columns: Any) -> list[list[int]]:
    return [list(row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _row_bytes(form: CacheFormat, head_dim: int, page_rows: int, row: int) -> list[list[Any]]:
    first = ((f, f.byte(page_rows, row)) for f in form.fields(head_dim))
    return [[f.name, at, at + f.nbytes] for f, at in first]


def _prime(n: int) -> int:
    """The least prime above n + 3, so that multiples of 3 name different pages."""
    p = n + 4
    while any(p % k == 0 for k in range(2, int(p**0.5) + 1)):
        p += 1
    return p
