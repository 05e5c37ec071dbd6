"""Tensors that end (or begin) at an unmapped page: a step that leaves them ends the run."""

import ctypes
import mmap

import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_PAGE = mmap.PAGESIZE
_kept = []  # memory lives as long as the process: tensors do not hold it


def guarded(like, *, front=False):
    """A copy of a tensor whose last byte (or first, with ``front``) is the last one that may be touched."""
    like = like.contiguous()
    size = like.numel() * like.element_size()
    pages = -(-size // _PAGE) + 2
    block = mmap.mmap(-1, pages * _PAGE, prot=_READ_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for page in (0, pages - 1):
        if _LIBC.mprotect(ctypes.c_void_p(start + page * _PAGE), ctypes.c_size_t(_PAGE), _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = _PAGE if front else (pages - 1) * _PAGE - size
    offset -= offset % like.element_size()
    memory = (ctypes.c_char * max(size, 1)).from_address(start + offset)
    _kept.append((block, memory))
    tensor = torch.frombuffer(memory, dtype=like.dtype, count=like.numel()) if size else like.clone()
    tensor = tensor.view(like.shape)
    tensor.copy_(like)
    return tensor
