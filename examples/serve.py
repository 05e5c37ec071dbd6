"""Serve two requests with speculation: one prefills in chunks while the other decodes and has drafts rejected.

    python examples/serve.py

Whatever was rejected, the cache ends up with the bytes of feeding each request its tokens in one go.
"""

from __future__ import annotations

import torch

import kvcondense as kc

DRAFTS, STEPS = 3, 8


def main() -> None:
    """Steps with both requests in one call, then the comparison."""
    spec = kc.CompressorSpec.csa(kc.ModelConfig.FLASH)
    gen = torch.Generator().manual_seed(1)
    weights = kc.CompressorWeights(norm=torch.ones(512), ape=torch.randn(4, 1024, generator=gen))
    rope = kc.RopeTable.build(kc.ModelConfig.FLASH, 256)
    tokens = torch.randn(2, 128, spec.projected, generator=gen)  # what each request would be fed, by position
    state = kc.StatePool.ring(spec, num_slots=2, ring_rows=spec.required_ring_rows(DRAFTS))
    cache = kc.PagedCache.allocate(512, num_pages=4, page_rows=16)
    pages, done = [[2, 0], [1, 3]], [0, 40]
    first = kc.RaggedBatch.build([0, 40], start_positions=[0], state_slots=[1], block_table=[pages[1]])
    kc.condense(spec, tokens[1, :40], weights, rope, first, state=state, cache=cache)  # request 1 was here before
    for step in range(STEPS):
        chunk, accepted = 5 + step, step % (DRAFTS + 1)  # request 0 prefills, request 1 verifies three drafts
        new = [tokens[0, done[0] : done[0] + chunk], tokens[1, done[1] : done[1] + 1 + DRAFTS].clone()]
        new[1][1 + accepted :] = torch.randn(DRAFTS - accepted, spec.projected, generator=gen)  # wrong guesses
        batch = kc.RaggedBatch.build(
            [0, chunk, chunk + 1 + DRAFTS],
            start_positions=done,
            draft_rows=[0, DRAFTS],
            state_slots=[0, 1],
            block_table=pages,
        )
        rows = kc.condense(spec, torch.cat(new), weights, rope, batch, state=state, cache=cache)
        done = [done[0] + chunk, done[1] + 1 + accepted]  # rollback is this and nothing else
        print(f"step {step + 1}: {accepted} of {DRAFTS} drafts accepted, {rows.values.shape[0]} rows, now at {done}")
    for q in range(2):
        alone = kc.RaggedBatch.build([0, done[q]], start_positions=[0])
        whole = kc.condense(spec, tokens[q, : done[q]], weights, rope, alone).values.bfloat16()
        slots = torch.tensor([pages[q][w // 16] * 16 + w % 16 for w in range(whole.shape[0])])
        same = torch.equal(cache.rows.flatten(0, 1)[slots], whole)
        print(f"request {q}: {whole.shape[0]} rows {'equal, byte for byte' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
