"""Tests of a GPU are skipped where there is none, or where kernels are not compiled."""

import functools

import pytest
import torch


@functools.cache
def why_not():
    """None if kernels run on a GPU here."""
    if not torch.cuda.is_available():
        return "no GPU"
    from kvcondense.backends.triton.runtime import why_no_device

    return why_no_device(torch.device("cuda"))


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
