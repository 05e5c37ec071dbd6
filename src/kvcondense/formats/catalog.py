"""The cache formats, one entry each. A variant's name says what differs. Adding a format is adding an entry here."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense.errors import DtypeError, require, require_known
from kvcondense.formats.descriptor import PAD, SCALES, CacheFormat, Channels
from kvcondense.formats.elements import BF16, E2M1, E2M1_TIES_DOWN, E4M3, E4M3FNUZ, FP32, INT8, Element
from kvcondense.formats.scales import Scale, ScaleRule

_AMAX_FLOOR = 1e-4
"""Least amax of DeepSeek's FP8 act_quant, and the floor of everyone who floors the scale instead."""
_REF = "DeepSeek-V4 inference/kernel.py"
_MAIN, _INDEXER = 512, 128
_NEW_V41 = "vLLM 0.33, SGLang 0.5.23, FlashMLA since 2026-09-30"
_ATOM = "ROCm/ATOM atom/model_ops/v4_kernels/fused_compress.py (ffdf3bb)"
_ATOM_MAIN = "ROCm/ATOM atom/model_ops/v4_kernels/v4_quant.py (ffdf3bb)"
_ROWS = (("rows",),)
_TWO_SECTIONS = (("values",), (SCALES,))


def _plain(name: str, element: Element, summary: str, source: str) -> CacheFormat:
    return CacheFormat(name, summary, source, (Channels("rows", element),), _ROWS)


_FP8_MODEL1 = CacheFormat(
    name="fp8_model1",
    summary="main rows: 448 FP8 channels in blocks of 64, 64 RoPE channels in bf16; floor on amax",
    source=f"FlashMLA MODEL1, vLLM fp8_ds_mla, SGLang; scales as in {_REF}",
    channels=(
        Channels("nope", E4M3, 0, 448, ScaleRule(Scale.POW2_BYTE, 64, _AMAX_FLOOR)),
        Channels("rope", BF16, 448, 512),
    ),
    sections=(("nope", "rope"), (SCALES, PAD)),
    head_dim=_MAIN,
    rope_dim=64,
    pad_bytes=1,
    align=576,
)
_FP8_INDEXER = CacheFormat(
    name="fp8_indexer_pow2",
    summary="indexer keys: FP8, one fp32 scale that is a power of two; floor on amax",
    source="vLLM's indexer cache",
    channels=(Channels("values", E4M3, scale=ScaleRule(Scale.POW2_FP32, _INDEXER, _AMAX_FLOOR)),),
    sections=_TWO_SECTIONS,
    head_dim=_INDEXER,
)
_MXFP4_INDEXER = CacheFormat(
    name="mxfp4_indexer",
    summary="indexer keys: FP4 in blocks of 32 with power-of-two scales; ties to even",
    source=f"{_REF}; vLLM's MXFP4 indexer cache",
    channels=(Channels("values", E2M1, scale=ScaleRule(Scale.POW2_BYTE, 32, 6 * 2.0**-126)),),
    sections=_TWO_SECTIONS,
    head_dim=_INDEXER,
)
_FP4_V41 = CacheFormat(
    name="fp4_v41",
    summary="V4.1 main rows: FP4 over all 512 channels in blocks of 16 with e4m3 scales",
    source="FlashMLA V41_FP4, SGLang KVLayout.V41_FP4",
    channels=(Channels("values", E2M1, scale=ScaleRule(Scale.E4M3_BYTE, 16, 6 * 2.0**-9)),),
    sections=_TWO_SECTIONS,
    head_dim=_MAIN,
    align=256,
)
_MXFP8_V41 = CacheFormat(
    name="mxfp8_v41_window",
    summary="V4.1 window rows: FP8 over all 512 channels in blocks of 32; floor on amax",
    source="FlashMLA V41_FP8Sparse, vLLM for V4.1",
    channels=(Channels("values", E4M3, scale=ScaleRule(Scale.POW2_BYTE, 32, _AMAX_FLOOR)),),
    sections=_TWO_SECTIONS,
    head_dim=_MAIN,
    align=512,
)


def _interleaved(form: CacheFormat) -> CacheFormat:
    """V4.1 rows whose scales lie right behind their data, in pages of whole rows."""
    return replace(
        form,
        name=f"{form.name}_interleaved",
        summary=f"{form.summary}; scales behind each row",
        source=_NEW_V41,
        sections=(tuple(name for section in form.sections for name in section),),
        align=1,
    )


def _tiled(form: CacheFormat) -> CacheFormat:
    """16 rows and 16 channels to a tile, as matrix units load them."""
    return replace(
        form, name=f"{form.name}_16x16", summary=f"{form.summary}; data in tiles of 16 rows x 16 channels",
        source=_ATOM, tile=16,
    )  # fmt: skip


def _cleaned(form: CacheFormat, source: str) -> CacheFormat:
    """As vLLM writes it on gfx950: scales of at most 254, no NaN."""
    summary = f"{form.summary}; nothing stored is NaN"
    return replace(form, name=f"{form.name}_clean", summary=summary, source=source, clean=True)


