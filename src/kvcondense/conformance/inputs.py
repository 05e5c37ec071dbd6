"""The tokens and weights of a history: values of the generator, junk, or patterns; for scripts and for vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvcondense.conformance import generator
from kvcondense.conformance.cases import JUNK
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class Piece:
    """Tokens first .. first + count - 1 of a stream, or ``count`` tokens whose every channel is ``junk``."""

    stream: int
    first: int
    count: int
    junk: str = ""


@dataclass(frozen=True)
class Inputs:
    """Where numbers come from: the generator with ``seed``, times ``scale``.

    Of patterns, ``patterns`` [R, head_dim] has the tokens of each stream, all alike, and ``norm`` the norm's weight.
    """

    spec: CompressorSpec
    seed: int
    scale: float
    patterns: torch.Tensor | None = None
    norm: torch.Tensor | None = None

    def tokens(self, pieces: Iterable[Piece]) -> torch.Tensor:
        """What pieces hold: [T, 2N] fp32."""
        width, found = self.spec.projected, [torch.zeros(0, self.spec.projected)]
        for p in pieces:
            if p.junk:
                found.append(torch.full((p.count, width), JUNK[p.junk] or 0.0))
            elif self.patterns is not None:
                kv = self.patterns[p.stream - generator.TOKENS].float().repeat(self.spec.halves)
                found.append(torch.cat([kv, torch.zeros(width - kv.shape[0])]).expand(p.count, width))
            else:
                values = generator.values(self.seed, p.stream, p.first * width, p.count * width)
                found.append((values * self.scale).view(p.count, width))
        return torch.cat(found)

    def weights(self) -> CompressorWeights:
        """Weight of the norm 1 + value / 4, ape value / 2 times the scale; of patterns, their own, and no ape."""
        spec, norm, ape = self.spec, self.norm, None
        if norm is None:
            norm = 1 + generator.values(self.seed, generator.NORM, 0, spec.head_dim) / 4
        if spec.has_ape:
            values = generator.values(self.seed, generator.APE, 0, spec.ratio * spec.width) / 2 * self.scale
            ape = (torch.zeros_like(values) if self.patterns is not None else values).view(spec.ratio, spec.width)
        return CompressorWeights(norm=norm, ape=ape)
