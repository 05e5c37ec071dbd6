"""Marks of state rows around a step: by compiled code where it can run, else by the state itself."""

from __future__ import annotations

from kvcondense.backends.cpu import marking
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Facts, Plan
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec


def check(spec: CompressorSpec, state: StatePool | OnlineState, plan: Plan, facts: Facts) -> None:
    """Raise StateMismatchError unless every stored row that a step reads holds the position that it should."""
    if type(state) is not StatePool or not marking.mark(marking.CHECK, state, facts):
        state.check_continues(spec, plan.batch, facts.reads)


def begin(state: StatePool | OnlineState, plan: Plan, facts: Facts) -> None:
    """Record that a step begins to write rows: until ``name`` says what they hold, nobody knows."""
    if type(state) is not StatePool or not marking.mark(marking.BEGIN, state, facts):
        state.begin(plan.batch, facts.dense.keep_row, facts.active)


def name(state: StatePool | OnlineState, plan: Plan, facts: Facts) -> None:
    """Record what the rows hold that a step has written."""
    if type(state) is not StatePool or not marking.mark(marking.NAME, state, facts):
        state.tag(plan.batch, facts.dense.keep_row, facts.dense.keep_position, facts.active)
