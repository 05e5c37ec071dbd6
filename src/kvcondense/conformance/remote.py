"""Placeholder."""

from __future__ import annotations

from kvcondense.conformance.adapter import Factory


def exec_factory(command: str, timeout: float = 60.0) -> Factory:
    """Placeholder."""
    raise NotImplementedError(command)
