"""Some tokens packed in more bits than others: what ZipVL, AKVQ-VL and VidKV have in common.

Attention does not mind the order of its columns, so tokens of either kind are packed together, each kind in a bank of
its own, and the attention over the two is merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch

from ...kernels.packed_attention import merge_attention
from .bank import Bank, Format, Rating, States, UniformBank, rows
from .base import Seen
from .packed import Packed, check_bits, check_window
from .scores import received_attention


@dataclass(frozen=True)
class MixedConfig(ABC):
    """Settings of a packed store in which salient tokens of a prompt have more bits than others.

    Attributes:
        high, low: bits of salient tokens and of the others.
        probes: latest tokens of a prompt whose attention counts.
        group, residual, sink, hadamard: as in `PackedConfig`.

    Raises:
        ValueError: a field is out of range.
    """

    high: int | float = 4
    low: int | float = 2
    probes: int = 64
    group: int = 64
    residual: int = 128
    sink: int = 0
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_bits(high=self.high, low=self.low)
        check_window(self.group, self.residual, self.sink)
        check_probes(self.probes)

    @abstractmethod
    def rate(self, seen: Seen) -> Rating:
        """Which tokens are salient."""

    def make(self, sinks: int = 0) -> Packed:
        high, low = (
            UniformBank(Format(bits, "channel", self.group), Format(bits, "token", self.group))
            for bits in (self.high, self.low)
        )
        return Packed(MixedBank(high, low), self.residual, max(sinks, self.sink), self.hadamard, self.rate)


def check_probes(probes: int) -> None:
    """Raises ValueError where nothing could be rated."""
    if probes < 1:
        raise ValueError(f"probes is {probes}; accepted: at least 1")


def check_fraction(**fractions: float) -> None:
    """Raises ValueError where one is out of range."""
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; accepted: a fraction from 0 to 1")


def attention_of_probes(seen: Seen, probes: int) -> torch.Tensor:
    """What columns receive from a prompt's last tokens: [batch, 1, columns], or for each KV head where heads differ."""
    received = received_attention(seen, min(probes, seen.store.columns))
    return received if seen.slots.shape[1] > 1 else received.mean(1, keepdim=True)


class MixedBank(Bank):
    """Salient tokens in one bank, the others in a second.

    Of each prompt as many are salient, in whole groups, as in the row and head with the most of them. Tokens that
    nobody rated are salient: those that the model has generated.

    Args:
        high: for salient tokens.
        low: for the others, with groups of the same size.
    """

    def __init__(self, high: UniformBank, low: UniformBank):
        self.banks, self.group = (high, low), high.group
        self.numbers: list[torch.Tensor] = []  # of the tokens of each bank: int32 [batch, 1 | kv_heads, tokens]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.numbers, *(tensor for bank in self.banks for tensor in bank.tensors)]

    def append(self, keys: torch.Tensor, values: torch.Tensor, rating: Rating | None = None) -> None:
        tokens = keys.shape[2]
        if rating is None:
            everything = torch.arange(tokens, device=keys.device).expand(len(keys), 1, -1)
            split = (everything, everything[:, :, :0])
        else:
            split = self._split(rating.salient, rating.scores)
        for bank, part in zip(self.banks, split, strict=True):
            if part.shape[2]:
                bank.append(rows(keys, part), rows(values, part))
        new = [(part + self.tokens).to(torch.int32) for part in split]
        self.numbers = [_joined(*pair) for pair in zip(self.numbers, new, strict=True)] if self.numbers else new
        self.tokens += tokens

    def _split(self, salient: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the salient and of the other tokens, ascending; the scores say which fill up the last group."""
        tokens = salient.shape[2]
        count = min(-(-int(salient.sum(-1).max()) // self.group) * self.group, tokens)
        chosen = scores.float().masked_fill(salient, torch.inf).topk(count, dim=-1).indices
        order = torch.ones_like(salient, dtype=torch.uint8).scatter_(2, chosen, 0).argsort(dim=-1, stable=True)
        return order[:, :, :count], order[:, :, count:]

    def attend(
        self,
        states: torch.Tensor,
        dense_keys: torch.Tensor,
        dense_values: torch.Tensor,
        scaling: float,
        packed_mask: torch.Tensor | None,
        dense_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        dense = (dense_keys, dense_values, dense_mask)
        for bank, numbers in zip(self.banks, self.numbers, strict=True):
            if bank.tokens:
                mask = None if packed_mask is None else _columns(packed_mask, numbers)
                found.append(bank.attend(states, dense[0], dense[1], scaling, mask, dense[2]))
                dense = (dense_keys[:, :, :0], dense_values[:, :, :0], None)
        return found[0] if len(found) == 1 else merge_attention(*zip(*found, strict=True))

    @property
    def _places(self) -> torch.Tensor:
        """Where each token is, int64 [batch, 1 | kv_heads, tokens]: in the first bank, or after its last one."""
        numbers = torch.cat(self.numbers, dim=2).long()
        return torch.empty_like(numbers).scatter_(
            2, numbers, torch.arange(self.tokens, device=numbers.device).expand_as(numbers)
        )

    def dense(self, start: int, stop: int) -> States:
        numbers = self.numbers[0]
        return self.take(torch.arange(start, stop, device=numbers.device).expand(len(numbers), 1, -1))

    def take(self, index: torch.Tensor) -> States:
        high, low = self.banks
        places = _gathered(self._places, index)
        if not low.tokens:
            return high.take(places)
        if not high.tokens:
            return low.take(places)
        salient = (places < high.tokens)[..., None]
        taken = zip(
            high.take(places.clamp(max=high.tokens - 1)), low.take((places - high.tokens).clamp(min=0)), strict=True
        )
        keys, values = (torch.where(salient, *pair) for pair in taken)
        return keys, values

    def selected(self, index: torch.Tensor, take: Callable[[torch.Tensor], States]) -> Self:
        high = self.banks[0].tokens
        inside = (index >= 0) & (index < self.tokens)
        places = _gathered(self._places, index.clamp(0, self.tokens - 1))
        salient = ~inside | (places < high)
        places = torch.where(inside, places, -1)

        def of_part(part: torch.Tensor, some: torch.Tensor) -> States:
            return take(part.gather(2, some))

        split = self._split(salient, torch.zeros_like(salient, dtype=torch.float32))
        banks = [
            bank.selected(places.gather(2, part) - start, partial(of_part, part))
            for bank, part, start in zip(self.banks, split, (0, high), strict=True)
        ]
        mixed = type(self)(banks[0], banks[1])
        mixed.numbers = [part.to(torch.int32) for part in split]
        mixed.tokens = index.shape[2]
        return mixed

    def rows(self, index: torch.Tensor) -> None:
        self.numbers = [numbers[index] for numbers in self.numbers]
        for bank in self.banks:
            bank.rows(index)


def _joined(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    heads = max(old.shape[1], new.shape[1])
    return torch.cat([old.expand(-1, heads, -1), new.expand(-1, heads, -1)], dim=2)


def _gathered(places: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    heads = max(places.shape[1], index.shape[1])
    return places.expand(-1, heads, -1).gather(2, index.expand(-1, heads, -1))


def _columns(mask: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Some columns of a mask [batch, 1 | kv_heads, 1 | queries, columns]."""
    heads = max(mask.shape[1], numbers.shape[1])
    index = numbers.long()[:, :, None].expand(-1, heads, mask.shape[2], -1)
    return mask.expand(-1, heads, -1, -1).gather(3, index)
