"""Rows of tokens as a pool reads them: of fp32, of bf16, or of bf16 with scores rounded as a bf16 state holds them.

Classes emit instructions; the functions behind them give the same numbers, by a kind that is known at run time.
Channels are named by their offset in bytes of fp32, whatever a row holds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import bf16, simd
from kvcondense.backends.cpu.kernels.bf16 import load_bf16, round_bf16
from kvcondense.backends.cpu.kernels.functions import inlined
from kvcondense.backends.cpu.kernels.simd import load
from kvcondense.backends.cpu.target import target


class Fp32:
    """Rows of fp32."""

    size = 4
    at_once = 2 if target().registers < 32 else 4
    """Tokens whose weights are formed step by step together, which hides their latency: as many as registers hold."""

    @staticmethod
    def value(b: Any, row: Any, at: Any) -> Any:
        """A vector of channels, in fp32."""
        return simd.read(b, b.add(row, at), simd.F32.llvm, 4)

    @classmethod
    def score(cls, b: Any, row: Any, ape: Any, at: Any) -> Any:
        """z, the score with its ape, in the form that ``number`` and ``above`` take."""
        return b.fadd(cls.value(b, row, at), cls.value(b, ape, at))

    @staticmethod
    def number(b: Any, z: Any) -> Any:  # noqa: ARG004 - as the others have it
        """z in fp32."""
        return z

    @staticmethod
    def above(b: Any, z: Any, m: Any) -> Any:
        """z - m in fp32."""
        return b.fsub(z, m)


class Bf16(Fp32):
    """Rows of bf16."""

    size = 2
    at_once = 8 if target().fast_bf16_products else Fp32.at_once  # sums that are products are few, but take long

    @staticmethod
    def value(b: Any, row: Any, at: Any) -> Any:
        return bf16.emit_load_bf16(b, _halved(b, row, at))

    @classmethod
    def score(cls, b: Any, row: Any, ape: Any, at: Any) -> Any:
        return bf16.emit_sum(b, bf16.emit_score(b, _halved(b, row, at)), Fp32.value(b, ape, at))


class Rounded(Bf16):
    """Rows of bf16, z rounded to bf16."""

    @classmethod
    def score(cls, b: Any, row: Any, ape: Any, at: Any) -> Any:
        return bf16.emit_nearest_score(b, super().score(b, row, ape, at))

    @staticmethod
    def number(b: Any, z: Any) -> Any:
        return bf16.emit_widened(b, z)

    @staticmethod
    def above(b: Any, z: Any, m: Any) -> Any:
        return bf16.emit_sum(b, z, b.fneg(m))


def _halved(b: Any, row: Any, at: Any) -> Any:
    return b.add(row, b.lshr(at, ir.Constant(at.type, 1)))


@inlined
def value_of(kind, row, c):
    """A vector of channels, in fp32; kind: FP32, BF16 or BF16_ROUNDED."""
    return load(row + c) if kind == params.FP32 else load_bf16(row + c // 2)


@inlined
def score_of(kind, candidate, c):
    """z: the score with its ape."""
    z = value_of(kind, candidate.score, c) + load(candidate.bias + c)
    return round_bf16(z) if kind == params.BF16_ROUNDED else z
