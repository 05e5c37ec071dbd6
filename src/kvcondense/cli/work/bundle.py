"""The work of ``kvcondense bundle``: what is in one, whether it is whole, and a prefix of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kvcondense.bundle import Bundle, cut
from kvcondense.bundle.held import row_bytes
from kvcondense.cli.output import Output
from kvcondense.errors import CheckpointError, UnsupportedError

_SHOWN = 8
"""Commits, of many, that info prints; --json has all."""


def run(
    output: Output,
    *,
    action: str,
    source: Path,
    out: Path | None,
    position: int | None,
    format: str | None,
    indexer_format: str | None,
    verify: bool,
    recover: bool,
) -> bool | None:
    """Whether it is whole, if that was asked."""
    given = {"--out": out, "--position": position, "--format": format, "--indexer-format": indexer_format}
    for option, value in given.items():
        if action != "cut" and value is not None:
            raise UnsupportedError(option, "bundle cut", f"bundle {action}")
    if action == "cut" and out is None:
        raise UnsupportedError("--out", "a file for the result", "none")
    if action == "check" and not verify:
        raise UnsupportedError("--no-verify", "bundle info or cut", "bundle check, which compares digests")
    if action == "check":
        return _check(output, source, recover)
    with Bundle(source, verify=verify, recover=recover) as bundle:
        if out is not None:
            formats = {part: name for part, name in (("main", format), ("indexer", indexer_format)) if name is not None}
            cut(bundle, out, position, formats)
            with Bundle(out) as made:
                output.say(f"{source}, {bundle.position} tokens -> {out}, {made.position} tokens")
                _describe(output, made)
                output.finish(_facts(made))
            return None
        _describe(output, bundle)
        output.finish(_facts(bundle))
        return None


def _check(output: Output, source: Path, recover: bool) -> bool:
    begun, facts = time.perf_counter(), {}
    try:
        with Bundle(source, recover=recover) as bundle:
            facts = _facts(bundle)
            count = bundle.check()
    except CheckpointError as error:
        output.say(f"FAIL  {error}")
        output.finish({**facts, "passed": False, "damage": str(error)})
        return False
    seconds = time.perf_counter() - begun
    rate = f"{count / max(seconds, 1e-9) / 1e9:.2g} GB/s"
    output.say(f"PASS  {count} bytes in {len(facts['commits'])} commits, {seconds:.2f} s, {rate}")
    output.finish({**facts, "passed": True, "damage": None, "checked_bytes": count})
    return True


def _describe(output: Output, bundle: Bundle) -> None:
    commits = [commit.position for commit in bundle.commits]
    output.say(f"a request of {bundle.position} tokens, {len(bundle.members)} compressors")
    for key, value in bundle.about.items():
        output.say(f"  {key}: {value}")
    rows = [
        (m["layer"], m["part"], m["ratio"], m["rows"], m["format"], m["row_bytes"], m["state_bytes"],
         ", ".join(m["converted_from"]))
        for m in _members(bundle)
    ]  # fmt: skip
    columns = ("layer", "part", "ratio", "rows", "format", "bytes a row", "bytes of state", "lost bits in")
    filled = len(columns) - (not any(row[-1] for row in rows))
    output.table(columns[:filled], [row[:filled] for row in rows])
    shown = commits if len(commits) <= _SHOWN else ["...", *commits[-_SHOWN:]]
    output.say(f"commits at {', '.join(map(str, shown))}: it can go on there, and within the windows open then")
    if bundle.file.unfinished:
        output.say(f"{bundle.file.unfinished} bytes behind the last commit, of an append that was broken off")


def _members(bundle: Bundle) -> list[dict[str, Any]]:
    return [
        {
            **member.as_dict(),
            "ratio": member.spec.ratio,
            "rows": member.spec.visible_rows(bundle.position),
            "row_bytes": row_bytes(member.format, member.spec.head_dim),
            "state_bytes": entry.state.bytes,
        }
        for member, entry in zip(bundle.members.values(), bundle.commits[-1].entries, strict=True)
    ]


def _facts(bundle: Bundle) -> dict[str, Any]:
    return {
        "position": bundle.position,
        "about": bundle.about,
        "commits": [commit.position for commit in bundle.commits],
        "members": _members(bundle),
        "bytes": bundle.file.mark.end,
        "unfinished_bytes": bundle.file.unfinished,
    }
