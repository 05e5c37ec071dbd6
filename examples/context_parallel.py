"""Packed documents on several ranks: every window is emitted by one of them, with the bits of a single rank.

    torchrun --nproc-per-node 4 examples/context_parallel.py --tokens 4000

Documents are dealt in zigzag, as engines do it. Printed beside: bytes of rows that moved, and those of an all-gather.
"""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist

import kvcondense as kc
from kvcondense.parallel import Shards, condense_shard, traffic, zigzag


def check(name: str, spec: kc.CompressorSpec, lengths: list[int], segments: list) -> bool:
    """Condense on all ranks and, on each for itself, in one piece; compare; add up the bytes."""
    gen, rank, starts = torch.Generator().manual_seed(0), dist.get_rank(), [0] * len(lengths)
    kv_score = [torch.randn(n, spec.projected, generator=gen) for n in lengths]  # every rank makes all, to compare with
    weights = kc.CompressorWeights(torch.ones(spec.head_dim), torch.randn(spec.ratio, spec.width, generator=gen))
    rope = kc.RopeTable.build(kc.ModelConfig.FLASH, max(lengths))
    shards = Shards.agree_on(segments[rank], timeout=timedelta(seconds=30))
    mine = torch.cat([kv_score[s.sequence][s.start : s.end] for s in segments[rank]])
    ours = condense_shard(spec, mine, weights, rope, shards)
    batch = kc.RaggedBatch.build(torch.tensor([0, *lengths]).cumsum(0), start_positions=starts)
    whole = kc.condense(spec, torch.cat(kv_score), weights, rope, batch)
    place = {row: e for e, row in enumerate(zip(whole.request.tolist(), whole.window.tolist(), strict=True))}
    here = [place[row] for row in zip(ours.sequence.tolist(), ours.rows.window.tolist(), strict=True)]
    equal = torch.equal(ours.rows.values, whole.values[here])
    totals = torch.tensor([equal, len(here), ours.received, ours.all_gather])
    dist.all_reduce(totals)
    agreed, emitted, moved, gathered = totals.tolist()
    good = agreed == dist.get_world_size() and emitted == len(place)
    if rank == 0:
        bits = "bits of one rank" if good else "DIFFERS"
        print(f"{name}: {emitted} rows, {moved} bytes moved (all-gather: {gathered}), {bits}")
        moved, gathered = traffic(spec, zigzag([1 << 20], 64))
        print(f"  a million tokens on 64 ranks: {moved / 1e6:.1f} MB (all-gather: {gathered / 1e9:.0f} GB)")
    return good


def main() -> None:
    """All three compressors of a layer pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000, help="of all documents (default: 4000)")
    tokens = parser.parse_args().tokens
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    lengths = [tokens - tokens // 3 - 1, tokens // 3, 1]
    segments = zigzag(lengths, dist.get_world_size())
    kinds = [getattr(kc.CompressorSpec, name)(kc.ModelConfig.FLASH) for name in ("csa", "hca", "indexer")]
    good = [check(f"ratio {spec.ratio}, {spec.head_dim} channels", spec, lengths, segments) for spec in kinds]
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    raise SystemExit(None if all(good) else "rows differ from a single rank's")


if __name__ == "__main__":
    main()