def _rescaled(form: CacheFormat, name: str, summary: str, source: str, rule: ScaleRule) -> CacheFormat:
    """``form`` with another scale rule."""
    channels = tuple(replace(c, scale=rule) if c.scale else c for c in form.channels)
    return replace(form, name=name, summary=summary, source=source, channels=channels)


def _floor_on_scale(form: CacheFormat, source: str) -> CacheFormat:
    assert form.scaled is not None
    assert form.scaled.scale is not None
    summary = form.summary.replace("floor on amax", "floor on the scale")
    return _rescaled(form, f"{form.name}_scale_floor", summary, source, replace(form.scaled.scale, floor_on_scale=True))


def _through(form: CacheFormat) -> CacheFormat:
    """The bf16 row that DeepSeek's code keeps: quantised and dequantised again."""
    return CacheFormat(
        name=f"bf16_via_{form.name}",
        summary=f"bf16(q * s): what {form.name} gives back",
        source=f"{_REF} (act_quant and fp4_act_quant in place)",
        channels=(Channels("rows", BF16),),
        sections=_ROWS,
        head_dim=form.head_dim,
        rope_dim=form.rope_dim,
        through=form,
    )


_TIMES = ScaleRule(Scale.E4M3_TIMES, 16, 6 * 2.0**-9)
_FP4_V41_TIMES = _rescaled(
    _FP4_V41,
    "fp4_v41_times",
    f"{_FP4_V41.summary}; the scale by a product, as NVFP4's",
    "vLLM for V4.1, up to 0.32",
    _TIMES,
)
_FP8_INDEXER_FNUZ = replace(
    _FP8_INDEXER,
    name="fp8_indexer_fnuz",
    summary="indexer keys: FP8 of gfx942 (e4m3fnuz), one fp32 scale that is a power of two; floor on amax",
    source=_ATOM,
    channels=(replace(_FP8_INDEXER.channels[0], element=E4M3FNUZ),),
)


def _via_fp4(form: CacheFormat, layout: str) -> CacheFormat:
    """SGLang's FP8 pages of V4.1's compressed rows: the FP4 row's values, quantised again."""
    return replace(
        form,
        name=f"{form.name}_via_{_FP4_V41_TIMES.name}",
        summary=f"{form.summary}; of rows that went through {_FP4_V41_TIMES.name}",
        source=f"SGLang 0.5.23 KVLayout.{layout}, compressed rows of V4.1: jit/csrc/deepseek_v4/c1.cuh",
        through=_FP4_V41_TIMES,
    )


_MXFP8_SCALE_FLOOR = _floor_on_scale(_MXFP8_V41, "FlashMLA's test quantiser; SGLang 0.5.23 KVLayout.V41, window rows")
_MXFP8_SCALE_FLOOR_NEW = _floor_on_scale(_interleaved(_MXFP8_V41), "SGLang 0.5.23 KVLayout.V41_NEW, window rows")
_TWO_BUFFERS = CacheFormat(
    name="fp8_model1_two_buffers",
    summary="main rows in two buffers: 448 FP8 channels in blocks of 64, each scale twice; 64 RoPE channels in bf16",
    source=f"{_ATOM_MAIN}, gfx950",
    channels=(
        Channels("nope", E4M3, 0, 448, ScaleRule(Scale.POW2_PAIR, 64, _AMAX_FLOOR, floor_on_scale=True)),
        Channels("rope", BF16, 448, 512),
    ),
    sections=(("nope", SCALES, PAD),),
    head_dim=_MAIN,
    rope_dim=64,
    pad_bytes=50,
)
_FLASHINFER = CacheFormat(
    name="fp4_model1",
    summary="main rows of 384 bytes: 448 FP4 channels in blocks of 16 with e4m3 scales, 64 RoPE channels in bf16",
    source="FlashInfer 0.7.2 csrc/sparse_mla_sm120/dsv4_nvfp4_cache_ops.cu",
    channels=(
        Channels("nope", E2M1, 0, 448, ScaleRule(Scale.E4M3_INVERSE, 16)),
        Channels("rope", BF16, 448, 512),
    ),
    sections=(("nope", "rope"), (SCALES, PAD)),
    head_dim=_MAIN,
    rope_dim=64,
    pad_bytes=4,
)

