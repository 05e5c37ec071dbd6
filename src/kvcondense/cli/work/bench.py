"""The work of ``kvcondense bench``: cases timed, one after the other, each in the file as soon as it is made."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvcondense import files
from kvcondense.backends import get_backend
from kvcondense.bench import chart, measure, peer_files, records, report
from kvcondense.bench import device as gpu
from kvcondense.bench.bundle import CASES as BUNDLES
from kvcondense.bench.bundle import run_case as run_bundle
from kvcondense.bench.cases import CASES, DEVICE_CASES
from kvcondense.bench.context_parallel import CASES as SPLITS
from kvcondense.bench.context_parallel import run_split
from kvcondense.bench.decode_step import DECODE_STEP, decode_step
from kvcondense.bench.fused import LAYERS, run_layer
from kvcondense.bench.run import CONTEXTS, STREAMS, context_series, run_case, stream_series
from kvcondense.bench.swap import CASES as SWAPS
from kvcondense.bench.swap import run_case as run_swap
from kvcondense.bench.training import CASES as TRAINING_CASES
from kvcondense.bench.training import run_case as run_training
from kvcondense.cli.output import Output
from kvcondense.cli.work import page
from kvcondense.errors import RangeError, UnsupportedError
from kvcondense.files.schema import typed

_WHAT = "kvcondense bench"
_SERIES = {CONTEXTS: context_series, STREAMS: stream_series, DECODE_STEP: decode_step}
"""What is timed on a CPU beside the cases."""
_RATES = {
    "memory": ("memory", 1e9, "GB/s"),
    "cache": ("cache", 1e9, "GB/s"),
    "gemm": ("bf16 GEMM", 1e9, "GFLOP/s"),
    "cached": ("stays in caches", 1e6, "MB"),
}


def run(
    output: Output,
    *,
    backend: str,
    case: list[str] | None,
    fused: bool,
    context_parallel: bool,
    peer_file: list[str] | None,
    training: bool,
    bundle: bool,
    swap: bool,
    list_cases: bool,
    from_file: Path | None,
    predict: str | None,
    measured: Path | None,
    plot: Path | None,
    report_file: Path | None,
    resume: bool,
) -> bool | None:
    """Whether the backend's rows are right and no case raised."""
    if predict is not None:
        from kvcondense.cli.work import prediction  # kernels and all: no other bench needs them

        prediction.run(output, predict, case, fused, measured)
        return None
    on_gpu = backend == "triton"
    forms: tuple[tuple[bool, dict[str, Any], Any], ...] = (
        (training, TRAINING_CASES, run_training),
        (context_parallel, SPLITS, run_split),
        (bundle, BUNDLES, run_bundle),
        (swap, SWAPS, run_swap),
    )
    form = next((form for form in forms if form[0]), None)
    if fused + sum(given for given, *_ in forms) > 1:
        raise UnsupportedError("--fused", "one of --fused, --training, --context-parallel, --bundle, --swap", "more")
    if fused and not on_gpu:
        raise UnsupportedError("--fused", "--backend triton", backend)
    for option, given in (("--context-parallel", context_parallel), ("--bundle", bundle), ("--swap", swap)):
        if given and on_gpu:
            raise UnsupportedError(option, "a backend of the CPU", backend)
    cases: dict[str, Any] = (LAYERS if fused else DEVICE_CASES) if on_gpu else CASES
    if form:
        cases = form[1]
    if list_cases:
        rows = [(c.name, c.bytes, c.flops) for c in cases.values()]
        more = [(name, "", "") for name in _SERIES] if cases is CASES else []
        output.table(("case", "bytes", "flops"), [*rows, *more])
        output.finish({"cases": [{"case": c.name, "bytes": c.bytes, "flops": c.flops} for c in cases.values()]})
        return None
    chosen = [c for c in cases.values() if not case or any(part in c.name for part in case)]
    stores, kinds = (getattr(get_backend(backend), name, None) for name in ("stores", "kit"))
    if stores is not None and cases is CASES:  # one that writes some formats only, token by token: few come before
        chosen = [c for c in chosen if kinds is None or c.kind in kinds]
        chosen = [replace(c, format=stores[0], start=c.start % (2 * c.spec.window)) for c in chosen]
    series = [name for name in _SERIES if cases is CASES and (not case or any(part in name for part in case))]
    if not chosen and not series:
        raise RangeError("--case", f"part of one of: {'; '.join(cases)}", case)
    if from_file is not None:
        if resume:
            raise UnsupportedError("--resume", "timings to be made", "--from")
        found = records.read(from_file, "--from", _WHAT)
        if any("complete" in r for r in found):
            found = [found[0], *records.finished(found)]
        if not report.tables(found):
            raise UnsupportedError("--from", f"timings of {_WHAT}", f"{from_file}, which has none")
        records.Log(output.json_file, found[0], found[1:])
    else:
        if on_gpu and not gpu.available():
            raise UnsupportedError("--backend", "a GPU for triton (nobody times its interpreter)", "none found")
        if peer_file and not on_gpu:
            raise UnsupportedError("--peer-file", "--backend triton", backend)
        extra = [peer_files.load(text) for text in peer_file or ()]
        one_case = run_layer if fused else partial(run_case, backend=backend, extra=extra)
        if form:
            one_case = form[2]
        log, rates = _start(output, on_gpu, resume)
        _measure(output, log, chosen, partial(one_case, rates=rates, say=output.say, device=_home(on_gpu)))
        for name in series:
            if name not in log.complete:
                for record in _SERIES[name](backend, output.say):
                    log.add(record)
                log.finish(name)
        found = log.records
    for title, table in report.tables(found).items():
        output.say(f"\n{title}")
        output.markdown(table)
    if report_file is not None:
        named = {_RATES.get(k, (k, 1e9, "G/s")): v for k, v in (found[0].get("rates") or {}).items()}
        about = {**found[0]["machine"], **{name: f"{v / each:.3g} {unit}" for (name, each, unit), v in named.items()}}
        page.write(report_file, _WHAT, about, page.of_timings(found))
        output.say(f"written to {report_file}")
    if plot is not None:
        with files.replacing(plot) as made:
            chart.plot(found, made)
        output.say(f"drawn to {plot}")
    wrong = any("wrong" in r and r["runner"].startswith((backend, "fused", "kvcondense")) for r in found)
    return not (wrong or any("failed" in r for r in found))


