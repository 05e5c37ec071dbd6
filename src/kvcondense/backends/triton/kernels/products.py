"""Products of tokens and weights, summed over the hidden channels in the same steps whoever forms them.

A tile's sums have a row for each channel and its tokens side by side: matrix units leave a row to a few lanes of one
warp, so that what pools a window of them waits for no other warp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, WIDE: tl.constexpr):
    """total + a [M, K] @ b [K, N] of bf16 values, in fp32.

    WIDE: for the interpreter, whose own product is a BLAS's: on bits of bf16, and, in fp32, with an order of sums that
    depends on a row's place in the tile (OpenBLAS's AVX2 kernels). Here every row is summed alike.
    """
    if WIDE:
        total += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def reach(token, live, base, M: tl.constexpr):
    """Of the tokens [M] that are ``live``: 0 if there are none, 1 if number m is base + m for each, else 2."""
    apart = live & (token != base + tl.arange(0, M))
    return tl.max(tl.where(apart, 2, live.to(tl.int32)), axis=0)


@triton.jit
def weights(w, first, i, w_stride, BLOCK: tl.constexpr, K: tl.constexpr, BOXES: tl.constexpr):
    """w [BLOCK, K] of the channels from ``first`` and the hidden ones from i on."""
    if BOXES:
        found = w.load([first, i])
    else:
        channel = first + tl.arange(0, BLOCK)
        found = tl.load(w + channel.to(tl.int64)[:, None] * w_stride + (i + tl.arange(0, K))[None, :])
    return found


@triton.jit
def accumulate(x, w, token, live, base, first, other, hidden, x_stride, w_stride,
               c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
               BOXES: tl.constexpr, NEAR: tl.constexpr):  # fmt: skip
    """kv, z of the channels from ``first`` on, then of those from ``other`` on (None: 0); see ``project_tile``.

    NEAR: x is a descriptor, and token m is base + m. BOXES: w is one.
    """
    N: tl.constexpr = c.value.width
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    TWO: tl.constexpr = other is not None
    kv = tl.zeros([BLOCK, M], tl.float32)
    z = tl.zeros([BLOCK, M], tl.float32)
    kv_2 = tl.zeros([BLOCK, M], tl.float32)
    z_2 = tl.zeros([BLOCK, M], tl.float32)
    if not NEAR:
        source = x + tl.where(live, token, 0).to(tl.int64)[None, :] * x_stride + tl.arange(0, K)[:, None]
    for i in range(0, hidden, K):  # all loads, then all products: so boxes that arrive together are waited for once
        if NEAR:
            a = tl.trans(x.load([base, i]))
            if WIDE:  # in order: numpy sums a view of transposed memory otherwise
                a = tl.reshape(tl.reshape(a, (K * M,)), (K, M))
        else:
            a = tl.load(source + i, mask=live[None, :], other=0.0)
        w_kv = weights(w, first, i, w_stride, BLOCK, K, BOXES)
        if GATE:
            w_z = weights(w, N + first, i, w_stride, BLOCK, K, BOXES)
        if TWO:
            w_kv_2 = weights(w, other, i, w_stride, BLOCK, K, BOXES)
            if GATE:
                w_z_2 = weights(w, N + other, i, w_stride, BLOCK, K, BOXES)
        kv = product(w_kv, a, kv, WIDE)
        if GATE:
            z = product(w_z, a, z, WIDE)
        if TWO:
            kv_2 = product(w_kv_2, a, kv_2, WIDE)
            if GATE:
                z_2 = product(w_z_2, a, z_2, WIDE)
    return kv, z, kv_2, z_2


@triton.jit
def project_tile(x, x_box, w, token, live, base, first, other, hidden, x_stride, w_stride,
                 c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """kv, z [block, M] fp32 of tokens [M], where they are ``live``, for the kv channels of w from ``first`` on.

    Then the same for the channels from ``other`` on, unless that is None: x is read once. x_box: descriptor of x, in
    tiles [M, K], for tokens that lie side by side from ``base`` on; w is one, too, then. None: there are none. What is
    not live is 0 or, from a descriptor, a neighbour's.
    """
    BOXES: tl.constexpr = x_box is not None
    how = reach(token, live, base, M)
    many = tl.where(how > 0, hidden, 0)
    if BOXES:
        if how < 2:
            kv, z, kv_2, z_2 = accumulate(x_box, w, token, live, base, first, other, many, x_stride, w_stride,
                                          c, M, K, WIDE, BOXES, True)  # fmt: skip
        else:
            kv, z, kv_2, z_2 = accumulate(x, w, token, live, base, first, other, many, x_stride, w_stride,
                                          c, M, K, WIDE, BOXES, False)  # fmt: skip
    else:
        kv, z, kv_2, z_2 = accumulate(x, w, token, live, base, first, other, many, x_stride, w_stride,
                                      c, M, K, WIDE, BOXES, False)  # fmt: skip
    return kv, z, kv_2, z_2