_ALL = (
    _plain("bf16", BF16, "bf16 rows, before any quantisation", "transformers, pypto-lib, vLLM and SGLang in bf16"),
    _plain("fp32", FP32, "rows as computed, for fp32 models and for comparing", "kvcondense"),
    _through(_FP8_MODEL1),
    _through(_MXFP4_INDEXER),
    _through(_FP4_V41),
    _FP8_MODEL1,
    _floor_on_scale(_FP8_MODEL1, "FlashMLA's test quantiser, vLLM on CPU and in CuTe-DSL"),
    _via_fp4(_FP8_MODEL1, "V4"),
    _cleaned(_FP8_MODEL1, "vLLM 0.33 on gfx950"),
    _TWO_BUFFERS,
    replace(
        _TWO_BUFFERS,
        name="fp8_model1_two_buffers_fnuz",
        summary=_TWO_BUFFERS.summary.replace("FP8", "e4m3fnuz"),
        source=f"{_ATOM_MAIN}, gfx942",
        channels=(replace(_TWO_BUFFERS.channels[0], element=E4M3FNUZ), _TWO_BUFFERS.channels[1]),
    ),
    _FLASHINFER,
    CacheFormat(
        name="fp8_tensor",
        summary="FP8 rows with one given scale for the whole cache",
        source="FlashInfer, TensorRT-LLM",
        channels=(Channels("rows", E4M3, scale=ScaleRule(Scale.TENSOR, None)),),
        sections=_ROWS,
    ),
    CacheFormat(
        name="fp8_tensor_fnuz",
        summary="FP8 rows of gfx942 (e4m3fnuz) with one given scale for the whole cache",
        source="engines on AMD's gfx942",
        channels=(Channels("rows", E4M3FNUZ, scale=ScaleRule(Scale.TENSOR, None)),),
        sections=_ROWS,
    ),
    _FP8_INDEXER,
    _tiled(_FP8_INDEXER),
    _FP8_INDEXER_FNUZ,
    _tiled(_FP8_INDEXER_FNUZ),
    _rescaled(
        _FP8_INDEXER,
        "fp8_indexer_ue8m0",
        "indexer keys: FP8, the exponent of a power-of-two scale as four equal bytes; floor on amax",
        "vLLM 0.33 on SM100",
        ScaleRule(Scale.POW2_WORD, _INDEXER, _AMAX_FLOOR),
    ),
    _rescaled(
        _FP8_INDEXER,
        "fp8_indexer_plain",
        "indexer keys: FP8, one fp32 scale amax / 448; floor on amax",
        "SGLang's indexer cache",
        ScaleRule(Scale.PLAIN_FP32, _INDEXER, _AMAX_FLOOR),
    ),
    _MXFP4_INDEXER,
    replace(
        _MXFP4_INDEXER,
        name="mxfp4_indexer_ties_down",
        summary="indexer keys: FP4 in blocks of 32 with power-of-two scales; 0.75, 1.75 and 3.5 go down",
        source="SGLang's FP4 indexer cache",
        channels=tuple(replace(c, element=E2M1_TIES_DOWN) for c in _MXFP4_INDEXER.channels),
    ),
    CacheFormat(
        name="int8_indexer",
        summary="indexer keys: int8, fp32 scales in a tensor of their own",
        source="pypto-lib's sparse indexer",
        channels=(Channels("rows", INT8, scale=ScaleRule(Scale.INVERSE_FP32, _INDEXER, _AMAX_FLOOR)),),
        sections=_ROWS,
        head_dim=_INDEXER,
    ),
    _FP4_V41,
    _FP4_V41_TIMES,
    _interleaved(_FP4_V41),
    replace(_interleaved(_FP4_V41_TIMES), source="vLLM 0.33"),
    _cleaned(_interleaved(_FP4_V41_TIMES), "vLLM 0.33 on gfx950"),
    _MXFP8_V41,
    _interleaved(_MXFP8_V41),
    _cleaned(_interleaved(_MXFP8_V41), "vLLM 0.33 on gfx950"),
    _MXFP8_SCALE_FLOOR,
    _via_fp4(_MXFP8_SCALE_FLOOR, "V41"),
    _MXFP8_SCALE_FLOOR_NEW,
    _via_fp4(_MXFP8_SCALE_FLOOR_NEW, "V41_NEW"),
)

FORMATS: dict[str, CacheFormat] = {f.name: f for f in _ALL}


def get_format(name: str) -> CacheFormat:
    """The format called ``name``; raises with the list of names otherwise."""
    require("format", name, str)
    require_known("format", name, FORMATS, "kvcondense info --formats says what they are")
    return FORMATS[name]


def format_of_dtype(dtype: torch.dtype) -> CacheFormat:
    """The format of rows that are plain values of ``dtype``; raises DtypeError if there is none."""
    by_dtype = {f.plain.dtype: f for f in FORMATS.values() if f.plain and not f.through}
    if dtype not in by_dtype:
        raise DtypeError("rows", " or ".join(map(str, by_dtype)) + " (or name the format)", dtype)
    return by_dtype[dtype]


def converted(before: tuple[str, ...], source: str, target: str) -> tuple[str, ...]:
    """Formats in which rows have lost bits, when those of ``source``, which lost ``before``, are encoded as ``target``.

    From fp32, and from bf16 to anything but fp32, the codes are those of encoding at once.
    """
    exact = source in ("fp32", target) or (source == "bf16" and target != "fp32")
    return before if exact else (*before, source)
