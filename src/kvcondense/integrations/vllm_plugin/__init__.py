"""In vLLM: ``DeepseekCompressor.forward`` (V4, V4.1) by a bound step on vLLM's own states and caches, in place."""

from __future__ import annotations

from kvcondense.integrations.vllm_plugin.compressor import install
from kvcondense.integrations.vllm_plugin.support import Support, support

__all__ = ["Support", "install", "support"]
