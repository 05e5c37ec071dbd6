"""Timings as a picture: a bar for each implementation, case by case, beside the floor; time per token by context."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcondense.bench.records import Record
from kvcondense.errors import UnsupportedError

_BAR, _GAP = 0.27, 2.1
"""Inches of a bar, and bars' room between cases."""
_MOST_BARS = 1000
"""Of a picture; matplotlib makes none of more than 2^16 pixels."""
_COLOURS = (
    "#2b6cb0",
    "#63b3ed",
    "#2c7a7b",
    "#c05621",
    "#805ad5",
    "#b83280",
    "#718096",
    "#a0aec0",
    "#975a16",
    "#4a5568",
)


def plot(records: Sequence[Record], path: Path) -> None:
    """``chart`` to a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = chart(records)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def chart(records: Sequence[Record], *, tall: bool = False) -> Any:
    """Bars of warm medians, logarithmic, a group for each case; below, time per token if it was measured.

    tall: for a narrow page.
    """
    from matplotlib import pyplot as plt

    # What stands between two dollars would be set as a formula, or be an error.
    records = [{k: v.replace("$", r"\$") if isinstance(v, str) else v for k, v in r.items()} for r in records]
    timed = [r for r in records if r.get("cache") == "warm"]
    contexts = [r for r in records if "context" in r]
    groups = [(case, [r for r in timed if r["case"] == case]) for case in dict.fromkeys(r["case"] for r in timed)]
    if not 0 < max(len(timed), len(contexts)) <= _MOST_BARS:
        got = f"{len(timed)} and {len(contexts)}"
        raise UnsupportedError("timings", f"warm ones or such by context to draw, at most {_MOST_BARS}", got)
    bars = sum(len(group) for _, group in groups) + _GAP * len(groups)
    heights = [h for h, wanted in (((1.25 if tall else 1) * (0.8 + _BAR * bars), groups), (3.6, contexts)) if wanted]
    with plt.rc_context({"font.size": 10, "text.usetex": False}):
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(4.6 if tall else 9, sum(heights)), squeeze=False, layout="constrained",
            height_ratios=heights,
        )  # fmt: skip
        panels = [axis[0] for axis in axes]
        if groups:
            _cases(panels[0], groups, tall)
        if contexts:
            _contexts(panels[-1], contexts, tall)
    return figure


def amount(us: float) -> str:
    """Microseconds in a unit that suits them."""
    if us >= 1e6:
        return f"{us / 1e6:.3g} s"
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} \u00b5s"


def _cases(axes: Any, groups: Sequence[tuple[str, Sequence[Record]]], tall: bool) -> None:
    """Bars to the right, named at their left; the floor of a case as a line through its bars."""
    runners = list(dict.fromkeys(r["runner"] for _, group in groups for r in group))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(runners)}
    least = min(min(r["us"], r["floor_us"]) for _, group in groups for r in group) / 2
    most = max(r["us"] for _, group in groups for r in group)
    y, ticks, names = 0.0, [], []
    for number, (case, group) in enumerate(groups):
        axes.annotate(
            _filled(case, 45 if tall else 100, 1),
            (0.01, y + 0.1),
            xycoords=("figure fraction", "data"),
            weight="bold",
            va="center",
        )
        at = [y + 1 + i for i in range(len(group))]
        drawn = axes.barh(at, [r["us"] for r in group], 0.8, left=0, color=[colours[r["runner"]] for r in group])
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # read over the floor's line
        axes.bar_label(drawn, [amount(r["us"]) for r in group], padding=3, bbox=ground, zorder=3)
        floor = group[0]["floor_us"]
        axes.vlines(floor, at[0] - 0.5, at[-1] + 0.5, color="black", lw=1.6, label=None if number else "floor")
        ticks += at
        names += [_filled(r["runner"], 16 if tall else 40, 2) for r in group]
        y = at[-1] + _GAP - 1
    axes.set_yticks(ticks, names)
    axes.set(xscale="log", xlabel="microseconds, warm, the median", xlim=(least, most * (300 if tall else 6)))
    axes.set_ylim(y, -1.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, borderaxespad=0)


def _filled(name: str, columns: int, lines: int) -> str:
    """A name in at most so many lines: one of a user's file may be of any length, and leave no room for bars."""
    return textwrap.fill(name, columns, max_lines=lines, placeholder=" ...")


def _contexts(axes: Any, records: Sequence[Record], tall: bool) -> None:
    """A line for each implementation."""
    lengths = list(dict.fromkeys(r["context"] for r in records))
    for name in dict.fromkeys(r["runner"] for r in records):
        us = {r["context"]: r["us"] for r in records if r["runner"] == name}
        axes.plot(list(us), list(us.values()), marker="o", label=_filled(name, 18 if tall else 40, 2))
        axes.annotate(amount(us[max(us)]), (max(us), us[max(us)]), (6, 0), textcoords="offset points", va="center")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="microseconds a token" if tall else "microseconds per token, ratio 4",
    )
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.minorticks_off()
    axes.margins(x=0.4 if tall else 0.14, y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if tall:
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2, frameon=False, columnspacing=1)
    else:
        axes.legend(loc="upper left", frameon=False)
