"""Predictions as records and as tables, beside timings of the same cases where a file has some."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcondense.bench import records
from kvcondense.bench.cases import DEVICE_CASES, Case
from kvcondense.bench.fused import EACH_UNFUSED, LAYERS, UNFUSED, Layer
from kvcondense.bench.predict.machines import Machine
from kvcondense.bench.predict.model import Answer
from kvcondense.bench.predict.work import LIBRARY, ONE_LAUNCH, OWN, PRODUCT, STEP, TILES
from kvcondense.bench.runners import EmptyLaunch
from kvcondense.errors import UnsupportedError

CASES: Mapping[str, Case | Layer] = {**DEVICE_CASES, **LAYERS}
"""The GPU's cases of the bench, those of ``--fused`` among them."""
_RUNNERS = {
    STEP: ("triton, bare",),
    ONE_LAUNCH: ("fused, one launch",),
    TILES: ("fused, tiles",),
    LIBRARY: (UNFUSED, "triton, bare"),
    OWN: ("batch-invariant",),
}
"""By form, who in the bench runs it without the host's time."""
_NAME = 44
"""Columns of a case's name, so that a row has at most 100; what is longer goes on below."""


def record_of(answer: Answer, timings: Iterable[records.Record] = ()) -> records.Record:
    """A case's record: every number of the model and, if a timing is there, measured_us and measured / predicted."""
    found = {
        "case": answer.case, "form": answer.form, "predicted_us": round(answer.us, 2),
        "floor_us": float(f"{answer.floor_us:.4g}"), "bound": answer.bound, "bytes": answer.bytes,
        "flops": answer.flops, "kernels": [kernel.as_dict() for kernel in answer.kernels],
    }  # fmt: skip
    timing = _timing(answer, timings)
    if timing is not None:
        found |= {key: timing[key] for key in ("runner", "cache")}
        found |= {"measured_us": timing["us"], "ratio": round(timing["us"] / answer.us, 3)}
    return found


def _timing(answer: Answer, timings: Iterable[records.Record]) -> records.Record | None:
    """Of the case, of who does it in this form: with cold caches if that was timed, since the model reads memory."""
    several = answer.form == LIBRARY and sum(kernel.kernel == PRODUCT for kernel in answer.kernels) > 1
    order = (EACH_UNFUSED,) if several else _RUNNERS[answer.form]
    mine = [r for r in timings if r.get("case") == answer.case and r.get("runner") in order]
    mine = [r for r in mine if "us" in r and r.get("cache") in ("cold", "warm")]
    return min(mine, key=lambda r: (r["cache"] != "cold", order.index(r["runner"])), default=None)


def measured(path: Path, argument: str, machine: Machine) -> tuple[Machine, list[records.Record]]:
    """Timings of ``kvcondense bench --backend triton --json``, and the machine with what was measured with them.

    That is the rates of a copy and of a product, and an empty launch.

    Raises UnsupportedError for any other file, and for one made on a CPU.
    """
    head, *rest = records.read(path, argument, "kvcondense bench --backend triton")
    device = head["machine"].get("device")
    if device is None:
        raise UnsupportedError(argument, "timings of a GPU", f"{path}, whose machine has no device")
    rates: dict[str, Any] = head.get("rates") or {}
    empty = [r["us"] / 1e6 for r in rest if (r.get("runner"), r.get("cache")) == (EmptyLaunch.name, "warm")]
    return replace(
        machine,
        launch=statistics.median(empty) if empty else machine.launch,
        memory=rates.get("memory", machine.memory), copy_part=1.0 if "memory" in rates else machine.copy_part,
        product=rates.get("gemm", machine.product), product_part=1.0 if "gemm" in rates else machine.product_part,
    ), rest  # fmt: skip


def rows(found: Sequence[records.Record]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table: a case, microseconds, floor, and what decides."""
    timed = any("measured_us" in r for r in found)
    head = ("case", "us", "floor", "bound", "form", *(("measured", "ratio") if timed else ()))
    table = []
    for r in found:
        name, *below = textwrap.wrap(r["case"], _NAME, subsequent_indent="  ")
        row = (name, _number(r["predicted_us"]), _number(r["floor_us"]), r["bound"], r["form"])
        more = (_number(r["measured_us"]), f"{r['ratio']:.2f}") if "measured_us" in r else ("-", "-")
        table.append((*row, *(more if timed else ())))
        table += [(part, *("",) * (len(head) - 1)) for part in below]
    return head, table


def launch_lines(record: records.Record) -> Iterator[str]:
    """A case's launches, a line each: how many programs, how many at once on a processor, and the longest bounds."""
    for k in record["kernels"]:
        longest = sorted(k["bounds"].items(), key=lambda item: -item[1])[:2]
        parts = [f"{name} {_number(us)}" for name, us in longest if us >= 0.05]
        if k["warps"]:
            size = f"{k['programs']} programs, {k['resident']} at once, {k['registers']} registers"
            parts = [size, f"chain {_number(k['chain_us'])}", *parts]
        yield f"  {k['kernel']:<10} {_number(k['us']):>6} us: {', '.join(parts)}"


def _number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
