"""Mutants of what is stored: codes, scales, and where the bytes of a row lie in a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kvcondense.backends.reference import Stages
from kvcondense.conformance.mutants.mutant import ALIASING, NUMERICS, TRANSFER, Mutant
from kvcondense.formats import CacheFormat, Channels
from kvcondense.formats.descriptor import PAD, SCALES
from kvcondense.formats.elements import E2M1, E2M1_TIES_DOWN, E4M3, E4M3FNUZ, Element
from kvcondense.formats.scales import E4M3_SCALES, POW2, ScaleRule
from kvcondense.layout.cache import PagedCache
from kvcondense.stages import store


def _scatter_as(change: Callable[[CacheFormat], CacheFormat]) -> Callable[..., None]:
    """Store in another format than the cache's, of the same size."""

    def scatter(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
        store.scatter(rows, slot, replace(cache, format=change(cache.format)), exact)

    return scatter


def _with_channels(change: Callable[[Channels], Channels]) -> Callable[..., None]:
    """The same for a format whose channels are other ones."""
    return _scatter_as(lambda form: replace(form, channels=tuple(change(c) for c in form.channels)))


class _RoundedDown(ScaleRule):
    def exponent(self, amax: torch.Tensor, element: Element) -> torch.Tensor:
        up = super().exponent(amax, element)
        exact = torch.ldexp(torch.full_like(amax, element.largest), up) == amax
        return up - (~exact).to(torch.int32)


class _RoundedAfter(ScaleRule):
    """Values are divided by the scale as computed; what is stored is the scale as rounded."""

    def _apply(self, blocks: torch.Tensor, amax: torch.Tensor, element: Element) -> tuple[torch.Tensor, torch.Tensor]:
        stored, scaled = super()._apply(blocks, amax, element)
        if self.kind not in (*POW2, *E4M3_SCALES):
            return stored, scaled
        return stored, blocks / (amax / element.largest)[..., None]


def _floor_on_scale(c: Channels) -> Channels:
    return replace(c, scale=c.scale and replace(c.scale, floor_on_scale=True))


def _round_down(c: Channels) -> Channels:
    return replace(c, scale=c.scale and _RoundedDown(**vars(c.scale)))


def _round_after(c: Channels) -> Channels:
    return replace(c, scale=c.scale and _RoundedAfter(**vars(c.scale)))


def _ties_down(c: Channels) -> Channels:
    return replace(c, element=E2M1_TIES_DOWN if c.element == E2M1 else c.element)


def _fnuz(c: Channels) -> Channels:
    return replace(c, element=E4M3FNUZ if c.element == E4M3 else c.element)


def _inline(form: CacheFormat) -> CacheFormat:
    return replace(form, sections=(tuple(name for section in form.sections for name in section),))


def _split(form: CacheFormat) -> CacheFormat:
    """Rows and their scales, where they are all of a page's one section, as two sections."""
    *data, last = form.sections[0]
    interleaved = len(form.sections) == 1 and last == SCALES
    return replace(form, sections=(tuple(data), (last,))) if interleaved else form


def _scatter_without_pad(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    stored = cache.encode(rows[slot >= 0], exact)
    cache.put(slot[slot >= 0], {name: values for name, values in stored.items() if name != PAD})


def _scatter_nibbles_swapped(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    stored = cache.encode(rows[slot >= 0], exact)
    for c in cache.format.channels:
        if c.element.bits == 4:
            stored[c.name] = (stored[c.name] << 4) | (stored[c.name] >> 4)
    cache.put(slot[slot >= 0], stored)


def _scatter_fp32_scales(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    """Where a scale is its exponent's byte, once or more often, store as many leading bytes of it as an fp32."""
    stored, scaled = cache.encode(rows[slot >= 0], exact), cache.format.scaled
    if scaled is not None and scaled.scale is not None and scaled.scale.kind in POW2 and scaled.scale.copies:
        scales = stored[SCALES]
        fp32 = (scales.to(torch.int64) & 0xFF) << 23
        stored[SCALES] = (fp32 >> (32 - 8 * scaled.scale.nbytes)).to(scales.dtype)
    cache.put(slot[slot >= 0], stored)


MUTANTS = (
    Mutant(
        "scale-floor-on-scale",
        "the scale has a floor where the format has one on amax",
        NUMERICS,
        Stages(scatter=_with_channels(_floor_on_scale)),
    ),
    Mutant(
        "scale-rounded-down",
        "power-of-two scales are rounded down, and the largest values saturate",
        NUMERICS,
        Stages(scatter=_with_channels(_round_down)),
    ),
    Mutant(
        "scale-rounded-after",
        "values are divided by the scale before it is rounded to what is stored",
        NUMERICS,
        Stages(scatter=_with_channels(_round_after)),
    ),
    Mutant(
        "mx-scale-as-fp32",
        "the bytes of an fp32 scale where the format has its exponent",
        TRANSFER,
        Stages(scatter=_scatter_fp32_scales),
    ),
    Mutant(
        "fp4-ties-down",
        "FP4 ties go down where the format rounds them to even",
        NUMERICS,
        Stages(scatter=_with_channels(_ties_down)),
    ),
    Mutant(
        "fp4-nibbles-swapped",
        "the even channel is in the high nibble",
        TRANSFER,
        Stages(scatter=_scatter_nibbles_swapped),
    ),
    Mutant(
        "fnuz-for-e4m3",
        "codes of gfx942's e4m3fnuz, which readers of e4m3 take for twice the value",
        TRANSFER,
        Stages(scatter=_with_channels(_fnuz)),
    ),
    Mutant(
        "scales-inline",
        "scales follow their row instead of the page's rows",
        TRANSFER,
        Stages(scatter=_scatter_as(_inline)),
    ),
    Mutant(
        "interleaved-as-split",
        "scales follow the page's rows where they belong behind their own",
        TRANSFER,
        Stages(scatter=_scatter_as(_split)),
    ),
    Mutant("pad-unwritten", "the pad byte keeps what was there", ALIASING, Stages(scatter=_scatter_without_pad)),
)
