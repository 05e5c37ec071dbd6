"""Train on several ranks: documents of each rank's own, then one sequence cut between ranks; gradients beside one's.

torchrun --nproc-per-node 2 examples/train_ranks.py
"""

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, fsdp, tensor
from torch.nn.parallel import DistributedDataParallel

import kvcondense as kc
from kvcondense.module import Compressor
from kvcondense.parallel import Shards
from kvcondense.spec import Rounding

HIDDEN, TOKENS = 64, 302


def compressor() -> Compressor:
    """The same on every rank; fp64, so that sums in another order still agree."""
    spec = kc.CompressorSpec(ratio=4, head_dim=32, eps=1e-6, rope_dim=0, overlap=True, rounding=Rounding.FUSED)
    w = torch.randn(spec.projected, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm, ape = torch.ones(spec.head_dim, dtype=torch.float64), w[: spec.ratio, :1].repeat(1, spec.width)
    return Compressor(spec, kc.CompressorWeights(norm=norm, ape=ape, w=w / HIDDEN**0.5), None)


def hidden(count: int, seed: int) -> torch.Tensor:
    """Random ones [count, HIDDEN]."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model: torch.nn.Module, parts: list) -> list[torch.Tensor]:
    """Of a loss over the rows of all parts (x, where), whole on every rank."""
    for x, where in parts:
        model(x, where)[:, ::2].square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, tensor.DTensor) else g for g in found]


def main() -> None:
    """Both wrappers, both ways to lay tokens on ranks."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh, x = device_mesh.init_device_mesh("cpu", (ranks,)), hidden(TOKENS, seed=1)
    begin, end = (k * TOKENS // ranks for k in (rank, rank + 1))  # no window boundary
    pack = [(hidden(n, n), kc.RaggedBatch.build([0, 20, n], start_positions=[0, 0])) for n in range(51, 51 + ranks)]
    whole = (x, kc.RaggedBatch.build([0, TOKENS], start_positions=[0]))
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP", lambda module: fsdp.fully_shard(module, mesh=mesh))):
        shard = (x[begin:end], Shards.agree(begin, end - begin))
        for way, mine, all_of_it in (("packed documents", pack[rank], pack), ("one sequence", shard, [whole])):
            ours, one = gradients(wrap(compressor()), [mine]), gradients(compressor(), all_of_it)
            off = max(float((ranks * a - b).abs().max() / b.abs().max()) for a, b in zip(ours, one, strict=True))
            if rank == 0:  # the wrappers take the mean over ranks
                print(f"{name}, {way}: gradients {'of one process' if off < 1e-12 else 'DIFFER'}, off by {off:.0e}")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
