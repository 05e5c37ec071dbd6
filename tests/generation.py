"""A small DeepSeek-V4 of transformers, prompts for it, and how what it gives is compared."""

import inspect
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

EXAMPLE = Path(__file__).parent.parent / "examples" / "generate.py"
CLOSE = 2e-6
"""Of logits of a model in fp32, relative to the largest."""


def small_model():
    """That of the example, whose heads and ratios are DeepSeek's."""
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        return __import__("generate").small_model()
    finally:
        sys.path.remove(str(EXAMPLE.parent))


def ids(batch=2, count=300, seed=0):
    return torch.randint(1, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, *, begun=None, **more):
    """``begun``: a cache, called ``past_key_values`` before transformers 5.24."""
    if begun is not None:
        named = "cache" in inspect.signature(type(model).forward).parameters
        more["cache" if named else "past_key_values"] = begun
    return model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0, **more)


def cache_of(model):
    return transformers.DynamicCache(config=model.config)


def close(a, b):
    return float((a - b).abs().max() / b.abs().max()) < CLOSE
