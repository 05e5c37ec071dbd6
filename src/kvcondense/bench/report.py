"""What timings look like as lines and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from kvcondense.bench.fused import EACH_UNFUSED, GEMM, IN_ORDER, UNFUSED
from kvcondense.bench.records import Record
from kvcondense.bench.runners import GEMMS


def line(record: Record) -> str:
    """One timing of the case that was named before, with its ratio to the floor."""
    ratio = record["us"] / record["floor_us"]
    return f"  {record['runner']:<28} {record['cache']:<5} {record['us']:>11.1f} us {ratio:>8.2f} x floor"


def tables(records: Sequence[Record]) -> dict[str, str]:
    """The Markdown tables that these records make, by their titles."""
    records = [{k: _in_cell(v) if isinstance(v, str) else v for k, v in r.items()} for r in records]
    if any("saved_bytes" in r for r in records):
        return {"Forward and backward": training(records)}
    if any("file_bytes" in r for r in records):
        return {"A request in a file": in_a_file(records)}
    if any("swapped_bytes" in r for r in records):
        return {"States in host memory": swapped(records)}
    if any("moved_bytes" in r for r in records):
        return {"A sequence on several processes": context_parallel(records)}
    if any(r.get("runner") == GEMM for r in records):
        return {"Steps from hidden states": fused(records)}
    found = {}
    if any("case" in r for r in records):
        found["Steps, warm, medians"] = markdown(records)
    if any("context" in r for r in records):
        found["A token, by context"] = contexts(records)
    if any("streamed" in r for r in records):
        found["A long prefill, by tokens"] = streams(records)
    if any("step" in r and "us" in r for r in records):
        found["A whole decode step"] = decode_step(records)
    if any(r.get("runner") in GEMMS for r in records):
        found["Ways to project"] = markdown(records, gemms=True).rstrip("\n")
    return found


def streams(records: Sequence[Record]) -> str:
    """Nanoseconds for each token of a sequence that comes in chunks, and by how much the process grew."""
    timed = [r for r in records if "streamed" in r]
    lines = ["| | tokens | ns a token | MB more |", "|---|---|---|---|"]
    lines += [
        f"| ratio {r['ratio']} | {r['streamed']} | {1e3 * r['us']:.1f} | {r['grown_bytes'] / 1e6:.1f} |" for r in timed
    ]
    return "\n".join(lines)


def in_a_file(records: Sequence[Record]) -> str:
    """Seconds and bytes a second of each way."""
    lines = ["| | way | MB | seconds | GB/s |", "|---|---|---|---|---|"]
    for r in (r for r in records if "file_bytes" in r):
        rate = r["file_bytes"] / r["us"] / 1e3
        lines.append(
            f"| {r['case']} | {r['runner']} | {r['file_bytes'] / 1e6:.1f} | {r['us'] / 1e6:.3f} | {rate:.2f} |"
        )
    return "\n".join(lines)


def swapped(records: Sequence[Record]) -> str:
    """Milliseconds and bytes a second of each way, and its time over that of a plain copy."""
    lines = ["| | way | MB | ms | GB/s | x plain copy |", "|---|---|---|---|---|---|"]
    for r in (r for r in records if "swapped_bytes" in r):
        cells = (r["case"], r["runner"], f"{r['swapped_bytes'] / 1e6:.1f}", f"{r['us'] / 1e3:.2f}")
        lines.append(f"| {' | '.join(cells)} | {r['swapped_bytes'] / r['us'] / 1e3:.2f} | {r['of_plain']:.2f} |")
    return "\n".join(lines)


def decode_step(records: Sequence[Record]) -> str:
    """The parts of a model's decode step by implementations."""
    timed = [r for r in records if "step" in r and "us" in r]
    runners = list(dict.fromkeys(r["runner"] for r in timed))
    lines = [f"| microseconds, {timed[0]['step']} | {' | '.join(runners)} |", "|---|" + "---|" * len(runners)]
    for part in dict.fromkeys(r["part"] for r in timed):
        us = {r["runner"]: _number(r["us"]) for r in timed if r["part"] == part}
        lines.append(f"| {part} | " + " | ".join(us.get(name, "-") for name in runners) + " |")
    return "\n".join(lines)


