"""KV caches for inference: what keeps keys and values, what evicts some, what chooses those that are read."""

from .cache import KVCache
from .dense import DenseConfig
from .h2o import H2O
from .lookm import LookM
from .packed import PackedConfig
from .paged import PagedConfig
from .parse import KVSpec, kv_text, parse_kv
from .quest import Quest
from .snapkv import SnapKV
from .split import DuoAttention
from .streaming import StreamingLLM

__all__ = [
    "H2O",
    "DenseConfig",
    "DuoAttention",
    "KVCache",
    "KVSpec",
    "LookM",
    "PackedConfig",
    "PagedConfig",
    "Quest",
    "SnapKV",
    "StreamingLLM",
    "kv_text",
    "parse_kv",
]
