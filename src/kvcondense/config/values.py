"""Values as JSON has them, bounded: each raises an error that names it, whatever it is."""

from __future__ import annotations

from typing import Any

from kvcondense.errors import CheckpointError, DtypeError, RangeError
from kvcondense.files.reading import short

MAX_SIZE = 1 << 31
MAX_RATIO = 1 << 20
THETA = (2.0, 1e18)
"""Bounds of a RoPE base: ln(theta) is a divisor in YaRN, theta^(62/64) must be an fp32."""
FACTOR = (1e-3, 1e6)
"""Bounds of a YaRN factor. One of 1e-310, or 0, makes NaN of a table."""
TURNS = (1e-3, 1e6)
"""Bounds of beta_fast and beta_slow."""
EPS = (2.0**-126, 1.0)
"""Bounds of an eps: it is added to an fp32 mean, so no subnormal."""


def number(name: str, value: object, bounds: tuple[float, float]) -> float:
    """A number (no bool, no text, no NaN) within bounds, which belong to it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise DtypeError(name, "a finite number", short(value))
    if not bounds[0] <= value <= bounds[1]:  # compares integers of any length
        raise RangeError(name, f"a number from {bounds[0]:g} to {bounds[1]:g}", short(value))
    return float(value)


def whole(name: str, value: object, low: int = 1, high: int = MAX_SIZE) -> int:
    """An integer (no bool, no 4.0) within bounds, which belong to it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(name, "an integer", short(value))
    if not low <= value <= high:
        raise RangeError(name, f"at least {low} and at most {high}", short(value))
    return value


def mapping(name: str, value: object) -> dict[str, Any]:
    """An object of JSON."""
    if not isinstance(value, dict):
        raise DtypeError(name, "an object", type(value).__name__)
    return value


def listed(name: str, value: object) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise DtypeError(name, "a list", type(value).__name__)
    return value


def text(name: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise DtypeError(name, "a string", short(value))
    return value


def agree(name: str, values: dict[str, Any]) -> Any:
    """The one value of all spellings that are there (None: is not); different ones contradict each other."""
    present = {k: v for k, v in values.items() if v is not None}
    if not present:
        raise CheckpointError(f"config.json {name}", f"one of {', '.join(values)}", "none of them")
    first = next(iter(present.values()))
    if any(v != first for v in present.values()):
        got = "; ".join(f"{k}: {short(v)}" for k, v in present.items())
        raise CheckpointError(f"config.json {name}", "spellings that agree", got)
    return first
