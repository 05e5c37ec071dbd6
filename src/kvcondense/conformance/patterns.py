"""Rows of a cache whose bytes are certain, whoever computes them: tokens and a norm's weight that no rounding changes.

All tokens of a window are alike, so that pooling gives the token back; its small integers have squares of mean 1, so
that the norm gives it back (eps is 1e-30: some kernels quantise the row before any rounding to bf16, where 1e-6 moves
values off their ties); the weight has at most 8 bits, and RoPE at position 0 changes nothing. The first row of a
request is then integer times weight, to the bit.
"""

from __future__ import annotations

import random

import torch

_SHARES = ((1, 0, 0), (1 / 2, 1 / 8, 0), (0, 1 / 4, 0), (0, 0, 1 / 16))
"""Of channels that are +-1, +-2, +-4; the others are 0."""


def rows(head_dim: int, seed: int, count: int) -> torch.Tensor:
    """Tokens of ``count`` requests: [count, head_dim] int8."""
    rng = random.Random(f"pattern {seed}")
    found = []
    for i in range(count):
        values = [v for v, share in zip((1, 2, 4), _SHARES[i % 4], strict=True) for _ in range(int(share * head_dim))]
        values += [0] * (head_dim - len(values))
        rng.shuffle(values)
        found.append([v * rng.choice((-1, 1)) for v in values])
    return torch.tensor(found, dtype=torch.int8)


def weight(head_dim: int, seed: int) -> torch.Tensor:
    """Weight of the norm [head_dim]: of 3, 4 or 8 bits (ties of FP4, of FP8, of neither), over 24 powers of two."""
    rng, found = random.Random(f"weight {seed}"), []
    for c in range(head_dim):
        bits = rng.choice((2, 3, 7))
        exponent = 2 - 24 * c // head_dim - rng.randrange(3)
        found.append((1 + rng.randrange(1 << bits) / (1 << bits)) * 2.0**exponent)
    return torch.tensor(found)