def _home(on_gpu: bool) -> str:
    return gpu.home() if on_gpu else "cpu"


def _start(output: Output, on_gpu: bool, resume: bool) -> tuple[records.Log, measure.Rates]:
    """The records to add to, and this machine's rates: measured, or those of the file that is gone on with."""
    machine = {**measure.machine(), **(gpu.machine() if on_gpu else {})}
    head, kept = records.resumed(output.json_file, machine, _WHAT) if resume else (None, [])
    measure.keep_memory()
    if head is None:
        output.say("measuring this machine's rates ...")
        head = {"machine": machine, "rates": vars(gpu.rates() if on_gpu else measure.Rates.measure())}
    rates = typed(head.get("rates"), measure.Rates, "rates")
    output.say(f"{machine}")
    output.say(
        f"memory {rates.memory / 1e9:.0f} GB/s, cache {rates.cache / 1e9:.0f} GB/s, "
        f"bf16 GEMM {rates.gemm / 1e9:.0f} GFLOP/s"
    )
    return records.Log(output.json_file, head, kept, keep_old=not resume), rates


def _measure(output: Output, log: records.Log, chosen: list[Any], one_case: Any) -> None:
    for number, one in enumerate(chosen, 1):
        if one.name in log.complete:
            output.say(f"[{number}/{len(chosen)}] {one.name}: in the file already")
            continue
        output.say(f"[{number}/{len(chosen)}] {one.name}: comparing rows, then timing ...")
        try:
            for record in one_case(one):
                log.add(record)
                if "floor_us" in record:
                    output.say(report.line(record))
        except Exception as error:  # whatever a compiler or a driver raises: the other cases have their own chance
            log.add({"case": one.name, "failed": f"{type(error).__name__}: {error}"})
            output.say(f"{one.name}: {type(error).__name__}: {error}")
        else:
            log.finish(one.name)
