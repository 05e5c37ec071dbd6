"""Comparators of the golden run: allclose, bf16 ulp, error ratio; each can be applied row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvcondense.numerics import ulp_distance
from kvcondense.spec import CompressorSpec

Comparator = Callable[[torch.Tensor, torch.Tensor], "Comparison"]


@dataclass(frozen=True)
class Comparison:
    """Outcome for one output: the worst absolute error, the worst distance in ulp, and where it went wrong.

    None: the question makes no sense, as for the ulp between a row and its quantisation.
    """

    passed: bool
    worst: float
    worst_ulp: int | None
    equal: float | None
    """Fraction of equal elements among those that are not zero on both sides (unwritten rows say nothing)."""
    detail: str = ""
    ulps: tuple[tuple[str, int], ...] = ()
    """How many elements lie how far away, in ulp; elements that are zero on both sides are left out."""
    first: int | None = None
    """The first element that is wrong, and how many are."""
    count: int = 0


def allclose(atol: float = 1e-3, rtol: float = 1e-3) -> Comparator:
    """Every element within atol + rtol * |expected| (the default of pypto-lib's harness)."""
    return ratio_allclose(atol, rtol, max_error_ratio=0.0)


def ratio_allclose(atol: float = 1e-3, rtol: float = 1e-3, max_error_ratio: float = 0.005) -> Comparator:
    """Any NaN or Inf fails; at most round(max_error_ratio * numel) elements may exceed atol + rtol * |expected|."""

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
        return _compare(actual, expected, _close(actual, expected, atol, rtol), max_error_ratio)

    return compare


def bf16_allclose_or_ulp(max_ulp: int = 1, atol: float = 1e-3, rtol: float = 1e-3) -> Comparator:
    """bf16: within atol + rtol * |expected| in fp32, or both finite and at most ``max_ulp`` bf16 steps apart.

    Steps are counted on a scale that is monotone across zero; the raw int16 difference of the original is not.
    """

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
        for name, t in (("actual", actual), ("expected", expected)):
            if t.dtype != torch.bfloat16:
                return Comparison(False, float("nan"), -1, 0.0, f"{name} is {t.dtype}, expected bfloat16")
        near = ulp_distance(actual, expected) <= max_ulp if actual.shape == expected.shape else torch.tensor(False)
        return _compare(
            actual, expected, _close(actual, expected, atol, rtol) | (_finite(actual, expected) & near), 0.0
        )

    return compare


def rowwise(comparator: Comparator) -> Comparator:
    """Apply ``comparator`` to every row of the last dimension, so that a wrong row cannot hide in a large cache."""

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
        whole = _compare(actual, expected, torch.ones_like(actual, dtype=torch.bool), 0.0)
        if actual.shape != expected.shape:
            return whole
        rows = zip(actual.flatten(0, -2), expected.flatten(0, -2), strict=True)
        failed = [(i, c) for i, (a, e) in enumerate(rows) if not (c := comparator(a, e)).passed]
        if not failed:
            return whole
        index, first = failed[0]
        detail = f"{len(failed)} of {actual.flatten(0, -2).shape[0]} rows; first is row {index}: {first.detail}"
        return replace(whole, passed=False, detail=detail)

    return compare


def same_bytes(describe: Callable[[int], str]) -> Comparator:
    """uint8 tensors that must be equal; worst counts the bytes that differ, ``describe`` says what byte i is."""

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
        if actual.shape != expected.shape:
            return Comparison(False, float("nan"), -1, 0.0, f"{list(actual.shape)} instead of {list(expected.shape)}")
        wrong = (actual != expected).flatten().nonzero()[:, 0]
        detail = ""
        if wrong.shape[0]:
            i = int(wrong[0])
            pair = f"{int(actual.flatten()[i])} instead of {int(expected.flatten()[i])}"
            detail = f"{wrong.shape[0]} of {actual.numel()} bytes; first at {describe(i)}: {pair}"
        equal = 1 - wrong.shape[0] / max(actual.numel(), 1)
        return Comparison(not wrong.shape[0], float(wrong.shape[0]), None, equal, detail)

    return compare


Quantisation = Callable[[torch.Tensor], torch.Tensor]


def bounds_of_rows(
    spec: CompressorSpec, expected: torch.Tensor, quantisation: Quantisation | None = None
) -> torch.Tensor:
    """How far an element of a row [..., d] may lie from the reference's: fp64, of the shape of ``expected``.

    A change of the summation order flips a few bf16 roundings before RoPE. Allowed per element: 1e-3 + 1e-3 |e|; two
    bf16 steps of e; on RoPE channels 3.3 * 2^-8 * hypot(pair), since a flip in one channel of a pair reaches the other;
    after a Hadamard rotation, which spreads a flip over the row, 2^-7 of the row's RMS. No budget of outliers; PR 270's
    rules, 1e-3 or one step, fail correct outputs now and then. ``quantisation``: what the cache's format may add.
    """
    e = expected.to(torch.float64)
    step = torch.ldexp(torch.ones_like(e), torch.frexp(e).exponent - 8)  # one bf16 ulp of e
    bound = torch.maximum(1e-3 + 1e-3 * e.abs(), 2 * step)
    if spec.rotate:
        bound = torch.maximum(bound, 2**-7 * e.square().mean(-1, keepdim=True).sqrt())
    elif spec.rope_dim:
        pairs = e[..., -spec.rope_dim :].unflatten(-1, (-1, 2))
        reach = 3.3 * 2**-8 * pairs.norm(dim=-1).repeat_interleave(2, dim=-1)
        bound[..., -spec.rope_dim :] = torch.maximum(bound[..., -spec.rope_dim :], reach)
    return bound if quantisation is None else bound + quantisation(expected)


def row_bounds(spec: CompressorSpec, min_equal: float = 0.0, quantisation: Quantisation | None = None) -> Comparator:
    """Rows [..., d] of a compressor against the reference, within ``bounds_of_rows``.

    ``min_equal``: fraction of the elements that must be bit-equal, which tells a missing rounding from a flipped one.
    """

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
        if actual.shape != expected.shape:
            return _compare(actual, expected, torch.zeros(1, dtype=torch.bool), 0.0)
        bound, e = bounds_of_rows(spec, expected, quantisation), expected.to(torch.float64)
        result = _compare(actual, expected, (actual.to(torch.float64) - e).abs() <= bound, 0.0)
        if quantisation is not None:
            return replace(result, worst_ulp=None, equal=None, ulps=())
        if result.passed and result.equal is not None and result.equal < min_equal:
            detail = f"{result.equal:.2%} of the elements are bit-equal, at least {min_equal:.2%} must be"
            return replace(result, passed=False, detail=detail)
        return result

    return compare


def _finite(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(actual) & torch.isfinite(expected)


def _close(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> torch.Tensor:
    if actual.shape != expected.shape:
        return torch.zeros(1, dtype=torch.bool)
    a, e = actual.to(torch.float64), expected.to(torch.float64)
    return _finite(actual, expected) & ((a - e).abs() <= atol + rtol * e.abs())


def _compare(actual: torch.Tensor, expected: torch.Tensor, good: torch.Tensor, max_error_ratio: float) -> Comparison:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        detail = f"{actual.dtype} {list(actual.shape)} instead of {expected.dtype} {list(expected.shape)}"
        return Comparison(False, float("nan"), -1, 0.0, detail)
    if actual.numel() == 0:
        return Comparison(True, 0.0, 0, 1.0)
    delta = (actual.to(torch.float64) - expected.to(torch.float64)).abs()
    distance = ulp_distance(actual, expected)
    told = (actual != 0) | (expected != 0)
    equal = float((actual == expected)[told].to(torch.float64).mean()) if bool(told.any()) else 1.0
    finite = _finite(actual, expected)
    bad = (~(good & finite)).flatten().nonzero()[:, 0]
    passed = bool(finite.all()) and bad.shape[0] <= round(max_error_ratio * actual.numel())
    detail, first = "", None
    if not passed:
        first = i = int(bad[0])
        pair = f"{actual.flatten()[i].item()!r} instead of {expected.flatten()[i].item()!r}"
        detail = f"{bad.shape[0]} of {actual.numel()} elements; first at {i}: {pair}"
    worst = float(delta.nan_to_num(float("inf")).max())
    ulps = _buckets(distance[told])
    return Comparison(passed, worst, int(distance.max()), equal, detail, ulps, first, bad.shape[0])


def _buckets(distance: torch.Tensor) -> tuple[tuple[str, int], ...]:
    """Elements by distance: 0, 1, 2, 3 to 4, 5 to 8, ... 65 and more."""
    low, found = 0, []
    for high in (0, 1, 2, 4, 8, 16, 32, 64):
        found.append(
            (f"{high}" if low == high else f"{low}-{high}", int(((distance >= low) & (distance <= high)).sum()))
        )
        low = high + 1
    return (*found, (f">{low - 1}", int((distance >= low).sum())))
