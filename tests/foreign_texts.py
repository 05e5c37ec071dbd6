"""Readers of JSON that this library's own commands have written, and of kept machine code; see foreign_files."""

import json
import math
import os
from dataclasses import replace

import alterations
from foreign_files import Reader, digest
from kvcondense import KvCondenseError
from kvcondense.backends.cpu import kept
from kvcondense.bench import chart, records, report, tune
from kvcondense.cli.work import page
from kvcondense.conformance.cases import Case, Op
from kvcondense.conformance.invariants import whole
from kvcondense.conformance.own import load_factory
from kvcondense.conformance.play import Player
from kvcondense.files import read_text


class Cases(Reader):
    """Conformance cases; those that are small are played and judged."""

    weight = 3
    playing = 8

    def made(self):
        self.make, self.played, self.read_ = load_factory("reference"), 0, 0
        ops = (
            Op("step", (3, 2), drafts=1, junk="nan", padding=2, order=(1, 0)), Op("move", q=1),
            Op("recycle", q=0, junk="inf"),
            Op("step", (5, 4)), Op("fork", q=0, to=1), Op("step", (1, 1)),
        )  # fmt: skip
        one = Case("csa", 2, ops, seed=3, first=4, scale=2.0)
        far = Case("hca", 1, (Op("step", (2,)),), first=128 * 100, far=True)
        sized = Case(
            "csa head_dim=512 rope_dim=64 format=fp8_model1 page_rows=16", 1, (Op("step", (5,)),), pattern=True
        )
        return [c.to_json().encode() for c in (one, replace(one, spec="r2", first=0), far, sized)]

    def alter(self, chance, which):
        return self.json(chance, which), False

    def read(self, data, which):
        case = Case.from_json(read_text(self.put(data), "a case", 1 << 20))
        self.read_ += 1
        if self.read_ % self.playing == 0 and case.size < 100 and case.requests <= 8:
            self.played += 1
            player = Player(case, self.make)
            player.run()
            whole(player)
        assert Case.from_json(case.to_json()) == case
        return {digest(case)}


MACHINE = {"processor": "a", "torch": "1", "commit": "abc"}


class Records(Reader):
    """A bench's records, gone on with; tables of them, and now and then the picture and the page."""

    weight = 2
    drawing = 100

    def made(self):
        self.accepted = self.drawn = 0
        warm = {"cache": "warm", "floor_us": 3.0}
        timed = [{"case": c, "runner": r, "us": 5.0, **warm} for c in ("a", "b $x") for r in ("cpu", "reference")]
        longer = [{"runner": r, "context": n, "us": 2.0} for r in ("cpu", "reference") for n in (1024, 4096)]
        step = [{"step": "flash", "part": p, "runner": "cpu", "us": 7.0} for p in ("csa", "all")]
        wrong = {"step": "flash", "part": "csa", "runner": "cpu", "wrong": math.inf}
        gemms = [{"case": "x", "runner": r, "us": 5.0, **warm} for r in ("bf16 GEMM alone", "our GEMM alone")]
        fused = [{"case": "x", "runner": r, "us": 5.0, **warm} for r in ("GEMM alone", "GEMM + step", "fused, one")]
        training = [{"case": "x", "runner": r, "us": 5.0, "saved_bytes": 12.0} for r in ("a", "b")]
        ranks = [
            {"case": "x", "runner": r, "us": 5.0, "moved_bytes": 12, "all_gather_bytes": 50} for r in ("a", "one rank")
        ]
        swaps = [{"case": "x", "runner": r, "us": 5.0, "swapped_bytes": 12, "of_plain": 1.5} for r in ("out", "in")]
        head = {"machine": MACHINE, "rates": {"memory": 1e9, "cache": 1e10, "gemm": 1e11}}
        found = (
            [*timed, *longer],
            [*step, *gemms, {"case": "y", "failed": "no"}, wrong],
            fused,
            training,
            ranks,
            swaps,
        )
        lines = [[head, *some, {"complete": "x"}] for some in found]
        return ["".join(map(records.text, some)).encode() for some in lines]

    def alter(self, chance, which):
        lines = [json.loads(line) for line in self.seeds[which].splitlines()]
        if chance.random() < 0.25:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds), False
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(lines))
            way = chance.random()
            if way < 0.7:
                lines[at] = alterations.tree(chance, lines[at], 1)
            elif way < 0.8:
                del lines[at]
            elif way < 0.9:
                lines.insert(at, lines[chance.randrange(len(lines))] if lines else {})
            else:
                lines += [json.loads(line) for line in chance.choice(self.seeds).splitlines()]
            lines = lines or [{}]
        return "".join(alterations.rendered(line) + "\n" for line in lines).encode("utf-8", "surrogatepass"), False

    def read(self, data, which):
        path = self.put(data)
        found = records.read(path, "--from", "kvcondense bench")
        head, finished = records.resumed(path, found[0]["machine"], "kvcondense bench")
        records.Log(None, head, finished)
        any("wrong" in r and r["runner"].startswith("cpu") for r in found)  # as the command asks
        for record in found:
            if {"us", "floor_us", "runner", "cache"} <= record.keys():
                report.line(record)
        for table in report.tables(found).values():
            page.of_markdown(table)
        self.accepted += 1
        if self.accepted % self.drawing == 0:
            self.drawn += 1
            chart.plot(found, self.folder / "picture.png")
            about = {**found[0]["machine"], **(found[0].get("rates") or {})}
            page.write(self.folder / "page.html", "timings", about, page.of_timings(found))
        return {digest(found)}


class Tuned(Reader):
    """A tuner's records, and the best of them."""

    weight = 2

    def made(self):
        timed = [
            {"kind": "hca", "rows": n, "block": 64, "num_warps": 4, "us": us} for n in (16, None) for us in (3.0, None)
        ]
        lines = [
            {"machine": MACHINE},
            *timed,
            {**timed[0], "us": None, "error": "no"},
            {"complete": "hca, at most 16 rows"},
        ]
        return ["".join(map(records.text, lines)).encode()]

    def alter(self, chance, which):
        return Records.alter(self, chance, which)

    def read(self, data, which):
        path = self.put(data)
        found = records.read(path, "--from", "kvcondense tune", tune.check_record)
        _, kept_records = records.resumed(path, found[0]["machine"], "kvcondense tune", tune.check_record)
        timings = [tune.Timed.from_dict(r) for r in kept_records if "block" in r]
        assert [math.isfinite(t.seconds) for t in timings if t.seconds is not None].count(False) == 0
        for t in timings:
            t.as_dict()
        if timings:
            tune._line(timings)
        return {digest(timings)}


class Kept(Reader):
    """Kept machine code: what was written, or None."""

    weight = 1

    sealed = True

    def made(self):
        self.code = os.urandom(300)
        old, kept.place = kept.place, lambda: self.folder
        try:
            kept.write("kernel", self.code)
        finally:
            kept.place = old
        return [(self.folder / "kernel").read_bytes()]

    def read(self, data, which):
        self.put(data, "kernel").chmod(0o600)
        old, kept.place = kept.place, lambda: self.folder
        try:
            found = kept.read("kernel")
        finally:
            kept.place = old
        if found is None:
            raise KvCondenseError("kernel", "code that was kept", "None")
        return {digest(found)}
