"""Packed documents on several ranks, chunk after chunk: one rank emits each window, with the bits of one call.

    torchrun --nproc-per-node 4 examples/context_parallel.py --tokens 4000

Chunks are dealt in zigzag, as engines do it. Printed beside: bytes of rows that moved, and those of an all-gather.
"""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist

import kvcondense as kc
from kvcondense.parallel import Shards, condense_shard, traffic, zigzag


def check(name: str, spec: kc.CompressorSpec, lengths: list[int], chunk: int) -> bool:
    """Condense chunk after chunk on all ranks and, on each for itself, in one call; compare; add up the bytes."""
    gen, rank, ranks = torch.Generator().manual_seed(0), dist.get_rank(), dist.get_world_size()
    kv_score = [torch.randn(n, spec.projected, generator=gen) for n in lengths]  # every rank makes all, to compare with
    weights = kc.CompressorWeights(torch.ones(spec.head_dim), torch.randn(spec.ratio, spec.width, generator=gen))
    rope = kc.RopeTable.build(kc.ModelConfig.FLASH, max(lengths))
    batch = kc.RaggedBatch.build(torch.tensor([0, *lengths]).cumsum(0), start_positions=[0] * len(lengths))
    whole = kc.condense(spec, torch.cat(kv_score), weights, rope, batch)
    place = {row: e for e, row in enumerate(zip(whole.request.tolist(), whole.window.tolist(), strict=True))}
    totals, holds, live = torch.zeros(4, dtype=torch.int64), {}, {}
    for begin in range(0, max(lengths), chunk):
        starts = [min(begin, n) for n in lengths]
        segments = zigzag([min(chunk, n - a) for a, n in zip(starts, lengths, strict=True)], ranks, starts=starts)[rank]
        shards = Shards.agree_on(segments, holds=holds, timeout=timedelta(seconds=30))
        mine = torch.cat([kv_score[0][:0], *(kv_score[s.sequence][s.start : s.end] for s in segments)])
        ours = condense_shard(spec, mine, weights, rope, shards, held=live)
        here = [place[row] for row in zip(ours.sequence.tolist(), ours.rows.window.tolist(), strict=True)]
        wrong = int(not torch.equal(ours.rows.values, whole.values[here]))
        totals += torch.tensor([wrong, len(here), ours.received, ours.all_gather])
        holds, live = shards.held_after, ours.live  # the next chunk goes on from there
    dist.all_reduce(totals)
    wrong, emitted, moved, gathered = totals.tolist()
    good = not wrong and emitted == len(place)
    if rank == 0:
        bits = "bits of one call" if good else "DIFFERS"
        print(f"{name}: {emitted} rows, {moved} bytes moved (all-gather: {gathered}), {bits}")
        moved, gathered = traffic(spec, zigzag([1 << 20], 64))
        print(f"  a million tokens on 64 ranks: {moved / 1e6:.1f} MB (all-gather: {gathered / 1e9:.0f} GB)")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000, help="of all documents (default: 4000)")
    parser.add_argument("--chunk", type=int, default=512, help="most tokens of a document in a call (default: 512)")
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    sizes = [options.tokens - options.tokens // 3 - 1, options.tokens // 3, 1]
    kinds = [getattr(kc.CompressorSpec, name)(kc.ModelConfig.FLASH) for name in ("csa", "hca", "indexer")]
    same = [check(f"ratio {spec.ratio}, {spec.head_dim} channels", spec, sizes, options.chunk) for spec in kinds]
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    raise SystemExit(None if all(same) else "rows differ from a single process's")
