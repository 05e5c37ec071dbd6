"""docs/findings.md, whole, from results."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from findings.registry import IMPLEMENTATIONS, NOT_RUN, Implementation

COMMAND = "python tools/findings.py --peers PEERS --json benchmarks/baselines/findings.json --write docs/findings.md"
Record = dict[str, Any]


def page(report: Record) -> str:
    """The page."""
    results, versions = report["results"], report["versions"]
    parts = [_head(report), _summary(results), _not_run(), "## One by one\n"]
    parts += [_section(about, results[about.name]) for about in IMPLEMENTATIONS]
    parts.append(_tail(report, versions))
    return "\n".join(parts).rstrip() + "\n"


def _head(report: Record) -> str:
    foreign = [about for about in IMPLEMENTATIONS if not about.ours]
    engines = list(dict.fromkeys(about.name.split(",")[0] for about in foreign))
    failed = [about.name for about in foreign if _failed(report["results"][about.name])]
    count = _count(len(failed), "failing case", "; ".join(failed))
    intro = (
        f"The [conformance kit](conformance.md) was run on {len(engines)} engines' own compressors: "
        f"{', '.join(engines)}. It found {count}. "
        f"As of {report['date']}, kvcondense {report['versions']['kvcondense']}."
    )
    return f"""# What the kit found in other engines

<!-- Written by tools/findings.py from benchmarks/baselines/findings.json. Do not edit. -->

{_filled(intro)}
**A pass is no proof.** It says that no history of those that were played shows an error. Kernels for GPUs ran in
Triton's interpreter, so races, compilers and graphs were not tested, and no whole engine ran.
"""


def _summary(results: Record) -> str:
    lines = [
        "| implementation | version | ran in | invariants asked | histories | result |",
        "|---|---|---|---|---|---|",
    ]
    for about in IMPLEMENTATIONS:
        found = results[about.name]
        asked = [i for i in found["invariants"] if not i["skipped"]]
        histories = sum(i["played"] for i in asked)
        lines.append(
            f"| [{about.name}](#{_anchor(about.name)}) | {found.get('version', about.version)} | {about.ran} "
            f"| {len(asked)} of {len(found['invariants'])} | {histories} | {_result(found)} |"
        )
    return "\n".join(lines) + "\n"


def _not_run() -> str:
    rows = "\n".join(f"| {name} | {why} |" for name, why in NOT_RUN)
    return f"""What could not be run:

| implementation | why |
|---|---|
{rows}
"""


def _section(about: Implementation, found: Record) -> str:
    parts = [f"### {about.name}\n"]
    if found["error"]:
        parts.append(f"Not finished: {found['error']}.\n")
    if about.note:
        parts.append(_filled(about.note))
    parts.append(_asked(about, found))
    for invariant in _failed(found):
        told = f"**{invariant['name']} fails**: {invariant['promise']}. {_sentence(invariant['detail'])}"
        parts.append(_filled(told))
        if invariant["case"] is not None:
            parts.append("The smallest history that was found:\n")
            parts.append(f"```json\n{_case(invariant['case'])}\n```\n")
    parts += [_widths(width) for width in found["widths"]]
    if found["chunks"]:
        parts.append(_filled(_chunks(found["chunks"])))
    if found["wrong"]:
        parts.append(_filled(_seen(found["wrong"])))
    if about.meaning and _failed(found):
        parts += [_filled(text) for text in about.meaning]
    return "\n".join(parts)


def _asked(about: Implementation, found: Record) -> str:
    specs = ", ".join(f"`{spec}`" for spec in found.get("specs", ()))
    names = ", ".join(f"`{name}`" for name in about.files)
    lines = [f"* Adapter: `{about.adapter}`" + (f"; files of {about.source}: {names}." if about.files else ".")]
    lines.append(f"* Compressors: {specs}.")
    asked = [f"{i['name']} ({i['played']})" for i in found["invariants"] if not i["skipped"]]
    steps = sum(i["request_steps"] for i in found["invariants"])
    lines.append(f"* Asked, with histories: {', '.join(asked)}; {steps:,} steps of a request.")
    left = list(found.get("left_out", ()))
    if about.only:
        left.append("every other invariant")
    if left:
        lines.append(f"* Left out, as the adapter declares it: {'; '.join(left)}.")
    if close := found.get("declared", {}).get("close"):
        lines.append(f"* Rows may be {close:g} off, relative to 1 + their size.")
    return "\n".join(_filled(line, hanging=line.startswith("* ")).rstrip() for line in lines) + "\n"


def _widths(width: Record) -> str:
    what = width["spec"].split(" ")[0]
    if not width["fails"]:
        told = f"Verify steps of `{what}` with 1 to {width['tried']} drafts, all rejected, tried one by one: all pass."
        return _filled(told)
    first = width["fails"][0]
    passes = f"1 to {first - 1} drafts pass" if first > 1 else "none passes"
    told = (
        f"Verify steps of `{what}`, all drafts rejected, tried one by one: {passes}, {_ranges(width['fails'])} fail. "
        "The first that fails:"
    )
    return "\n".join((_filled(told), f"```json\n{_case(width['case'])}\n```\n", _filled(_sentence(width["detail"]))))


def _chunks(chunks: list[Record]) -> str:
    """What became of a prompt's chunks."""
    failed = {tuple(c["lengths"]): c["detail"] for c in chunks if c["detail"]}
    every = dict.fromkeys(tuple(c["lengths"]) for c in chunks)
    told = (f"{' + '.join(map(str, lengths))} ({failed.get(lengths, 'pass')})" for lengths in every)
    return f"A prompt in chunks as its engine makes them, every compressor: {', '.join(told)}."


