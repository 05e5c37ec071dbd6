"""Names of models, formats, kinds, backends, mutants and cases, for help, completion and typos, which import no torch.

A test holds them equal to the tables that they are of.
"""

from __future__ import annotations

from kvcondense.config import PRESETS

MODELS = tuple(PRESETS)
KINDS = ("hca", "csa", "indexer")
BACKENDS = ("cpu", "triton", "reference", "pypto")
FORMATS = (
    "bf16", "fp32", "bf16_via_fp8_model1", "bf16_via_mxfp4_indexer", "bf16_via_fp4_v41", "fp8_model1",
    "fp8_model1_scale_floor", "fp8_model1_via_fp4_v41_times", "fp8_model1_clean", "fp8_model1_two_buffers",
    "fp8_model1_two_buffers_fnuz", "fp4_model1", "fp8_tensor", "fp8_tensor_fnuz", "fp8_indexer_pow2",
    "fp8_indexer_pow2_16x16", "fp8_indexer_fnuz", "fp8_indexer_fnuz_16x16", "fp8_indexer_ue8m0",
    "fp8_indexer_plain", "mxfp4_indexer", "mxfp4_indexer_ties_down", "int8_indexer", "fp4_v41", "fp4_v41_times",
    "fp4_v41_interleaved", "fp4_v41_times_interleaved", "fp4_v41_times_interleaved_clean", "mxfp8_v41_window",
    "mxfp8_v41_window_interleaved", "mxfp8_v41_window_interleaved_clean", "mxfp8_v41_window_scale_floor",
    "mxfp8_v41_window_scale_floor_via_fp4_v41_times", "mxfp8_v41_window_interleaved_scale_floor",
    "mxfp8_v41_window_interleaved_scale_floor_via_fp4_v41_times",
)  # fmt: skip
ROUNDINGS = ("reference", "fused", "latent")
STATES = ("ring", "online")
ACTIONS = ("info", "check", "cut")
"""Of bundles."""
VECTOR_ACTIONS = ("write", "play", "check", "mutants")
COMPRESSORS = ("csa", "hca", "indexer", "fused", "r2")
"""Of the kit."""
NEEDS = (
    "exact", "chunks", "ragged", "max_draft", "mixed", "inert", "spare", "unmapped", "exports", "begins", "huge_cache",
    "refuses", "format", *FORMATS, "compressor", *COMPRESSORS,
)  # fmt: skip
"""What a test vector may need, word by word."""
WHOLE_NEEDS = {f"{kind} {name}": name for kind, of in (("format", FORMATS), ("compressor", COMPRESSORS)) for name in of}
"""Needs of two words -> the word that says the same."""
WARM_STATES = ("ring", "paged", "online")
ADAPTER_STATES = ("ring", "paged", "online")
MUTANTS = (
    "ape-dropped", "ape-shifted", "ape-by-chunk-offset", "bias-twice-from-state", "overlap-ignored", "overlap-swapped",
    "neighbour-window", "halo-across-documents", "first-halo-score-zero", "halo-lost-at-boundary", "state-not-reset",
    "chunk-start-aligned", "current-token-only", "uniform-average", "scalar-gate", "softmax-without-max",
    "softmax-not-rescaled", "rope-at-row-index", "rope-at-last-position", "rope-clamped", "rope-table-bf16",
    "half-split-pairs", "theta-1e4", "no-yarn", "yarn-as-linear", "yarn-ramp-reversed", "eps-times-10",
    "eps-outside-root", "no-bf16-before-norm", "gamma-dropped", "rotate-ignored", "rotate-always", "row-0-for-minus-1",
    "emission-late", "emission-twice", "partial-window-emitted", "previous-plan", "int32-address", "int32-last-page",
    "stale-draft-row", "drafts-not-kept-for", "eight-drafts-kept-for", "drafts-at-committed",
    "online-drafts-folded", "ring-race", "ring-wraps-early", "state-in-bf16", "stale-block-table",
    "state-slot-by-order", "second-document-as-padding", "empty-takes-a-token", "inert-slot-clamped",
    "spare-tokens-to-last", "split-by-batch-size", "scale-floor-on-scale", "scale-rounded-down", "scale-rounded-after",
    "mx-scale-as-fp32", "fp4-ties-down", "fp4-nibbles-swapped", "fnuz-for-e4m3", "scales-inline",
    "interleaved-as-split", "pad-unwritten",
)  # fmt: skip
ADAPTERS = (*BACKENDS, *(f"reference:{kind}" for kind in ADAPTER_STATES), *(f"mutant:{name}" for name in MUTANTS))
CASES = (
    "prefill 8192, ratio 128", "prefill 8192, ratio 4", "prefill 8192 in bf16, ratio 128",
    "decode 16 on a boundary, ratio 128", "decode 16 on a boundary in bf16, ratio 128",
    "decode 16 on a boundary, ratio 4", "decode 16 within a window, ratio 128", "decode 16 within a window, ratio 4",
    "prefill 2048 from x, ratio 128", "decode 16 from x, ratio 128", "decode 1 from x, ratio 128",
    "prefill 8192, V4.1 ratio 2", "decode 16 on a boundary, V4.1 ratio 2", "decode 16 within a window, V4.1 ratio 2",
)  # fmt: skip
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
PAGE_TOKENS = 256
EXAMPLE_DIM = 512
