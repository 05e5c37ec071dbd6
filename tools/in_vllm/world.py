"""vLLM's attention layers, page memory and metadata as its engine makes them, and requests that hold blocks of it."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from in_vllm import tiny

RATIOS = [0, 4, 128, 4, 128]
_LONGEST, _MEMORY = 1024, 48 << 20


class Turn(NamedTuple):
    """What a request does in a step: tokens, of which the last ``rejected`` are drafts that are rejected afterwards."""

    request: str
    tokens: int
    rejected: int = 0


class Module(NamedTuple):
    """A compressor of vLLM's and the table of its RoPE."""

    compressor: Any
    rope: Any

    @property
    def kind(self) -> str:
        """Its kind in words."""
        ratio = self.compressor.compress_ratio
        return f"indexer, ratio {ratio}" if self.compressor.head_dim == 128 else f"ratio {ratio}"


@dataclass
class Request:
    """Tokens so far, and its blocks in each of vLLM's groups; 0 where a block is out of every window."""

    blocks: list[list[int]]
    length: int = 0


@dataclass
class Blocks:
    """Blocks of the one memory; the last freed is the first given out, so that it is soon another layer's."""

    free: list[int]
    users: Counter[int] = field(default_factory=Counter)

    def take(self, block: int | None = None) -> int:
        """A free block, or one more user of one that is not."""
        block = self.free.pop() if block is None else block
        self.users[block] += 1
        return block

    def drop(self, block: int) -> None:
        """One user less."""
        self.users[block] -= 1
        if block and not self.users[block]:
            self.free.append(block)


