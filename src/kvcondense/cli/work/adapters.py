"""The adapter that ``--adapter`` or ``--exec`` names."""

from __future__ import annotations

import shlex

from kvcondense.conformance.adapter import Factory
from kvcondense.conformance.own import load_factory
from kvcondense.conformance.remote import exec_factory


def adapter_of(adapter: str, command: str | None, timeout: float) -> tuple[str, Factory]:
    """How it is typed, and what makes it; one that cannot work is an error before anything runs."""
    if command is not None:
        return f"--exec {shlex.quote(command)}", exec_factory(command, timeout)
    make = load_factory(adapter)
    make()
    return f"--adapter {adapter}", make
