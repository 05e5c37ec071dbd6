# pyright: reportInvalidTypeForm=false, reportMissingImports=false, reportGeneralTypeIssues=false
"""The decode step in pypto.language, from hidden states to the cache: one token for each request, one shape a program.

``Form`` says for which shape; ``program`` makes it. The language reads the function's source: names of ``Form`` become
numbers, ``if`` on them is decided there; scalars that are read from tensors stay runtime values. Nothing is imported
before a program is made.
"""

from dataclasses import dataclass
from typing import Any

POSITION, BASE, BEGIN, KEPT, SLOT = range(5)
"""Rows of ``where`` [5, batch] int32: position (-1: nobody), first row of the ring, first candidate of the window that
ends (-1: none does), state row that takes the token (-1: none), cache row that takes the window's row (-1: none)."""


@dataclass(frozen=True)
class Form:
    """What a program is made for. batch: requests, a multiple of 16; hidden: of x, or 0 for kv_score in its place.

    state_rows, ring_rows: of the whole state and of one ring; cache_rows: of the cache.
    """

    batch: int
    hidden: int
    head_dim: int
    ratio: int
    overlap: bool
    rope_dim: int
    eps: float
    state_rows: int
    ring_rows: int
    cache_rows: int

    @property
    def width(self) -> int:
        """N: channels of kv, and of scores."""
        return self.head_dim * (1 + self.overlap)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.ratio * (1 + self.overlap)

    @property
    def depth(self) -> int:
        """Hidden channels of one product."""
        return next(k for k in (512, 256, 128, 64, 32, 16) if self.hidden % k == 0)

    @property
    def pairs(self) -> int:
        """Columns of the selectors: RoPE's pairs, and columns of zeros up to a tile's least width."""
        return max(16, self.rope_dim // 2)

    @property
    def columns(self) -> int:
        """Channels of one tile."""
        return min(128, self.head_dim)


def program(form: Form) -> Any:
    """The step as a ``pl.program``.

    Operands: tokens [batch, hidden] bf16 (kv_score [batch, 2 N] fp32 if hidden is 0), w [2 N, hidden] bf16, ape
    [ratio, N] and gain [1, d] fp32, cos and sin [batch, pairs] fp32, even and odd [rope_dim, pairs] bf16 selectors,
    signs [d, d] bf16 (Hadamard, +-1), state [state_rows, 2 N] fp32 and cache [cache_rows, d] bf16 in place, out
    [batch, d] fp32, where [5, batch] and rotate [8] int32.
    """
    import pypto.language as pl

    B, D, d, N = form.batch, form.hidden, form.head_dim, form.width  # noqa: N806 - the letters of the formula
    W, R, RING = form.window, form.ratio, form.ring_rows  # noqa: N806
    ROWS, SLOTS, ROPE, HALF = form.state_rows, form.cache_rows, form.rope_dim, form.pairs  # noqa: N806
    K, C = form.depth if D else 16, form.columns  # noqa: N806
    OVERLAP, LATE = form.overlap, N - d  # noqa: N806
    FIRST = R if OVERLAP else 0  # noqa: N806 - candidates of the window itself
    XC, XT = (D, pl.BF16) if D else (2 * N, pl.FP32)  # noqa: N806
    WC = max(D, 16)  # noqa: N806
    NOPE, EPS, INV, HAD = d - ROPE, form.eps, 1.0 / d, d**-0.5  # noqa: N806

    if form.hidden:

        @pl.inline
        def fresh_rows(
            tokens: pl.Tensor[[B, XC], XT], w: pl.Tensor[[2 * N, WC], pl.BF16]
        ) -> pl.Tensor[[B, 2 * N], pl.FP32]:
            """kv and scores of the tokens, without ape: one product for both."""
            fresh = pl.create_tensor([B, 2 * N], dtype=pl.FP32)
            for n in pl.parallel(0, 2 * N, C):
                with pl.at(level=pl.Level.CORE_GROUP, name_hint="project"):
                    part = pl.matmul(tokens[:, 0:K], w[n : n + C, 0:K], out_dtype=pl.FP32, b_trans=True)
                    for k in pl.range(K, D, K):
                        part = pl.matmul_acc(part, tokens[:, k : k + K], w[n : n + C, k : k + K], b_trans=True)
                    fresh = pl.assemble(fresh, part, [0, n])
            return fresh

    else:

        @pl.inline
        def fresh_rows(
            tokens: pl.Tensor[[B, XC], XT],
            w: pl.Tensor[[2 * N, WC], pl.BF16],  # noqa: ARG001
        ) -> pl.Tensor[[B, 2 * N], pl.FP32]:
            """The same, from kv_score; w is not looked at."""
            fresh = pl.create_tensor([B, 2 * N], dtype=pl.FP32)
            for n in pl.parallel(0, 2 * N, C):
                with pl.at(level=pl.Level.CORE_GROUP, name_hint="take"):
                    fresh = pl.assemble(fresh, pl.add(tokens[:, n : n + C], 0.0), [0, n])
            return fresh

    @pl.program
    class DecodeStep:
        @pl.function(type=pl.FunctionType.Opaque)
        def decode_step(
            self,
            tokens: pl.Tensor[[B, XC], XT],
            w: pl.Tensor[[2 * N, WC], pl.BF16],
            ape: pl.Tensor[[R, N], pl.FP32],
            gain: pl.Tensor[[1, d], pl.FP32],
            cos: pl.Tensor[[B, HALF], pl.FP32],
            sin: pl.Tensor[[B, HALF], pl.FP32],
            even: pl.Tensor[[ROPE, HALF], pl.BF16],
            odd: pl.Tensor[[ROPE, HALF], pl.BF16],
            signs: pl.Tensor[[d, d], pl.BF16],
            state: pl.InOut[pl.Tensor[[ROWS, 2 * N], pl.FP32]],
            cache: pl.InOut[pl.Tensor[[SLOTS, d], pl.BF16]],
            out: pl.Out[pl.Tensor[[B, d], pl.FP32]],
            where: pl.Tensor[[5, B], pl.INT32],
            rotate: pl.Tensor[[8], pl.INT32],
        ) -> tuple[pl.Tensor[[ROWS, 2 * N], pl.FP32], pl.Tensor[[SLOTS, d], pl.BF16], pl.Tensor[[B, d], pl.FP32]]:
            fresh = fresh_rows(tokens, w)
            pooled = pl.create_tensor([B, d], dtype=pl.FP32)
            for b in pl.range(B):
                ends = pl.read(where, [2, b])
                if ends >= 0:  # compared as it is read: an INDEX has no sign
                    p = pl.cast(pl.read(where, [0, b]), target_type=pl.INDEX)
                    base = pl.cast(pl.read(where, [1, b]), target_type=pl.INDEX)
                    begin = pl.cast(ends, target_type=pl.INDEX)
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="pool"):
                        # The step's own token first: the maximum then begins at a score, and what loops carry is read
                        # behind them by nothing but the division.
                        own = fresh[b : b + 1, N + LATE : N + LATE + d]
                        top = pl.add(own, ape[R - 1 : R, LATE : LATE + d])
                        den = pl.full([1, d], dtype=pl.FP32, value=1.0)
                        num = pl.mul(fresh[b : b + 1, LATE : LATE + d], 1.0)
                        if OVERLAP:  # the window before, in the first channels
                            for j in pl.range(begin, R):
                                row = base + (p + j - (W - 1)) % RING
                                z = state[row : row + 1, N : N + d]
                                v = state[row : row + 1, 0:d]
                                new_top = pl.maximum(top, z)
                                keep = pl.exp(pl.sub(top, new_top))
                                weight = pl.exp(pl.sub(z, new_top))
                                den = pl.add(pl.mul(den, keep), weight)
                                num = pl.add(pl.mul(num, keep), pl.mul(v, weight))
                                top = new_top
                        for j in pl.range(FIRST, W - 1):
                            row = base + (p + j - (W - 1)) % RING
                            z = state[row : row + 1, N + LATE : N + LATE + d]
                            v = state[row : row + 1, LATE : LATE + d]
                            new_top = pl.maximum(top, z)
                            keep = pl.exp(pl.sub(top, new_top))
                            weight = pl.exp(pl.sub(z, new_top))
                            den = pl.add(pl.mul(den, keep), weight)
                            num = pl.add(pl.mul(num, keep), pl.mul(v, weight))
                            top = new_top
                        pooled = pl.assemble(pooled, pl.div(num, den), [b, 0])

            normed = pl.create_tensor([B, d], dtype=pl.BF16)
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="norm"):
                squares = pl.full([1, B], dtype=pl.FP32, value=0.0)
                for c in pl.range(0, d, C):
                    u = pl.cast(pl.cast(pooled[:, c : c + C], target_type=pl.BF16), target_type=pl.FP32)
                    squares = pl.add(squares, pl.reshape(pl.row_sum(pl.mul(u, u)), [1, B]))
                scale = pl.reshape(pl.recip(pl.sqrt(pl.add(pl.mul(squares, INV), EPS))), [B, 1])
                for c in pl.range(0, d, C):
                    u = pl.cast(pl.cast(pooled[:, c : c + C], target_type=pl.BF16), target_type=pl.FP32)
                    y = pl.col_expand_mul(pl.row_expand_mul(u, scale), gain[:, c : c + C])
                    normed = pl.assemble(normed, pl.cast(y, target_type=pl.BF16), [0, c])

            evens = pl.create_tensor([B, HALF], dtype=pl.FP32)
            odds = pl.create_tensor([B, HALF], dtype=pl.FP32)
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="select_even"):
                evens = pl.assemble(evens, pl.matmul(normed[:, NOPE:d], even[:, :], out_dtype=pl.FP32), [0, 0])
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="select_odd"):
                odds = pl.assemble(odds, pl.matmul(normed[:, NOPE:d], odd[:, :], out_dtype=pl.FP32), [0, 0])
            turned_even = pl.create_tensor([B, HALF], dtype=pl.BF16)
            turned_odd = pl.create_tensor([B, HALF], dtype=pl.BF16)
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="turn"):
                a = pl.sub(pl.mul(evens[:, :], cos[:, :]), pl.mul(odds[:, :], sin[:, :]))
                turned_even = pl.assemble(turned_even, pl.cast(a, target_type=pl.BF16), [0, 0])
                e = pl.add(pl.mul(evens[:, :], sin[:, :]), pl.mul(odds[:, :], cos[:, :]))
                turned_odd = pl.assemble(turned_odd, pl.cast(e, target_type=pl.BF16), [0, 0])
            merged = pl.create_tensor([B, ROPE], dtype=pl.FP32)
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="merge"):
                both = pl.matmul(turned_even[:, :], even[:, :], out_dtype=pl.FP32, b_trans=True)
                both = pl.matmul_acc(both, turned_odd[:, :], odd[:, :], b_trans=True)
                merged = pl.assemble(merged, both, [0, 0])
            with pl.at(level=pl.Level.CORE_GROUP, name_hint="put_turned"):
                normed = pl.assemble(normed, pl.cast(merged[:, :], target_type=pl.BF16), [0, NOPE])

            flag = pl.read(rotate, [0])
            spread = pl.create_tensor([B, d], dtype=pl.FP32)
            if flag == 1:
                for n in pl.parallel(0, d, C):
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="rotate"):
                        spread = pl.assemble(
                            spread, pl.matmul(normed[:, 0:d], signs[:, n : n + C], out_dtype=pl.FP32), [0, n]
                        )
                for n in pl.parallel(0, d, C):
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="scale"):
                        out = pl.assemble(out, pl.mul(spread[:, n : n + C], HAD), [0, n])
            else:
                for n in pl.parallel(0, d, C):
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="widen"):
                        out = pl.assemble(out, pl.cast(normed[:, n : n + C], target_type=pl.FP32), [0, n])

            for b in pl.range(B):
                takes = pl.read(where, [3, b])
                if takes >= 0:
                    kept = pl.cast(takes, target_type=pl.INDEX)
                    phase = pl.cast(pl.read(where, [0, b]), target_type=pl.INDEX) % R
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="keep"):
                        state = pl.assemble(state, fresh[b : b + 1, 0:N], [kept, 0])
                        biased = pl.add(fresh[b : b + 1, N : 2 * N], ape[phase : phase + 1, :])
                        state = pl.assemble(state, biased, [kept, N])
                stores = pl.read(where, [4, b])
                if stores >= 0:
                    slot = pl.cast(stores, target_type=pl.INDEX)
                    with pl.at(level=pl.Level.CORE_GROUP, name_hint="store"):
                        cache = pl.assemble(cache, pl.cast(out[b : b + 1, :], target_type=pl.BF16), [slot, 0])
            return state, cache, out

    return DecodeStep
