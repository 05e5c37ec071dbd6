"""Readers of a model's files that somebody else may have written, each with valid inputs and all that reading does."""

import contextlib
import hashlib
import json
from dataclasses import replace

import torch
from safetensors.torch import save

import alterations
import checkpoints
import model_files
from kvcondense import CompressorSpec, KvCondenseError, ModelConfig
from kvcondense.checkpoint import compressors
from kvcondense.files import sealed
from kvcondense.rope_table import inverse_frequencies
from kvcondense.stream import HiddenFile
from kvcondense.weightfiles import gguf
from kvcondense.weightfiles.files import tensor_files
from kvcondense.weightfiles.settings import Settings
from weight_forms import fp8, mlx


def digest(*parts):
    """One short word for everything that was read."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.update(sealed.digest(part).encode())
        else:
            found.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


class Reader:
    """seeds: valid inputs; ``alter`` makes an input of one of them, ``read`` does all that can be done with it.

    What ``read`` returns are words for what was read. sealed: no others than those of the seeds come of an input whose
    digests are a seed's.
    """

    sealed = False
    quiet = False
    """Whether it has no reason to warn."""
    weight = 1

    def __init__(self, folder):
        self.folder = folder / type(self).__name__.lower()
        self.folder.mkdir()
        self.seeds = self.made()
        self.whole = {word for i, seed in enumerate(self.seeds) for word in self.read(seed, i)}

    def made(self):
        raise NotImplementedError

    def alter(self, chance, which):
        """(input, whether its digests are those of the seed)."""
        return alterations.of_bytes(chance, self.seeds[which], self.seeds), True

    def read(self, data, which):
        raise NotImplementedError

    def put(self, data, name="input"):
        """A new file: what an earlier one is mapped for stays as it is."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path

    def json(self, chance, which):
        """The seed as JSON, altered, or as bytes."""
        if chance.random() < 0.25:
            return alterations.of_bytes(chance, self.seeds[which], self.seeds)
        text = alterations.rendered(alterations.tree(chance, json.loads(self.seeds[which])))
        return text.encode("utf-8", "surrogatepass")


class Config(Reader):
    """config.json, in every form; what layers have, their RoPE, and how matrices are said to be stored."""

    weight = 3

    def made(self):
        forms = [model_files.made(form, model_files.official()) for form in model_files.FORMS]
        extra = {
            "quantization_config": {"weight_block_size": [128, 128]},
            "quantization": {"group_size": 64, "bits": 4},
        }
        small = {**checkpoints.CONFIG, **extra}
        v41 = {**{k: v for k, v in small.items() if k != "rope_scaling"}, "model_type": "deepseek_v41"}
        v41 |= {"kv_source_layer_ids": [1, 2], "compress_ratios": [0, 2, 2, 1]}
        return [json.dumps(c).encode() for c in (small, v41, *forms)]

    def alter(self, chance, which):
        return self.json(chance, which), False

    def read(self, data, which):
        path = self.put(data, "config.json")
        config = ModelConfig.from_json(path)
        for layer in config.compressor_layers[:3]:
            for part in CompressorSpec.parts_of_layer(config, layer):
                CompressorSpec.for_layer(config, layer, part)
        if config.rope_dim < 1 << 12:
            assert inverse_frequencies(config).isfinite().all()
        settings = Settings.of(self.folder)
        with contextlib.suppress(KvCondenseError):
            settings.groups("layers.1.attn.compressor.wkv")
        return {digest(config)}


_TINY = replace(
    checkpoints.MODEL, num_hidden_layers=2, compress_ratios=(0, 4), head_dim=8, index_head_dim=8, rope_dim=4
)
TINY = replace(_TINY, hidden_size=8)


def tiny_tensors(kind="official"):
    found = checkpoints.tensors(model=TINY)
    if kind == "fp8":
        found, _ = fp8(found, block=(8, 8))
    if kind == "mlx":
        wide = checkpoints.tensors(model=replace(TINY, hidden_size=32))
        found = mlx(wide, bits=4, group=32)[0]
    return {k: v.contiguous() for k, v in found.items()}


