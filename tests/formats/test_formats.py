"""Whole formats against the golden pages (a second implementation), and what a format promises of its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_elements import ALL_BF16, FINITE

from kvcondense import KvCondenseError
from kvcondense.formats import FORMATS, describe, format_of_dtype, get_format
from kvcondense.formats.elements import E2M1, E4M3
from kvcondense.formats.scales import POW2
from kvcondense.golden import calibrated, pages

SCALE = torch.tensor(0.037)
SCALED = [name for name, fmt in FORMATS.items() if fmt.scaled]


def width(fmt):
    return fmt.head_dim or 512


def scale_of(fmt):
    return SCALE if fmt.tensor_scale else None


def stored_bytes(fmt, rows):
    """Bytes of the data part and of the scale part of every row, from the descriptor."""
    stored = fmt.encode(rows, scale_of(fmt))
    parts = [part.name for part in fmt.channels], [name for name in ("scales", "pad") if name in stored]
    return [torch.cat([stored[n].contiguous().view(torch.uint8) for n in names], dim=1) for names in parts if names]


def compare_with_golden(name, rows):
    fmt = FORMATS[name]
    parts = stored_bytes(fmt, rows)
    back = fmt.decode(fmt.encode(rows, scale_of(fmt)), scale_of(fmt))
    for i, row in enumerate(rows):
        golden = pages.encode_row(name, row, float(SCALE))
        for part, expected in zip(parts, golden, strict=False):
            assert part[i].numpy().tobytes() == expected, (name, i)
        expected = torch.from_numpy(pages.decode_row(name, *golden, float(SCALE))).float()
        torch.testing.assert_close(back[i], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_all_bf16_values_in_order_and_shuffled(name):
    fmt = FORMATS[name]
    compare_with_golden(name, ALL_BF16.view(-1, width(fmt)))
    finite = ALL_BF16[FINITE]
    shuffled = finite[torch.randperm(finite.shape[0], generator=torch.Generator().manual_seed(1))]
    compare_with_golden(name, shuffled[: finite.shape[0] // width(fmt) * width(fmt)].view(-1, width(fmt)))


@pytest.mark.parametrize("name", SCALED)
def test_amax_at_and_around_every_power_of_two(name):
    """Largest magnitudes L * 2^k and 2^k with their bf16 neighbours, next to values a few binades below."""
    fmt = FORMATS[name]
    largest = fmt.scaled.element.largest
    amax = torch.tensor([m * 2.0**k for k in range(-110, 111) for m in (largest / 64, 1.0)]).bfloat16()
    bits = amax.view(torch.int16)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int16)
    amax = bits.view(torch.bfloat16).float().flatten()
    part, gen = fmt.scaled, torch.Generator().manual_seed(2)
    stop = part.stop or width(fmt)
    size = part.scale.block or stop - part.start
    blocks = (stop - part.start) // size
    amax = torch.nn.functional.pad(amax, (0, -amax.shape[0] % blocks), value=1.0)
    values = (torch.rand(amax.shape[0], size, generator=gen) - 0.5) * amax[:, None]
    values[torch.arange(amax.shape[0]), torch.randint(0, size, amax.shape, generator=gen)] = amax
    values[::2] *= -1
    rows = torch.rand(amax.shape[0] // blocks, width(fmt), generator=gen)
    rows[:, part.start : stop] = values.view(-1, blocks * size)  # one amax for each block of a row
    compare_with_golden(name, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_special_rows(name):
    d = width(FORMATS[name])
    rows = torch.randn(10, d, generator=torch.Generator().manual_seed(3))
    rows[0], rows[1] = 0.0, -0.0
    rows[2], rows[3] = 1e-39, 3.38e38
    rows[4], rows[5] = float("nan"), float("inf")
    rows[6, 3], rows[7, d - 1], rows[8, 5] = float("nan"), float("inf"), -float("inf")
    compare_with_golden(name, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_a_number_never_reads_as_one(name):
    fmt = FORMATS[name]
    d = width(fmt)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for channel in (0, 65 if d > 65 else 3, d - 1):
            rows = torch.randn(2, d, generator=torch.Generator().manual_seed(4))
            rows[0, channel] = bad
            back = fmt.decode(fmt.encode(rows, scale_of(fmt)), scale_of(fmt))
            assert back[1].isfinite().all()
            if fmt.clean:
                plain = fmt.channels[-1].scale is None and channel == d - 1  # bf16 channels keep infinities
                assert torch.isinf(back[0, channel]) == (plain and bad == bad), (bad, channel)
                assert back[0].isfinite().sum() == d - int(plain and bad == bad)
                assert bad == bad or back[0, channel] == 0
                continue
            assert not back[0, channel].isfinite()
            inner = fmt.through if fmt.through is FORMATS["fp4_v41_times"] else fmt
            if channel >= (d if inner.scaled is None else inner.scaled.stop or d):
                assert back[0].isfinite().sum() == d - 1
            elif inner.scaled is not None and inner.scaled.element is E2M1 and fmt.scaled is not None:
                # No NaN code: the scale of the block says it.
                block = inner.scaled.scale.block
                wrong = back[0].isnan().view(-1, block).any(-1)
                assert wrong.sum() == 1
                assert back[0].isnan().view(-1, block)[wrong].all()
            elif fmt.scaled is not None and fmt.scaled.element is E4M3:
                assert back[0].isfinite().sum() == d - 1


@given(st.integers(0, 2**31), st.sampled_from(sorted(FORMATS)), st.floats(-6, 2))
def test_half_a_step_bounds_the_error_and_nothing_is_lost(seed, name, decade):
    fmt = FORMATS[name]
    rows = torch.randn(3, width(fmt), generator=torch.Generator().manual_seed(seed)) * 10**decade
    scale = rows.abs().amax().clamp(min=1e-30) / (0.98 * fmt.scaled.element.largest) if fmt.tensor_scale else None
    stored = fmt.encode(rows, scale)
    x = rows if name == "fp32" else rows.bfloat16().float()
    error = (fmt.decode(stored, scale) - x).abs()
    if x.abs().max() <= 2688:
        assert (error <= fmt.error_bound(rows, stored, scale)).all()
        assert not fmt.lost(rows, stored, scale).any()


@pytest.mark.parametrize("name", [n for n in SCALED if FORMATS[n].scaled.scale.kind in POW2 and not FORMATS[n].through])
def test_formats_with_their_own_scales_never_saturate(name):
    fmt = FORMATS[name]
    for value in (1e-30, 1.0, 449.0, 1.5e38):
        rows = torch.full((1, width(fmt)), value)
        assert not fmt.lost(rows, fmt.encode(rows), None).any()


@pytest.mark.parametrize("name", ["fp8_model1", "mxfp4_indexer"])
def test_next_to_the_largest_fp32_a_value_may_round_to_infinity(name):
    """q * s with both rounded up is no fp32 value; DeepSeek's code has infinity there too. Validation tells."""
    fmt = FORMATS[name]
    rows = torch.full((1, width(fmt)), 3.38e38)
    stored = fmt.encode(rows)
    back = fmt.decode(stored)
    assert back[0, :64].isinf().all()
    assert torch.equal(fmt.lost(rows, stored), back.isinf())


