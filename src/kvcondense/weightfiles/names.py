"""Names of compressors' tensors in weight files: one table of schemes, and which of them a file follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvcondense.errors import CheckpointError
from kvcondense.spec import CompressorSpec

MATRICES = ("wkv", "wgate", "wkv_wgate")
"""Roles that may be quantised; wkv_wgate is wkv stacked on wgate."""
COMPANIONS = ("scale", "weight_scale", "weight_scale_inv", "scales", "biases")
"""What may stand beside a matrix ``x.weight``, as ``x.<companion>``; see ``storage``."""
_SHOWN = 6


@dataclass(frozen=True)
class Scheme:
    """How one family of files names a compressor's tensors.

    A name is prefix + layer + base + leaf: ``layers.3.`` (or ``blk.3.``), then ``main`` or ``indexer``, then one of the
    spellings in ``leaves``, by role. What begins with ``foreign`` behind the base belongs to somebody else. ``source``
    says where the names stand.
    """

    name: str
    main: str
    indexer: str
    leaves: dict[str, tuple[str, ...]]
    source: str
    foreign: tuple[str, ...] = ()
    layer: str = "layers"

    def base(self, part: str) -> str:
        """What stands between the layer and the leaves of ``part``."""
        return self.main if part == "main" else self.indexer


_SPLIT = {"wkv": ("wkv.weight",), "wgate": ("wgate.weight",), "ape": ("ape",), "norm": ("norm.weight",)}
_QUERIES = ("q_b_proj.", "wq_b.", "scorer.", "weights_proj.")


def _fused(leaf: str) -> dict[str, tuple[str, ...]]:
    return {"wkv_wgate": (leaf,), "ape": ("ape",), "norm": ("norm.weight",)}


SCHEMES = (
    Scheme(
        "official",
        "attn.compressor.",
        "attn.indexer.compressor.",
        _SPLIT,
        "deepseek-ai's checkpoints and their inference/model.py; with model. in front, MLX's too (ml-explore/mlx-lm, "
        "mlx_lm/models/deepseek_v4.py, class Compressor; names in a file: Blaizzy/mlx-vlm issue 1421)",
    ),
    Scheme(
        "transformers",
        "self_attn.compressor.",
        "self_attn.compressor.indexer.",
        {
            "wkv": ("kv_proj.weight",),
            "wgate": ("gate_proj.weight",),
            "ape": ("position_bias",),
            "norm": ("kv_norm.weight",),
        },
        "huggingface/transformers, conversion_mapping.py and models/deepseek_v4/modeling_deepseek_v4.py",
        ("indexer.", *_QUERIES),
    ),
    Scheme(
        "vllm",
        "attn.compressor.",
        "attn.indexer.compressor.",
        _fused("fused_wkv_wgate.weight"),
        "vllm-project/vllm, vllm/models/deepseek_v4/compressor.py and load_weights of nvidia/model.py",
    ),
    Scheme(
        "atom",
        "attn.compressor.",
        "attn.indexer.compressor.",
        _fused("wkv_gate.weight"),
        "ROCm/ATOM, atom/models/deepseek_v4.py, packed_modules_mapping",
    ),
    Scheme(
        "tensorrt-llm",
        "self_attn.compressor.",
        "self_attn.indexer.compressor.",
        _fused("wkv_gate.weight"),
        "NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/models/modeling_deepseekv4.py, _remap_deepseek_v4_checkpoint_keys",
    ),
    Scheme(
        "ascend",
        "self_attn.compressor.",
        "self_attn.indexer.compressor.",
        _SPLIT,
        "vllm-project/vllm-ascend, vllm_ascend/models/deepseek_v4.py, load_weights; onnxruntime/mobius, "
        "src/mobius/models/deepseek_v4_flash_test.py",
    ),
    Scheme(
        "automodel",
        "self_attn.compressor.",
        "self_attn.compressor.indexer.",
        {
            "wkv": ("wkv.weight",),
            "wgate": ("wgate.weight",),
            "ape": ("ape_param.weight", "ape_param"),
            "norm": ("kv_norm.weight",),
        },
        "NVIDIA-NeMo/Automodel, nemo_automodel/components/models/deepseek_v4/state_dict_adapter.py; its MTP layers are "
        "mtp.layers.N",
        ("indexer.", *_QUERIES),
    ),
    Scheme(
        "gguf",
        "attn_compressor_",
        "indexer_compressor_",
        {
            "wkv": ("kv.weight",),
            "wgate": ("gate.weight",),
            "ape": ("ape.weight", "ape"),
            "norm": ("norm.weight",),
        },
        "llama.cpp's converter (ggml-org/llama.cpp pull request 24162), as onnxruntime/mobius maps its names, "
        "src/mobius/integrations/gguf/_tensor_mapping.py",
        layer="blk",
    ),
)
"""Every scheme that can be read. ``wkv_gate`` is the parameter of SGLang's running model, too, whose ape has been
reordered by then (``apply_ape_hotfix``): a dump of it has these names but is no checkpoint, and nothing in it says so.
"""
_NAME = re.compile(r"((?:[^.]+\.)*?)(layers|mtp\.layers|mtp|blk)\.(0|[1-9][0-9]{0,5})\.(.+)", re.DOTALL)
_BASES = tuple({base for scheme in SCHEMES for base in (scheme.main, scheme.indexer)})


@dataclass(frozen=True)
class Found:
    """A compressor's tensors in a file: the scheme's name, the prefix, and role -> name.

    Roles: wkv and wgate, or wkv_wgate; ape; norm; and a companion of a matrix, such as ``wkv.weight_scale_inv``.
    """

    scheme: str
    prefix: str
    tensors: dict[str, str]


class Names:
    """The names in a file (or a folder of shards) that may belong to compressors, by layer."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = names
        self._layers: dict[tuple[str, str, int], dict[str, str]] = {}
        for name in names:
            match = _NAME.fullmatch(name) if "compressor" in name else None
            if match is not None and match[4].startswith(_BASES):
                self._layers.setdefault((match[1], match[2], int(match[3])), {})[match[4]] = name
        self._prefixes = sorted({prefix for prefix, kind, _ in self._layers if not kind.startswith("mtp")})

    def has(self, layer: int, part: str, mtp: int | None = None) -> bool:
        """Whether there is any tensor of this compressor."""
        bases = tuple(scheme.base(part) for scheme in SCHEMES)
        return any(rest.startswith(bases) for _, _, tensors in self._of(layer, mtp) for rest in tensors)

    def find(self, spec: CompressorSpec, layer: int, part: str, mtp: int | None = None) -> Found:
        """The tensors of a compressor. The scheme is the one with most of its leaves there.

        Raises CheckpointError: two prefixes before ``layers.N`` in a file, a tensor that is missing, one that ``spec``
        has no use for, or names of no known scheme (a few that look alike are listed).
        """
        if len(self._prefixes) > 1:
            listed = ", ".join(repr(p) for p in self._prefixes[:_SHOWN])
            raise CheckpointError("names of compressors", "one prefix before layers.N", listed)
        best: tuple[int, str, Scheme, dict[str, str]] | None = None
        for prefix, kind, tensors in self._of(layer, mtp):
            for scheme in SCHEMES:
                if (kind == "blk") != (scheme.layer == "blk"):
                    continue
                base = scheme.base(part)
                present = {rest[len(base) :]: name for rest, name in tensors.items() if rest.startswith(base)}
                present = {leaf: name for leaf, name in present.items() if not leaf.startswith(scheme.foreign)}
                count = sum(any(leaf in present for leaf in spelt) for spelt in scheme.leaves.values())
                if present and (best is None or count > best[0]):
                    best = (count, prefix, scheme, present)
        if best is None or best[0] == 0:
            raise self._unknown(layer, part)
        return Found(best[2].name, best[1], _roles(spec, best[2].leaves, best[3]))

    def _of(self, layer: int, mtp: int | None) -> Iterator[tuple[str, str, dict[str, str]]]:
        """(prefix, kind, rest of a name -> name) of a layer; MTP layers may have another prefix."""
        for (prefix, kind, number), tensors in self._layers.items():
            if number == (mtp if kind.startswith("mtp") else layer):
                yield prefix, kind, tensors

    def _unknown(self, layer: int, part: str) -> CheckpointError:
        argument = f"compressor of layer {layer}"
        hint = "kvcondense info --checkpoint DIR lists the compressors that are there"
        if self._layers:
            prefix = self._prefixes[0] if self._prefixes else ""
            starts = {"layers": f"{prefix}layers.{layer}.", "blk": f"blk.{layer}."}
            tried = [starts[s.layer] + s.base(part) + next(iter(s.leaves.values()))[0] for s in SCHEMES]
            of_layer = [name for _, _, tensors in self._of(layer, None) for name in tensors.values()]
            got = f"an unknown scheme: {_some(of_layer)}" if of_layer else "none of them"
            return CheckpointError(argument, f"one of {', '.join(tried)}", got, hint)
        alike: list[str] = []
        for word in ("compressor", "wkv", "kv_proj", "compress"):
            alike = alike or [name for name in self.all if word in name]
        got = f"an unknown one: {_some(alike)}" if alike else "no name that looks like one"
        return CheckpointError(argument, f"a known scheme of names: {', '.join(s.name for s in SCHEMES)}", got)


def _roles(spec: CompressorSpec, leaves: dict[str, tuple[str, ...]], present: dict[str, str]) -> dict[str, str]:
    wanted = {
        role: spelt
        for role, spelt in leaves.items()
        if (role != "wgate" or spec.has_gate) and (role != "ape" or spec.has_ape)
    }
    any_leaf, any_name = next(iter(present.items()))
    base = any_name[: len(any_name) - len(any_leaf)]
    roles = {}
    for role, spelt in wanted.items():
        leaf = next((leaf for leaf in spelt if leaf in present), None)
        if leaf is None:
            raise CheckpointError(base + spelt[0], "to be in the checkpoint", "a missing tensor")
        roles[role] = leaf
        if role in MATRICES:
            beside = {f"{role}.{c}": leaf.removesuffix("weight") + c for c in COMPANIONS}
            roles |= {key: name for key, name in beside.items() if name in present}
    extra = sorted(set(present) - set(roles.values()))
    if extra:
        raise CheckpointError(base + extra[0], "no such tensor for this compressor", "an extra tensor")
    return {role: present[leaf] for role, leaf in roles.items()}


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
