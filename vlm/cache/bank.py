"""The packed tokens of a layer: buffers that grow, attention over them, and what is left of them after an eviction."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch

from ...kernels.packed_attention import packed_attention
from ...kernels.packing import (
    PackedKeys,
    PackedValues,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)

Part = PackedKeys | PackedValues
States = tuple[torch.Tensor, torch.Tensor]  # keys and values, each [batch, kv_heads, tokens, head_dim]
TOKENS_AT_ONCE = 1 << 11  # bounds the memory: tokens that are widened at a time


@dataclass(frozen=True)
class Rating:
    """How much tokens matter, for stores that keep some of them in more bits than others.

    Attributes:
        scores: [batch, 1 | kv_heads, columns].
        salient: bool of this shape, which of them should have more bits.
    """

    scores: torch.Tensor
    salient: torch.Tensor


@dataclass(frozen=True)
class Format:
    """How keys or values are packed.

    Attributes:
        bits: of a code.
        per: what has a scale of its own: a channel in each group of tokens, or a token.
        group: tokens of a group.
    """

    bits: float
    per: Literal["channel", "token"]
    group: int

    def pack(self, states: torch.Tensor) -> Part:
        """[batch, kv_heads, tokens, head_dim], a multiple of the group."""
        return pack_keys(states, self.bits, self.group) if self.per == "channel" else pack_values(states, self.bits)


class Bank(ABC):
    """Packed tokens in the order in which they came.

    Attributes:
        tokens: that there are.
        group: a multiple of which is added at a time.
    """

    tokens = 0
    group: int

    @property
    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""

    @abstractmethod
    def append(self, keys: torch.Tensor, values: torch.Tensor, rating: Rating | None = None) -> None:
        """Packs a multiple of `group` tokens, [batch, kv_heads, tokens, head_dim]; `rating` is about these."""

    @abstractmethod
    def attend(
        self,
        states: torch.Tensor,
        dense_keys: torch.Tensor,
        dense_values: torch.Tensor,
        scaling: float,
        packed_mask: torch.Tensor | None,
        dense_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `packed_attention`, over the bank and some dense columns."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> States:
        """Keys and values of some tokens, in float32."""

    @abstractmethod
    def take(self, index: torch.Tensor) -> States:
        """As `dense`, of tokens by number, int64 [batch, 1 | kv_heads, tokens]."""

    @abstractmethod
    def selected(self, index: torch.Tensor, take: Callable[[torch.Tensor], States]) -> "Bank":
        """A bank with other tokens, a multiple of `group`, packed alike; those packed as they were if they can be.

        Args:
            index: int64 [batch, 1 | kv_heads, tokens], their numbers in this bank; others where they aren't in it.
            take: gives them, in full precision, by their place in `index`: int64 [batch, 1 | kv_heads, some].
        """

    @abstractmethod
    def rows(self, index: torch.Tensor) -> None:
        """Keeps these rows of the batch, int64 [rows]."""


class UniformBank(Bank):
    """Tokens that are all packed alike; the buffers grow by a 64th, by a group at least.

    Args:
        formats: of the parts that `divide` gives, with groups of the same size.
    """

    def __init__(self, *formats: Format):
        self.formats, self.group = formats, formats[0].group
        self.buffers: list[Part] = []

    def divide(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is packed, each in a format of its own."""
        return keys, values

    def join(self, parts: list[torch.Tensor]) -> States:
        """Undoes `divide`."""
        keys, values = parts
        return keys, values

    def empty(self) -> Self:
        """A bank that packs as this one, without its tokens."""
        return type(self)(*self.formats)

    @property
    def parts(self) -> list[Part]:
        """What is packed; views of the buffers."""
        return [buffer.blocks(0, self.tokens) for buffer in self.buffers]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for buffer in self.buffers for tensor in buffer.tensors]

    def _pack(self, keys: torch.Tensor, values: torch.Tensor) -> list[Part]:
        return [format.pack(part) for format, part in zip(self.formats, self.divide(keys, values), strict=True)]

    def _unpack(self, parts: Iterable[Part]) -> States:
        return self.join([unpack(part) for part in parts])

    def append(self, keys: torch.Tensor, values: torch.Tensor, rating: Rating | None = None) -> None:
        end = self.tokens + keys.shape[2]
        new = self._pack(keys, values)
        if not self.buffers:
            self.buffers = new
        else:
            capacity = self.buffers[0].tokens
            if end > capacity:
                self._grow(max(end, capacity + max(1, capacity // self.group // 64) * self.group))
            for buffer, part in zip(self.buffers, new, strict=True):
                write(buffer.blocks(self.tokens, end), part)
        self.tokens = end

    def _grow(self, capacity: int) -> None:
        grown = []
        for buffer, part in zip(self.buffers, self.parts, strict=True):
            more = resized(buffer, capacity)
            write(more.blocks(0, self.tokens), part)
            grown.append(more)
        self.buffers = grown

    def attend(
        self,
        states: torch.Tensor,
        dense_keys: torch.Tensor,
        dense_values: torch.Tensor,
        scaling: float,
        packed_mask: torch.Tensor | None,
        dense_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.parts
        return packed_attention(states, keys, values, dense_keys, dense_values, scaling, packed_mask, dense_mask)

    def dense(self, start: int, stop: int) -> States:
        first, last = start // self.group * self.group, -(-stop // self.group) * self.group
        block = self._unpack([part.blocks(first, last) for part in self.parts])
        return block[0][:, :, start - first : stop - first], block[1][:, :, start - first : stop - first]

    def take(self, index: torch.Tensor) -> States:
        return self._unpack([taken(part, index) for part in self.parts])

    def selected(self, index: torch.Tensor, take: Callable[[torch.Tensor], States]) -> Self:
        bank, tokens = self.empty(), index.shape[2]
        if not tokens:
            return bank
        step = max(TOKENS_AT_ONCE // self.group, 1) * self.group
        places = torch.arange(tokens, device=index.device).expand_as(index)
        for start in range(0, tokens, step):
            some = slice(start, start + step)
            block = bank._pack(*take(places[:, :, some]))
            if self.tokens:
                for old, new in zip(self.parts, block, strict=True):
                    keep_exact(old, new, index[:, :, some])
            if not bank.buffers:
                bank.buffers = [resized(part, tokens) for part in block]
            for buffer, new in zip(bank.buffers, block, strict=True):
                write(buffer.blocks(start, min(start + step, tokens)), new)
        bank.tokens = tokens
        return bank

    def rows(self, index: torch.Tensor) -> None:
        self.buffers = [with_tensors(buffer, [part[index] for part in buffer.tensors]) for buffer in self.buffers]


# Packed tokens of either kind.


def unpack(packed: Part) -> torch.Tensor:
    return unpack_keys(packed) if isinstance(packed, PackedKeys) else unpack_values(packed)


def with_tensors(packed: Part, tensors: Iterable[torch.Tensor], **changed: Any) -> Part:
    codes, scale, zero = tensors
    return replace(packed, codes=codes, scale=scale, zero=zero, **changed)


def resized(packed: Part, tokens: int) -> Part:
    """Empty buffers for so many tokens."""
    return with_tensors(
        packed,
        (
            part.new_empty(*part.shape[:2], part.shape[2] * tokens // packed.tokens, *part.shape[3:])
            for part in packed.tensors
        ),
    )


def write(buffer: Part, packed: Part) -> None:
    for into, part in zip(buffer.tensors, packed.tensors, strict=True):
        into.copy_(part)


def rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [batch, kv_heads, rows, ...] of `states` at index [batch, 1 | kv_heads, rows]."""
    index = index.expand(-1, states.shape[1], -1)
    return states.gather(2, index if states.ndim == 3 else index[..., None].expand(-1, -1, -1, states.shape[3]))


def taken(packed: Part, index: torch.Tensor) -> Part:
    """Some tokens, each with a scale of its own."""
    if not isinstance(packed, PackedKeys):
        return with_tensors(packed, (rows(part, index) for part in packed.tensors))
    group = index // packed.group
    return with_tensors(
        packed, (rows(packed.codes, index), rows(packed.scale, group), rows(packed.zero, group)), group=1
    )


def keep_exact(old: Part, new: Part, index: torch.Tensor) -> None:
    """Copies into `new` what was packed so before: whole groups where a scale is a channel's, else single tokens.

    Args:
        old: what there was.
        new: packed anew.
        index: int64 [batch, 1 | kv_heads, tokens], where in `old` they were; others where they weren't.
    """
    inside = (index >= 0) & (index < old.tokens)
    places = index.clamp(0, old.tokens - 1)
    before = taken(old, places)
    if isinstance(old, PackedKeys):
        places, inside = (part.unflatten(2, (-1, old.group)) for part in (places, inside))
        first = places[..., 0]
        in_order = places == first[..., None] + torch.arange(old.group, device=index.device)
        whole = (in_order & inside).all(-1) & (first % old.group == 0)
        group = first // old.group
        before = with_tensors(before, (before.codes, rows(old.scale, group), rows(old.zero, group)))
        masks = (whole.repeat_interleave(old.group, 2)[..., None], whole[..., None], whole[..., None])
    else:
        masks = (inside[..., None], inside, inside)
    for mask, was, part in zip(masks, before.tensors, new.tensors, strict=True):
        part.copy_(torch.where(mask, was, part))