def context_parallel(records: Sequence[Record]) -> str:
    """Bytes that ranks move beside those of gathering, and milliseconds beside one rank's."""
    timed = [r for r in records if "moved_bytes" in r]
    lines = ["| sequence | bytes moved | all-gather | ms | one rank, ms |", "|---|---|---|---|---|"]
    for case in dict.fromkeys(r["case"] for r in timed):
        of, one = (
            next((r for r in timed if r["case"] == case and (r["runner"] == "one rank") == b), None)
            for b in (False, True)
        )
        if of is None:
            continue
        ms = ("-" if r is None else f"{r['us'] / 1e3:.1f}" for r in (of, one))
        cells = (str(of["moved_bytes"]), str(of["all_gather_bytes"]), *ms)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(records: Sequence[Record], *, gemms: bool = False) -> str:
    """Cases by implementations, warm, in microseconds; with ``gemms``, the ways to project."""
    timed = [r for r in records if r.get("cache") == "warm" and (r["runner"] in GEMMS or not gemms)]
    runners = [name for name in dict.fromkeys(r["runner"] for r in timed) if gemms or name not in GEMMS[1:]]
    lines = ["| microseconds | floor | " + " | ".join(runners) + " |", "|---|" + "---|" * (len(runners) + 1)]
    for case in dict.fromkeys(r["case"] for r in timed):
        of_case = {r["runner"]: r for r in timed if r["case"] == case}
        floor = next(iter(of_case.values()))["floor_us"]
        cells = [_number(of_case[name]["us"]) if name in of_case else "-" for name in runners]
        lines.append(f"| {case} | {_number(floor)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fused(records: Sequence[Record]) -> str:
    """Layers by ways, warm, in microseconds, and how the fused way compares."""
    timed = [r for r in records if r.get("cache") == "warm"]
    ordered = (IN_ORDER,) if any(r["runner"].startswith(IN_ORDER) for r in timed) else ()
    each = (EACH_UNFUSED,) if any(r["runner"] == EACH_UNFUSED for r in timed) else ()
    head = ("floor", GEMM, UNFUSED, *each, "batch-invariant", *ordered, "fused")
    ratios = {
        "fused / floor": ("fused", "floor"),
        f"fused / {GEMM}": ("fused", GEMM),
        "unfused / fused": (UNFUSED, "fused"),
    }
    names = (*head, *ratios)
    lines = ["| microseconds | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case in dict.fromkeys(r["case"] for r in timed):
        us = {r["runner"].partition(",")[0]: r["us"] for r in timed if r["case"] == case}
        us["floor"] = next(r["floor_us"] for r in timed if r["case"] == case)
        cells = [_number(us[name]) if name in us else "-" for name in head]
        for above, below in ratios.values():
            cells.append(f"{us[above] / us[below]:.2f}" if {above, below} <= us.keys() else "-")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training(records: Sequence[Record]) -> str:
    """Milliseconds of a forward and a backward pass, and what each way keeps in between."""
    timed = [r for r in records if "saved_bytes" in r]
    runners = list(dict.fromkeys(r["runner"] for r in timed))
    names = [*(f"{n}, ms" for n in runners), "ratio", *(f"{n}, MiB kept" for n in runners)]
    lines = ["| forward and backward | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case in dict.fromkeys(r["case"] for r in timed):
        of = {r["runner"]: r for r in timed if r["case"] == case}
        us = [of[n]["us"] if n in of else None for n in runners]
        kept = [f"{of[n]['saved_bytes'] / 2**20:.1f}" if n in of else "-" for n in runners]
        ratio = f"{us[-1] / us[0]:.2f}" if us[0] and us[-1] else "-"
        cells = [*("-" if u is None else f"{u / 1e3:.1f}" for u in us), ratio, *kept]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contexts(records: Sequence[Record]) -> str:
    """Microseconds per token by context."""
    of = [r for r in records if "context" in r]
    runners, lengths = (list(dict.fromkeys(r[key] for r in of)) for key in ("runner", "context"))
    lines = ["| microseconds per token, ratio 4 | " + " | ".join(runners) + " |", "|---|" + "---|" * len(runners)]
    for length in lengths:
        us = {r["runner"]: _number(r["us"]) for r in of if r["context"] == length}
        cells = [us.get(name, "-") for name in runners]
        lines.append(f"| context {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _in_cell(name: str) -> str:
    """A name of a user's file as one cell of one line."""
    return " ".join(name.replace("|", "\\|").split())


def _number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
