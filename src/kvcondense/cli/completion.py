"""What the shell offers behind an option: names of models, formats, kinds, backends, mutants, adapters and cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvcondense.backends import backend_names
from kvcondense.bench.cases import CASES
from kvcondense.capacity import STATES
from kvcondense.config import PRESETS
from kvcondense.conformance.adapter import KINDS as STATE_KINDS
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.formats import FORMATS
from kvcondense.golden.inputs import KINDS

Completer = Callable[[str], list[str]]


def _of(names: Iterable[str]) -> Completer:
    known = list(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


models = _of(PRESETS)
kinds = _of(KINDS)
formats = _of(FORMATS)
backends = _of(("auto", *backend_names()))
mutants = _of(MUTANTS)
states = _of(STATES)
cases = _of(CASES)
adapters = _of(
    (*backend_names(), *(f"reference:{kind}" for kind in STATE_KINDS), *(f"mutant:{name}" for name in MUTANTS))
)


def format_pair(incomplete: str) -> list[str]:
    """MAIN or MAIN,INDEXER."""
    main, comma, indexer = incomplete.partition(",")
    return [f"{main}{comma}{name}" for name in formats(indexer)] if comma else formats(main)