def test_what_saturates_is_lost_and_what_is_infinite_too():
    tensor, v41 = FORMATS["fp8_tensor"], FORMATS["fp4_v41"]
    scale = torch.tensor(1.0)
    rows = torch.tensor([[448.0, 460.0, 500.0, -1e9, float("nan"), float("inf"), 0.0]])
    expected = [[False, False, True, True, False, True, False]]
    assert tensor.lost(rows, tensor.encode(rows, scale), scale).tolist() == expected
    rows = torch.zeros(1, 512)
    rows[0, :3] = torch.tensor([2688.0, -2000.0, 1.0])
    rows[0, 16:18] = torch.tensor([5000.0, -1.0])
    lost = v41.lost(rows, v41.encode(rows))
    assert lost.nonzero().tolist() == [[0, 16]]


@pytest.mark.parametrize("name", [n for n in SCALED if FORMATS[n].scaled.scale.kind in POW2 and not FORMATS[n].through])
def test_quantising_twice_changes_no_value(name):
    fmt = FORMATS[name]
    rows = torch.randn(40, width(fmt), generator=torch.Generator().manual_seed(6)) * torch.logspace(-5, 3, 40)[:, None]
    once = fmt.decode(fmt.encode(rows))
    assert torch.equal(fmt.decode(fmt.encode(once)), once)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.through and not f.scaled])
def test_bf16_via_holds_exactly_what_the_format_gives_back(name):
    fmt = FORMATS[name]
    rows = torch.randn(20, width(fmt), generator=torch.Generator().manual_seed(7))
    inner = fmt.through.decode(fmt.through.encode(rows))
    assert torch.equal(fmt.decode(fmt.encode(rows)), inner), "q * s is a bf16 value: nothing is rounded twice"


