"""What the backend can launch for DeepSeek-V4's compressors, and what every such kernel is compiled for.

``variants`` has every entry of the tuning table, every state, every cache format, every type of tokens; ``arguments``
the types of a kernel's arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvcondense.backends.triton import decode, fused, tuning
from kvcondense.backends.triton.constants import Constants, StateKey, constants
from kvcondense.backends.triton.tuning import Choice
from kvcondense.config import ModelConfig
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.spec import CompressorSpec, Rounding

STRIDE = "stride"
"""Type of an i32 that is a multiple of 16."""
_PAGE_ROWS = 64
_MAIN = {"csa": "fp8_model1", "hca": "fp8_model1", "indexer": "mxfp4_indexer", "r2": "fp4_v41", "r1": "fp4_v41"}
_RING = {"csa": 16, "indexer": 16, "hca": 136, "r2": 8, "r1": 8}
_HIDDEN = 4096


@dataclass(frozen=True)
class Variant:
    """One kernel: which compressor, kind of state, types of tokens and state ("" for none), format and rows.

    kernel: "step", one that projects (pool, keep, project, decode, together: with the indexer's step), or "finish".
    """

    kind: str
    state: str = "ring"
    tokens: str = "fp32"
    state_type: str = "fp32"
    format: str = ""
    rows: int = 16
    latent: bool = False
    rounding: Rounding = Rounding.REFERENCE
    kernel: str = "step"

    @property
    def multiplies(self) -> bool:
        """True for kernels that project."""
        return self.kernel not in ("step", "finish")

    @property
    def name(self) -> str:
        """Short and unique."""
        if self.kernel != "step":
            words = (self.kind, self.kernel, self.state or "stateless", self.state_type, self.format or "rows")
            return "-".join(words)
        extra = ("latent",) * self.latent + (self.rounding.value,) * (self.rounding is Rounding.FUSED)
        return "-".join((self.kind, self.state or "stateless", self.tokens, self.state_type, f"{self.rows}rows",
                         self.format or "rows", *extra))  # fmt: skip


@functools.cache
def specs() -> dict[str, CompressorSpec]:
    """The compressors that are compiled."""
    flash, v41 = ModelConfig.FLASH, ModelConfig.V41_FLASH
    return {
        "hca": CompressorSpec.hca(flash),
        "csa": CompressorSpec.csa(flash),
        "indexer": CompressorSpec.indexer(flash),
        "r2": CompressorSpec.for_layer(v41, 2),
        "r1": CompressorSpec.for_layer(v41, 20),
    }


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every entry of the tuning table with each state, then every format, type and profile."""
    return tuple(dict.fromkeys(_variants()))


def _variants() -> Iterator[Variant]:
    kinds = specs()
    for kind, spec in kinds.items():
        for rows in _row_classes(spec):
            for state in ("ring", "paged", "") + (() if spec.overlap else ("online",)):
                yield Variant(kind, state, format=_MAIN[kind], rows=rows)
        for form in FORMATS.values():
            if _fits(form, spec):
                yield Variant(kind, format=form.name)
        yield Variant(kind, latent=True, format="bf16", rounding=Rounding.FUSED)
        for tokens in ("bf16", "fp16"):
            yield Variant(kind, tokens=tokens, state_type="bf16", format="bf16")
        yield Variant(kind)
        for state, state_type in (("", "fp32"), ("ring", "fp32"), ("ring", "bf16"), ("paged", "fp32")):
            for kernel in ("pool", "keep", "decode", "together"):
                if kernel != "together" or kind == "csa":
                    form = "" if kernel in ("pool", "keep") else _MAIN[kind]
                    if kernel != "keep" or state:
                        yield Variant(kind, state, "bf16", state_type, form, kernel=kernel)
        yield Variant(kind, "", "bf16", kernel="project")
        yield Variant(kind, "", format=_MAIN[kind], kernel="finish")


def _fits(form: Any, spec: CompressorSpec) -> bool:
    try:
        form.check(spec.head_dim, spec.rope_dim)
    except UnsupportedError:
        return False
    return True


@functools.cache
def _row_classes(spec: CompressorSpec) -> tuple[int, ...]:
    """A number of rows for every entry that the tuning table has for this compressor, on any architecture."""
    found = {1 << 20}
    for part in tuning.table().values():
        found |= {e[2] for e in part["entries"] if (e[0], e[1]) == (spec.ratio, spec.head_dim) and e[2] is not None}
    return tuple(sorted(found))


def arguments(variant: Variant, arch: str) -> tuple[Any, Choice, dict[str, Any], dict[str, Any]]:
    """(kernel, tiling, type of each run-time argument with None for one that is absent, compile-time values)."""
    if variant.kernel in ("decode", "together"):
        return _decode(variant)
    from kvcondense.backends.triton.kernels import fused as products
    from kvcondense.backends.triton.kernels.condense import condense_kernel, finish_kernel
    from kvcondense.backends.triton.kernels.online import online_kernel

    spec = replace(specs()[variant.kind], rounding=variant.rounding)
    choice, values = tuning.choose_for(arch, spec.ratio, spec.window, spec.head_dim, variant.rows), {}
    if variant.kernel != "step":
        choice = fused.choice(spec)
    if variant.kernel in ("pool", "keep", "project"):
        tile = {"G": fused.TILE // spec.ratio} if variant.kernel == "pool" else {"M": fused.TILE}
        values = {**tile, "K": fused.DEPTH, "WIDE": False}
    c = _constants(variant, spec, choice)
    kernel = {
        "step": online_kernel if c.online else condense_kernel,
        "pool": products.project_pool_kernel,
        "keep": products.project_keep_kernel,
        "project": products.project_kernel,
        "finish": finish_kernel,
    }[variant.kernel]
    return kernel, choice, _types(kernel.arg_names, variant, c), {"c": c, **values}


def _constants(variant: Variant, spec: CompressorSpec, choice: Choice, splits: int = 0) -> Constants:
    rows = {"ring": _RING[variant.kind], "paged": 32, "online": 8, "": 0}[variant.state]
    bf16 = variant.state_type == "bf16" and variant.state != ""
    state = StateKey(variant.state, rows, bf16, spec.state_dim, spec.state_dim * rows, rows)
    form = FORMATS[variant.format] if variant.format else None
    return constants(spec, state, form, _PAGE_ROWS, variant.latent, choice, splits=splits)


def _types(names: list[str], variant: Variant, c: Constants) -> dict[str, Any]:
    types: dict[str, Any] = {"kv_score": f"*{variant.tokens}", "state": f"*{variant.state_type}", "cache": "*u8"}
    types |= dict.fromkeys(("ape", "gamma", "cos", "sin", "rows", "latent", "acc", "log", "scales"), "*fp32")
    types |= {"counters": "*i32", "x": "*bf16", "w": "*bf16", "hidden": STRIDE}
    types |= dict.fromkeys(("window_programs", "windows", "keeps", "tokens"), "i32")
    if variant.kernel == "project":
        types["kv_score"] = "*fp32"
    absent = {
        "ape": not c.has_ape,
        "latent": not c.latent,
        "state": not c.has_state,
        "state_table": not c.has_state,
        "cache": not c.has_cache,
        "scales": c.rows_map is None or not (c.rows_map.scales_outside or variant.format == "fp8_tensor"),
        "counters": c.blocks == 1 or not c.counters,
    }
    found = {}
    for name in names:
        found[name] = None if absent.get(name) else STRIDE if name.endswith("_stride") else types.get(name, "*i64")
    return found


def _decode(variant: Variant) -> tuple[Any, Choice, dict[str, Any], dict[str, Any]]:
    """The same for a launch that does whole steps; the second compressor's arguments end in _2."""
    from kvcondense.backends.triton.kernels import decode as kernels

    two = variant.kernel == "together"
    other = replace(variant, kind="indexer", format=_MAIN["indexer"])
    both = [_decode_one(v) for v in (variant, other)[: 1 + two]]
    types: dict[str, Any] = {"x": "*bf16", "tokens": "i32", "hidden": STRIDE, "x_stride": STRIDE}
    for suffix, given in zip(("", "_2"), [t for t, _ in both] + [decode.NONE] * (not two), strict=True):
        types |= {name + suffix: t for name, t in zip(decode.ARGUMENTS, given, strict=True)}
    block = decode.block_of([c.projected for _, c in both])
    values = {
        "c": both[0][1], "c_2": both[1][1] if two else None, "TWO": two, "ORDERED": variant.state == "paged",
        "PHASE": kernels.ALL.value, "M": decode.TOKENS, "B": block, "K": decode.DEPTH, "WIDE": False,
    }  # fmt: skip
    return kernels.decode_kernel, Choice(block, decode.WARPS), types, values


def _decode_one(variant: Variant) -> tuple[tuple[Any, ...], Constants]:
    spec = specs()[variant.kind]
    c = _constants(variant, spec, decode.choice(spec.window, spec.head_dim), decode.splits(_HIDDEN))
    names = ("ape", "gamma", "state_table", "state", "cache", "scales", "counters")
    ape, gamma, table, state, cache, scales, _ = _types(list(names), variant, c).values()
    table_cos = "*fp32" if c.rope_dim else None
    whole = "*i64"
    return (
        ("*bf16", "*fp32", STRIDE, STRIDE),
        (ape, gamma, table_cos, table_cos, whole, whole),
        (whole, whole, whole, "*i32", "i32"),
        (whole, whole, whole, "i32"),
        ("*fp32", None, table, state, cache, scales, STRIDE, STRIDE, STRIDE),
    ), c
