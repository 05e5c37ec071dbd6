"""A sequence on several ranks: every window is emitted by one of them, with the bits of a single rank.

    torchrun --nproc-per-node 4 examples/context_parallel.py --tokens 4096 --json build/context_parallel.json

Ranks cut the sequence evenly, which is no window boundary for most of them, or at --cuts. The table says how many bytes
of rows each compressor moved, beside what gathering kv_score everywhere would have moved.
"""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kvcondense import CompressorSpec, CompressorWeights, ModelConfig, RaggedBatch, RopeTable, StatePool, condense
from kvcondense.layout.snapshot import export_live
from kvcondense.parallel import Shards, condense_shard


def check(name: str, spec: CompressorSpec, tokens: int, starts: list[int]) -> dict[str, object]:
    """Condense on all ranks and, on each for itself, in one piece; compare; add up the bytes."""
    gen = torch.Generator().manual_seed(0)
    kv_score = torch.randn(tokens, spec.projected, generator=gen)  # every rank makes all of it, to compare with
    weights = CompressorWeights(
        norm=1 + 0.2 * torch.randn(spec.head_dim, generator=gen),
        ape=0.1 * torch.randn(spec.ratio, spec.width, generator=gen),
    )
    rope = RopeTable.build(ModelConfig.FLASH, tokens)
    rank = dist.get_rank()
    begin, end = starts[rank], starts[rank + 1]
    shards = Shards.agree(begin, end - begin, timeout=timedelta(seconds=30))
    ours = condense_shard(spec, kv_score[begin:end], weights, rope, shards)

    pool = StatePool.ring(spec, 1)
    batch = RaggedBatch.build([0, tokens], start_positions=[0], state_slots=[0])
    whole = condense(spec, kv_score, weights, rope, batch, state=pool)
    mine = slice(begin // spec.ratio, end // spec.ratio)
    equal = torch.equal(ours.rows.values, whole.values[mine]) and torch.equal(ours.rows.window, whole.window[mine])
    if ours.live is not None:
        equal = equal and torch.equal(ours.live, export_live(spec, pool, RaggedBatch.at(tokens, state_slot=0)))
    totals = torch.tensor([int(equal), ours.rows.values.shape[0], ours.received, ours.all_gather])
    dist.all_reduce(totals)
    agreed, windows, moved, gathered = totals.tolist()
    return {
        "compressor": name,
        "ranks": dist.get_world_size(),
        "cuts": starts[1:-1],
        "equal": agreed == dist.get_world_size() and windows == tokens // spec.ratio,
        "windows": windows,
        "bytes": moved,
        "all_gather_bytes": gathered,
    }


def main() -> None:
    """Both kinds of main compressor and the indexer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cuts", type=int, nargs="*", help="where ranks 1, 2, ... begin")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to FILE")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks, tokens = dist.get_world_size(), arguments.tokens
    cuts = arguments.cuts if arguments.cuts is not None else [k * tokens // ranks for k in range(1, ranks)]
    starts = [0, *cuts, tokens]
    if len(starts) != ranks + 1 or starts != sorted(starts):
        raise SystemExit(f"--cuts: {ranks - 1} rising positions up to {tokens}, got {cuts}")
    flash = ModelConfig.FLASH
    kinds = {"CSA": CompressorSpec.csa, "HCA": CompressorSpec.hca, "indexer": CompressorSpec.indexer}
    table = [check(name, make(flash), tokens, starts) for name, make in kinds.items()]
    if dist.get_rank() == 0:
        print(f"{tokens} tokens on {ranks} ranks, cut at {cuts}")
        print(f"{'compressor':<12} {'rows':>6} {'bytes moved':>12} {'all-gather':>14}   bits of one rank")
        for line in table:
            print(
                f"{line['compressor']:<12} {line['windows']:>6} {line['bytes']:>12} {line['all_gather_bytes']:>14}"
                f"   {'yes' if line['equal'] else 'NO'}"
            )
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    if not all(line["equal"] for line in table):
        raise SystemExit("rows differ from a single rank's")


if __name__ == "__main__":
    main()
