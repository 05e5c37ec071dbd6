"""``kvcondense bench --context-parallel``: a sequence on 2 and 4 processes of this machine, beside one."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvcondense.api import condense
from kvcondense.bench import measure
from kvcondense.bench.cases import CONFIG, Case, make_inputs
from kvcondense.errors import UnsupportedError
from kvcondense.layout.batch import RaggedBatch
from kvcondense.parallel import Shards, condense_shard
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

_LIMIT = timedelta(seconds=120)
_ROUNDS = 7


@dataclass(frozen=True)
class Split:
    """A case on a number of ranks, cut evenly, and off the windows' boundaries by ``shift`` tokens."""

    case: Case
    ranks: int
    shift: int

    @property
    def name(self) -> str:
        """What is printed."""
        where = "on boundaries" if self.shift == 0 else f"{self.shift} beyond boundaries"
        return f"{self.case.name}, {self.ranks} ranks, cut {where}"

    @property
    def starts(self) -> list[int]:
        """Where shards begin, and the end."""
        tokens = self.case.tokens
        return [0, *(k * tokens // self.ranks + self.shift for k in range(1, self.ranks)), tokens]

    @property
    def bytes(self) -> int:
        """Of the case."""
        return self.case.bytes

    @property
    def flops(self) -> int:
        """None but the case's."""
        return self.case.flops


CASES = {
    split.name: split
    for split in (
        Split(Case(f"{tokens} tokens, {kind}", kind, tokens, 1, 0, format="bf16"), ranks, shift)
        for kind, tokens in (("csa", 8192), ("hca", 8192))
        for ranks in (2, 4)
        for shift in (0, 67)
    )
}


def run_split(
    split: Split, rates: measure.Rates, say: Callable[[str], None], *, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """One record: the slowest rank's median, bytes moved, whether all bits are those of one rank."""
    if device != "cpu":
        raise UnsupportedError("--context-parallel", "the CPU's processes", device)
    context, rates = multiprocessing.get_context("spawn"), rates.now()
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        workers = [
            context.Process(target=_work, args=(split, rank, str(Path(folder) / "store"), results), daemon=True)
            for rank in range(split.ranks)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(_LIMIT.total_seconds())
        dead = [rank for rank, worker in enumerate(workers) if worker.exitcode != 0]
        if dead:
            for worker in workers:
                worker.kill()
            raise UnsupportedError("--context-parallel", "processes that end well", f"ranks {dead} that did not")
        found = [results.get() for _ in workers]
    name = f"{split.ranks} ranks"
    if not all(f["equal"] for f in found):
        say(f"{split.name}: rows differ from those of one rank")
        yield {"case": split.name, "runner": f"kvcondense, {name}", "wrong": float("inf")}
        return
    for runner, us in ((name, max(f["us"] for f in found)), ("one rank", max(f["whole_us"] for f in found))):
        yield {
            "case": split.name,
            "runner": runner,
            "cache": "warm",
            "us": round(us, 2),
            "floor_us": round(1e6 * rates.floor(split, cold=False), 2),
            "rounds": _ROUNDS,
            "note": "agree, exchange, condense" if runner == name else "condense",
            "moved_bytes": sum(f["received"] for f in found) if runner == name else 0,
            "all_gather_bytes": sum(f["all_gather"] for f in found) if runner == name else 0,
        }


def _work(split: Split, rank: int, store: str, results: Any) -> None:
    """What a rank does: the split sequence, then, rank 0 by itself, the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=split.ranks, timeout=_LIMIT)
    inputs, spec = make_inputs(split.case), split.case.spec
    weights = CompressorWeights(norm=inputs.norm, ape=inputs.ape)
    rope = RopeTable.build(CONFIG, split.case.tokens)
    kv_score, (begin, end) = inputs.new[0], split.starts[rank : rank + 2]
    batch = RaggedBatch.build([0, split.case.tokens], start_positions=[0])
    whole = condense(spec, kv_score, weights, rope, batch)
    times, done = [], None
    for _ in range(_ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        shards = Shards.agree(begin, end - begin, timeout=_LIMIT)
        done = condense_shard(spec, kv_score[begin:end], weights, rope, shards)
        times.append(time.perf_counter() - start)
    dist.barrier()
    alone = [
        measure.clock(lambda: condense(spec, kv_score, weights, rope, batch)) for _ in range(_ROUNDS * (rank == 0))
    ]
    assert done is not None
    mine = slice(begin // spec.ratio, end // spec.ratio)
    results.put(
        {
            "equal": torch.equal(done.rows.values, whole.values[mine]),
            "us": 1e6 * measure.median(times[1:]),
            "whole_us": 1e6 * measure.median(alone) if alone else 0.0,
            "received": done.received,
            "all_gather": done.all_gather,
        }
    )
    dist.barrier()
    dist.destroy_process_group()
