"""``kvcondense compress``: hidden states of a layer through the compressors of a real checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvcondense.cachefile import PAGE_TOKENS
from kvcondense.cli.convert import IndexerFormat, PageTokens, Strict, TensorScale, describe
from kvcondense.cli.output import JsonFile, Output
from kvcondense.errors import CheckpointError, RangeError
from kvcondense.spec import Rounding
from kvcondense.stream import HiddenFile, Sequence

EXAMPLE = "Example: kvcondense compress --checkpoint DIR --layer 2 --hidden h.safetensors --out cache.safetensors"


def compress(
    checkpoint: Annotated[Path, typer.Option(help="Model directory: config.json and safetensors files.")],
    layer: Annotated[int, typer.Option(help="Layer whose compressors to run (main and, in CSA layers, indexer).")],
    hidden: Annotated[Path, typer.Option(help="Safetensors file with the layer's hidden states [T, D].")],
    out: Annotated[Path, typer.Option(help="Result: rows, live state and header, as safetensors.")],
    chunk: Annotated[int, typer.Option(help="Tokens per step.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sequence that --out holds.")] = False,
    first_position: Annotated[
        int | None, typer.Option(help="Position of the file's first token (default: its metadata, else see --resume).")
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the hidden states in the file.")] = None,
    format: Annotated[str, typer.Option(help="Cache format of the rows; see kvcondense info --formats.")] = "bf16",
    indexer_format: IndexerFormat = None,
    page_tokens: PageTokens = PAGE_TOKENS,
    tensor_scale: TensorScale = None,
    strict: Strict = True,
    rounding: Annotated[
        str, typer.Option(help="Rounding profile: reference or fused (fp32 throughout).")
    ] = "reference",
    rotate: Annotated[
        bool, typer.Option("--rotate/--no-rotate", help="Hadamard rotation of the indexer's rows.")
    ] = True,
    backend: Annotated[str, typer.Option(help="Backend, or auto.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Stream hidden states through a layer's compressors and write cache rows, live state and header.

    The result does not depend on --chunk, nor on whether it was made in one go or with --resume: the files are equal
    byte for byte. --out is replaced whole. Ctrl-C saves the chunks that are done.

    With --resume, a hidden file that says where it starts (--first-position, or its metadata) must continue the
    sequence. One that does not say so holds the whole sequence if the last compressed token stands in it at its place;
    otherwise it holds further tokens.
    """
    profiles = {r.value: r for r in Rounding}
    if rounding not in profiles:
        raise RangeError("--rounding", " or ".join(profiles), repr(rounding))
    if not out.parent.is_dir():
        raise CheckpointError("--out", "a file in a folder that exists", str(out))
    sequence = Sequence.start(
        checkpoint,
        layer,
        format=format,
        indexer_format=indexer_format,
        page_tokens=page_tokens,
        tensor_scale=tensor_scale,
        strict=strict,
        rotate=rotate,
        rounding=profiles[rounding],
    )
    if resume:
        sequence.resume(out)
    states = HiddenFile.open(hidden, layer, first_position, tensor)
    before, offset = sequence.position, sequence.locate(states)
    total = offset + states.tokens - before
    begun = time.perf_counter()
    console = Console(stderr=True)
    columns = (TextColumn("compress"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    interrupted = False
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        _BetweenChunks() as chunks,
    ):
        task = bar.add_task("tokens", total=total if limit is None else min(total, limit))

        def progress(tokens: int) -> None:
            bar.advance(task, tokens)
            chunks.check()

        try:
            sequence.feed(states, chunk=chunk, limit=limit, impl=backend, progress=progress)
        except KeyboardInterrupt:
            interrupted = True
    file = sequence.file()
    file.save(out)
    done, seconds = sequence.position - before, time.perf_counter() - begun
    output = Output(json_file)
    if resume:
        output.say(f"resumed at {before}; {hidden.name} starts at position {offset}")
    output.say(f"layer {layer}: {done} tokens in {seconds:.1f} s, sequence now {sequence.position} tokens -> {out}")
    for line in describe(file):
        output.say(f"  {line}")
    output.finish({**file.header(), "tokens": done, "seconds": seconds, "interrupted": interrupted})
    if interrupted:
        output.say("interrupted; the rest can be done with --resume")
        raise typer.Exit(130)


class _BetweenChunks:
    """Ctrl-C waits for the end of a chunk, where the sequence can be saved; a second one does not wait."""

    def __enter__(self) -> _BetweenChunks:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.asked:
            signal.signal(signal.SIGINT, self.before)
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt
