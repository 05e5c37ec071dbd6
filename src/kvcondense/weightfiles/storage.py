"""How a matrix is stored (plain, FP8 with scales, MLX's affine groups, GGUF), and the one way to get it out in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvcondense.errors import CheckpointError
from kvcondense.weightfiles import files
from kvcondense.weightfiles.files import StoredTensor
from kvcondense.weightfiles.settings import Settings

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = ("BF16", "F16", "F32", "F64")
_FP8 = "F8_E4M3"
_SCALES = ("scale", "weight_scale", "weight_scale_inv")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_BLOCK = 128
_MISSING = "a missing tensor"


@dataclass(frozen=True)
class Storage:
    """How one matrix is stored, in words, and what reads it: [N, D], plain as it is, any other form in bf16."""

    text: str
    read: Callable[[], torch.Tensor]


def storage_of(tensors: dict[str, StoredTensor], role: str, shape: tuple[int, int], settings: Settings) -> Storage:
    """How the matrix ``role`` of ``tensors`` is stored, by headers alone; shape: the [N, D] that it must have.

    * BF16, F16, F32, F64: left as they are.
    * F8_E4M3 [N, D] with a scale (``scale``: deepseek-ai's checkpoints; ``weight_scale``: compressed-tensors;
      ``weight_scale_inv``: transformers' FP8, a factor like the others, see NVIDIA/TensorRT-LLM,
      tensorrt_llm/_torch/models/modeling_deepseekv4.py, weight_dequant): w[n, d] = fp32(q[n, d]) * scale of its block.
      Scales are [ceil(N / b), ceil(D / c)] with b x c from config.json's weight_block_size, else 128 x 128 where that
      fits, else the square of a power of two that gives this shape; [N, 1], one per row; or [] and [1], one for all.
      F32, BF16, F16, F8_E8M0, or U8 that means 2^(byte - 127).
    * U32 with ``scales`` and ``biases`` [N, D / group] (ml-explore/mlx, mlx.core.quantize, mode affine):
      w[n, d] = q[n, d] * scale + bias of its group; q is ``bits`` wide, little-endian: in a word of eight 4-bit values
      the lowest nibble comes first.
    * Any quantised type of GGUF, as the gguf package dequantises it.

    The products (and sums) are taken in fp32, and rounded to bf16 once, to nearest even. Raises CheckpointError, with
    the tensor's name, for another shape or type, a scale that is missing (it is never taken for 1) or one too many;
    ``read`` raises it for scales and results that are not finite.
    """
    weight = tensors[role]
    beside = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{role}.")}
    if weight.dtype in _PLAIN or weight.file.suffix == ".gguf":
        _reject(beside, weight)
        _expect(weight, shape)
        return Storage(weight.dtype, lambda: _plain(weight))
    if weight.dtype == _FP8:
        return _fp8(weight, beside, shape, settings, fused=role == "wkv_wgate")
    if weight.dtype == "U32" and ("scales" in beside or "biases" in beside or settings.mlx):
        return _mlx(weight, beside, shape, settings)
    raise CheckpointError(
        weight.name,
        "bf16, fp16, fp32 or fp64, fp8 e4m3 with scales, MLX's uint32 with scales and biases, or GGUF",
        _spelt(weight.dtype),
    )


def vector(tensor: StoredTensor, shape: tuple[int, ...]) -> torch.Tensor:
    """ape or norm: plain, or a quantised type of GGUF, which stays fp32."""
    _expect(tensor, shape)
    if tensor.dtype not in _PLAIN and tensor.file.suffix != ".gguf":
        raise CheckpointError(tensor.name, "bf16, fp16, fp32 or fp64", _spelt(tensor.dtype))
    return _finite(files.read(tensor), tensor) if tensor.dtype not in _PLAIN else files.read(tensor)


def _plain(weight: StoredTensor) -> torch.Tensor:
    tensor = files.read(weight)
    return tensor if weight.dtype in _PLAIN else _rounded(tensor, weight)


def _fp8(
    weight: StoredTensor, beside: dict[str, StoredTensor], shape: tuple[int, int], settings: Settings, *, fused: bool
) -> Storage:
    _expect(weight, shape)
    stem = weight.name.removesuffix("weight")
    kinds = [kind for kind in _SCALES if kind in beside]
    if not kinds:
        raise CheckpointError(
            f"{stem}scale", f"to be there: {weight.name} is FP8 (or {', '.join(_SCALES[1:])})", _MISSING
        )
    _reject({kind: t for kind, t in beside.items() if kind != kinds[0]}, weight)
    scale = beside[kinds[0]]
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(scale.name, "F32, BF16, F16, F8_E8M0 or U8", scale.dtype)
    block = _block(scale, shape, settings.block)
    if fused and block[0] < shape[0] and shape[0] // 2 % block[0]:
        # Blocks of the two halves, or of the whole? Their shapes may be the same.
        wanted = f"a whole number of blocks of {block[0]} rows in each of wkv and wgate"
        raise CheckpointError(scale.name, wanted, f"{shape[0] // 2} rows")
    one = "one scale" if block == shape else f"a scale per {block[0]}x{block[1]}"
    return Storage(f"F8_E4M3, {one} ({kinds[0]}, {scale.dtype})", lambda: _scaled(weight, scale, block))


def _block(scale: StoredTensor, shape: tuple[int, int], given: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale."""

    def count(block: tuple[int, int]) -> tuple[int, int]:
        return -(-shape[0] // block[0]), -(-shape[1] // block[1])

    if scale.shape in ((), (1,)):
        return shape
    if given is not None:
        if scale.shape != count(given):
            wanted = f"shape {list(count(given))}, one per block of {given[0]} x {given[1]} (config.json)"
            raise CheckpointError(scale.name, wanted, f"shape {list(scale.shape)}")
        return given
    if scale.shape == count((_BLOCK, _BLOCK)):
        return _BLOCK, _BLOCK
    if scale.shape == (shape[0], 1):
        return 1, shape[1]
    for side in (1 << n for n in range(3, 21)):
        if scale.shape == count((side, side)):
            return side, side
    wanted = f"shape {list(count((_BLOCK, _BLOCK)))}, {[shape[0], 1]} or []"
    hint = "weight_block_size in config.json says which other block"
    raise CheckpointError(scale.name, wanted, f"shape {list(scale.shape)}", hint)


def _scaled(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> torch.Tensor:
    factor = files.read(scale)
    if scale.dtype == "U8":
        factor = factor.view(torch.float8_e8m0fnu)
    factor = _finite(factor.to(torch.float32), scale)
    rows, columns = weight.shape
    if factor.dim() == 2:
        factor = factor.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return _rounded(files.read(weight).to(torch.float32) * factor, weight)


def _mlx(weight: StoredTensor, beside: dict[str, StoredTensor], shape: tuple[int, int], settings: Settings) -> Storage:
    stem = weight.name.removesuffix(".weight")
    for kind in ("scales", "biases"):
        if kind not in beside:
            raise CheckpointError(f"{stem}.{kind}", f"to be there: {weight.name} is MLX's uint32", _MISSING)
    _reject({kind: t for kind, t in beside.items() if kind not in ("scales", "biases")}, weight)
    group, bits = settings.groups(stem)
    if shape[1] % group or shape[1] * bits % 32:
        raise CheckpointError(weight.name, f"rows of whole groups of {group}", f"{shape[1]} columns")
    _expect(weight, (shape[0], shape[1] * bits // 32))
    for kind in ("scales", "biases"):
        _expect(beside[kind], (shape[0], shape[1] // group))
        if beside[kind].dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(beside[kind].name, "F32, BF16 or F16", beside[kind].dtype)
    return Storage(
        f"MLX {bits}-bit, groups of {group} ({beside['scales'].dtype})",
        lambda: _affine(weight, beside["scales"], beside["biases"], group, bits),
    )


def _affine(weight: StoredTensor, scales: StoredTensor, biases: StoredTensor, group: int, bits: int) -> torch.Tensor:
    scale, bias = (_finite(files.read(t).to(torch.float32), t) for t in (scales, biases))
    codes = files.read(weight).view(torch.uint8).to(torch.int32)
    each = (codes.unsqueeze(-1) >> torch.arange(8, dtype=torch.int32, device="cpu")) & 1
    each = each.reshape(codes.shape[0], -1, bits)  # a row's bits, from the lowest of its first byte on
    q = (each << torch.arange(bits, dtype=torch.int32, device="cpu")).sum(-1).to(torch.float32)
    q = q.reshape(*scale.shape, group)
    return _rounded((q * scale.unsqueeze(-1) + bias.unsqueeze(-1)).flatten(1), weight)


def _rounded(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    return _finite(_finite(tensor, stored).to(torch.bfloat16), stored)


def _finite(tensor: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise CheckpointError(stored.name, "finite values", "NaN or infinity")
    return tensor


def _expect(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise CheckpointError(stored.name, f"shape {list(shape)}", f"shape {list(stored.shape)}")


def _reject(beside: dict[str, StoredTensor], weight: StoredTensor) -> None:
    if beside:
        extra = next(iter(beside.values()))
        raise CheckpointError(extra.name, f"no such tensor beside {weight.name}, {weight.dtype}", "an extra tensor")


def _spelt(dtype: str) -> str:
    """torch's name of a type that no compressor is stored in; int8, for I8."""
    kinds = {"I": "int", "U": "uint"}
    return kinds.get(dtype[0], dtype[0]) + dtype[1:] if dtype[1:].isdigit() else dtype
