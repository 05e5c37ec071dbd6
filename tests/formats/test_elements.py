"""Element codecs, exhaustively: every bf16 value, every code, every tie, against ml_dtypes and exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from kvcondense.formats.elements import (
    BF16,
    E2M1,
    E2M1_TIES_DOWN,
    E4M3,
    E4M3FNUZ,
    FP32,
    INT8,
    ceil_log2_ratio,
    decode_ue8m0,
    encode_ue8m0,
    pack_nibbles,
    unpack_nibbles,
)

ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
FINITE = torch.isfinite(ALL_BF16)
SMALL = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e4m3fnuz": (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
}


def theirs(x, dtype):
    """Codes that ml_dtypes gives fp32 values."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(x.numpy().astype(dtype).view(np.uint8).copy())


def values(element):
    """Every finite value of a small float, ascending from 0, from its codes."""
    return element.decode(torch.arange(element.max_code + 1, dtype=torch.uint8)).double()


def around(x):
    """x and its two fp32 neighbours."""
    x = x.float()
    low, high = (torch.nextafter(x, torch.full_like(x, limit)) for limit in (-np.inf, np.inf))
    return torch.cat([low, x, high])


@pytest.mark.parametrize("name", SMALL)
def test_all_bf16_values_get_the_codes_of_ml_dtypes(name):
    element, dtype = SMALL[name]
    # From half a step beyond the largest value on, ml_dtypes' FP8 overflows to NaN; here it saturates.
    inside = FINITE & ((ALL_BF16.abs() <= (464 if element is E4M3 else 247)) | (element is E2M1))
    assert inside.sum() > 30_000
    assert torch.equal(element.encode(ALL_BF16[inside]), theirs(ALL_BF16[inside], dtype))
    beyond = FINITE & (ALL_BF16.abs() >= element.largest)
    assert beyond.any()
    sign = torch.where(ALL_BF16[beyond] < 0, 1 << (element.bits - 1), 0)
    assert torch.equal(element.encode(ALL_BF16[beyond]).int(), element.max_code + sign)


@pytest.mark.parametrize("name", SMALL)
def test_every_tie_and_its_neighbours(name):
    element, dtype = SMALL[name]
    table = values(element)
    assert torch.equal(table, table.sort().values)
    ties = (table[1:] + table[:-1]) / 2
    assert torch.equal(ties.float().double(), ties), "ties are fp32 values"
    x = around(torch.cat([ties, table]))
    x = torch.cat([x, -x])
    assert torch.equal(element.encode(x), theirs(x, dtype))


def test_ties_down_differ_from_even_exactly_at_three_ties():
    table = values(E2M1)
    ties = (table[1:] + table[:-1]) / 2
    down = E2M1_TIES_DOWN.encode(ties.float())
    assert torch.equal(down.int(), torch.arange(7, dtype=torch.int32))
    assert ties[down != E2M1.encode(ties.float())].tolist() == [0.75, 1.75, 3.5]
    near = around(ties)
    near = near[~torch.isin(near, ties.float())]
    assert torch.equal(E2M1_TIES_DOWN.encode(near), E2M1.encode(near))
    finite = ALL_BF16[FINITE]
    codes = E2M1_TIES_DOWN.encode(finite)
    differ = codes != E2M1.encode(finite)
    assert sorted(finite[differ].abs().tolist()) == [0.75, 0.75, 1.75, 1.75, 3.5, 3.5]


@pytest.mark.parametrize("name", SMALL)
def test_every_code_decodes_as_in_ml_dtypes_and_encodes_back(name):
    element, dtype = SMALL[name]
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(dtype).astype(np.float32))
    got = element.decode(codes)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got)[~got.isnan()], torch.signbit(expected)[~got.isnan()])
    # A NaN has no sign: what sign a computed one has depends on the processor.
    assert torch.equal(element.encode(got), torch.where(got.isnan(), element.nan_code or 0, codes))
    assert element.largest == float(ml_dtypes.finfo(dtype).max)


