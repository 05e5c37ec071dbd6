"""What children of ``tools/on_gpu.py`` measure: the machine, its rates, the barrier, every form, hardware counters.

``python -m on_gpu.probes NAME --records FILE``: records are lines of FILE, each there as soon as it is made.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from on_gpu.timings import CASES, FEW_CASES, FEW_LAYERS, LAYERS

Record = dict[str, Any]
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_bytes.sum",
    "smsp__inst_executed.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
COUNTED = ("decode 64 on a boundary, ratio 128", "decode 4096 on a boundary, ratio 4", "prefill 1 x 8192, ratio 128")
COUNTED_LAYERS = ("HCA, prefill 8192", "CSA + indexer, decode 1 within a window")
_ROUNDS = 64
_TASKS_OF_A_PROCESS = 10
"""An illegal access spoils all that follows it in a process, so processes do not live long."""


def machine(stand_in: bool) -> Iterator[Record]:
    """What this is; a failure where there is no GPU."""
    import torch

    from kvcondense.bench import device, measure

    say = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", f"--query-gpu={say}", "--format=csv"]
        yield {"nvidia-smi": subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()}
    found: Record = {**measure.machine(), "kernel": platform.release(), "cpus": os.cpu_count()}
    if not device.available():
        yield found
        raise SystemExit("there is no GPU: torch.cuda.is_available() is False")
    found.update(device.machine())
    if not stand_in:
        of = torch.cuda.get_device_properties(0)
        found.update(processors=of.multi_processor_count, l2_bytes=of.L2_cache_size, memory_bytes=of.total_memory)
    yield found


def rates(stand_in: bool) -> Iterator[Record]:
    """What this machine's memory, cache and GEMM reach."""
    del stand_in
    from kvcondense.bench import device

    yield vars(device.rates())


def barrier(stand_in: bool) -> Iterator[Record]:
    """1, 2 and 3 programs per processor; then more than any processor holds, which the driver has to refuse."""
    import torch

    from kvcondense.bench import device
    from on_gpu.barrier import launcher

    home = device.home()
    processors = 1 if stand_in else torch.cuda.get_device_properties(0).multi_processor_count
    wrong = []
    for each in (1,) if stand_in else (1, 2, 3, 33):
        record: Record = {"programs": each * processors, "each": each}
        try:
            (once, late), (many, late_many) = (launcher(each * processors, n, home) for n in (1, 1 + _ROUNDS))
            for run in (once, many):
                run()
                device.elapsed(run)  # compiled, and counters used before
            seconds = [min(device.elapsed(run) for _ in range(10)) for run in (once, many)]
            us = 1e6 * (seconds[1] - seconds[0]) / (2 * _ROUNDS)
            missed = int(late) + int(late_many)
            record.update(late=missed, us_per_barrier=round(us, 3), us_of_a_launch=round(1e6 * seconds[0], 2))
            if missed or each == 33:
                wrong.append(f"{each} programs per processor: {missed} late" if missed else "33 were not refused")
        except RuntimeError as error:
            record["refused"] = str(error)
            if each < 3:
                wrong.append(f"{each} programs per processor: {error}")
        yield record
    if wrong:
        raise SystemExit("; ".join(wrong))


def forms(stand_in: bool) -> Iterator[Record]:
    """A row of every form, and of the cases that are timed later, compiled side by side, beside the reference."""
    from kvcondense.bench.forms import forms as all_forms

    names = [f.name for f in all_forms()]
    layers, cases = (FEW_LAYERS, FEW_CASES) if stand_in else (LAYERS, CASES)
    tasks = [("layer", n, stand_in) for n in layers] + [("case", n, stand_in) for n in cases]
    tasks += [("form", n, stand_in) for n in (names[::40] if stand_in else names)]
    wrong = 0
    for record in map(_check, tasks) if stand_in else _side_by_side(tasks):
        wrong += not record["right"]
        yield record
    if wrong:
        raise SystemExit(f"{wrong} of {len(tasks)} are wrong")


