"""The demo's picture and its three sentences: what went in, what came out, how much smaller, how it was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from demo.compare import BF16_WORST, ENGINE, FP32_WORST, Found
from demo.model import CSA, HCA, TEXT, TOKENS

PLAIN = 512 * 2
"""Bytes of a token in an uncompressed cache: one bf16 row of 512 channels, as keys and values share it."""
_TOKENS, _RATIO = 24, 4
_INK, _BLUE, _ORANGE, _GREY = "#222222", "#2b6cb0", "#c05621", "#a0aec0"


def sentences(found: Found, ok: bool) -> list[str]:
    """What a newcomer wants to know."""
    plain, csa, hca = TOKENS * PLAIN, found.bytes(CSA), found.bytes(HCA)
    rows = [found.counts[layer, "main"] for layer in (CSA, HCA)]
    verdict = "and all of it held" if ok else "and NOT ALL OF IT HELD (see FAIL above)"
    return [
        f"In: {TOKENS} tokens of text, {plain / 1e6:.2f} MB of bf16 keys and values in each layer.",
        f"Out: {rows[0]} rows of CSA (one for 4 tokens) in {csa / 1e3:.0f} kB, {plain / csa:.0f} times smaller, and "
        f"{rows[1]} rows of HCA (one for 128) in {hca / 1e3:.1f} kB, {plain / hca:.0f} times smaller; in the formats "
        f"that engines keep ({ENGINE['main']}, {ENGINE['indexer']}).",
        "Checked: every row against transformers' own compressor in fp32 and bf16, and files made in different ways "
        f"byte for byte, {verdict}.",
    ]


def draw(found: Found, file: Path) -> None:
    """Four panels: tokens become rows, bytes, the rows themselves, and distances beside what is allowed."""
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "text.color": _INK})
    figure = plt.figure(figsize=(11.6, 9.4), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.1, 1.5, 1.5))
    top, middle, bottom = parts
    _windows(top.subplots())
    _bytes(found, middle.subplots())
    _rows(found, bottom)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _windows(axes: Any) -> None:
    """The text's first tokens, and the windows that become rows of CSA: 8 tokens each, 4 of them new."""
    axes.set(xlim=(-0.5, _TOKENS - 0.5), ylim=(-2.6, 1.2))
    axes.axis("off")
    axes.set_title(
        "1  Every 4 tokens (here: bytes) become one row of CSA, which reads the 4 before them, too (light)",
        loc="left",
    )
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    for i, letter in enumerate(text[:_TOKENS]):
        axes.text(
            i, 0.55, letter if letter != " " else "\u2423", ha="center", va="center", family="monospace", fontsize=15
        )
    for c in range(_TOKENS // _RATIO):
        first, last = max(0, (c - 1) * _RATIO), (c + 1) * _RATIO - 1
        y = -0.35 - 0.55 * (c % 2)
        axes.plot([first - 0.3, last + 0.3], [y, y], color=_BLUE, lw=5, alpha=0.35, solid_capstyle="round")
        axes.plot([last - 3.3, last + 0.3], [y, y], color=_BLUE, lw=5, solid_capstyle="round")
        axes.annotate(f"row {c}", (last - 1.5, -1.95), ha="center", va="center",
                      bbox={"boxstyle": "round", "fc": "#ebf4ff", "ec": _BLUE})  # fmt: skip
        axes.annotate("", (last - 1.5, -1.62), (last - 1.5, y - 0.14), arrowprops={"arrowstyle": "->", "color": _BLUE})


def _bytes(found: Found, axes: Any) -> None:
    """Bytes of a layer's cache, before and after."""
    plain = TOKENS * PLAIN
    bars = {
        f"no compression: {TOKENS} rows of bf16": plain,
        f"CSA: {found.counts[CSA, 'main']} rows, and keys of its indexer": found.bytes(CSA),
        f"HCA: {found.counts[HCA, 'main']} rows": found.bytes(HCA),
    }
    drawn = axes.barh(list(bars), [v / 1024 for v in bars.values()], color=(_GREY, _BLUE, _ORANGE), height=0.6)
    labels = [
        f"{v / 1024:,.0f} KiB" + ("" if v == plain else f"  ({plain / v:.0f} times smaller)") for v in bars.values()
    ]
    axes.bar_label(drawn, labels, padding=6)
    axes.invert_yaxis()
    axes.set(xlabel="KiB of cache in one layer", xlim=(0, 1.12 * plain / 1024))
    axes.set_title("2  What a layer keeps of the text", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _rows(found: Found, figure: Any) -> None:
    """The rows, and how far they are from transformers'."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(found.rows[:96].float(), aspect="auto", cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
    left.axvline(448, color=_INK, lw=1, ls="--")
    left.set(xlabel="channel (rotated by RoPE from 448, dashed)", ylabel="row, 4 tokens each")
    left.set_title("3  The first 96 rows of CSA, bf16", loc="left")
    figure.colorbar(image, ax=left, label="value")
    names = list(found.fp32)
    worst = [[float(e.max()) for e in errors.values()] for errors in (found.fp32, found.bf16)]
    for offset, values, limit, label, color in (
        (-0.2, worst[0], FP32_WORST, "fp32, absolute", _BLUE),
        (0.2, worst[1], BF16_WORST, "bf16, of a row's RMS", _ORANGE),
    ):
        places = [i + offset for i in range(len(names))]
        right.bar(places, values, width=0.36, color=color, label=label)
        right.hlines([limit] * len(names), [p - 0.2 for p in places], [p + 0.2 for p in places], colors=_INK, lw=2)
    right.plot([], [], color=_INK, lw=2, label="allowed")
    right.set(yscale="log", ylabel="largest distance", xticks=range(len(names)), xticklabels=names)
    right.set_title("4  Distance from transformers' rows", loc="left")
    right.margins(y=0.25)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