class World:
    """Layers with their pages. Made inside ``set_current_vllm_config``, whose config is ``config``."""

    def __init__(self, config: Any) -> None:
        self.config, self.layers = config, _layers(config)
        self.context: dict[str, Any] = config.compilation_config.static_forward_context
        self.specs = {n: s for n, layer in self.context.items() if (s := layer.get_kv_cache_spec(config)) is not None}
        pages = self._pages()
        self.groups = pages.kv_cache_groups
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._bind(pages).values()}
        (storage,) = storages.values()
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]
        gen = torch.Generator().manual_seed(1)
        self.memory.copy_(torch.randint(0, 256, self.memory.shape, dtype=torch.uint8, generator=gen))
        self.builders = {name: self._builder(name) for name in self.specs}
        self.blocks = Blocks(list(range(pages.num_blocks - 1, 0, -1)))
        self.requests: dict[str, Request] = {}
        self.modules = [
            Module(compressor, layer.indexer_rotary_emb)
            for layer in self.layers
            for compressor in (layer.indexer and layer.indexer.compressor, layer.compressor)
            if compressor
        ]

    def _pages(self) -> Any:
        utils, base = import_module("vllm.v1.attention.backends.utils"), import_module("vllm.v1.worker.worker_base")
        worker = type("Worker", (), {"vllm_config": self.config})
        layouts = base.WorkerBase.get_supported_kv_cache_layouts(worker)
        utils.resolve_kv_cache_layout(self.config, [layouts], self.specs.values())
        made = import_module("vllm.v1.core.kv_cache_utils").get_kv_cache_configs(self.config, [self.specs], [_MEMORY])
        return made[0]

    def _bind(self, pages: Any) -> dict[str, torch.Tensor]:
        sizes = [group.kv_cache_spec.block_size for group in pages.kv_cache_groups]
        layout = self.config.cache_config.get_resolved_kv_cache_layout()
        made = import_module("vllm.v1.worker.utils").allocate_kv_cache(pages, torch.device("cpu"), layout, sizes)
        for name, tensor in made.items():
            self.context[name].bind_kv_cache(tensor)
        return made

    def _group(self, name: str) -> tuple[int, Any]:
        """The group that a layer is in, and its own spec."""
        index = next(i for i, group in enumerate(self.groups) if name in group.layer_names)
        return index, getattr(self.groups[index].kv_cache_spec, "kv_cache_specs", {name: self.specs[name]})[name]

    def _builder(self, name: str) -> Any:
        builder, spec = self.context[name].get_attn_backend().get_builder_cls(), self._group(name)[1]
        wide = "block_table_width" in inspect.signature(builder.__init__).parameters
        more = {"block_table_width": -(-_LONGEST // spec.block_size)} if wide else {}
        return builder(spec, [name], self.config, torch.device("cpu"), **more)

    def prefix(self, request: str, of: str, length: int) -> None:
        """A new request that goes on behind the first ``length`` tokens of another one, on that one's blocks."""
        blocks = []
        for group, theirs in zip(self.groups, self.requests[of].blocks, strict=True):
            shared = theirs[: length // group.kv_cache_spec.block_size]
            blocks.append([self.blocks.take(block) for block in shared])
        self.requests[request] = Request(blocks, length)

    def end(self, request: str) -> None:
        """Give a request's blocks back."""
        for blocks in self.requests.pop(request).blocks:
            for block in blocks:
                self.blocks.drop(block)

    def metadata(self, turns: list[Turn], padding: int) -> tuple[dict[str, Any], torch.Tensor]:
        """attn_metadata by layer, as vLLM's builders make it, and positions; ``padding`` tokens of nobody behind."""
        for turn in turns:
            self._make_room(self.requests.setdefault(turn.request, Request([[] for _ in self.groups])), turn.tokens)
        asked = [(self.requests[turn.request], turn.tokens) for turn in turns]
        lengths = torch.tensor([tokens for _, tokens in asked])
        owner = torch.arange(len(turns)).repeat_interleave(lengths)
        runs = [torch.arange(request.length, request.length + tokens) for request, tokens in asked]
        positions = torch.cat([*runs, torch.zeros(padding, dtype=torch.int64)])
        common = [self._common(i, asked, owner, positions, padding) for i in range(len(self.groups))]
        made, found = {}, {}
        for name in self.specs:  # layers with one spec and one backend share their metadata, as in vLLM
            index, spec = self._group(name)
            key = (index, spec, self.context[name].get_attn_backend())
            if key not in made:
                made[key] = self.builders[name].build(0, common[index])
            found[name] = made[key]
        for turn in turns:
            self.requests[turn.request].length += turn.tokens - turn.rejected
        return found, positions

    def _make_room(self, request: Request, tokens: int) -> None:
        """Blocks for so many tokens more; those that no window reaches any more go back."""
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            size, window = group.kv_cache_spec.block_size, _window(group.kv_cache_spec)
            for index in range(max(0, request.length - window + 1) // size if window else 0):
                self.blocks.drop(blocks[index])
                blocks[index] = 0
            while len(blocks) * size < request.length + tokens:
                blocks.append(self.blocks.take())

    def _common(
        self, index: int, asked: list[tuple[Request, int]], owner: torch.Tensor, positions: torch.Tensor, padding: int
    ) -> Any:
        size = self.groups[index].kv_cache_spec.block_size
        table = torch.zeros(len(asked), -(-_LONGEST // size), dtype=torch.int32)
        for row, (request, _) in zip(table, asked, strict=True):
            row[: len(request.blocks[index])] = torch.tensor(request.blocks[index], dtype=torch.int32)
        at, lengths = positions[: owner.shape[0]], torch.tensor([tokens for _, tokens in asked], dtype=torch.int32)
        slots = table[owner, at // size].long() * size + at % size
        ends = torch.tensor([request.length + tokens for request, tokens in asked], dtype=torch.int32)
        return common(lengths, ends, table, torch.cat([slots, torch.full((padding,), -1)]), positions)


def common(
    lengths: torch.Tensor, ends: torch.Tensor, table: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
) -> Any:
    """What vLLM's builders are given of a group: lengths and ends [R], its table [R, blocks], slots, positions [T]."""
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return import_module("vllm.v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=bounds,
        query_start_loc_cpu=bounds,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
        num_reqs=lengths.shape[0],
        num_actual_tokens=positions.shape[0],
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=slots,
        positions=positions,
        is_prefilling=lengths > 1,
    )


def _window(spec: Any) -> int:
    """The widest sliding window of a group's layers; 0 if there is none."""
    specs = getattr(spec, "kv_cache_specs", {"": spec}).values()
    return max(getattr(one, "sliding_window", None) or 0 for one in specs)


def _layers(config: Any) -> list[Any]:
    """The attention of every layer that compresses, as vLLM's model for CPUs makes it, with random weights."""
    sparse = import_module("vllm.models.deepseek_v4.cpu.cpu_sparse")
    torch.cuda.Event = sparse._NoOpEvent  # as that model does meanwhile
    torch.set_default_dtype(torch.bfloat16)
    chosen = torch.zeros(512, 512, dtype=torch.int32)
    made = [
        sparse.DeepseekV4CPUAttention(config, prefix=f"model.layers.{i}.attn", topk_indices_buffer=chosen)
        for i, ratio in enumerate(RATIOS)
        if ratio
    ]
    torch.set_default_dtype(torch.float32)
    for layer in made:  # what follows upon the loading of weights
        tiny.randomise(None, layer)
        layer.rotary_emb.cos_sin_cache = layer.rotary_emb.cos_sin_cache.float().contiguous()
        for compressor in (layer.indexer and layer.indexer.compressor, layer.compressor):
            if compressor:
                compressor.cache_norm_weight_fp32()
    return made


def opened(folder: Path) -> Any:
    """vLLM's config of the small model, with its distributed state begun."""
    config = import_module("vllm.engine.arg_utils").EngineArgs(**tiny.arguments(folder, RATIOS)).create_engine_config()
    distributed = import_module("vllm.distributed")
    with import_module("vllm.config").set_current_vllm_config(config):
        distributed.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/rendezvous", backend="gloo"
        )
        distributed.ensure_model_parallel_initialized(1, 1)
    return config
