"""Quantised matrices made by code, and what they are worth: FP8 with scales and MLX's affine groups, in numpy."""

from dataclasses import replace

import numpy as np
import torch

from checkpoints import WIDE

MODEL = replace(WIDE, hidden_size=320)
"""Heads of DeepSeek-V4 over 320 channels: two blocks of 128 and a half."""
MATRICES = (
    "wkv.weight",
    "wgate.weight",
    "kv_proj.weight",
    "gate_proj.weight",
    "fused_wkv_wgate.weight",
    "wkv_gate.weight",
)
CHANNEL, TENSOR = "channel", "tensor"


def bf16(values):
    """fp32 -> bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def e4m3(codes):
    """Bytes of float8_e4m3fn -> fp32."""
    sign, exponent, mantissa = codes >> 7, (codes >> 3) & 15, (codes & 7).astype(np.float64)
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    )
    return np.where(sign == 1, -size, size).astype(np.float32)


def is_matrix(name):
    return "compressor" in name and name.endswith(MATRICES)


def fp8(tensors, kind="scale", dtype=torch.float32, block=(128, 128)):
    """Tensors with every matrix in e4m3 and its scales beside it; matrix -> the bits of bf16 it stands for."""
    out, worth = dict(tensors), {}
    for name, weight in tensors.items():
        if not is_matrix(name):
            continue
        rows, columns = {CHANNEL: (1, weight.shape[1]), TENSOR: tuple(weight.shape)}.get(block, block)
        shape = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        gen = torch.Generator().manual_seed(len(worth))
        power = torch.randint(-9, -3, shape, generator=gen)
        scale = (2.0 ** power.float() * (1 if dtype in (torch.uint8, torch.float8_e8m0fnu) else 1.37)).float()
        stored = (power + 127).to(torch.uint8) if dtype == torch.uint8 else scale.to(dtype)
        codes = torch.randint(0, 127, weight.shape, generator=gen, dtype=torch.uint8)
        codes |= torch.randint(0, 2, weight.shape, generator=gen, dtype=torch.uint8) << 7
        out[name] = codes.view(torch.float8_e4m3fn)
        out[name.removesuffix("weight") + kind] = stored[0, 0] if block == TENSOR else stored
        wide = np.repeat(
            np.repeat(scale.to(dtype).float().numpy() if dtype != torch.uint8 else scale.numpy(), rows, 0), columns, 1
        )
        worth[name] = bf16(e4m3(codes.numpy()) * wide[: weight.shape[0], : weight.shape[1]])
    return out, worth


def mlx(tensors, bits=4, group=64, own=()):
    """The same in MLX's packing: codes of ``bits`` from the lowest bit on, scales and biases in fp16 per group.

    ``own``: (end of a matrix's name, bits of its own).
    """
    out, worth = dict(tensors), {}
    for name, weight in tensors.items():
        if not is_matrix(name):
            continue
        wide = next((b for end, b in own if name.endswith(end)), bits)
        rng = np.random.default_rng(len(worth))
        q = rng.integers(0, 2**wide, weight.shape, dtype=np.int64)
        scale, bias = (rng.normal(0, 0.1, (weight.shape[0], weight.shape[1] // group)).astype(np.float16) for _ in "ab")
        packed = []
        for row in q:
            whole = sum(int(code) << (wide * i) for i, code in enumerate(row))
            packed.append(np.frombuffer(whole.to_bytes(len(row) * wide // 8, "little"), np.uint32))
        out[name] = torch.from_numpy(np.stack(packed))
        out[name.removesuffix("weight") + "scales"] = torch.from_numpy(scale)
        out[name.removesuffix("weight") + "biases"] = torch.from_numpy(bias)
        s, b = (np.repeat(t.astype(np.float32), group, 1) for t in (scale, bias))
        worth[name] = bf16(q.astype(np.float32) * s + b)
    return out, worth


def bits_of(weights):
    """The bits of ``CompressorWeights.w``, in bf16."""
    assert weights.w.dtype == torch.bfloat16
    return weights.w.view(torch.int16).numpy().view(np.uint16)
