"""The work of ``kvcondense bench --predict``: cases compiled for an architecture, and the model's times of them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from kvcondense.bench import records
from kvcondense.bench.fused import LAYERS
from kvcondense.bench.predict import table
from kvcondense.bench.predict.machines import MACHINES
from kvcondense.bench.predict.model import predict
from kvcondense.bench.predict.work import forms_of
from kvcondense.cli.output import Output
from kvcondense.cli.work.aot import check_compiler
from kvcondense.errors import RangeError


def run(output: Output, arch: str, case: list[str] | None, fused: bool, measured: Path | None) -> None:
    """Print, and write to --json, a record for each case that is asked for, in each form that the backend has."""
    cases = LAYERS if fused else table.CASES
    chosen = [c for c in cases.values() if not case or any(part in c.name for part in case)]
    if not chosen:
        raise RangeError("--case", f"part of one of: {'; '.join(cases)}", case)
    machine, timings = MACHINES[arch], []
    if measured is not None:
        machine, timings = table.measured(measured, "--measured", machine)
    check_compiler("--predict")
    output.say(f"{arch}, {machine.name}: predicted, not measured; triton {version('triton')}")
    output.say(f"constants: {machine.source}")
    output.say(
        f"copy {machine.copy_rate / 1e9:.0f} GB/s, last cache {machine.cache_rate / 1e9:.0f} GB/s, "
        f"bf16 {machine.product_rate / 1e12:.0f} TFLOP/s, {machine.processors} processors of "
        f"{machine.clock / 1e9:.2f} GHz, a launch {1e6 * machine.launch:.1f} us\n"
    )
    log = records.Log(output.json_file, {"predicted_for": arch, "machine": machine.as_dict()})
    for one in output.track(chosen, len(chosen), "compiling"):
        for form in forms_of(one, arch):
            log.add(table.record_of(predict(one, arch, machine, form), timings))
    found = log.records[1:]
    output.table(*table.rows(found))
    for record in found if case else ():
        output.say(f"\n{record['case']}: {record['form']}")
        for line in table.launch_lines(record):
            output.say(line)
    if measured is not None and not any("measured_us" in r for r in found):
        output.say(f"\n--measured {measured} has no timing of these cases in these forms")
