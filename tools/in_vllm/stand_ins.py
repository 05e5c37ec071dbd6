"""Plain torch for C++ operators of DeepSeek-V4 that vLLM's AVX2 build lacks, except the compressor's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from kvcondense import PagedCache
from kvcondense.formats import get_format

Tensor = torch.Tensor
_ROPE = 64


def _pages(memory: Tensor) -> PagedCache:
    form = get_format("fp8_model1_scale_floor")
    return PagedCache(memory, form, 512, memory.shape[1] // form.row_bytes(512))


def _turned(x: Tensor, positions: Tensor, cos_sin: Tensor, back: bool = False) -> Tensor:
    """Pairs side by side of the last channels of x [T, .., D] by the angles of positions [T]."""
    cos, sin = cos_sin[positions].float().chunk(2, dim=-1)
    for _ in range(x.ndim - 2):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    sin = -sin if back else sin
    first, second = x[..., -_ROPE::2], x[..., 1 - _ROPE :: 2]
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([x[..., :-_ROPE], pairs.flatten(-2)], dim=-1)


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def fused_qnorm_rope_kv_insert_cpu(
    q: Tensor, kv: Tensor, positions: Tensor, cache: Tensor, slots: Tensor, cos_sin: Tensor, heads: int, eps: float,
    _: int,
) -> Tensor:  # fmt: skip
    """Queries normed and turned, in as many heads as are wanted; keys turned into the window's pages."""
    out = q.new_zeros(q.shape[0], heads, q.shape[2])
    out[:, : q.shape[1]] = _turned(_normed(q.float(), eps), positions, cos_sin).to(q.dtype)
    pages, wanted = _pages(cache), slots >= 0
    keys = _turned(kv.float(), positions, cos_sin)[: slots.shape[0]][wanted]
    pages.put(slots[wanted], pages.encode(keys))
    return out


def flash_mla_with_kvcache_cpu(
    out: Tensor, q: Tensor, window: Tensor, at: Tensor, _: int, cache: Tensor, chosen: Tensor, __: int, sink: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Attention of each token over rows of its window and of the compressed cache, with a sink for each head."""
    near, far = _pages(window), _pages(cache)
    for token, query in enumerate(q.float()):
        slots = at[token][at[token] >= 0].long(), chosen[token][chosen[token] >= 0].long()
        keys = torch.cat([near.decode_rows(slots[0]), far.decode_rows(slots[1])])
        scores = torch.cat([query @ keys.T * scale, sink.float()[:, None]], dim=1).softmax(-1)
        out[token] = (scores[:, :-1] @ keys).to(out.dtype)


def _mixes(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x.float().flatten(1), eps) @ weight.float().T


def hc_pre_fused_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, base: Tensor, count: int, rounds: int, norm_eps: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Hyper-connections before a block: its input, and how its output goes back into the streams."""
    mixes = _mixes(x, weight, norm_eps)
    pre = torch.sigmoid(mixes[:, :count] * scale[0] + base[:count]) + eps
    post = 2 * torch.sigmoid(mixes[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    across = (mixes[:, 2 * count :] * scale[2] + base[2 * count :]).view(-1, count, count).softmax(-1) + eps
    across = across / (across.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        across = across / (across.sum(-1, keepdim=True) + eps)
        across = across / (across.sum(-2, keepdim=True) + eps)
    return (pre[..., None] * x.float()).sum(1).to(x.dtype), post, across


def hc_post_fused_cpu(x: Tensor, residual: Tensor, post: Tensor, across: Tensor) -> Tensor:
    """Hyper-connections behind a block."""
    mixed = torch.einsum("tkh,tkd->thd", across, residual.float())
    return (post[..., None] * x.float()[:, None] + mixed).to(x.dtype)


def hc_head_fused_cpu(x: Tensor, weight: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float) -> Tensor:
    """The streams' sum before the head."""
    pre = torch.sigmoid(_mixes(x, weight, norm_eps) * scale + base) + eps
    return (pre[..., None] * x.float()).sum(1).to(x.dtype)


def biased_topk_cpu(_: Tensor, logits: Tensor, bias: Tensor, count: int, *rest: Any) -> tuple[Tensor, Tensor]:
    """Experts by biased scores; weights by scores, of a sum that is the fourth of the rest."""
    scores = functional.softplus(logits.float()).sqrt()
    chosen = (scores + bias).topk(count).indices
    weights = scores.gather(1, chosen)
    return weights / weights.sum(-1, keepdim=True) * (rest[3] or 1.0), chosen.to(torch.int32)


def inverse_gptj_rope_o_proj_cpu(out: Tensor, positions: Tensor, cos_sin: Tensor, _: int) -> Tensor:
    """Outputs turned back."""
    return _turned(out.float(), positions, cos_sin, back=True)


def convert_weight_packed(weight: Tensor) -> Tensor:
    """Weights in the order of a product's tiles: left as they are, for the two products below."""
    return weight


def bmm_cpu(out: Tensor, one: Tensor, other: Tensor, packed: bool, scale: Tensor | None) -> None:  # noqa: ARG001
    """A batch of products with packed weights."""
    out.copy_((one.float() @ other.float().transpose(1, 2)).to(out.dtype))


def weight_packed_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, packed: bool) -> None:  # noqa: ARG001
    """A product with packed weights."""
    out.copy_(functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(out.dtype))


_OPERATORS = (
    fused_qnorm_rope_kv_insert_cpu, flash_mla_with_kvcache_cpu, hc_pre_fused_cpu, hc_post_fused_cpu, hc_head_fused_cpu,
    biased_topk_cpu, inverse_gptj_rope_o_proj_cpu, convert_weight_packed, bmm_cpu, weight_packed_linear,
)  # fmt: skip


def install() -> list[str]:
    """Put in the place of every operator that is missing; their names."""
    missing = [operator for operator in _OPERATORS if not hasattr(torch.ops._C, operator.__name__)]
    for operator in missing:
        setattr(torch.ops._C, operator.__name__, operator)
    return [operator.__name__ for operator in missing]