def _seen(wrong: list[Record]) -> str:
    """What became of errors on purpose."""
    told = [f"{w['what']} ({'seen' if w['seen'] else 'NOT seen'} by {w['invariant']})" for w in wrong]
    return f"Wrong on purpose: {'; '.join(told)}."


def _tail(report: Record, versions: Record) -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    told = (
        f"to {kind}: {raw['wrong']:,} wrong as it is, {report['casts']['corrected'][kind]['wrong']} corrected"
        for kind, raw in report["casts"].get("as it is", {}).items()
    )
    return f"""## Run it again

```text
{COMMAND}
```

PEERS is a folder with one folder for each engine, as `examples/foreign/peers.py` says; each adapter there names the
files that it needs. The results are in `benchmarks/baselines/findings.json`, with the first digits of every file's
SHA-256. To play a history from this page, write it into a file:

```text
export KVCONDENSE_PEERS=PEERS PYTHONPATH=examples/foreign
kvcondense conformance --adapter atom_adapter:make16 --replay case.json
```

{_filled(f"Made with {made}. Casts of Triton's interpreter, 16,384 values each, {'; '.join(told)}.")}"""


def _failed(found: Record) -> list[Record]:
    return [i for i in found["invariants"] if i["detail"]]


def _result(found: Record) -> str:
    if found["error"]:
        return "not finished"
    failed = [i["name"].split(" ")[0] + " " + i["name"].split(" ", 1)[1] for i in _failed(found)]
    return f"**fails** {', '.join(failed)}" if failed else "pass"


def _count(count: int, what: str, names: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''} ({names})" if count else f"no {what}"


def _case(case: Record) -> str:
    """One operation a line."""
    ops = ",\n  ".join(json.dumps(op, sort_keys=True) for op in case["ops"])
    rest = json.dumps({key: value for key, value in case.items() if key != "ops"}, sort_keys=True)
    return f'{{"ops": [\n  {ops}\n ],\n {rest[1:]}'


def _ranges(values: list[int]) -> str:
    whole = values == list(range(values[0], values[-1] + 1))
    return f"{values[0]} to {values[-1]}" if whole and len(values) > 1 else ", ".join(map(str, values))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _anchor(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c in " -_.").replace(" ", "-").replace(".", "")


def _filled(text: str, hanging: bool = False) -> str:
    return (
        textwrap.fill(
            text, 118, subsequent_indent="  " if hanging else "", break_long_words=False, break_on_hyphens=False
        )
        + "\n"
    )
