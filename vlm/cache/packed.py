"""Keys and values as codes of a few bits, all but the first and the latest tokens'.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (ICML 2024), https://arxiv.org/abs/2402.02750, section 3:
keys per channel in groups of tokens, values per token, the latest tokens as they are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from ...kernels.packing import CODES_PER_BYTE, PackedKeys, PackedValues, levels
from ...kernels.page_attention import packed_page_attention
from .bank import Bank, Format, Rating, States, UniformBank, rows
from .base import Query, Seen, Store
from .rotation import rotated


def check_window(group: int, residual: int, sink: int) -> None:
    """Raises ValueError where a setting that all packed stores have is out of range."""
    for name, value, least in (("group", group, 1), ("residual", residual, 0), ("sink", sink, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; accepted: at least {least}")


def check_bits(**bits: float) -> None:
    """Raises ValueError where there are no codes of so many bits."""
    for name, value in bits.items():
        if value not in CODES_PER_BYTE:
            raise ValueError(f"{name} is {value}; accepted: {', '.join(map(str, CODES_PER_BYTE))} bits")


@dataclass(frozen=True)
class PackedConfig:
    """Settings of a packed store.

    Attributes:
        keys, values: bits of a code: 8, 4, 2, 1.58 or 1.
        group: tokens that share a scale where it is a channel's; so many are packed at a time.
        residual: latest tokens in full precision; there are from `residual` to `residual + group - 1` of them.
        sink: first tokens in full precision; a policy that keeps sinks makes them at least as many.
        keys_per, values_per: what has a scale of its own.
        hadamard: whether heads are rotated; head_dim must be a power of two.

    Raises:
        ValueError: a field is out of range.
    """

    keys: int | float = 4
    values: int | float = 4
    group: int = 64
    residual: int = 128
    sink: int = 0
    keys_per: Literal["channel", "token"] = "channel"
    values_per: Literal["channel", "token"] = "token"
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_bits(keys=self.keys, values=self.values)
        check_window(self.group, self.residual, self.sink)

    @property
    def has_pages(self) -> bool:
        """Whether groups of keys are pages that Quest can read."""
        return self.keys_per == "channel" and self.values_per == "token" and not self.hadamard

    def make(self, sinks: int = 0) -> "Packed":
        keys = Format(self.keys, self.keys_per, self.group)
        values = Format(self.values, self.values_per, self.group)
        return Packed(UniformBank(keys, values), self.residual, max(sinks, self.sink), self.hadamard)


class Packed(Store):
    """Columns [sinks][packed][latest]: the packed ones are in a bank, the others in one buffer, sinks first.

    Nothing is packed before there are `sink + residual + group` columns.

    Args:
        bank: that is empty yet.
        residual, sink, hadamard: as in `PackedConfig`.
        rate: which tokens of a prompt matter, for a bank that asks for it.
    """

    def __init__(
        self,
        bank: Bank,
        residual: int,
        sink: int = 0,
        hadamard: bool = False,
        rate: Callable[[Seen], Rating] | None = None,
    ):
        self.bank, self.residual, self.sink, self.hadamard, self.rate = bank, residual, sink, hadamard, rate
        self.group = bank.group
        self.buffers: States | None = None  # [batch, kv_heads, at least `full`, head_dim]
        self.is_lent = False  # the buffers are the model's own keys and values, not to be written into
        self.full = 0  # columns in full precision
        self.sinks = 0  # of these, those before the packed ones; all of them are after it while nothing is packed

    @property
    def packed(self) -> int:
        """How many columns are packed."""
        return self.bank.tokens

    @property
    def packed_end(self) -> int:
        """The first column after them."""
        return self.sinks + self.packed

    def _full(self, start: int = 0, stop: int | None = None) -> States:
        """Columns in full precision, counted without those that are packed; rotated."""
        assert self.buffers is not None
        stop = self.full if stop is None else stop
        return self.buffers[0][:, :, start:stop], self.buffers[1][:, :, start:stop]

    # A pass: append, attend, select, settle.

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.full + keys.shape[2]
        if self.hadamard:
            keys, values = rotated(keys), rotated(values)
        if self.buffers is None:
            self.buffers, self.is_lent = (keys, values), not self.hadamard
        elif end > self.buffers[0].shape[2] or self.is_lent:
            old = self._full()
            self.buffers = (torch.cat([old[0], keys], dim=2), torch.cat([old[1], values], dim=2))
            self.is_lent = False
        else:
            for buffer, new in zip(self.buffers, (keys, values), strict=True):
                buffer[:, :, self.full : end] = new
        self.columns += end - self.full
        self.full = end

    def attend(self, query: Query) -> torch.Tensor:
        if not self.packed:
            return query.own(*self.dense())
        return self.attend_part(query)[0].to(query.states.dtype)

    def attend_part(self, query: Query) -> tuple[torch.Tensor, torch.Tensor]:
        """As `packed_attention`, where other stores hold the rest of the columns; something is packed."""
        states = rotated(query.states) if self.hadamard else query.states
        out, lse = self.bank.attend(states, *self._full(), query.scaling, *self._masks(query))
        return self._back(out, out.dtype), lse

    def _masks(self, query: Query) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask of the packed columns and that of the others."""
        if query.mask is None:
            return None, None
        before, packed, after = query.mask.tensor_split((self.sinks, self.packed_end), dim=-1)
        return packed, torch.cat([before, after], dim=-1)

    def settle(self, look: Callable[[], Seen]) -> None:
        """Packs whole groups of the oldest tokens after the sinks, so that `residual` to that and a group are left."""
        sinks = self.sinks if self.packed else self.sink
        ready = max(self.full - sinks - self.residual, 0) // self.group * self.group
        capacity = sinks + self.residual + self.group
        assert self.buffers is not None
        if ready:
            self.sinks = sinks
            rating = None
            if self.rate is not None:
                seen = look()
                if seen.is_prefill:
                    rated = self.rate(seen)
                    part = slice(self.packed_end, self.packed_end + ready)
                    rating = Rating(rated.scores[:, :, part], rated.salient[:, :, part])
            self.bank.append(*self._full(sinks, sinks + ready), rating)
        elif self.buffers[0].shape[2] == capacity and not self.is_lent:
            return
        kept = (self._full(0, sinks), self._full(sinks + ready))
        self.full -= ready
        self._hold([torch.cat([kept[0][which], kept[1][which]], dim=2) for which in range(2)], capacity)

    def _hold(self, states: Iterable[torch.Tensor], capacity: int = 0) -> None:
        """Columns in full precision into new buffers, or the old ones where they have that capacity."""
        buffers = []
        for which, part in enumerate(states):
            batch, heads, columns, width = part.shape
            buffer = None if self.buffers is None or self.is_lent else self.buffers[which]
            if buffer is None or buffer.shape[:3] != (batch, heads, capacity):
                buffer = part.new_empty(batch, heads, max(capacity, columns), width)
            buffer[:, :, :columns] = part
            buffers.append(buffer)
        self.buffers, self.is_lent = (buffers[0], buffers[1]), False

    # What policies and the layer ask for.

    def dense(self, start: int = 0, stop: int | None = None) -> States:
        stop = self.columns if stop is None else stop
        first, last = max(start, self.sinks), min(stop, self.packed_end)
        parts = [self._full(start, min(stop, self.sinks))] if start < self.sinks else []
        if first < last:
            parts.append(self.bank.dense(first - self.sinks, last - self.sinks))
        if stop > self.packed_end or not parts:
            parts.append(self._full(max(start, self.packed_end) - self.packed, stop - self.packed))
        dtype = self._full()[0].dtype
        keys, values = (joined([part[which].to(dtype) for part in parts]) for which in range(2))
        return self._back(keys, dtype), self._back(values, dtype)

    def _back(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (rotated(states) if self.hadamard else states).to(dtype)

    def select(self, index: torch.Tensor, start: int = 0) -> None:
        """As the contract says; tokens that stay packed are packed anew where their group does not stay whole.

        So their errors add up, unless whole groups go. What is left of the last group goes back to full precision.
        """
        kept = torch.arange(start, device=index.device).expand(*index.shape[:2], -1)
        index = torch.cat([kept, index], dim=2)
        self.columns, end = index.shape[2], self.packed_end
        if not self.packed:
            self._hold(self._take(index))
            self.full = self.columns
            return
        sinks = int((index < self.sinks).all(0).all(0).cumprod(0).sum())
        latest = int((index >= end).all(0).all(0).flip(0).cumprod(0).sum())
        latest += (self.columns - sinks - latest) % self.group
        packed = index[:, :, sinks : self.columns - latest]
        bank = self.bank.selected(packed - self.sinks, lambda some: self._take(packed.gather(2, some)))
        full = self._take(torch.cat([index[:, :, :sinks], index[:, :, self.columns - latest :]], dim=2))
        dtype = self._full()[0].dtype
        self._hold([states.to(dtype) for states in full])
        self.bank, self.sinks, self.full = bank, sinks if bank.tokens else 0, sinks + latest

    def _take(self, index: torch.Tensor) -> States:
        """Columns by number, int64 [batch, 1 | kv_heads, columns]; rotated, those that were packed widened."""
        inside = (index >= self.sinks) & (index < self.packed_end)
        full = torch.where(index < self.sinks, index, index - self.packed).clamp(0, self.full - 1)
        taken = [rows(states, full) for states in self._full()]
        if self.packed:
            packed = self.bank.take((index - self.sinks).clamp(0, self.packed - 1))
            taken = [torch.where(inside[..., None], *pair) for pair in zip(packed, taken, strict=True)]
        return taken[0], taken[1]

    def replace(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        stop = start + keys.shape[2]
        if stop > self.sinks and start < self.packed_end and self.packed:
            raise ValueError(
                f"columns {start} to {stop} are to be replaced, but {self.sinks} to {self.packed_end} are packed"
            )
        if start >= self.packed_end:
            start, stop = start - self.packed, stop - self.packed
        if self.hadamard:
            keys, values = rotated(keys), rotated(values)
        if self.is_lent:
            self._hold(self._full())
        for states, new in zip(self._full(start, stop), (keys, values), strict=True):
            states.copy_(new)

    @property
    def croppable(self) -> int:
        return self.full - self.sinks if self.packed else self.full

    def crop(self, columns: int) -> None:
        self.full -= columns
        self.columns -= columns

    def rows(self, index: torch.Tensor) -> None:
        assert self.buffers is not None
        self.buffers = (self.buffers[0][index], self.buffers[1][index])
        self.is_lent = False
        self.bank.rows(index)

    @property
    def nbytes(self) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        return sum(storages.values())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [*(self.buffers or ()), *self.bank.tensors]

    # Quest's pages are the groups of packed keys.

    @property
    def page(self) -> int:
        return self.group

    @property
    def paged_from(self) -> int:
        return self.sinks

    def page_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest key of each packed group in each channel, each [batch, kv_heads, pages, head_dim]."""
        if not self.packed:
            nothing = self._full(0, 0)[0]
            return nothing, nothing
        assert isinstance(self.bank, UniformBank)
        keys, _ = self.bank.parts
        return keys.zero, torch.add(keys.zero, keys.scale, alpha=levels(keys.bits))

    def attend_pages(self, query: Query, pages: torch.Tensor) -> torch.Tensor:
        """Attention of single queries over some groups, int64 [batch, kv_heads, chosen], and all that is not packed."""
        assert isinstance(self.bank, UniformBank)
        keys, values = self.bank.parts
        assert isinstance(keys, PackedKeys) and isinstance(values, PackedValues)
        out, _ = packed_page_attention(
            query.states, keys, values, *self._full(), pages, query.scaling, *self._masks(query)
        )
        return out.to(query.states.dtype)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Columns one after the other; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
