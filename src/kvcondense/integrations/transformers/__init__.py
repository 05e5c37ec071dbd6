"""``accelerate``: transformers' DeepSeek-V4 with compressors that keep a fixed state and never copy the rows they have.

What differs from transformers beside speed: sequences of a batch count their own tokens (transformers counts padding
before a prompt as tokens, so the windows of a padded sequence are shifted), and ``crop``, which takes tokens from the
sliding windows of its cache but not from its compressors, is refused.
"""

from __future__ import annotations

from typing import Any

from kvcondense.backends import Backend
from kvcondense.errors import UnsupportedError
from kvcondense.integrations.transformers.accelerated import Accelerated
from kvcondense.integrations.transformers.forwards import check_call, forward, kind
from kvcondense.integrations.transformers.hooks import is_ours, is_replaced

__all__ = ["Accelerated", "accelerate"]


def accelerate(model: Any, *, impl: str | Backend = "auto") -> Accelerated:
    """Let the compressors of a ``DeepseekV4ForCausalLM`` (or its inner model) run on kvcondense, in place.

    Prefill, generation, beams and cache resets give transformers' rows up to fp32 rounding, computed in fp32 whatever
    the model's type: a model in fp32 gives the same greedy tokens, one in bf16 is as accurate, not equal. Parameters,
    their names and checkpoints stay as they are; layers that are wrapped or quantised project by their own forward, and
    weights that accelerate's hooks load (offloading, several devices) are read when they are there. A single query of a
    CSA layer gets the rows that its indexer picked, not all of them under a mask.

    To transformers' own forward goes, and gives what it gives: a call that needs gradients; a first call whose
    positions are not those of one sequence per row, padded at the left at most (packed documents, which transformers'
    compressors do not keep apart, right padding, a start other than 0 without a cache, jumps); and whatever continues
    a cache that began so. Caches can be copied and pickled; one whose sequences have one length goes on without
    kvcondense, too.

    Mutates the model: ``forward`` of its compressors and a hook before its own. Undone by ``undo``, or at the end of a
    ``with``. Raises UnsupportedError for a model without such compressors, one that is accelerated already, or one
    whose compressors' forward somebody else replaced. Its calls raise, before anything is written, KvCondenseError for
    positions that do not continue their cache, and UnsupportedError for gradients through a cache that it fills.
    """
    modules = [m for m in model.modules() if kind(m)] if hasattr(model, "modules") else []
    if not modules:
        raise UnsupportedError("model", "one with DeepSeek-V4 compressors of transformers", type(model).__name__)
    if any(is_ours(m) for m in modules):
        raise UnsupportedError("model", "one whose compressors are transformers' own", "one that is accelerated")
    replaced = [m for m in modules if is_replaced(m)]
    if replaced:
        expected = "compressors with the forward of their class, behind accelerate's hooks or not"
        raise UnsupportedError("model", expected, f"a {type(replaced[0]).__name__} with another one")
    models = [m for m in model.modules() if type(m).__name__ == "DeepseekV4Model"]
    return Accelerated(modules, models, impl, (forward, check_call))
