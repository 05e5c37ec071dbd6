"""Which bytes tensors take: whether their elements are memory of their own, and whether two share some."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvcondense.errors import DtypeError, KvCondenseError, ShapeError


def check_plain(name: str, t: torch.Tensor) -> None:
    """Raise unless memory holds the values themselves: no sparse tensor, no negated or conjugate view."""
    if t.layout is not torch.strided:
        raise DtypeError(name, "a strided tensor", t.layout)
    if t.is_neg() or t.is_conj():
        raise KvCondenseError(name, "a tensor that holds its values (t.resolve_neg(), t.resolve_conj())", "a lazy view")


def check_written(name: str, t: torch.Tensor) -> None:
    """The same, and raise unless every element has memory of its own: no stride of 0, no rows that overlap."""
    check_plain(name, t)
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride < reach:
            raise ShapeError(name, "elements with memory of their own", f"strides {list(t.stride())}")
        reach = stride * size
    if t.requires_grad and torch.is_grad_enabled():
        raise KvCondenseError(name, "a tensor without gradients", "one that requires them")


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they may share a byte. Tensors that lie side by side in blocks of one stride, as in an engine, do not."""
    if a.device != b.device or not a.numel() or not b.numel():
        return False
    first, other = span(a), span(b)
    if first[1] <= other[0] or other[1] <= first[0]:
        return False
    step = a.stride(0) * a.element_size() if a.dim() else 0
    if a.dim() < 2 or b.dim() < 2 or step == 0 or step != b.stride(0) * b.element_size():
        return True
    lengths = [end - begin for begin, end in (span(a[0]), span(b[0]))]
    offset = (other[0] - first[0]) % step
    return offset < lengths[0] or offset + lengths[1] > step


def check_apart(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    """Raise if a tensor that is written shares memory with another one, written or read."""
    names = list(written)
    for index, name in enumerate(names):
        for other in names[:index]:
            if overlap(written[name], written[other]):
                raise KvCondenseError(name, "memory of its own", f"memory of {other}")
        for other, t in read.items():
            if overlap(written[name], t):
                raise KvCondenseError(other, f"memory that no step writes ({name} is written)", f"memory of {name}")


def version(t: torch.Tensor) -> int | None:
    """A number that changes made in place to a tensor, or to a view of it, change; None where nobody counts them.

    Changes made through ``t.data`` are not counted, nor are those of tensors that were made in inference mode.
    """
    return None if t.is_inference() else t._version


def span(t: torch.Tensor) -> tuple[int, int]:
    """Address of its first byte, and of the first behind its last."""
    start = t.data_ptr()
    if t.is_contiguous():
        return start, start + t.numel() * t.element_size()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()