def test_zeros_subnormals_and_what_is_not_finite():
    specials = torch.tensor([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38])
    assert E4M3.encode(specials).tolist() == [0, 128, 0, 128, 0x7F, 0x7F, 0x7F, 0x7E, 0xFE]
    assert E2M1.encode(specials).tolist() == [0, 8, 0, 8, 0, 0, 0, 7, 15]
    assert INT8.encode(specials).tolist() == [0, 0, 0, 0, 0, 0, 0, 127, -127]
    assert E4M3.encode(torch.tensor([2.0**-10, 2.0**-9, 1.5 * 2.0**-10])).tolist() == [0, 1, 1]


def test_int8_is_round_half_to_even_everywhere():
    halves = torch.arange(-260, 261) / 2
    x = torch.cat([around(halves), ALL_BF16[FINITE]])
    expected = np.clip(np.rint(x.double().numpy()), -127, 127).astype(np.int8)
    assert torch.equal(INT8.encode(x), torch.from_numpy(expected))
    codes = torch.arange(-127, 128, dtype=torch.int8)
    assert torch.equal(INT8.encode(INT8.decode(codes)), codes)


def test_ue8m0_all_bytes():
    codes = torch.arange(256).to(torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    torch.testing.assert_close(decode_ue8m0(codes), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(encode_ue8m0(torch.arange(-127, 128, dtype=torch.int32)), codes[:255])


def test_plain_types_round_to_even_and_have_one_nan():
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32))
    ties = (ALL_BF16[FINITE].view(torch.int32) | 0x8000).view(torch.float32)
    x = torch.cat([ALL_BF16, around(ties), noise])
    number = ~torch.isnan(x)
    expected = torch.from_numpy(x[number].numpy().astype(ml_dtypes.bfloat16).view(np.int16))
    assert torch.equal(BF16.encode(x[number]).view(torch.int16), expected)
    for length in (1, 7, 64, 1000):
        nan = torch.full((length,), float("nan"))
        for quiet in (nan, -nan, (nan.view(torch.int32) + 5).view(torch.float32)):
            assert BF16.encode(quiet).view(torch.int16).eq(0x7FC0).all()
            assert FP32.encode(quiet).view(torch.int32).eq(0x7FC00000).all()
    assert torch.equal(FP32.encode(x[number]).view(torch.int32), x[number].view(torch.int32))


@pytest.mark.parametrize("largest", [448.0, 6.0, 1.0])
def test_scale_exponents_at_and_around_every_power_of_two(largest):
    powers = torch.tensor([largest * 2.0**k for k in range(-116, 119)], dtype=torch.float64)
    positive = ALL_BF16[(ALL_BF16 >= 2.0**-116) & FINITE]
    amax = torch.cat([around(powers), positive, around(2.0 ** torch.arange(-116, 127, dtype=torch.float64))])
    k = ceil_log2_ratio(amax, largest)
    for a, e in zip(amax.tolist(), k.tolist(), strict=True):
        assert Fraction(a) <= Fraction(largest) * Fraction(2) ** e, (a, e)
        assert Fraction(a) > Fraction(largest) * Fraction(2) ** (e - 1), (a, e)


@pytest.mark.parametrize("largest", [448.0, 6.0])
def test_scale_exponents_are_those_of_deepseeks_kernel(largest):
    """REF multiplies by fp32(1 / L) and looks at the bits of the product: the same exponent, for every bf16 amax."""
    amax = ALL_BF16[(ALL_BF16 >= 1e-30) & FINITE]
    product = (amax * (torch.ones(1) / torch.tensor(largest))).view(torch.int32)
    expected = (product >> 23) - 127 + ((product & 0x7FFFFF) != 0).int()
    assert torch.equal(ceil_log2_ratio(amax, largest), expected)


def test_nibbles_even_channel_low():
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed[1, 2] == codes[1, 4] + 16 * codes[1, 5]
    assert torch.equal(unpack_nibbles(packed), codes)