def tiny_config(quantised=False):
    config = {**checkpoints.CONFIG, "num_hidden_layers": 2, "compress_ratios": [0, 4], "hidden_size": 8, "head_dim": 8,
              "index_head_dim": 8, "qk_rope_head_dim": 4}  # fmt: skip
    more = {"hidden_size": 32, "quantization": {"group_size": 32, "bits": 4}} if quantised else {}
    return {**config, **more}


def load_all(folder):
    """All that is done with a checkpoint."""
    found = []
    for c in compressors(folder):
        weights = c.load()
        found += [c.layer, c.part, c.storage, c.bytes, *(t for t in (weights.w, weights.ape) if t is not None)]
    return {digest(*found)}


class Weights(Reader):
    """model.safetensors, plain, FP8 and MLX's."""

    weight = 2

    def made(self):
        kinds = ("official", "fp8", "mlx")
        self.configs = [json.dumps(tiny_config(kind == "mlx")).encode() for kind in kinds]
        return [save(tiny_tensors(kind)) for kind in kinds]

    def alter(self, chance, which):
        return alterations.of_safetensors(chance, self.seeds[which], self.seeds), False

    def read(self, data, which):
        self.put(self.configs[which], "config.json")
        self.put(data, "model.safetensors")
        return load_all(self.folder)


class Index(Reader):
    """model.safetensors.index.json beside its shards."""

    weight = 1

    def made(self):
        folder = checkpoints.write(self.folder, shards=2, model=TINY, config={"config.json": tiny_config()})
        return [(folder / "model.safetensors.index.json").read_bytes()]

    def alter(self, chance, which):
        return self.json(chance, which), False

    def read(self, data, which):
        self.put(data, "model.safetensors.index.json")
        assert {path.parent for path in tensor_files(self.folder).values()} <= {self.folder}
        return load_all(self.folder)


class Gguf(Reader):
    """A model in GGUF, plain and quantised."""

    weight = 2

    def made(self):
        package = gguf.package()
        (self.folder / "config.json").write_text(json.dumps({**tiny_config(), "hidden_size": 32}))
        out = []
        for kind in ("F32", "Q8_0", "BF16"):
            writer = package.GGUFWriter(self.folder / "made", "deepseek4")
            writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
            writer.add_uint32("deepseek4.block_count", 4)
            writer.add_array("deepseek4.rates", [0, 4, 128])
            writer.add_uint32("general.alignment", 32)
            for name, tensor in checkpoints.tensors(model=replace(TINY, hidden_size=32)).items():
                for part, base in zip(("attn", "indexer"), checkpoints.SCHEMES["official"], strict=False):
                    leaf = name.removeprefix(base.format(1))
                    if leaf == name:
                        continue
                    leaf = {"wkv.weight": "kv.weight", "wgate.weight": "gate.weight", "ape": "ape.weight"}.get(
                        leaf, leaf
                    )
                    stored = kind if leaf in ("kv.weight", "gate.weight") else "F32"
                    raw = package.GGMLQuantizationType[stored]
                    data = package.quants.quantize(tensor.float().numpy(), raw)
                    raw = None if stored == "F32" else raw
                    writer.add_tensor(f"blk.1.{part}_compressor_{leaf}", data, raw_dtype=raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            out.append((self.folder / "made").read_bytes())
        return out

    def read(self, data, which):
        gguf._header.cache_clear()  # files of one size within one tick of the clock
        self.put(data, "model.gguf")
        return load_all(self.folder)


class Hidden(Reader):
    """Hidden states, which are read in slices."""

    weight = 3

    def made(self):
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        named = {"layers.1.hidden_states": x[None], "hidden_states": x.float()}
        return [save({"hidden_states": x}, metadata={"first_position": "3"}), save(named), save({"x": x})]

    def alter(self, chance, which):
        return alterations.of_safetensors(chance, self.seeds[which], self.seeds), False

    def read(self, data, which):
        found = HiddenFile.open(self.put(data), 1)
        return {digest(found, found.read(0, 4), found.read(found.tokens // 2, found.tokens))}
