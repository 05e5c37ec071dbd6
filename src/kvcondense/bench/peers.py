"""Other implementations, where they are installed: transformers' and nano-deepseek-v4's compressors.

They are run as their packages have them, but for three things. Where a case brings kv_score, their projections pick
their channels from it. The lightning indexer and the attention mask that follow are left out. RoPE has no YaRN, which
one of them lacks. They keep rows in the type they compute in: nothing is quantised or paged.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from kvcondense.bench.cases import CONFIG, FORMAT, Case, Inputs
from kvcondense.stages.hadamard import hadamard

_SINGLE = 5
"""Tokens of the history that are decoded rather than prefilled."""
_KINDS = ("hca", "csa")
_LAYERS = {4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


class _DoneError(Exception):
    """The compressor has kept its rows; what would follow is not its work."""


class _Stop(torch.nn.Module):
    def forward(self, *args: Any) -> None:
        del args
        raise _DoneError


class _Pick(torch.nn.Module):
    """In the place of a projection: the channels that it would have projected."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.channels = slice(first, last)

    def forward(self, kv_score: torch.Tensor) -> torch.Tensor:
        return kv_score[..., self.channels]


class _Peer:
    """What both have in common: a module, and a cache that a step changes."""

    name = ""
    capturable = False

    def __init__(self, inputs: Inputs, module: Any) -> None:
        case, spec = inputs.case, inputs.case.spec
        self.inputs, self.spec, self.module = inputs, spec, module
        dtype = torch.bfloat16 if case.hidden else torch.float32
        self.note = f"{'bf16 with projection' if case.hidden else 'fp32'}; rows kept as computed, buffers copied"
        with torch.no_grad():
            if case.hidden:
                module.kv_proj.weight = torch.nn.Parameter(inputs.w[: spec.width])
                module.gate_proj.weight = torch.nn.Parameter(inputs.w[spec.width :])
            else:
                module.kv_proj, module.gate_proj = _Pick(0, spec.width), _Pick(spec.width, 2 * spec.width)
            module.position_bias.copy_(inputs.ape)
            if hasattr(module, "indexer"):
                module.indexer = _Stop()
            for parameter in module.parameters():  # not the buffers: RoPE's frequencies stay fp32
                parameter.data = parameter.data.to(dtype)
        self.module = module.to(inputs.new.device).eval()

    def cache(self) -> Any:
        raise NotImplementedError

    def call(self, tokens: torch.Tensor, position: int, cache: Any) -> None:
        raise NotImplementedError

    def rows(self, cache: Any) -> torch.Tensor | None:
        raise NotImplementedError

    def primed(self) -> dict[str, Any]:
        state = {"cache": self.cache(), "position": 0}
        history = self.inputs.history
        if self.inputs.case.start:
            # The last ones by themselves: what is left of a prefill is a view of all it projected, which would be
            # copied and freed with every step.
            self.feed(state, history[:, :-_SINGLE])
            for token in history[:, -_SINGLE:].split(1, dim=1):
                self.feed(state, token)
        return state

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return copy.deepcopy(state)

    @torch.no_grad()
    def step(self, state: dict[str, Any]) -> None:
        self._call(state, self.inputs.new)

    def feed(self, state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        before = state["position"] // self.spec.ratio
        with torch.no_grad():
            self._call(state, tokens)
        rows = self.rows(state["cache"])
        if rows is None:
            return tokens.new_zeros(tokens.shape[0], 0, self.spec.head_dim, dtype=torch.float32)
        return rows[:, before:].float()

    def _call(self, state: dict[str, Any], tokens: torch.Tensor) -> None:
        with contextlib.suppress(_DoneError):
            self.call(tokens, state["position"], state["cache"])
        state["position"] += tokens.shape[1]


class Transformers(_Peer):
    """``deepseek_v4`` of Hugging Face transformers."""

    name = "transformers"

    def __init__(self, inputs: Inputs) -> None:
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

        spec = inputs.case.spec
        self.config = DeepseekV4Config(
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=1,
            layer_types=[_LAYERS[spec.ratio]],
            mlp_layer_types=["moe"],
            head_dim=CONFIG.head_dim,
            index_head_dim=CONFIG.index_head_dim,
            partial_rotary_factor=spec.rope_dim / CONFIG.head_dim,
            q_lora_rank=8,
            rms_norm_eps=spec.eps,
            max_position_embeddings=CONFIG.max_positions,
            compress_rope_theta=CONFIG.compress_rope_theta,
            rope_parameters={"rope_type": "default"},
        )
        self.part = "indexer" if inputs.case.kind == "indexer" else "compressor"
        makers = {
            "hca": modeling.DeepseekV4HCACompressor,
            "csa": modeling.DeepseekV4CSACompressor,
            "indexer": modeling.DeepseekV4Indexer,
        }
        module: Any = makers[inputs.case.kind](self.config)
        if self.part == "indexer":
            module.q_b_proj = _Stop()
        super().__init__(inputs, module)
        with torch.no_grad():
            self.module.kv_norm.weight.copy_(inputs.norm)

    def cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def call(self, tokens: torch.Tensor, position: int, cache: Any) -> None:
        # A position_ids of one entry: the mask for several queries is not the compressor's work.
        self.module(tokens, tokens[..., :8], torch.full((1, 1), position, device=tokens.device), cache, 0)

    def rows(self, cache: Any) -> torch.Tensor | None:
        rows = cache.layers[0].compressed_kv.get(self.part)
        return rows if rows is None or not self.spec.rotate else hadamard(rows.float())  # it does not rotate keys


class Nano(_Peer):
    """nano-deepseek-v4."""

    name = "nano-deepseek-v4"

    def __init__(self, inputs: Inputs) -> None:
        from nano_deepseek_v4 import modeling
        from nano_deepseek_v4.config import DeepSeekV4Config

        spec = inputs.case.spec
        config = DeepSeekV4Config(
            hidden_size=CONFIG.hidden_size,
            head_dim=spec.head_dim,
            partial_rotary_factor=spec.rope_dim / spec.head_dim,
            compress_rope_theta=CONFIG.compress_rope_theta,
            rms_norm_eps=spec.eps,
            max_position_embeddings=CONFIG.max_positions,
            compress_rates={_LAYERS[4]: 4, _LAYERS[128]: 128},
        )
        self.new_cache = modeling.DeepSeekV4LayerCache
        super().__init__(inputs, (modeling.CSACompressor if spec.overlap else modeling.HCACompressor)(config))
        with torch.no_grad():
            self.module.norm.weight.copy_(inputs.norm)

    def cache(self) -> Any:
        return self.new_cache()

    def call(self, tokens: torch.Tensor, position: int, cache: Any) -> None:
        batch, count, _ = tokens.shape
        positions = torch.arange(position, position + count, device=tokens.device).expand(batch, -1)
        arguments = (tokens, tokens, positions, cache) if self.spec.overlap else (tokens, positions, cache)
        self.module(*arguments)

    def rows(self, cache: Any) -> torch.Tensor | None:
        return cache.compressed_kv.get("compressor")


Make = Callable[[Inputs], Any]
"""Makes a runner."""

PEERS: dict[str, tuple[str, Make]] = {
    "transformers": ("transformers.models.deepseek_v4", Transformers),
    "nano": ("nano_deepseek_v4", Nano),
}


def takes(peer: Make, case: Case) -> bool:
    """True if ``peer`` has the case's compressor and rows.

    A peer that takes no x says ``hidden = False``; one that has others than V4's main compressors, which ``kinds`` and
    rows of which ``format`` it takes.
    """
    known = case.kind in getattr(peer, "kinds", _KINDS) and case.format == getattr(peer, "format", FORMAT)
    return known and not case.narrow and (getattr(peer, "hidden", True) or not case.hidden)


def installed() -> list[Make]:
    """The peers that can be imported here."""
    found = []
    for module, peer in PEERS.values():
        try:
            if find_spec(module) is not None:
                found.append(peer)
        except ModuleNotFoundError:
            continue
    return found
