"""``summary.md``: a conformance run as a page to link to, one cause after the other, each with how to see it again."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kvcondense
from kvcondense import files
from kvcondense.conformance.cases import Case
from kvcondense.conformance.coverage import Coverage
from kvcondense.conformance.invariants import Outcome


@dataclass(frozen=True)
class Cause:
    """Something that is wrong: what was found, the smallest history, and the command that shows it again."""

    name: str
    detail: str
    case: Case | None
    again: str


def visits(coverage: Coverage) -> Iterator[str]:
    """What was visited, a line for each compressor."""
    for spec, kinds in coverage.told().items():
        drafts = "; drafts of {drafts} from {phases of verify steps} phases" if "drafts" in kinds else ""
        text = "visited {spec}: chunks of {chunk lengths} from {phases} phases to {ends}" + drafts
        text += (
            "; positions {positions}; slots {state slots}; requests in a step {requests}, spare tokens {spare tokens}"
        )
        yield text.format_map({"spec": spec, **kinds})


def write(
    folder: Path,
    typed: str,
    seed: int,
    outcomes: Sequence[Outcome],
    causes: Sequence[Cause],
    visited: Coverage,
    left: Sequence[str],
) -> Path:
    """The page, into ``folder``, beside the histories that it names."""
    failed = sum(not o.passed for o in outcomes)
    lines = [f"# kvcondense conformance: {len(causes)} {'cause' if len(causes) == 1 else 'causes'}", ""]
    lines += [f"`kvcondense conformance {_code(typed)} --seed {seed}`, kvcondense {kvcondense.__version__}: "
              f"{failed} of {len(outcomes)} invariants do not hold."]  # fmt: skip
    for number, cause in enumerate(causes, 1):
        lines += ["", f"## {number}. {_text(cause.name)}", "", _text(cause.detail), ""]
        if cause.case is not None:
            lines += ["The smallest history found:", "", "```json", cause.case.to_json(), "```", ""]
        lines += ["See it again:", "", "`````sh", cause.again, "`````"]
    lines += ["", "## All invariants", "", "| invariant | promise | result |", "|---|---|---|"]
    for o in outcomes:
        result = f"skipped: {o.skipped}" if o.skipped else "holds" if o.passed else "broken"
        lines.append(f"| {_text(o.invariant)} | {_text(o.promise)} | {_text(result)} |")
    lines += ["", "## Visited", "", *(f"* {_text(line.removeprefix('visited '))}" for line in visits(visited))]
    lines += ["", "## Not asked", "", *(f"* {_text(line)}" for line in left)]
    folder.mkdir(exist_ok=True)
    files.write(folder / "summary.md", "\n".join(lines) + "\n")
    return folder / "summary.md"


def _text(text: str) -> str:
    """What an adapter says is text, not markup."""
    quoted = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|~#" else c for c in quoted)


def _code(text: str) -> str:
    return text.replace("`", "'")
