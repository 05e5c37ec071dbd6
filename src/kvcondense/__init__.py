"""kvcondense: the DeepSeek-V4 KV compressor as a library. A name is imported when it is asked for, and torch with it.

So the command can say ``--help``, and refuse what nobody can do, without waiting for torch.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from kvcondense.api import compress, condense, explain, project, store
    from kvcondense.config import ModelConfig
    from kvcondense.errors import KvCondenseError
    from kvcondense.layout.batch import RaggedBatch
    from kvcondense.layout.cache import PagedCache
    from kvcondense.layout.online import OnlineState
    from kvcondense.layout.plan import Plan
    from kvcondense.layout.state import StatePool
    from kvcondense.rope_table import RopeTable
    from kvcondense.spec import CompressorSpec
    from kvcondense.weights import CompressorWeights

__version__ = "0.1.0"

__all__ = [
    "CompressorSpec",
    "CompressorWeights",
    "KvCondenseError",
    "ModelConfig",
    "OnlineState",
    "PagedCache",
    "Plan",
    "RaggedBatch",
    "RopeTable",
    "StatePool",
    "compress",
    "condense",
    "explain",
    "project",
    "store",
]

_HOMES = {
    "api": ("compress", "condense", "explain", "project", "store"),
    "config": ("ModelConfig",),
    "errors": ("KvCondenseError",),
    "layout.batch": ("RaggedBatch",),
    "layout.cache": ("PagedCache",),
    "layout.online": ("OnlineState",),
    "layout.plan": ("Plan",),
    "layout.state": ("StatePool",),
    "rope_table": ("RopeTable",),
    "spec": ("CompressorSpec",),
    "weights": ("CompressorWeights",),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> _typing.Any:
    """A public name, from the module that defines it; it is there from then on."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(_importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
