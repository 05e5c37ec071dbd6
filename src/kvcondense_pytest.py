"""pytest plugin: ``pytest --kvcondense-adapter module:factory`` adds one test for each invariant of the kit.

``--kvcondense-exec COMMAND`` does so for a program in any language.

It lives beside the package so that a pytest run that does not ask for it imports neither kvcondense nor torch.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options in a group of their own."""
    group = parser.getgroup("kvcondense", "kvcondense conformance kit")
    group.addoption(
        "--kvcondense-adapter", metavar="MODULE:FACTORY", help="run the conformance kit on this compressor adapter"
    )
    group.addoption("--kvcondense-exec", metavar="COMMAND", help="run it on a program that answers the kit's messages")
    group.addoption("--kvcondense-seed", type=int, default=0, help="seed of the generated histories")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the kit's tests behind whatever else was collected."""
    name, command = config.getoption("--kvcondense-adapter"), config.getoption("--kvcondense-exec")
    if not (name or command):
        return
    from kvcondense.conformance.invariants import INVARIANTS
    from kvcondense.conformance.own import load_factory
    from kvcondense.conformance.remote import exec_factory

    make, seed = exec_factory(command) if command else load_factory(str(name)), config.getoption("--kvcondense-seed")
    for invariant in INVARIANTS:
        items.append(
            InvariantItem.from_parent(
                session, name=f"kvcondense[{invariant.name}]", invariant=invariant, make=make, seed=seed
            )
        )


class BrokenError(Exception):
    """An invariant that does not hold."""


class InvariantItem(pytest.Item):
    """One invariant on the adapter under test; skipped if the adapter does not declare what it needs."""

    def __init__(self, *, invariant: Any, make: Any, seed: int, **more: Any) -> None:
        super().__init__(**more)
        self.invariant, self.make, self.seed = invariant, make, seed

    def runtest(self) -> None:
        from kvcondense.conformance.invariants import check

        outcome = check(self.invariant, self.make, seed=self.seed)
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if not outcome.passed:
            case = f"\nsmallest case: {outcome.case.to_json()}" if outcome.case else ""
            raise BrokenError(f"{outcome.invariant}: {outcome.promise}\n{outcome.detail}{case}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, BrokenError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, self.name
