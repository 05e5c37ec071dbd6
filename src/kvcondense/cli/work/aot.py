"""The work of ``kvcondense aot``: kernels compiled in processes of their own, and what each takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from kvcondense.backends.triton import aot as compiler
from kvcondense.backends.triton.launches import target as architecture
from kvcondense.backends.triton.variants import few as few_of
from kvcondense.backends.triton.variants import variants
from kvcondense.cli.output import Output
from kvcondense.errors import RangeError, UnsupportedError


def run(
    output: Output,
    *,
    arch: list[str] | None,
    variant: list[str] | None,
    few: bool,
    jobs: int | None,
    list_variants: bool,
) -> bool | None:
    """Whether all compile and none spills."""
    names = [v.name for v in variants()]
    wanted = [part for part in variant or () if part in names]  # a whole name is not a part of others
    wanted += [name for name in names if any(part in name for part in variant or () if part not in names)]
    targets = tuple(dict.fromkeys(arch or compiler.ARCHITECTURES))
    asked = {
        target: [v for v in (few_of(target) if few else variants()) if not variant or v.name in wanted]
        for target in targets
    }
    chosen = [v for v in variants() if any(v in part for part in asked.values())]
    if not chosen:
        raise RangeError("--variant", "part of a name that --list prints", variant)
    if list_variants:
        for v in chosen:
            output.say(v.name)
        output.finish({"variants": [v.name for v in chosen]})
        return None
    check_compiler("aot")
    for target in targets:
        architecture(target)  # a wrong name is an error before any work
    total = sum(map(len, asked.values()))
    output.say(f"triton {version('triton')}: {total} variants, {len(targets)} architectures")
    results: list[compiler.Compiled] = []
    with workers(jobs, targets) as work:
        for target in targets:
            found, count = [], len(asked[target])
            for number, kernels in enumerate(work(compiler.compile_variant, asked[target], [target] * count), 1):
                found += kernels
                for one in kernels:
                    output.say(f"[{number}/{count}] {_line(one)}")
            results += found
            output.say(_summary(target, found))
    bad = [r for r in results if r.error or r.spills]
    output.finish(
        {
            "triton": version("triton"),
            "architectures": list(targets),
            "variants": [v.name for v in chosen],
            "failed": sum(r.error is not None for r in results),
            "spilling": sum(bool(r.spills) for r in results),
            "kernels": [r.as_dict() for r in results],
        }
    )
    return not bad


def check_compiler(command: str) -> None:
    """Raise unless Triton can compile here."""
    if find_spec("triton") is None:
        raise UnsupportedError(command, "triton (pip install 'kvcondense[triton]')", "not installed")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UnsupportedError("TRITON_INTERPRET", "unset: the interpreter does not compile", "1")


@contextlib.contextmanager
def workers(jobs: int | None, targets: Sequence[str]) -> Iterator[Callable[..., Iterable[list[compiler.Compiled]]]]:
    """``map`` over this many processes. One job needs none, for targets at which the compiler is known not to abort."""
    if jobs == 1 and set(targets) <= set(compiler.ARCHITECTURES):
        yield map
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches every process of the terminal: those that compile end at once, and in silence.
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as executor:
        try:
            yield executor.map
        except BrokenProcessPool:
            got = f"{', '.join(targets)} (its compiler died)"
            raise UnsupportedError("arch", "architectures that the installed Triton compiles for", got) from None
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _line(r: compiler.Compiled) -> str:
    if r.error is not None:
        return f"{r.arch:<7} {r.variant:<52} {r.kernel:<19} FAILED {r.error}"
    numbers = f"{_number(r.registers):>4} registers {_number(r.spills):>3} spilled {_number(r.shared):>6} B shared"
    numbers += f" {sum(r.instructions.values()):>5} instructions"
    matrix = f", {r.matrix} matrix" if r.matrix else ""
    unit = "entries" if r.kernel == "plan_kernel" else "channels"
    return f"{r.arch:<7} {r.variant:<52} {r.kernel:<19} {numbers}  {r.num_warps} warps x {r.block} {unit}{matrix}"


def _summary(arch: str, results: Iterable[compiler.Compiled]) -> str:
    done = [r for r in results if r.error is None]
    failed = sum(r.error is not None for r in results)
    most: dict[str, Any] = {
        name: max((getattr(r, name) or 0 for r in done), default=0) for name in ("registers", "spills", "shared")
    }
    return (
        f"{arch:<7} {len(done)} compiled, {failed} failed; at most {most['registers']} registers, "
        f"{most['spills']} spilled, {most['shared']} B shared; {sum(r.seconds for r in done):.0f} s"
    )


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)
