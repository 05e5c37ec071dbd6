"""What compiled planners are told of a job, a plan to be made: integers, the same for every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.batch import MOST_POSITIONS
from kvcondense.layout.extremes import Layout
from kvcondense.layout.online import OnlineLayout
from kvcondense.spec import CompressorSpec

Job = tuple[CompressorSpec, Layout | None, int | None]
"""What a plan is made for: a compressor, the layout of its state, the rows of its cache's pages."""
STATELESS, RING, PAGED, ONLINE = range(4)
"""Kinds of state."""


class Rule(NamedTuple):
    """A job in integers."""

    ratio: int
    halves: int
    kind: int
    blocks: int  # slots or pages of the state
    block_rows: int  # of each
    page_tokens: int
    keep_all: int
    page_rows: int  # of the cache; 0: not said


def rule_of(spec: Any, layout: Any, page_rows: Any) -> Rule | None:
    """The rule of a job; None if only the builders of plans can judge it, or its numbers are too large."""
    if type(spec) is not CompressorSpec or (page_rows is not None and (type(page_rows) is not int or page_rows < 1)):
        return None
    kind, blocks, rows, tokens, keep_all = STATELESS, 0, 0, 1, False
    if type(layout) is RingLayout:
        kind, blocks, rows = RING, layout.num_slots, layout.ring_rows
    elif type(layout) is PagedLayout:
        kind, blocks, rows = PAGED, layout.num_pages, layout.page_rows
        tokens, keep_all = layout.page_tokens, layout.keep_all
    elif type(layout) is OnlineLayout:
        kind, blocks, rows = ONLINE, layout.num_slots, layout.log_rows
        if type(blocks) is not int or type(rows) is not int or min(blocks, rows) < 0:
            return None
    elif layout is not None:
        return None
    rule = Rule(spec.ratio, spec.halves, kind, blocks, rows, tokens, int(keep_all), page_rows or 0)
    return rule if max(rule) < MOST_POSITIONS else None
