"""Keys and values as they are, in buffers that are allocated ahead."""

from dataclasses import dataclass

import torch

from .base import Query, Store


@dataclass(frozen=True)
class DenseConfig:
    """Keys and values as they are."""

    def make(self, sinks: int = 0) -> "Dense":
        return Dense()


class Dense(Store):
    """Buffers that double when they are full; a prompt's keys and values are copied once, and each new token's.

    Attributes:
        growth: by which part of them they grow instead, one in so many.
        keys, values: [batch, kv_heads, columns, head_dim], views of the buffers.
    """

    growth = 1

    def __init__(self) -> None:
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # [batch, kv_heads, capacity, head_dim]
        self.columns = 0

    @property
    def keys(self) -> torch.Tensor:
        return self._view(0)

    @property
    def values(self) -> torch.Tensor:
        return self._view(1)

    def _view(self, which: int) -> torch.Tensor:
        assert self.buffers is not None
        return self.buffers[which][:, :, : self.columns]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.columns + keys.shape[2]
        if self.buffers is None:
            self.buffers = (keys.clone(), values.clone())  # not theirs: a projection's output may be a part of more
        else:
            if end > self.buffers[0].shape[2]:
                capacity = self.buffers[0].shape[2]
                self._grow(max(end, capacity + max(1, capacity // self.growth)))
            for buffer, new in zip(self.buffers, (keys, values), strict=True):
                buffer[:, :, self.columns : end] = new
        self.columns = end

    def _grow(self, capacity: int) -> None:
        assert self.buffers is not None
        grown = []
        for buffer in self.buffers:
            batch, heads, _, width = buffer.shape
            more = buffer.new_empty(batch, heads, capacity, width)
            more[:, :, : self.columns] = buffer[:, :, : self.columns]
            grown.append(more)
        self.buffers = (grown[0], grown[1])

    def attend(self, query: Query) -> torch.Tensor:
        return query.own(self.keys, self.values)

    def dense(self, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        stop = self.columns if stop is None else stop
        return self.keys[:, :, start:stop], self.values[:, :, start:stop]

    def select(self, index: torch.Tensor, start: int = 0) -> None:
        assert self.buffers is not None
        kept = []
        for buffer in self.buffers:
            chosen = index[..., None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            kept.append(torch.cat([buffer[:, :, :start], buffer.gather(2, chosen)], dim=2))
        self.buffers, self.columns = (kept[0], kept[1]), start + index.shape[2]

    def replace(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[:, :, start : start + keys.shape[2]] = keys
        self.values[:, :, start : start + values.shape[2]] = values

    def crop(self, columns: int) -> None:
        self.columns -= columns

    def rows(self, index: torch.Tensor) -> None:
        assert self.buffers is not None
        self.buffers = (self.buffers[0][index], self.buffers[1][index])

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers or ())
