"""What the demo says while it runs: a bar on a terminal, lines in a pipe, the seconds of each part."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Report:
    """Lines of the comparison, and whether all of them hold; below them, on a terminal, how far the demo is."""

    def __init__(self, steps: int) -> None:
        self.ok = True
        self.checks: list[dict[str, object]] = []
        self.seconds: dict[str, float] = {}
        self.part = ""
        self.began = self.part_began = time.perf_counter()
        console = Console(highlight=False, markup=False, soft_wrap=True)
        columns = BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
        self.progress = Progress(
            *columns, TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal
        )
        self.steps, self.done = steps, -1
        self.task = self.progress.add_task("", total=steps)

    def begin(self, part: str) -> None:
        """The next part; its seconds are printed at the end."""
        now = time.perf_counter()
        if self.part:
            self.seconds[self.part] = now - self.part_began
        self.part, self.part_began = part, now

    def step(self, what: str) -> None:
        """What is done next, for more than a moment: the line below, or one more line where there is no terminal."""
        self.done += 1
        self.progress.update(self.task, description=what, completed=self.done)
        if self.progress.disable:
            print(f"  [{self.done + 1}/{self.steps}] {what}", flush=True)

    def say(self, line: str) -> None:
        """Print a line."""
        self.progress.console.print(line)

    def check(self, what: str, holds: bool, detail: str) -> None:
        """Print a comparison."""
        self.ok &= holds
        self.checks.append({"what": what, "holds": holds, "detail": detail})
        self.say(f"  {'PASS' if holds else 'FAIL'}  {what:<28} {detail}")

    def end(self) -> None:
        """The last part is over."""
        self.begin("")
        self.seconds["all"] = time.perf_counter() - self.began
