"""Train a compressor: it learns which token of a window to keep, from packed documents.

python examples/train.py
"""

from __future__ import annotations

import torch

import kvcondense as kc
from kvcondense.module import Compressor

HIDDEN, DIM, LENGTHS = 64, 32, (36, 20, 72)


def main() -> None:
    """The token that a marker points at carries a value; the row should be that value, whatever the others say."""
    spec = kc.CompressorSpec(ratio=4, head_dim=DIM, eps=1e-6, rope_dim=0)
    gen = torch.Generator().manual_seed(0)
    weights = kc.CompressorWeights(
        norm=torch.ones(DIM),
        ape=torch.zeros(spec.ratio, spec.width),
        w=torch.randn(spec.projected, HIDDEN, generator=gen) / HIDDEN**0.5,
    )
    model = Compressor(spec, weights, None, format="bf16")
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    batch = kc.RaggedBatch.build(starts, start_positions=[0] * len(LENGTHS))  # documents never share a window
    tokens = int(starts[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(301):
        x = torch.randn(tokens, HIDDEN, generator=gen)
        x[:, 0] = 0
        marked = torch.arange(0, tokens, 4) + torch.randint(0, 4, (tokens // 4,), generator=gen)  # one a window
        x[marked, 0] = 8
        wanted = torch.nn.functional.normalize(x[marked, 1 : 1 + DIM]) * DIM**0.5
        loss = (model(x, batch) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step:>3}: loss {loss.item():.3f}")
    print("learned" if losses[-1] < losses[0] / 4 else "NOT LEARNED")


if __name__ == "__main__":
    main()
