"""vLLM plugin (entry point ``vllm.general_plugins``): with ``KVCONDENSE_VLLM=1`` vLLM compresses with kvcondense.

It lives beside the package so that a vLLM that does not ask for it does not import kvcondense.
"""

from __future__ import annotations

import os

VARIABLE = "KVCONDENSE_VLLM"


def register() -> None:
    """Called by vLLM in each of its processes, more than once in some: replaces its compressor's forward, if asked."""
    if os.environ.get(VARIABLE) == "1":
        from kvcondense.integrations.vllm_plugin import install

        install()
