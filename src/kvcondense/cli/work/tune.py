"""The work of ``kvcondense tune``: tilings timed on this GPU, and the table that comes of them."""

from __future__ import annotations

import os
from pathlib import Path

from kvcondense import files
from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.runtime import installed
from kvcondense.cli.output import Output
from kvcondense.errors import UnsupportedError

_WHAT = "kvcondense tune"


def run(
    output: Output,
    *,
    kind: list[str] | None,
    out: Path | None,
    dry_run: bool,
    budget: float | None,
    jobs: int | None,
    resume: bool,
) -> bool:
    """Whether there is a part of the table to write."""
    table = out or tuning.TABLE
    reason = None if dry_run else files.why_not_written(table)
    if reason is not None:
        raise UnsupportedError("--out", "a table that can be written", f"{table} ({reason})")
    from kvcondense.bench import device as gpu
    from kvcondense.bench import measure

    if not installed() or not gpu.available():
        raise UnsupportedError("tune", "triton and a GPU", "none found")
    from kvcondense.bench import records
    from kvcondense.bench import tune as tuner

    facts = {**measure.machine(), **gpu.machine()}
    kept = records.resumed(output.json_file, facts, _WHAT, tuner.check_record)[1] if resume else []
    casts = tuner.exact_casts(gpu.home())
    output.say(
        f"the chip's casts that give what integer arithmetic does, for every float: {', '.join(casts) or 'none'}"
    )
    log = records.Log(output.json_file, {"machine": facts, "hardware_casts": casts}, kept, keep_old=not resume)
    limits = tuner.Limits(budget or float("inf"), jobs or os.cpu_count() or 1)
    tuner.tune(log, casts, kind or list(tuner.KINDS), output.say, limits)
    arch, part = tuner.part_of(log, casts, facts)
    if part is None:
        output.say("no compressor has timings of all its classes: the table stays as it is")
        return False
    if not dry_run:
        files.write(table, tuning.dump({**tuning.table(), arch: part}))
        output.say(f"written to {table}")
    log.add({"architecture": arch, "table": part})
    return True
