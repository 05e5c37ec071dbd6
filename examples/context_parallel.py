"""A sequence on several ranks: every window is emitted by one of them, with the bits of a single rank.

    torchrun --nproc-per-node 4 examples/context_parallel.py --tokens 4000

Printed beside: how many bytes of rows each compressor moved, and what gathering kv_score everywhere would have moved.
"""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist

import kvcondense as kc
from kvcondense.parallel import Shards, condense_shard


def check(name: str, spec: kc.CompressorSpec, tokens: int) -> bool:
    """Condense on all ranks and, on each for itself, in one piece; compare; add up the bytes."""
    gen = torch.Generator().manual_seed(0)
    kv_score = torch.randn(tokens, spec.projected, generator=gen)  # every rank makes all of it, to compare with
    ape = 0.1 * torch.randn(spec.ratio, spec.width, generator=gen)
    weights = kc.CompressorWeights(norm=torch.ones(spec.head_dim), ape=ape)
    rope = kc.RopeTable.build(kc.ModelConfig.FLASH, tokens)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    begin, end = rank * tokens // ranks, (rank + 1) * tokens // ranks  # a window boundary for few of them

    shards = Shards.agree(begin, end - begin, timeout=timedelta(seconds=30))
    ours = condense_shard(spec, kv_score[begin:end], weights, rope, shards)

    whole = kc.condense(spec, kv_score, weights, rope, kc.RaggedBatch.build([0, tokens], start_positions=[0]))
    mine = whole.values[begin // spec.ratio : end // spec.ratio]
    equal = torch.equal(ours.rows.values, mine)
    totals = torch.tensor([int(equal), ours.rows.values.shape[0], ours.received, ours.all_gather])
    dist.all_reduce(totals)
    agreed, rows, moved, gathered = totals.tolist()
    if rank == 0:
        bits = "bits of one rank" if agreed == ranks else "DIFFERS"
        print(f"{name}: {rows} rows, {moved} bytes moved (all-gather: {gathered}), {bits}")
    return agreed == ranks and rows == tokens // spec.ratio


def main() -> None:
    """All three compressors of a layer pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4000)
    tokens = parser.parse_args().tokens
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    kinds = {"CSA": kc.CompressorSpec.csa, "HCA": kc.CompressorSpec.hca, "indexer": kc.CompressorSpec.indexer}
    good = [check(name, make(kc.ModelConfig.FLASH), tokens) for name, make in kinds.items()]
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    if not all(good):
        raise SystemExit("rows differ from a single rank's")


if __name__ == "__main__":
    main()
