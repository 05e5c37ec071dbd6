"""kvcondense: the DeepSeek-V4 KV compressor as a library. Importing it imports torch and nothing optional."""

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
