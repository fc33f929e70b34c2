"""KV caches as text: `int4`, `int2:group=32,residual=64`, `snapkv:keep=0.25+int4`, `quest:keep=0.1+paged:page=32`.

Parts are joined by `+`, in any order: what keeps the columns (a store), what evicts them (a policy), what chooses those
that are read (a selector), and `duo`. Each is `NAME` or `NAME:FIELD=VALUE,...`, as in `spec`; none of a kind: `dense`,
nothing evicted, all read.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..spec import read, write
from .akvq import AKVQConfig
from .base import Policy, Selector, Store
from .dense import DenseConfig
from .h2o import H2O
from .lookm import LookM
from .packed import PackedConfig
from .paged import PagedConfig
from .quest import Quest
from .snapkv import SnapKV
from .split import DuoAttention
from .streaming import StreamingLLM
from .vidkv import VidKVConfig
from .zipvl import ZipVLConfig

STORES: dict[str, Any] = {
    "dense": DenseConfig(),
    "paged": PagedConfig(),
    "int8": PackedConfig(keys=8, values=8),
    "int4": PackedConfig(keys=4, values=4),
    "int2": PackedConfig(keys=2, values=2),
    "zipvl": ZipVLConfig(),
    "akvq-vl": AKVQConfig(),
    "vidkv": VidKVConfig(),
}
POLICIES: dict[str, type] = {
    "streaming": StreamingLLM,
    "snapkv": SnapKV,
    "h2o": H2O,
    "look-m": LookM,
}
SELECTORS: dict[str, type] = {"quest": Quest}
DUO: dict[str, type] = {"duo": DuoAttention}
PARTS = {"store": STORES, "policy": POLICIES, "selector": SELECTORS, "duo": DUO}  # fields of KVSpec


class StoreConfig(Protocol):
    """Settings of a store: a frozen dataclass."""

    def make(self, sinks: int = 0) -> Store:
        """A store of one layer that is empty and never packs the first `sinks` columns."""
        ...


@dataclass(frozen=True)
class KVSpec:
    """A KV cache in settings.

    Attributes:
        store: what keeps the columns.
        policy: what evicts them.
        selector: what chooses those that a decode step reads.
        duo: which heads keep every token.

    Raises:
        ValueError: parts that don't work together.
    """

    store: StoreConfig = field(default_factory=DenseConfig)
    policy: Policy | None = None
    selector: Selector | None = None
    duo: DuoAttention | None = None

    def __post_init__(self) -> None:
        has_pages = isinstance(self.store, PagedConfig) or (
            isinstance(self.store, PackedConfig) and self.store.has_pages
        )
        if self.selector is not None and not has_pages:
            raise ValueError(
                f"quest reads pages, which {write(self.store, STORES)} has not; accepted: paged, or packed keys per "
                "channel and values per token that are not rotated"
            )
        for name in ("policy", "selector"):
            part = getattr(self, name)
            if self.duo is not None and part is not None:
                raise ValueError(f"{name} is {write(part, PARTS[name])}, next to duo; accepted: duo and a store")

    @property
    def needs_visual(self) -> bool:
        """Whether it must be told which tokens are visual."""
        return any(getattr(part, "needs_visual", False) for part in (self.store, self.policy))


def parse_kv(text: str) -> KVSpec:
    """The settings that a text means.

    Raises:
        ValueError: a part, field or value does not exist, there are two of a kind, or they don't work together; the
            message says what is accepted.
    """
    given: dict[str, Any] = {}
    kinds = {name: kind for kind, named in PARTS.items() for name in named}
    every = {name: settings for named in PARTS.values() for name, settings in named.items()}
    for part in text.split("+"):
        settings = read(part, every, "kv")
        kind = kinds[part.strip().partition(":")[0].strip().lower()]
        if kind in given:
            raise ValueError(f"kv is {text!r}, with two of {', '.join(PARTS[kind])}; accepted: one of them")
        given[kind] = settings
    if "selector" in given:
        given.setdefault("store", PagedConfig())
    return KVSpec(**given)


def kv_text(spec: KVSpec) -> str:
    """The text, with every field, that `parse_kv` makes it from."""
    parts = {kind: getattr(spec, kind) for kind in ("duo", "policy", "selector", "store")}
    return "+".join(write(part, PARTS[kind]) for kind, part in parts.items() if part is not None)
