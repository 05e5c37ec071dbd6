"""Stage 3: one softmax per channel over the candidates of a window, P = sum softmax(score) * kv."""

from __future__ import annotations

import torch


def two_pass(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Maximum first, then one pass oldest to newest: kv, score [E, W, d] -> [E, d].

    P = (sum_j e^(z_j - m) K_j) / (sum_j e^(z_j - m)). A score of -inf has weight exactly 0.
    """
    _, total, pooled = statistics(kv, score)
    return pooled / total


def statistics(kv: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m, l = sum_j e^(z_j - m) and o = sum_j e^(z_j - m) K_j, [E, d] each, of kv, score [E, W, d]; oldest to newest."""
    top = score.amax(dim=1)  # [E, d]
    weight = torch.exp(score - top[:, None])  # [E, W, d]
    total = torch.zeros_like(top)
    pooled = torch.zeros_like(top)
    for j in range(kv.shape[1]):
        total = total + weight[:, j]
        pooled = pooled + weight[:, j] * kv[:, j]
    return top, total, pooled


def online(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The running form of pypto-lib's PR 270: (m, l, o) start from the last candidate, then oldest to newest.

    m' = max(m, z); l' = l e^(m - m') + e^(z - m'); o' = o e^(m - m') + K e^(z - m'); P = o / l. A score of -inf is
    skipped, never subtracted: -inf minus -inf is no number.
    """
    m = score[:, -1]  # [E, d]
    empty = torch.isneginf(m)
    l = torch.where(empty, 0.0, torch.ones_like(m))  # noqa: E741 - the name of the literature
    o = torch.where(empty, 0.0, kv[:, -1])
    for j in range(kv.shape[1] - 1):
        z = score[:, j]
        skip = torch.isneginf(z)
        top = torch.maximum(m, z)
        old, new = torch.exp(m - top), torch.exp(z - top)
        l = torch.where(skip, l, l * old + new)  # noqa: E741
        o = torch.where(skip, o, o * old + kv[:, j] * new)
        m = top
    return o / l
