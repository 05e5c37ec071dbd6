"""``--report FILE.html``: one self-contained page of tables and plots, readable on a phone, light and dark."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcondense import files
from kvcondense.bench import chart
from kvcondense.bench import report as timings
from kvcondense.cli.output import cells
from kvcondense.markup import policy
from kvcondense.markup import text as _text

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a7f37; --bad: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
th { background: var(--soft); } td.n { text-align: right; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff8a80; } }
figure { margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; } figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { fill: currentColor; } svg.tall { display: none; }
td.n { white-space: nowrap; }
@media (max-width: 40rem) { body { font-size: 14px; } th, td { padding: .25rem .35rem; }
  svg.tall { display: block; } svg.broad { display: none; } }
"""
_MARKS = {"PASS": "good", "passes": "good", "FAIL": "bad", "SURVIVED": "bad", "WRONGLY CAUGHT": "bad"}


@dataclass(frozen=True)
class Figure:
    """A picture: its markup, and the rules of style by their selectors that it needs."""

    markup: str
    rules: Mapping[str, str]


def write(path: Path, title: str, facts: Mapping[str, Any], parts: Sequence[str | Figure]) -> None:
    """A page of ``parts`` (tables and figures) under a title and what they were made with."""
    about = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in facts.items())
    rules = {at: rule for part in parts if isinstance(part, Figure) for at, rule in part.rules.items()}
    style = _STYLE + "".join(f"{at} {{ {rule} }}\n" for at, rule in sorted(rules.items()))
    body = "\n".join(
        [
            f"<h1>{_text(title)}</h1>",
            f'<div class="wide"><table>{about}</table></div>',
            *(part.markup if isinstance(part, Figure) else part for part in parts),
        ]
    )
    files.write(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n{policy(styles=[style])}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n",
    )


def heading(text: str, below: str = "") -> str:
    """A section's name and a sentence."""
    return f"<h2>{_text(text)}</h2>" + (f"<p>{_text(below)}</p>" if below else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers to the right; PASS and FAIL in colour; columns in which nothing stands are left out."""
    filled = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    columns, rows = [columns[i] for i in filled], [[row[i] for i in filled] for row in rows]
    head = "".join(f"<th>{_text(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def of_markdown(text: str) -> str:
    """A Markdown table as this page's."""
    lines = [cells(line) for line in text.strip().splitlines()]
    return table(lines[0], lines[2:])


def figure(draw: Callable[[Any, bool], Any], height: float = 4) -> Figure:
    """What ``draw(axes, tall)`` draws, as SVG inside the page, and once more in a shape for a phone."""

    def drawn(tall: bool) -> Any:
        made, axes = _pyplot().subplots(figsize=(4.6 if tall else 9, height), layout="constrained")
        draw(axes, tall)
        return made

    return _figure(drawn)


def of_timings(records: Sequence[timings.Record]) -> list[str | Figure]:
    """Tables and, where there are bars to draw, a chart with floors."""
    parts: list[str | Figure] = [heading(title) + of_markdown(text) for title, text in timings.tables(records).items()]
    if any(r.get("cache") == "warm" for r in records):
        picture = _figure(lambda tall: chart.chart(records, tall=tall))
        parts = [heading("At a glance", "Bars are medians; a line is the floor of its case."), picture, *parts]
    return parts


def histogram(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Elements by their distance from the reference, {output: {bucket: count}}, in bars side by side."""

    def draw(axes: Any, tall: bool) -> None:
        width = 0.8 / max(len(counts), 1)
        buckets = list(dict.fromkeys(b for found in counts.values() for b in found))
        for k, (name, found) in enumerate(counts.items()):
            at = [i + (k - (len(counts) - 1) / 2) * width for i, b in enumerate(buckets) if found.get(b)]
            axes.bar(at, [found[b] for b in buckets if found.get(b)], width, label=name)
        axes.set_xticks(range(len(buckets)), buckets, rotation=60 if tall else 0)
        axes.set(xlabel="ulp from the reference, in the output's type", ylabel="elements", yscale="log")
        axes.legend(fontsize=10)

    return figure(draw)


def tally(counts: Mapping[str, int], label: str) -> Figure:
    """Horizontal bars, the longest first."""

    def draw(axes: Any, tall: bool) -> None:  # noqa: ARG001 - bars to the right suit both shapes
        ordered = sorted(counts.items(), key=lambda item: item[1])
        axes.bar_label(axes.barh([k for k, _ in ordered], [v for _, v in ordered]), padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel(label)

    return figure(draw, height=1 + 0.3 * len(counts))


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    mark = _MARKS.get(text, "")
    if mark:
        return f'<td class="{mark}">{_text(text)}</td>'
    number = text.replace(".", "").replace("-", "").replace("%", "").replace("e", "").replace("+", "").isdigit()
    return f'<td class="n">{_text(text)}</td>' if number else f"<td>{_text(text)}</td>"


def _figure(draw: Callable[[bool], Any]) -> Figure:
    """Both shapes of a picture; the page's style shows one of them. Black is the colour of the page's text."""
    plt, parts, rules = _pyplot(), [], {}
    for shape in ("broad", "tall"):
        plt.rcParams["svg.hashsalt"] = shape  # names inside of one shape do not refer into the hidden one
        buffer, drawn = io.StringIO(), draw(shape == "tall")
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(drawn)
        svg, needed = _without_styles(buffer.getvalue())
        rules |= needed
        parts.append(f'<svg class="{shape}"' + svg[svg.index("<svg") + 4 :])
    return Figure(f"<figure>{''.join(parts)}</figure>", rules)


def _without_styles(svg: str) -> tuple[str, dict[str, str]]:
    """matplotlib's SVG with a class for each of its style attributes, which the page's policy forbids, and their rules.

    Its own style element is part of the page's. Only tags are looked at: matplotlib escapes < and > in text, so that a
    name in a picture keeps what looks like a style or a colour.
    """
    rules: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        rule = html.unescape(found[1])
        assert not set("<{}") & set(rule), "a declaration of matplotlib's"
        name = f"m{hashlib.sha256(rule.encode()).hexdigest()[:8]}"
        rules[f".{name}"] = rule
        return f' class="{name}"'

    def tag(found: re.Match[str]) -> str:
        return re.sub(r'\sstyle="([^"]*)"', named, found[0].replace("#000000", "currentColor"))

    svg = re.sub(r"<style\b[^<>]*>[^<]*</style>", "", svg)
    return re.sub(r"<\w[^<>]*>", tag, svg), rules


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["legend.frameon"] = False
    from matplotlib import pyplot as plt

    return plt
