"""The work of ``kvcondense compress``: chunk after chunk of a file, saved whole whenever it ends."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvcondense.cachefile import CacheFile
from kvcondense.cli.output import Output
from kvcondense.cli.work.convert import describe
from kvcondense.errors import ShapeError
from kvcondense.spec import Rounding
from kvcondense.stream import HiddenFile, Sequence


def run(
    output: Output,
    *,
    checkpoint: Path,
    layer: int,
    hidden: Path,
    out: Path,
    chunk: int,
    limit: int | None,
    resume: bool,
    verify: bool,
    save_every: float,
    first_position: int | None,
    tensor: str | None,
    format: str,
    indexer_format: str | None,
    page_tokens: int,
    tensor_scale: float | None,
    strict: bool,
    rounding: str,
    rotate: bool,
    backend: str,
) -> None:
    """Compress what there is; after Ctrl-C, what is done is kept and KeyboardInterrupt is raised again."""
    sequence = Sequence.start(
        checkpoint,
        layer,
        format=format,
        indexer_format=indexer_format,
        page_tokens=page_tokens,
        tensor_scale=tensor_scale,
        strict=strict,
        rotate=rotate,
        rounding=Rounding(rounding),
    )
    if resume:
        sequence.resume(out, verify=verify)
    states = HiddenFile.open(hidden, layer, first_position, tensor)
    if states.tokens == 0:
        raise ShapeError("hidden", "at least one token", f"{hidden}, with none")
    before, offset = sequence.position, sequence.locate(states)
    total = offset + states.tokens - before
    begun = time.perf_counter()
    console = Console(stderr=True)
    columns = (TextColumn("compress"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    interrupted = False
    with (
        Progress(*columns, console=console, transient=True, disable=output.quiet or not console.is_terminal) as bar,
        _BetweenChunks() as chunks,
    ):
        asked = total if limit is None else min(total, limit)
        task = bar.add_task("tokens", total=asked)

        saved = time.monotonic()

        def progress(tokens: int) -> None:
            nonlocal saved
            bar.advance(task, tokens)
            chunks.check()
            if time.monotonic() - saved >= save_every and sequence.position < before + asked:
                chunks.save(sequence.file(), out)
                saved = time.monotonic()

        try:
            sequence.feed(states, chunk=chunk, limit=limit, impl=backend, progress=progress)
        except KeyboardInterrupt:
            interrupted = True
        file = sequence.file()
        chunks.save(file, out)
    done, seconds = sequence.position - before, time.perf_counter() - begun
    if resume:
        output.say(f"resumed at {before}; {hidden.name} starts at position {offset}")
    output.say(f"layer {layer}: {done} tokens in {seconds:.1f} s, sequence now {sequence.position} tokens -> {out}")
    for line in describe(file):
        output.say(f"  {line}")
    output.finish({**file.header(), "tokens": done, "seconds": seconds, "interrupted": interrupted})
    if interrupted:
        output.say("the rest can be done with --resume")
        raise KeyboardInterrupt


class _BetweenChunks:
    """Ctrl-C waits for the end of a chunk, where the sequence can be saved; a second one does not wait.

    None breaks off a file that is being written: that would lose what is done, for the sake of a moment.
    """

    def __enter__(self) -> _BetweenChunks:
        self.asked = self.saving = False
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        if self.asked and not self.saving:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt

    def save(self, file: CacheFile, out: Path) -> None:
        """Write the file to its end."""
        self.saving = True
        try:
            file.save(out)
        finally:
            self.saving = False
