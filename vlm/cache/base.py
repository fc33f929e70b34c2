"""What the parts of a KV cache are: stores keep columns, policies evict them, selectors choose which are read.

A column is one token's key and value in every KV head of a layer. `layer.KVLayer` joins the parts; the order in a pass
is: append, attend, evict, pack.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Query:
    """Queries of one pass over all columns of a store, those that it just appended among them.

    Attributes:
        states: [batch, heads, queries, head_dim], after RoPE; heads of a group share a KV head, in order.
        scaling: of q·k.
        mask: bool [batch, 1 | kv_heads, 1 | queries, columns], True where seen; None where all is seen.
        own: the model's own attention over dense (keys, values) [batch, kv_heads, columns, head_dim] of all columns,
            masked as it must be; gives [batch, heads, queries, head_dim].
    """

    states: torch.Tensor
    scaling: float
    mask: torch.Tensor | None
    own: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Store(ABC):
    """How keys and values of one layer are kept.

    Attributes:
        columns: that are stored, holes included.
    """

    columns: int = 0

    @property
    def packed(self) -> int:
        """How many of the columns are quantised."""
        return 0

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds columns, [batch, kv_heads, tokens, head_dim], as they are; they may be kept without a copy."""

    @abstractmethod
    def attend(self, query: Query) -> torch.Tensor:
        """Attention over all columns, [batch, heads, queries, head_dim] in the dtype of the queries."""

    def settle(self, look: "Callable[[], Seen]") -> None:  # noqa: B027 - most pack nothing
        """Ends a pass: packs what is to be packed.

        Args:
            look: tells what the pass saw, with columns and slots as they are after the eviction; for stores that
                rate columns.
        """

    @abstractmethod
    def dense(self, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of columns, dequantised, each [batch, kv_heads, columns, head_dim]; not to be held on to."""

    @abstractmethod
    def select(self, index: torch.Tensor, start: int = 0) -> None:
        """Keeps the columns before `start`, and of the others those of `index`.

        Args:
            index: int64 [batch, 1 | kv_heads, columns], ascending numbers of columns; any number where a hole is.
        """

    @abstractmethod
    def replace(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrites columns from `start` on, which are not packed yet (or are sinks, which never are)."""

    @property
    def croppable(self) -> int:
        """How many of the last columns can be removed; those that are packed with others can't."""
        return self.columns

    @abstractmethod
    def crop(self, columns: int) -> None:
        """Removes the last columns, `croppable` at most."""

    @abstractmethod
    def rows(self, index: torch.Tensor) -> None:
        """Keeps these rows of the batch, int64 [rows], some several times."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are allocated."""


@dataclass
class Seen:
    """What a policy sees of a pass, after its attention and before anything is packed.

    Attributes:
        query: [batch, heads, queries, head_dim], after RoPE.
        scaling: of q·k.
        new: columns that this pass appended; the store's last ones, in full precision.
        store: all columns.
        slots: int64 [batch, 1 | kv_heads, columns], each column's place in the whole sequence, -1 at holes.
        visual: bool [batch, length] on the device of the slots, which tokens of the whole sequence are visual; None
            where nobody told.
        scores: float32 [batch, kv_heads, columns before this pass], what the policy gave last; None at first.
        layer: number of the layer.
        frequencies: float [rotary width / 2], of RoPE, in radians a position; None where the decoder has none.
        memory: the policy's own, for this layer: tensors [batch, ...], which follow the rows of the batch.
    """

    query: torch.Tensor
    scaling: float
    new: int
    store: Store
    slots: torch.Tensor
    visual: torch.Tensor | None
    scores: torch.Tensor | None
    layer: int
    frequencies: torch.Tensor | None = None
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_prefill(self) -> bool:
        """Whether several tokens came at once."""
        return self.query.shape[2] > 1

    @property
    def first_new(self) -> int:
        return self.store.columns - self.new


@dataclass(frozen=True)
class Eviction:
    """What a policy decides.

    Attributes:
        keep: bool [batch, 1 | kv_heads, columns - start], False at columns to evict; None keeps all. Holes are evicted
            in any case.
        start: columns before it are kept, and not moved.
        keys, values: [batch, kv_heads, columns - start, head_dim], new content of those columns (merging); or None.
        scores: float32 [batch, kv_heads, columns], to be remembered, for all columns before the eviction.
    """

    keep: torch.Tensor | None = None
    start: int = 0
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class Policy(ABC):
    """What is evicted: a frozen dataclass whose fields are its parameters.

    Attributes:
        needs_visual: whether it must know which tokens are visual.
        evicts_in_decode: whether columns are evicted after each token, too.
    """

    needs_visual: ClassVar[bool] = False
    evicts_in_decode: ClassVar[bool] = False

    @abstractmethod
    def evict(self, seen: Seen) -> Eviction | None:
        """Called after each pass; None keeps all."""

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Which columns are seen in a prefill, besides what causality says; None: all.

        Args:
            queries: slots [batch, 1, queries, 1].
            keys: slots [batch, 1 | kv_heads, 1, columns], -1 at holes.
        """
        return None

    @property
    def sinks(self) -> int:
        """Of each row and head so many first tokens stand in the first columns, with the row's holes behind them.

        A store never packs these columns, so that they can be overwritten in decode, too (`Store.replace`).
        """
        return 0

    def check(self, decoder: Any) -> None:  # noqa: B027 - most work on all
        """Raises ValueError where it can't work on the decoder (the text model)."""


class Selector(ABC):
    """Which columns a decode step reads: a frozen dataclass whose fields are its parameters."""

    @abstractmethod
    def attend(self, store: Store, query: Query, layer: int) -> torch.Tensor:
        """Attention of single queries over what is selected, [batch, heads, 1, head_dim]."""
