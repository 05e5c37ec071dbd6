"""Cache formats that nobody has listed, but a descriptor can say: what backends' encoders must not take for granted."""

from kvcondense.formats import FORMATS
from kvcondense.formats.descriptor import CacheFormat, Channels
from kvcondense.formats.elements import BF16, E4M3, SmallFloat
from kvcondense.formats.scales import Scale, ScaleRule

_E2M3 = SmallFloat("e2m3", bits=6, mantissa=3, bias=1, max_code=0x1F, nan_code=None)


def _rows(name, element, scale, *, clean=False):
    sections = (("values",),) if scale.kind is Scale.TENSOR else (("values",), ("scales",))
    return CacheFormat(name, name, "tests", (Channels("values", element, scale=scale),), sections, clean=clean)


_FORMATS = (
    _rows("bytes_of_six_bits", _E2M3, ScaleRule(Scale.POW2_BYTE, 32, 1e-4)),
    _rows("clean_per_cache", E4M3, ScaleRule(Scale.TENSOR, None), clean=True),
    _rows("clean_with_scales_of_zero", E4M3, ScaleRule(Scale.E4M3_BYTE, 16, 1e-9), clean=True),
    _rows("clean_times_with_scales_of_zero", E4M3, ScaleRule(Scale.E4M3_TIMES, 16, 1e-9), clean=True),
    CacheFormat(
        "bf16_via_int8",
        "bf16_via_int8",
        "tests",
        (Channels("values", BF16),),
        (("values",),),
        through=FORMATS["int8_indexer"],
    ),
)
UNUSUAL = {form.name: form for form in _FORMATS}