def test_the_place_of_the_floor_matters_up_to_448_over_2_to_14():
    """max(amax / 448, 1e-4) and amax / 448 round up to the same power of two above 2^-14, not only above 1e-4."""
    amax_floor, scale_floor = FORMATS["fp8_model1"], FORMATS["fp8_model1_scale_floor"]
    edge = 448 * 2.0**-14
    for amax, same in ((0.06, True), (edge * (1 + 2**-7), True), (edge, False), (0.01, False), (1e-6, False)):
        rows = torch.full((1, 512), amax)
        assert torch.equal(amax_floor.encode(rows)["scales"], scale_floor.encode(rows)["scales"]) == same, amax
    zero = torch.zeros(1, 512)
    assert amax_floor.encode(zero)["scales"].unique().tolist() == [127 - 22]
    assert scale_floor.encode(zero)["scales"].unique().tolist() == [127 - 13]


SIZES = {  # rows per page: bytes of a page
    "bf16": {64: 65536},
    "fp8_model1": {64: 37440, 2: 1728, 1: 1152},
    "fp8_indexer_pow2": {64: 8448},
    "mxfp4_indexer": {64: 4352},
    "int8_indexer": {64: 8192},
    "fp4_v41": {64: 18432, 1: 512},
    "fp4_v41_interleaved": {64: 18432, 1: 288},
    "mxfp8_v41_window_interleaved": {64: 33792, 1: 528},
    "fp8_indexer_pow2_16x16": {64: 8448, 16: 2112},
    "fp8_indexer_ue8m0": {64: 8448},
    "mxfp8_v41_window": {64: 33792, 1: 1024},
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    for rows, size in SIZES[name].items():
        assert FORMATS[name].page_bytes(width(FORMATS[name]), rows) == size


@pytest.mark.parametrize("page_rows", [1, 2, 3, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_of_a_page_belongs_to_one_field_or_to_the_tail(name, page_rows):
    fmt, d = FORMATS[name], width(FORMATS[name])
    page_rows *= fmt.tile
    owner = np.zeros(fmt.page_bytes(d, page_rows), dtype=int)
    for f in fmt.fields(d):
        for row in range(page_rows):
            places = [f.byte(page_rows, row, index) for index in range(f.nbytes)]
            np.add.at(owner, places, 1)
            assert fmt.name_byte(d, page_rows, places[0]) == f"{f.name}[0] of row {row}"
            last = (f.nbytes - 1) // f.dtype.itemsize
            assert fmt.name_byte(d, page_rows, places[-1]) == f"{f.name}[{last}] of row {row}"
    payload = page_rows * fmt.row_bytes(d)
    assert (owner[:payload] == 1).all()
    assert not owner[payload:].any()
    assert len(owner) - payload < fmt.align
    assert len(owner) == pages.page_bytes(name, d, page_rows)
    if payload < len(owner):
        assert fmt.name_byte(d, page_rows, payload) == "the page's tail"


def test_rows_of_another_shape_are_refused_with_the_reason():
    with pytest.raises(KvCondenseError, match=r"head_dim 128 for mxfp4_indexer \(indexer keys: FP4.*got head_dim 512"):
        FORMATS["mxfp4_indexer"].check(512)
    with pytest.raises(KvCondenseError, match="its last 64 channels stay bf16"):
        FORMATS["fp8_model1"].check(512, 32)
    with pytest.raises(KvCondenseError, match="one of bf16, fp32"):
        get_format("fp7")
    with pytest.raises(KvCondenseError, match=r"torch.bfloat16 or torch.float32"):
        format_of_dtype(torch.float16)
    assert format_of_dtype(torch.bfloat16).name == "bf16"


def test_the_document_is_what_the_descriptors_say():
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    begin, end = "<!-- kvcondense info --formats --markdown -->\n", "<!-- end -->"
    assert text.split(begin)[1].split(end)[0] == describe.markdown()


@pytest.mark.parametrize("kind", ["csa", "hca", "indexer"])
def test_errors_on_calibrated_rows_are_those_of_the_elements(kind):
    """Relative to the value, e4m3 errs by at most 1/16 and e2m1 by 1/4; more bits must lose less."""
    x = calibrated.rows(kind, count=32)
    assert torch.equal(x, x.bfloat16().float())
    assert torch.equal(x, calibrated.rows(kind, count=32))
    errors = {n: calibrated.error(f, x) for n, f in FORMATS.items() if kind in calibrated.kinds_of(f)}
    assert (errors["bf16"]["mean"], errors["bf16"]["max"]) == (0.0, 0.0)
    assert errors["bf16"]["least cosine"] == pytest.approx(1.0, abs=1e-12)
    fine, coarse = ("fp8_indexer_pow2", "mxfp4_indexer") if kind == "indexer" else ("fp8_model1", "fp4_v41")
    assert 0 < errors[fine]["mean"] < errors[coarse]["mean"] < 0.15
    assert 0.999 < errors[fine]["least cosine"] < 1
    assert 0.98 < errors[coarse]["least cosine"] < errors[fine]["least cosine"]
    assert ("int8_indexer" in errors) == (kind == "indexer")