def _side_by_side(tasks: list[Any]) -> Iterator[Record]:
    jobs = max(1, min(14, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=_TASKS_OF_A_PROCESS) as pool:
        yield from pool.imap_unordered(_check, tasks, chunksize=1)


def _check(task: tuple[str, str, bool]) -> Record:
    """One form, case or layer beside the reference."""
    what, name, stand_in = task
    if stand_in:
        from on_gpu import stand_in as stand

        stand.apply()
    import torch

    from kvcondense.bench.cases import make_inputs

    torch.set_num_threads(1)
    try:
        return _CHECKS[what](name)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return {what: name, "right": False, "raised": f"{type(error).__name__}: {error}"[:2000]}
    finally:  # the device's memory is everybody's
        make_inputs.cache_clear()
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def _check_form(name: str) -> Record:
    from kvcondense.bench import device
    from kvcondense.bench.forms import check
    from kvcondense.bench.forms import forms as all_forms

    form = next(f for f in all_forms() if f.name == name)
    return check(replace(form, requests=1) if device.home() == "cpu" else form, device.home())


def _check_case(name: str) -> Record:
    from kvcondense.bench import device, run
    from kvcondense.bench.cases import DEVICE_CASES, make_inputs
    from kvcondense.bench.runners import BARE, Kvcondense

    inputs = make_inputs(DEVICE_CASES[name], device.home())
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    worst = max(run.distance(Kvcondense(inputs, "triton", way), inputs, expected) for way in ("", BARE))
    return {"case": name, "off_by_rms": worst, "right": worst <= run.CLOSE}


def _check_layer(name: str) -> Record:
    from kvcondense.bench import device, fused
    from kvcondense.bench.cases import make_inputs

    inputs = [make_inputs(case, device.home()) for case in fused.LAYERS[name].cases]
    expected = [fused.reference_rows(i) for i in inputs]
    ways = fused.ways(inputs)
    worst = {w.name: max(fused.off(r, e) for r, e in zip(w.rows(), expected, strict=True)) for w in ways}
    return {"layer": name, "off_by_rms": worst, "right": max(worst.values()) <= fused.CLOSE}


_CHECKS: dict[str, Callable[[str], Record]] = {"form": _check_form, "case": _check_case, "layer": _check_layer}


def counters(stand_in: bool) -> Iterator[Record]:
    """Nsight Compute's of one launch of each of five steps; clocks stay as they are."""
    words = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    words += ["--target-processes", "all", "--metrics", ",".join(METRICS)]
    words += [sys.executable, "-m", "on_gpu.probes", "counted", *["--stand-in"] * stand_in]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr[-4000:])
    found = list(of_csv(done.stdout))
    yield from found
    if done.returncode or not found:
        sys.stderr.write(done.stdout[-2000:])
        raise SystemExit(f"ncu ended with {done.returncode} and {len(found)} kernels")


def of_csv(text: str) -> Iterator[Record]:
    """Kernels of ncu's raw page, with the metrics that were asked for; the line below the names has units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3 or not lines[0].startswith('"ID"'):
        return
    units, *rows = csv.DictReader(io.StringIO("\n".join(lines)))
    for row in rows:
        values = {m: f"{row[m]} {units[m]}".strip() for m in METRICS if row.get(m)}
        yield {"kernel": row["Kernel Name"], **values}


def counted(stand_in: bool) -> Iterator[Record]:
    """The steps whose kernels ``counters`` looks at, each once, after it was warmed up."""
    del stand_in
    import torch

    from kvcondense.bench import fused
    from kvcondense.bench.cases import DEVICE_CASES, make_inputs
    from kvcondense.bench.runners import BARE, Kvcondense

    ways: list[Any] = [Kvcondense(make_inputs(DEVICE_CASES[n], "cuda"), "triton", BARE) for n in COUNTED]
    ways += [fused.ways([make_inputs(case, "cuda") for case in fused.LAYERS[n].cases])[0] for n in COUNTED_LAYERS]
    works = [partial(way.step, way.primed()) for way in ways]
    for work in works:
        work()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        work()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    yield {"steps": len(works)}


PROBES = {f.__name__: f for f in (machine, rates, barrier, forms, counters, counted)}


def main() -> None:
    """Run one probe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("probe", choices=PROBES)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    given = parser.parse_args()
    if given.stand_in:
        from on_gpu import stand_in

        stand_in.apply()
    from kvcondense.bench import records

    for record in PROBES[given.probe](given.stand_in):
        line = records.text(record)
        sys.stdout.write(line)
        if given.records is not None:
            with given.records.open("a", encoding="utf-8") as file:
                file.write(line)


if __name__ == "__main__":
    main()
