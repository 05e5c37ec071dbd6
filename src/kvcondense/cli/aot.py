"""``kvcondense aot``: compile every Triton kernel for architectures that need not be here; what each takes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from kvcondense.backends.triton import aot as compiler
from kvcondense.backends.triton.launches import target as architecture
from kvcondense.backends.triton.variants import variants
from kvcondense.cli.output import JsonFile, Output
from kvcondense.errors import RangeError, UnsupportedError

EXAMPLE = "Example: kvcondense aot --arch sm_90 --arch gfx942 --variant hca --json aot.json"


def aot(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture, sm_NN or gfx9NN; may be given again. Default: all five.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A name, or a part of names; may be given again.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile. Default: one per processor.")] = None,
    list_variants: Annotated[bool, typer.Option("--list", help="Print the variants' names and compile none.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="One line per architecture only.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Compile the Triton kernels ahead of time, without a GPU, and say what each takes.

    A variant is a compressor, a kind of state, types of tokens and state, a cache format and a number of rows; all that
    the tuning table can choose for DeepSeek-V4's and V4.1's compressors, and the kernels that project. "matrix" counts
    instructions of the matrix units (wgmma alone on sm_90). Exit status 1 if one does not compile or spills registers.
    """
    output = Output(json_file)
    names = [v.name for v in variants()]
    wanted = [part for part in variant or () if part in names]  # a whole name is not a part of others
    wanted += [name for name in names if any(part in name for part in variant or () if part not in names)]
    chosen = [v for v in variants() if not variant or v.name in wanted]
    if not chosen:
        raise RangeError("--variant", "part of a name that --list prints", variant)
    if list_variants:
        for v in chosen:
            output.say(v.name)
        return
    check_compiler("aot", jobs)
    targets = tuple(dict.fromkeys(arch or compiler.ARCHITECTURES))
    for target in targets:
        architecture(target)  # a wrong name is an error before any work
    count = len(chosen)
    output.say(f"triton {version('triton')}: {count} variants x {len(targets)} architectures")
    results: list[compiler.Compiled] = []
    with workers(jobs or os.cpu_count() or 1) as work:
        for target in targets:
            found = []
            for number, kernels in enumerate(work(compiler.compile_variant, chosen, [target] * count), 1):
                found += kernels
                for one in kernels:
                    if not quiet or one.error or one.spills:
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
    raise typer.Exit(1 if bad else 0)


def check_compiler(command: str, jobs: int | None) -> None:
    """Raise unless Triton can compile here, in this many processes."""
    if find_spec("triton") is None:
        raise UnsupportedError(command, "triton (pip install kvcondense[triton])", "not installed")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UnsupportedError("TRITON_INTERPRET", "unset: the interpreter does not compile", "1")
    if jobs is not None and jobs < 1:
        raise RangeError("--jobs", "at least 1", jobs)


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Callable[..., Iterable[list[compiler.Compiled]]]]:
    """``map`` over this many processes; one job needs no process."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor.map


def _line(r: compiler.Compiled) -> str:
    if r.error is not None:
        return f"{r.arch:<7} {r.variant:<52} {r.kernel:<19} FAILED {r.error}"
    numbers = f"{_number(r.registers):>4} registers {_number(r.spills):>3} spilled {_number(r.shared):>6} B shared"
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
