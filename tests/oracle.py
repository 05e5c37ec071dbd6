"""An oracle that shares nothing with the package: one sequence, fp64 scalars, loops over windows and candidates."""

import math
import struct

import numpy as np


def bf16(x: float) -> float:
    """Nearest bf16, ties to even, by integer arithmetic."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def rows(spec, kv_score, ape, gamma, *, theta, first=0):
    """All rows of a sequence without YaRN whose tokens start at a window boundary ``first``: [n, head_dim] fp64.

    Candidates before ``first`` do not exist.
    """
    rounded = bf16 if spec.rounding.value == "reference" else float
    latent = float if spec.rounding.value == "fused" else bf16
    d, r, n_tokens = spec.head_dim, spec.ratio, len(kv_score)
    width = spec.width
    out = []
    for window in range(n_tokens // r):
        row = np.zeros(d)
        for channel in range(d):
            candidates = []
            for back in range(spec.window):
                token = (window + 1) * r - spec.window + back
                if token < 0:
                    continue
                column = channel + (d if spec.overlap and token >= window * r else 0)
                score = float(kv_score[token][width + column]) if spec.has_gate else 0.0
                if ape is not None:
                    score += float(ape[token % r][column])
                candidates.append((score, float(kv_score[token][column])))
            top = max(s for s, _ in candidates)
            total = math.fsum(math.exp(s - top) for s, _ in candidates)
            row[channel] = math.fsum(math.exp(s - top) * k for s, k in candidates) / total
        u = [rounded(v) for v in row]
        scale = 1 / math.sqrt(math.fsum(v * v for v in u) / d + spec.eps)
        n = [latent(float(g) * (v * scale)) for g, v in zip(gamma, u, strict=True)]
        position = first + window * r
        for pair in range(spec.rope_dim // 2):
            inverse = np.float32(1) / np.float32(theta) ** np.float32(2 * pair / spec.rope_dim)
            angle = float(np.float32(position) * inverse)
            i = d - spec.rope_dim + 2 * pair
            a, b = n[i], n[i + 1]
            n[i] = rounded(a * math.cos(angle) - b * math.sin(angle))
            n[i + 1] = rounded(a * math.sin(angle) + b * math.cos(angle))
        if spec.rotate:
            n = [sum((-1) ** (i & j).bit_count() * n[j] for j in range(d)) / math.sqrt(d) for i in range(d)]
        out.append(n)
    return np.array(out).reshape(-1, d)
